"""The levels of quantizers: scale and zero point from the range of each group, many bit-widths at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..plans.affine import Affine, ScaleDtype, Symmetry
from .scales import rounded_scale

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grids:
    """K quantizers for each of R groups: levels (code - zero_point) * scale for code in qmin..qmax.

    bits: int (K,); scale: float32 (R, K), in the weights' units, negative in some groups of the full range; zero_point:
    int32 (R, K). At 1 bit the codes are -1 and +1 alone.
    """

    bits: NDArray[np.int64]
    symmetric: Symmetry
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    @property
    def qmin(self) -> NDArray[np.int64]:
        """The least code, (K,)."""
        least = (self.symmetric is True) - 2 ** (self.bits - 1) if self.symmetric else np.zeros_like(self.bits)
        return np.where(self.bits == 1, -1, least) if 1 in self.bits else least

    @property
    def qmax(self) -> NDArray[np.int64]:
        """The greatest code, (K,)."""
        greatest = 2 ** (self.bits - bool(self.symmetric)) - 1
        return np.where(self.bits == 1, 1, greatest) if 1 in self.bits else greatest

    def take(self, columns: Sequence[int]) -> "Grids":
        """The quantizers at these positions."""
        chosen = list(columns)
        return Grids(self.bits[chosen], self.symmetric, self.scale[:, chosen], self.zero_point[:, chosen])


@dataclass(frozen=True)
class PiecewiseGrids:
    """K two-interval quantizers for each of R groups: |w| <= p = reach * dense is the dense one, the rest the tail.

    Levels are whole multiples of a unit on either side of zero: (stride j + offset) dense inside, p + (stride j +
    offset) tail outside, j = 0 .. top. With a b-bit sign and magnitude in each, units are steps; with 2^b levels
    in all, half steps, and levels lie at the middles of cells. bits: int (K,); dense, tail: float32 (R, K), in the
    weights' units, 0 where there is nothing to tell apart.
    """

    bits: NDArray[np.int64]
    shared: bool
    dense: NDArray[np.float32]
    tail: NDArray[np.float32]

    @property
    def magnitude_bits(self) -> NDArray[np.int64]:
        """Bits of j, (K,): what the sign, and of 2^b levels the interval, leave of b."""
        return self.bits - (2 if self.shared else 1)

    @property
    def top(self) -> NDArray[np.int64]:
        """The greatest j, (K,)."""
        return 2**self.magnitude_bits - 1

    @property
    def stride(self) -> int:
        """Units between levels."""
        return 2 if self.shared else 1

    @property
    def offset(self) -> int:
        """Units from an interval's start to its first level."""
        return int(self.shared)

    @property
    def reach(self) -> NDArray[np.int64]:
        """Units across each interval, (K,)."""
        return self.stride * (self.top + self.offset)

    @property
    def split(self) -> NDArray[np.float32]:
        """p, (R, K)."""
        with np.errstate(over="ignore"):  # a constant near float32's end lies inside all the same
            product: NDArray[np.float32] = self.dense * self.reach.astype(np.float32)
        return product


@dataclass(frozen=True)
class CodebookGrids:
    """K codebooks for each of R groups: levels centroids[k][r, code], ascending.

    bits: int (K,); centroids: K times float32 (R, 2^bits), in the weights' units.
    """

    bits: NDArray[np.int64]
    centroids: tuple[NDArray[np.float32], ...]


class AnyGrids(Protocol):
    """K quantizers for each of R groups, of any scheme. Those of this package are measured by the loops of kernel.py;
    others measure themselves."""

    @property
    def bits(self) -> NDArray[np.int64]:
        """The bit-widths, (K,)."""


class OwnGrids(AnyGrids, Protocol):
    """Grids that measure themselves."""

    def error_sums(self, rows: Any, largest: bool) -> Floats:
        """Sums over each row (n,) of a floating tensor (R, n) as kernel.error_sums gives them, float64 (R, K, 3)."""


SquaredErrors = Callable[[AnyGrids], Floats]
"""Grids of K candidates -> sums of (w - w')^2, (groups, K)."""


