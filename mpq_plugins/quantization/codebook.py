"""Codebook quantization of a weight (weight sharing): w' = c[code], c the 2^b centroids of its group.

Deep Compression (arXiv 1510.00149), sec. 3; how centroids are found is in kmeans.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.scheme import Codebook
from .calibrate import fitted_rows
from .grid import CodebookGrids
from .kmeans import edges


@dataclass(frozen=True)
class CodebookTensor:
    """Codes and the centroids they stand for.

    codes: int16, the weight's shape; grid: one codebook per group, ascending, groups ordered by output channel, then
    along the input; dtype: the weight's.
    """

    codes: Tensor
    grid: CodebookGrids
    scheme: Codebook
    channel_axis: int
    dtype: torch.dtype

    @property
    def centroids(self) -> Tensor:
        """(groups, 2^b), float32."""
        return torch.from_numpy(self.grid.centroids[0])


def quantize(
    weight: Tensor, bits: int, scheme: Codebook | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> CodebookTensor:
    """Codes of `weight` at 1 to 8 bits, each that of the nearest centroid.

    weight: float32, float16 or bfloat16, any shape, any strides; `channel_axis` is its output axis. A group of no more
    than 2^b different values is represented exactly, and a weight of 0 always is. Raises SettingError for bits outside
    1..8, more centroids than weights, or groups that do not divide the input, and WeightError, naming `layer`, for NaN,
    infinity or another dtype.
    """
    scheme = scheme or Codebook()
    try:
        scheme.check_bits(bits)
    except SettingError as error:
        raise SettingError(f"layer {layer!r}: {error}") from error
    scheme.check_part(
        bits, weight.shape or (1,), channel_axis, weight.shape[channel_axis] if weight.dim() else 1, layer
    )
    rows, shape, grid = fitted_rows(weight, bits, scheme, channel_axis, layer)
    assert isinstance(grid, CodebookGrids)
    codes = encode(rows, torch.from_numpy(grid.centroids[0]).to(rows.device)).reshape(shape)
    return CodebookTensor(
        from_channel_rows(codes, weight.shape, channel_axis), grid, scheme, channel_axis, weight.dtype
    )


def dequantize(quantized: CodebookTensor) -> Tensor:
    """The weight, in the original dtype and shape."""
    codes = channel_rows(quantized.codes, quantized.channel_axis)
    centroids = quantized.centroids.to(codes.device)
    rows = codes.reshape(centroids.shape[0], -1) if codes.numel() else codes
    values = (decode(rows, centroids) if rows.numel() else rows).to(quantized.dtype).reshape(codes.shape)
    return from_channel_rows(values, quantized.codes.shape, quantized.channel_axis)


def fake_quantize(
    weight: Tensor, bits: int, scheme: Codebook | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> Tensor:
    """dequantize(quantize(weight)): the weight that `bits` can hold, in its own dtype and shape."""
    return dequantize(quantize(weight, bits, scheme, channel_axis=channel_axis, layer=layer))


def encode(rows: Tensor, centroids: Tensor) -> Tensor:
    """Rows (groups, n), float32, and centroids (groups, k) -> codes int16 (groups, n)."""
    if rows.numel() == 0:
        return rows.to(torch.int16)
    between = torch.from_numpy(edges(centroids.cpu().numpy())).to(rows.device)
    return torch.searchsorted(between, rows.contiguous(), out_int32=True).to(torch.int16)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Codes (groups, n) and centroids (groups, k) -> values, float32 (groups, n)."""
    first = torch.arange(len(centroids), device=codes.device, dtype=torch.int32) * centroids.shape[1]
    return centroids.reshape(-1)[first[:, None] + codes.int()]
