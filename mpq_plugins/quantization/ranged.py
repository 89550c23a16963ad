"""Affine grids whose ranges follow from the weights of each group themselves: percentiles and least divergence."""

from collections.abc import Sequence

import numpy as np

from ..plans.affine import Affine
from .grid import Floats, Grids, GroupStats, affine_grids, minmax_grids
from .range_ends import kl_ends
from .value_sample import SortedValues


def grids_by_values(rows: Floats, stats: GroupStats, bits: Sequence[int], scheme: Affine) -> Grids:
    """The grids of groups (R, n) whose weights are in memory, (R, len(bits)).

    A constant group quantizes to itself, as under min-max; one whose range would hold only zeros keeps its extremes.
    At 1 bit there is no range.
    """
    widest = minmax_grids(stats, bits, scheme)
    whole = ~np.isfinite(rows).all(axis=1) | (stats.low == stats.high)  # what is not finite is refused later on
    if not rows.size or whole.all():
        return widest
    low, high = np.zeros((2, *widest.scale.shape))
    own = rows[~whole]
    low[~whole], high[~whole] = _percentiles(own, scheme) if scheme.range == "percentile" else _kl(own, bits, scheme)
    grids = affine_grids(low, high, widest.bits, scheme)
    kept = whole[:, None] | (low == high) | (widest.bits == 1)
    scale = np.where(kept, widest.scale, grids.scale)
    return Grids(widest.bits, widest.symmetric, scale, np.where(kept, widest.zero_point, grids.zero_point))


def _percentiles(rows: Floats, scheme: Affine) -> tuple[Floats, Floats]:
    """Both ends (R, 1): as range_ends.percentile_ends, of all rows at once."""
    assert scheme.share is not None
    if scheme.symmetric:
        return _within(rows, np.quantile(np.abs(rows), scheme.share, axis=1, keepdims=True))
    beyond = 1 - scheme.share
    low, high = np.quantile(rows, [beyond / 2, 1 - beyond / 2], axis=1, keepdims=True)
    one_low, one_high = np.quantile(rows, [beyond, 1 - beyond], axis=1, keepdims=True)
    positive, negative = (rows >= 0).all(axis=1, keepdims=True), (rows <= 0).all(axis=1, keepdims=True)
    low, high = np.where(negative, one_low, low), np.where(positive, one_high, high)
    return np.minimum(low, 0.0), np.maximum(high, 0.0)


def _kl(rows: Floats, bits: Sequence[int], scheme: Affine) -> tuple[Floats, Floats]:
    """Both ends (R, K)."""
    values = [SortedValues.of(row) for row in np.sort(rows, axis=1)]
    ends = [[kl_ends(own, max(b, 2), symmetric=bool(scheme.symmetric)) for b in bits] for own in values]
    low, high = np.moveaxis(np.array(ends), -1, 0)
    return _within(rows, high) if scheme.symmetric else (low, high)


def _within(rows: Floats, reach: Floats) -> tuple[Floats, Floats]:
    """The extremes within +-reach: the farther side is told from the other, which the full range has a code more on."""
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    return np.clip(low, -reach, 0.0), np.clip(high, 0.0, reach)
