"""Affine quantization of a weight: code = clamp(round(w / scale) + zero_point), w' = (code - zero_point) scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..plans.scheme import Affine, check_bits
from .calibrate import fitted_rows
from .grid import Grids


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and their grid.

    codes: int16, the weight's shape; grid: one scale and zero point per group, (groups, 1), groups ordered by
    output channel, then along the input; dtype: the weight's.
    """

    codes: Tensor
    grid: Grids
    scheme: Affine
    channel_axis: int
    dtype: torch.dtype


def quantize(
    weight: Tensor, bits: int, scheme: Affine | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> QuantizedTensor:
    """Codes of `weight` at 1 to 8 bits.

    weight: float32, float16 or bfloat16, any shape, any strides; `channel_axis` is its output axis.
    Raises SettingError for bits outside 1..8 or groups that do not divide the input, and WeightError, naming
    `layer`, for NaN, infinity or another dtype. A constant weight is represented exactly.
    """
    scheme = scheme or Affine()
    check_bits(bits)
    rows, shape, grid = fitted_rows(weight, bits, scheme, channel_axis, layer)
    assert isinstance(grid, Grids)
    codes = _encode(rows, grid).reshape(shape)
    return QuantizedTensor(
        from_channel_rows(codes, weight.shape, channel_axis), grid, scheme, channel_axis, weight.dtype
    )


def dequantize(quantized: QuantizedTensor) -> Tensor:
    """The weight (code - zero_point) * scale, computed in float32, in the original dtype and shape."""
    codes = channel_rows(quantized.codes, quantized.channel_axis)
    groups = quantized.grid.scale.shape[0]
    rows = codes.reshape(groups, -1) if codes.numel() else codes
    if rows.numel():
        scale, zero_point = _columns(quantized.grid, rows.device)
        rows = (rows - zero_point).float() * scale
    limit = torch.finfo(quantized.dtype).max  # the last level may lie half a step beyond the range
    values = rows.float().clamp(-limit, limit).to(quantized.dtype).reshape(codes.shape)
    return from_channel_rows(values, quantized.codes.shape, quantized.channel_axis)


def fake_quantize(
    weight: Tensor, bits: int, scheme: Affine | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> Tensor:
    """dequantize(quantize(weight)): the weight that `bits` can hold, in its own dtype and shape."""
    return dequantize(quantize(weight, bits, scheme, channel_axis=channel_axis, layer=layer))


def _encode(rows: Tensor, grid: Grids) -> Tensor:
    if grid.bits[0] == 1:
        return torch.where(rows < 0, -1, 1).to(torch.int16)
    if rows.numel() == 0:
        return rows.to(torch.int16)
    scale, zero_point = _columns(grid, rows.device)
    return torch.clamp(torch.round(rows / scale) + zero_point, int(grid.qmin[0]), int(grid.qmax[0])).to(torch.int16)


def _columns(grid: Grids, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(grid.scale).to(device), torch.from_numpy(grid.zero_point).to(device)