@dataclass(frozen=True)
class GroupStats:
    """What a range is chosen from, per group, float64 (groups,): extremes, sums of |w| and w^2; count of weights.

    layer_largest: the greatest magnitude of the layer, of which these may be some groups; None where they are all.
    """

    low: Floats
    high: Floats
    absolute: Floats
    squared: Floats
    count: int
    layer_largest: float | None = None

    @property
    def largest(self) -> float:
        """The greatest magnitude of the layer."""
        if self.layer_largest is not None:
            return self.layer_largest
        return float(max(-self.low.min(initial=0.0), self.high.max(initial=0.0)))

    @property
    def mean_abs(self) -> Floats:
        """Mean magnitude of each group."""
        return self.absolute / max(1, self.count)

    def merged(self) -> "GroupStats":
        """All groups as one."""
        if not self.low.size:
            zero = np.zeros(1)
            return GroupStats(zero, zero, zero, zero, 0)
        low, high = self.low.min(keepdims=True), self.high.max(keepdims=True)
        absolute, squared = self.absolute.sum(keepdims=True), self.squared.sum(keepdims=True)
        return GroupStats(low, high, absolute, squared, self.count * self.low.size)


def minmax_grids(stats: GroupStats, bits: Sequence[int], scheme: Affine) -> Grids:
    """Grids that span each group's whole range (asymmetric on [lo, hi], lo <= 0 <= hi), (R, len(bits)).

    A constant group gets the scale |c| and so quantizes to itself, exactly where the scales' dtype has |c|; at 1 bit
    the scale is mean|w|. A scale beyond the dtype is infinite, which scales.check_scales refuses.
    """
    widths = np.array(bits, np.int64)
    low, high = stats.low[:, None], stats.high[:, None]
    grids = affine_grids(np.minimum(low, 0.0), np.maximum(high, 0.0), widths, scheme)
    scale, zero_point = grids.scale, grids.zero_point
    if (low == high).any():
        alone = rounded_scale(np.abs(low), scheme.scale_dtype)
        constant = (low == high) & np.isfinite(alone)
        scale = np.where(constant, alone, scale)
        # c < 0 needs a code below the zero point; the asymmetric codes start at 0.
        zero_point = np.where(constant, np.int32(0) if scheme.symmetric else (low < 0).astype(np.int32), zero_point)
    if (widths == 1).any():
        scale = np.where(widths == 1, _binary_scale(stats.mean_abs[:, None], scheme.scale_dtype), scale)
        zero_point = np.where(widths == 1, np.int32(0), zero_point)
    return Grids(widths, scheme.symmetric, scale, zero_point)


def affine_grids(low: Floats, high: Floats, bits: NDArray[np.int64], scheme: Affine) -> Grids:
    """The grids on [low, high], low <= 0 <= high; float64, broadcast over (R, K) with bits (K,).

    At 1 bit, where the scale is not the range's, the values mean nothing.
    """
    if scheme.symmetric:
        # Of two extremes that are equally far, the negative one has the code that has no opposite.
        top = np.maximum(2 ** (bits - 1) - (scheme.symmetric is True), 1)
        scale = rounded_scale(np.maximum(-low, high) / top, scheme.scale_dtype)
        if scheme.symmetric == "full":
            scale = np.where(high > -low, -scale, scale)
        return Grids(bits, scheme.symmetric, scale, np.zeros(scale.shape, np.int32))
    top = 2**bits - 1
    with np.errstate(over="ignore"):  # at 1 bit, of the widest ranges
        scale = rounded_scale((high - low) / top, scheme.scale_dtype)
    # low is at most 0 and high at least 0, so this lies within the codes but for the rounding of the scale.
    zero_point = np.minimum(np.rint(-low / scale.astype(np.float64)), top).astype(np.int32)
    return Grids(bits, scheme.symmetric, scale, zero_point)


def _binary_scale(mean: Floats, dtype: ScaleDtype) -> NDArray[np.float32]:
    """The scale of +-mean|w|; 0 where all weights are 0."""
    return (
        mean.astype(np.float32)
        if dtype == "float32"
        else np.where(mean == 0, np.float32(0), rounded_scale(mean, dtype))
    )


def piecewise_grids(
    split: Floats, highest: Floats, constant: NDArray[np.bool_], bits: NDArray[np.int64], shared: bool
) -> PiecewiseGrids:
    """The grids with breakpoints `split` on [0, highest], float64 (R, K), 0 <= split <= highest; bits (K,).

    A `constant` group (R, 1) gets a level at its value, so it quantizes to itself, exactly.
    """
    empty = np.zeros(split.shape, np.float32)
    reach = PiecewiseGrids(bits, shared, empty, empty).reach
    dense = np.where(constant, highest, split / reach)
    tail = np.where(constant, 0.0, (highest - split) / reach)
    return PiecewiseGrids(bits, shared, _unit(dense), _unit(tail))


def _unit(exact: Floats) -> NDArray[np.float32]:
    return np.where(exact == 0, np.float32(0), rounded_scale(exact))
