"""k-means of the weights of one group: sorted once, so that a cluster is an interval and a mean two look-ups.

    minimise   sum over clusters i, weights w in i, of (w - c_i)^2          (arXiv 1510.00149, sec. 3, eq. 2)

`optimal` finds the global minimum by dynamic programming: exactly where there are at most CELLS different weights; of
more, the minimum over clusters of whole cells, from which Lloyd's iteration goes on (within 1e-4 of the minimum at 8
bits on every distribution tried). The paper's initialisations (sec. 3.2) go on from where they start to a local
minimum. Memory is a few numbers a weight, whatever k is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..plans.codebook import InitName

Floats = NDArray[np.float64]

CELLS = 1 << 14  # into which more different weights than that are gathered before the search
WATER_LEVELS = 8  # rounds of levelling the gaps between them
ROUNDS = 1000  # of Lloyd's iteration at the most
SEED = 0  # of the observations that Forgy's method draws


def centroids(group: NDArray[np.float32], bits: Sequence[int], init: InitName) -> list[NDArray[np.float32]]:
    """The centroids of one group's weights (n,) at each bit-width, ascending, (2^b,) each.

    Where some weights are exactly 0, which is how pruned ones look, 0 is a centroid and stays one. No more different
    weights than centroids: these are the weights themselves, the last one repeated.
    """
    values = np.sort(group, axis=None)
    starts = np.flatnonzero(np.concatenate((np.ones(1, bool), values[1:] != values[:-1])))  # of runs of equal values
    counts = [2**b for b in bits]
    searched = [k for k in counts if k < len(starts)]
    by_count = dict(zip(searched, _searched(values, starts, searched, init), strict=True)) if searched else {}
    distinct = values[starts[: max(counts)]] + np.float32(0)  # -0 is 0
    return [by_count[k] if k in by_count else np.pad(distinct, (0, k - len(distinct)), "edge") for k in counts]


def edges(ascending: NDArray[np.float32]) -> NDArray[np.float32]:
    """Between neighbours (..., k): the greatest float32 that is no nearer to the right one, (..., k - 1).

    A weight belongs to the first centroid whose edge is not below it, so a centroid belongs to itself.
    """
    wide = ascending.astype(np.float64)
    middle = (wide[..., :-1] + wide[..., 1:]) / 2
    rounded = middle.astype(np.float32)
    return np.where(rounded > middle, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _searched(
    values: NDArray[np.float32], starts: NDArray[np.int64], counts: Sequence[int], init: InitName
) -> list[NDArray[np.float32]]:
    """The centroids for each of these counts, of ascending values with more different ones than that."""
    from .kernel_kmeans import lloyd

    first, end = _zeros(values)
    total = _sums_from(values.astype(np.float64), _middle(values))
    begin = _optimal(values, starts, counts) if init == "optimal" else [_initial(values, k, init) for k in counts]
    for levels in begin:
        lloyd(values, total, levels, int(np.argmin(np.abs(levels))) if end > first else -1, ROUNDS)
    return [np.sort(levels.astype(np.float32)) for levels in begin]


def _optimal(values: NDArray[np.float32], starts: NDArray[np.int64], counts: Sequence[int]) -> list[Floats]:
    """The best clusterings of the different values, or of CELLS cells of them: one search serves every count."""
    from .kernel_kmeans import last_splits

    first, end = _zeros(values)
    cuts = starts if len(starts) <= CELLS else _cell_starts(values, starts)
    bounds = np.append(cuts, len(values))
    zero = int(np.searchsorted(cuts, first)) if end > first else -1
    # Far from the middle squares would cancel, and so would sums that came by an outlier.
    middle = _middle(values)
    origin = float(values[middle])
    shifted = values.astype(np.float64) - origin
    total, square = _sums_from(shifted, middle)[bounds], _sums_from(shifted**2, middle)[bounds]
    alone = _own_costs(shifted, cuts, zero)
    splits = last_splits(bounds.astype(np.float64), total, square, alone, zero, max(counts))
    clusterings = []
    for k in counts:
        ends = np.empty(k + 1, np.int64)
        ends[k] = len(cuts)
        for j in range(k - 1, -1, -1):
            ends[j] = splits[j, ends[j + 1]]
        means = np.diff(total[ends]) / np.diff(bounds[ends]) + origin
        if zero >= 0:
            means[np.searchsorted(ends, zero, "right") - 1] = 0.0
        clusterings.append(means)
    return clusterings


def _own_costs(shifted: Floats, cuts: NDArray[np.int64], zero: int) -> Floats:
    """What each cell costs as a cluster of its own: nothing, where it is one value."""
    sizes = np.diff(np.append(cuts, len(shifted)))
    means = np.add.reduceat(shifted, cuts) / sizes
    if zero >= 0:
        means[zero] = 0.0
    costs: Floats = np.add.reduceat((shifted - np.repeat(means, sizes)) ** 2, cuts)
    costs[shifted[cuts] == shifted[cuts + sizes - 1]] = 0.0
    return costs


def _cell_starts(values: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where cells begin, close together where centroids will be; zeros have one of their own.

    Many centroids lie as the cube root of the density does (Panter and Dite, Proc. IRE 39(1), 1951), whose integral
    over the gap d between two values is about d^(2/3). Each cell gets the same share of that; a gap so wide that it
    would get several gets one cut.
    """
    steps = np.diff(values[starts].astype(np.float64)) ** (2 / 3)
    for _ in range(WATER_LEVELS):
        steps = np.minimum(steps, steps.sum() / CELLS)
    along = np.concatenate((np.zeros(1), np.cumsum(steps)))
    even = starts[np.searchsorted(along, np.linspace(0.0, along[-1], CELLS))]
    cuts: NDArray[np.int64] = np.unique(np.concatenate((even, _zeros(values))))
    return cuts[cuts < len(values)]


def _sums_from(values: Floats, middle: int) -> Floats:
    """Prefix sums (n + 1,), 0 at `middle`: what lies far out at one end is in no difference but its own."""
    sums = np.zeros(len(values) + 1)
    np.cumsum(values[middle:], out=sums[middle + 1 :])
    sums[:middle] = -np.cumsum(values[:middle][::-1])[::-1]
    return sums


def _middle(values: NDArray[np.float32]) -> int:
    """Where the zeros begin, or else the median."""
    first, end = _zeros(values)
    return first if end > first else len(values) // 2


def _zeros(values: NDArray[np.float32]) -> tuple[int, int]:
    """Where the zeros of an ascending array begin and end."""
    return int(np.searchsorted(values, 0.0, "left")), int(np.searchsorted(values, 0.0, "right"))


def _initial(values: NDArray[np.float32], k: int, init: InitName) -> Floats:
    """Where the paper's three methods start; where there are zeros, with one of the k at 0, the others by the rest."""
    first, end = _zeros(values)
    zeros = end - first
    free = k - (zeros > 0)
    others = len(values) - zeros
    if init == "linear":
        spread = np.linspace(float(values[0]), float(values[-1]), free)
    else:
        shares = (np.arange(free) + 0.5) / free if init == "density" else np.random.default_rng(SEED).random(free)
        ranks = (shares * others).astype(np.int64)
        spread = values[np.where(ranks < first, ranks, ranks + zeros)].astype(np.float64)
    return np.sort(np.concatenate((spread, np.zeros(k - free))))
