"""Affine quantization of a weight: code = clamp(round(w / scale) + zero_point), w' = (code - zero_point) scale.

round is to nearest, or stochastic (stochastic.py), on the same grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..plans.affine import Affine
from ..plans.granular import check_bits
from .calibrate import choose_affine_grids, fitted_rows, squared_errors, whole_rows
from .contract import Each, PartCodes, PartShape
from .grid import Grids, GroupStats
from .ranged import grids_by_values
from .scales import check_scales
from .stochastic import StochasticGrids, stochastic_codes


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
    `layer`, for NaN, infinity or another dtype. A constant weight is represented exactly where a scale can be it.
    """
    scheme = scheme or Affine()
    check_bits(bits)
    rows, shape, grid = fitted_rows(weight, scheme, channel_axis, layer, partial(_grids, scheme, [bits]))
    check_scales(grid.scale, scheme.scale_dtype, layer)
    codes = _codes(rows, shape, grid, scheme).reshape(shape)
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
        rows = (rows - zero_point).float() * scale + 0.0  # no -0 of a negative scale
    limit = torch.finfo(quantized.dtype).max  # the last level may lie half a step beyond the range
    values = rows.float().clamp(-limit, limit).to(quantized.dtype).reshape(codes.shape)
    return from_channel_rows(values, quantized.codes.shape, quantized.channel_axis)


@dataclass(frozen=True)
class AffineQuantizer:
    """Quantizes under an affine scheme; see contract.py.

    A symbol is an asymmetric code counted from the zero point, or a symmetric one in two's complement, so that 0 stands
    for the weight 0: pruned weights are zeros, and the channels of a layer are alike, which an entropy coder lives on.
    """

    scheme: Affine

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> Grids | StochasticGrids:
        """One scale and zero point for each group, by the scheme's range rule."""
        grids, seed = _grids(self.scheme, bits, each, stats), self.scheme.stochastic
        return grids if seed is None else StochasticGrids(grids, seed)

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that `bits` can hold."""
        return dequantize(quantize(weight, bits, self.scheme, channel_axis=channel_axis, layer=layer))

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Symbols, scales and zero points."""
        one = quantize(weight, part.bits, self.scheme, channel_axis=part.channel_axis, layer=part.layer)
        rows, zero_points = part.rows(one.codes), one.grid.zero_point.astype(np.int16)
        symbols = (rows + 1) // 2 if part.bits == 1 else (rows - zero_points) & (2**part.bits - 1)
        kept = one.grid.zero_point.reshape(-1).astype(np.uint8) if part.zero_points else np.zeros(0, np.uint8)
        return PartCodes(part.symbols(symbols), one.grid.scale.reshape(-1), kept)

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """The weight again."""
        return dequantize(self.restored(codes, part, dtype))

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Which weights are 0."""
        zero: NDArray[np.bool_] = codes.symbols == 0
        return zero

    def restored(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> QuantizedTensor:
        """Codes and grid as `quantize` gives them."""
        rows = codes.symbols.reshape(part.groups, -1).astype(np.int16)
        zero_point = np.zeros((part.groups, 1), np.int32)
        if part.zero_points:
            zero_point = codes.zero_points.astype(np.int32).reshape(-1, 1)
        if part.bits == 1:
            rows = rows * 2 - 1
        elif self.scheme.symmetric:
            half = 2 ** (part.bits - 1)
            rows = (rows ^ half) - half
        else:
            rows = (rows + zero_point.astype(np.int16)) & (2**part.bits - 1)
        widths = np.array([part.bits], np.int64)
        grid = Grids(widths, self.scheme.symmetric, codes.tables.reshape(-1, 1), zero_point)
        return QuantizedTensor(part.tensor(rows), grid, self.scheme, part.channel_axis, dtype)


def _grids(scheme: Affine, bits: Sequence[int], each: Each, stats: GroupStats) -> Grids:
    if scheme.range in ("percentile", "kl"):
        return grids_by_values(whole_rows(each, scheme), stats, bits, scheme)
    return choose_affine_grids(stats, bits, scheme, squared_errors(each, scheme))


def _codes(rows: Tensor, channels: torch.Size, grid: Grids, scheme: Affine) -> Tensor:
    """Codes of rows, one for each group; channels: the shape of the rows that output channels are."""
    if scheme.stochastic is None or not rows.numel():
        return _encode(rows, grid)
    places = rows.reshape(channels) if scheme.granularity == "per_tensor" else rows
    return torch.from_numpy(stochastic_codes(places, grid, 0, scheme.stochastic)).to(rows.device)


def _encode(rows: Tensor, grid: Grids) -> Tensor:
    if grid.bits[0] == 1:
        return torch.where(rows < 0, -1, 1).to(torch.int16)
    if rows.numel() == 0:
        return rows.to(torch.int16)
    scale, zero_point = _columns(grid, rows.device)
    return torch.clamp(torch.round(rows / scale) + zero_point, int(grid.qmin[0]), int(grid.qmax[0])).to(torch.int16)


def _columns(grid: Grids, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(grid.scale).to(device), torch.from_numpy(grid.zero_point).to(device)
