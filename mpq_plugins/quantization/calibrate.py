"""Choosing the grid of each group: by its extremes, by the clipping with the least squared error, or in two parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows
from ..plans.affine import Affine
from ..plans.scheme import Scheme
from ..weights.dtypes import check_weight
from .contract import Each
from .grid import AnyGrids, Floats, Grids, GroupStats, SquaredErrors, affine_grids, minmax_grids
from .groups import group_rows
from .kernel import SQUARED, error_sums, error_totals, row_stats

Kind = TypeVar("Kind", bound=np.generic)
AGrid = TypeVar("AGrid")

COARSE = np.linspace(1.0, 0.04, 49)
FINE = np.linspace(-0.02, 0.02, 9)
ONE_SIDED = np.linspace(0.7, 1.15, 10)


def squared_errors(each: Each, scheme: Scheme) -> SquaredErrors:
    """What measures candidates for the grids of a weight under the scheme, block by block."""
    one_group = scheme.granularity == "per_tensor"

    def errors(grids: AnyGrids) -> Floats:
        sums = each(partial(error_totals if one_group else error_sums, grids=grids))[..., SQUARED]
        return sums.sum(axis=0, keepdims=True) if one_group else sums

    return errors


def whole_rows(each: Each, scheme: Scheme) -> Floats:
    """All weights of each group, float64 (groups, n)."""
    values = each(_values)
    return values.reshape(1, -1) if scheme.granularity == "per_tensor" else values


def _values(rows: Tensor) -> Floats:
    return rows.detach().double().cpu().numpy()


def choose_affine_grids(stats: GroupStats, bits: Sequence[int], scheme: Affine, squared_errors: SquaredErrors) -> Grids:
    """The affine grids of each group under the scheme's range rule, (R, len(bits))."""
    widest = minmax_grids(stats, bits, scheme)
    if scheme.range == "minmax":
        return widest
    chosen = [
        widest.take([k]) if b == 1 else least_squares_grid(stats, widest.take([k]), scheme, squared_errors)
        for k, b in enumerate(bits)
    ]
    return Grids(
        widest.bits,
        widest.symmetric,
        np.hstack([grid.scale for grid in chosen]),
        np.hstack([grid.zero_point for grid in chosen]),
    )


def least_squares_grid(stats: GroupStats, widest: Grids, scheme: Affine, squared_errors: SquaredErrors) -> Grids:
    """Search each group's clipping of [lo, hi] for the least sum of (w - w')^2, at one bit-width.

    Both ends shrink together over a coarse and then a fine set of ratios; an asymmetric range then tries
    each end alone. The unclipped grid (R, 1) is the first candidate, so the result is never worse than min-max.
    """
    low, high = np.minimum(stats.low, 0.0)[:, None], np.maximum(stats.high, 0.0)[:, None]
    ones = np.ones((stats.low.size, 1))
    error = squared_errors(widest)
    if scheme.symmetric == "full":
        return _either_sign(_Clipping(widest, error, ones, ones, low, high, scheme), squared_errors)
    best = _Clipping(widest, error, ones, ones, low, high, scheme)
    best = best.improved(squared_errors, COARSE * ones, COARSE * ones)
    best = best.improved(squared_errors, best.low + FINE, best.high + FINE)
    if not widest.symmetric:
        best = best.improved(squared_errors, best.low * ONE_SIDED, best.high + 0 * ONE_SIDED)
        best = best.improved(squared_errors, best.low + 0 * ONE_SIDED, best.high * ONE_SIDED)
    return best.grid


def _either_sign(best: "_Clipping", squared_errors: SquaredErrors) -> Grids:
    """The same search over scales of the full range: one end alone says a scale and its sign.

    The widest scale is that of the symmetric codes without the one more, which no weight is clipped by.
    """
    half = float(2 ** (best.grid.bits[0] - 1))
    farthest = np.maximum(-best.ends_low, best.ends_high)
    minmax = np.full_like(farthest, (half - 1) / half)  # of the widest scale, and on the side that it has
    negative = best.ends_high > -best.ends_low
    reach = farthest * (half / (half - 1))
    best = replace(
        best,
        low=np.where(negative, 0.0, minmax),
        high=np.where(negative, minmax, 0.0),
        ends_low=-reach,
        ends_high=reach,
    )
    coarse = COARSE * np.ones_like(farthest)
    best = best.improved(squared_errors, np.hstack([coarse, 0 * coarse]), np.hstack([0 * coarse, coarse]))
    return best.improved(squared_errors, (best.low + FINE) * (best.low > 0), (best.high + FINE) * (best.high > 0)).grid


@dataclass(frozen=True)
class _Clipping:
    """For each group a grid, its squared error, the ratios of the two ends it keeps, and the ends, all (R, 1)."""

    grid: Grids
    error: Floats
    low: Floats
    high: Floats
    ends_low: Floats
    ends_high: Floats
    scheme: Affine

    def improved(self, squared_errors: SquaredErrors, lows: Floats, highs: Floats) -> "_Clipping":
        """The better, group by group, of this and the best of the candidates (ratios, (R, K))."""
        lows, highs = np.clip(lows, 0.0, 1.0), np.clip(highs, 0.0, 1.0)
        bits = self.grid.bits.repeat(lows.shape[1])
        grids = affine_grids(self.ends_low * lows, self.ends_high * highs, bits, self.scheme)
        errors = squared_errors(grids)
        errors = np.where(np.isnan(errors), np.inf, errors)  # a scale beyond its dtype
        pick = errors.argmin(axis=1, keepdims=True)

        def better(new: NDArray[Kind], old: NDArray[Kind]) -> NDArray[Kind]:
            return np.where(least < self.error, np.take_along_axis(new, pick, axis=1), old)

        least = np.take_along_axis(errors, pick, axis=1)
        chosen = Grids(
            self.grid.bits,
            self.grid.symmetric,
            better(grids.scale, self.grid.scale),
            better(grids.zero_point, self.grid.zero_point),
        )
        return replace(
            self, grid=chosen, error=np.minimum(least, self.error), low=better(lows, self.low),
            high=better(highs, self.high),
        )  # fmt: skip


def fitted_rows(
    weight: Tensor,
    scheme: Scheme,
    channel_axis: int,
    layer: str,
    choose: Callable[[Each, GroupStats], AGrid],
) -> tuple[Tensor, torch.Size, AGrid]:
    """A weight as float32 rows, one per group; the shape of its channels' rows; and the grid of each group.

    Raises WeightError and SettingError, naming `layer`.
    """
    check_weight(weight, layer)
    per_channel = scheme.groups_per_channel(weight.shape, channel_axis, layer)
    channels = channel_rows(weight.detach().float(), channel_axis)
    rows = group_rows(channels, scheme, per_channel)
    stats = row_stats(channels).merged() if scheme.granularity == "per_tensor" else row_stats(rows)
    return rows, channels.shape, choose(lambda work: work(rows), stats)
