"""Two-interval quantization of a weight: w' = sign(w) level(|w|), a uniform quantizer on either side of |w| = p.

PWLQ (arXiv 2002.00104), eq. for pw(r; b, m, p), as PTILMPQ (arXiv 2404.02947) uses it: the dense centre and the
sparse tail do not overlap, so neither spends levels on the other's range.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.piecewise import Piecewise
from .breakpoint import choose_breakpoints
from .calibrate import fitted_rows, squared_errors
from .contract import Each, PartCodes, PartShape
from .grid import GroupStats, PiecewiseGrids


@dataclass(frozen=True)
class PiecewiseTensor:
    """Codes of either interval, which interval each weight is in, and the grids.

    codes: int16, the weight's shape, sign << k | j with k magnitude bits; tail: bool, the weight's shape, true
    outside p; grid: (groups, 1), groups ordered by output channel, then along the input; dtype: the weight's.
    """

    codes: Tensor
    tail: Tensor
    grid: PiecewiseGrids
    scheme: Piecewise
    channel_axis: int
    dtype: torch.dtype

    @property
    def code_bits(self) -> int:
        """Bits of all codes, signs and magnitudes."""
        return self.codes.numel() * (int(self.grid.magnitude_bits[0]) + 1)

    @property
    def interval_bits(self) -> int:
        """Bits of the interval map, one a weight. Of 2^b levels in all it is one of the b bits."""
        return self.tail.numel()

    @property
    def interval_entropy_bits(self) -> float:
        """Bits of the interval map when entropy coded by itself: H(share of the tail) a weight."""
        share = float(self.tail.float().mean()) if self.tail.numel() else 0.0
        if share in (0.0, 1.0):
            return 0.0
        return -self.tail.numel() * (share * math.log2(share) + (1 - share) * math.log2(1 - share))

    @property
    def scale_bits(self) -> int:
        """Bits of the two float32 units of every group."""
        return 64 * self.grid.dense.size if self.codes.numel() else 0

    @property
    def total_bits(self) -> int:
        """All of it, the interval map as it is."""
        return self.code_bits + self.interval_bits + self.scale_bits


def quantize(
    weight: Tensor, bits: int, scheme: Piecewise | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> PiecewiseTensor:
    """Codes of `weight` at 2 to 8 bits.

    weight: float32, float16 or bfloat16, any shape, any strides; `channel_axis` is its output axis. Raises
    SettingError for bits outside 2..8 or groups that do not divide the input, and WeightError, naming `layer`,
    for NaN, infinity or another dtype. A constant weight is represented exactly.
    """
    scheme = scheme or Piecewise()
    try:
        scheme.check_bits(bits)
    except SettingError as error:
        raise SettingError(f"layer {layer!r}: {error}") from error
    rows, shape, grid = fitted_rows(weight, scheme, channel_axis, layer, partial(_grids, scheme, [bits]))
    codes, tail = (from_channel_rows(part.reshape(shape), weight.shape, channel_axis) for part in encode(rows, grid))
    return PiecewiseTensor(codes, tail, grid, scheme, channel_axis, weight.dtype)


def dequantize(quantized: PiecewiseTensor) -> Tensor:
    """The weight, computed in float32, in the original dtype and shape."""
    codes, tail = (channel_rows(part, quantized.channel_axis) for part in (quantized.codes, quantized.tail))
    shape = (quantized.grid.dense.shape[0], -1) if codes.numel() else codes.shape
    values = decode(codes.reshape(shape), tail.reshape(shape), quantized.grid)
    limit = torch.finfo(quantized.dtype).max  # float32's rounding of a level may lie beyond
    values = values.clamp(-limit, limit).to(quantized.dtype).reshape(codes.shape)
    return from_channel_rows(values, quantized.codes.shape, quantized.channel_axis)


@dataclass(frozen=True)
class PiecewiseQuantizer:
    """Quantizes under a piecewise scheme; see contract.py. A symbol is the interval's bit, the sign, the magnitude."""

    scheme: Piecewise

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> PiecewiseGrids:
        """Two units for each group, on either side of the breakpoint."""
        return _grids(self.scheme, bits, each, stats)

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that `bits` can hold."""
        return dequantize(quantize(weight, bits, self.scheme, channel_axis=channel_axis, layer=layer))

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Symbols, the units of dense intervals, then those of tails."""
        two = quantize(weight, part.bits, self.scheme, channel_axis=part.channel_axis, layer=part.layer)
        symbols = part.rows(two.codes) | part.rows(two.tail.to(torch.int16)) << _sign_and_magnitude(two.grid)
        units = np.concatenate((two.grid.dense, two.grid.tail)).reshape(-1)
        return PartCodes(part.symbols(symbols), units, np.zeros(0, np.uint8))

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """The weight again."""
        return dequantize(self.restored(codes, part, dtype))

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Which weights are 0."""
        zero: NDArray[np.bool_] = codes.symbols == 0
        return zero

    def restored(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> PiecewiseTensor:
        """Codes, the map of intervals and the grid as `quantize` gives them."""
        rows = codes.symbols.reshape(part.groups, -1).astype(np.int16)
        dense, tail = codes.tables.reshape(2, part.groups, 1)
        grid = PiecewiseGrids(np.array([part.bits], np.int64), self.scheme.storage == "shared", dense, tail)
        outside = part.tensor(rows >> _sign_and_magnitude(grid)).bool()
        inside = part.tensor(rows & (2 ** _sign_and_magnitude(grid) - 1))
        return PiecewiseTensor(inside, outside, grid, self.scheme, part.channel_axis, dtype)


def _grids(scheme: Piecewise, bits: Sequence[int], each: Each, stats: GroupStats) -> PiecewiseGrids:
    return choose_breakpoints(stats, bits, scheme, squared_errors(each, scheme))


def _sign_and_magnitude(grid: PiecewiseGrids) -> int:
    """Bits of a code within its interval."""
    return int(grid.magnitude_bits[0]) + 1


def encode(rows: Tensor, grid: PiecewiseGrids) -> tuple[Tensor, Tensor]:
    """Rows (groups, n), float32 -> codes int16 and the tail's mask, both (groups, n)."""
    if rows.numel() == 0:
        return rows.to(torch.int16), rows.to(torch.bool)
    magnitude = rows.abs()
    split, dense, tail = _columns(grid, rows.device)
    outside = magnitude > split
    unit = torch.where(outside, tail, dense)
    steps = torch.where(unit > 0, (magnitude - torch.where(outside, split, 0)) / unit, 0)
    j = torch.round((steps - grid.offset) / grid.stride).clamp(0, int(grid.top[0])).to(torch.int16)
    # There is one zero: a code for -0 would be one more to tell apart.
    negative = (rows < 0) if grid.offset else (rows < 0) & (outside | (j > 0))
    return negative.to(torch.int16).bitwise_left_shift(int(grid.magnitude_bits[0])) | j, outside


def decode(codes: Tensor, tail: Tensor, grid: PiecewiseGrids) -> Tensor:
    """Codes and the tail's mask, both (groups, n) -> values, float32."""
    if codes.numel() == 0:
        return codes.float()
    k = int(grid.magnitude_bits[0])
    split, dense, outer = _columns(grid, codes.device)
    steps = grid.stride * (codes & (2**k - 1)).float() + grid.offset
    level = torch.where(tail, split + steps * outer, steps * dense)
    return torch.where(codes >> k > 0, -level, level)


def _columns(grid: PiecewiseGrids, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    split, dense, tail = (torch.from_numpy(array).to(device) for array in (grid.split, grid.dense, grid.tail))
    return split, dense, tail
