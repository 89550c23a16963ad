"""k-means of the weights of one region: sorted once, so that a cluster is an interval and a mean two look-ups.

    minimise   sum over clusters i, weights w in i, of (w - c_i)^2          (arXiv 1510.00149, sec. 3, eq. 2)

`optimal` finds the global minimum by dynamic programming; the paper's initialisations (sec. 3.2) go on from where they
start, by Lloyd's iteration, to a local one. Memory is a few numbers a weight, whatever k is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..scheme import InitName

Floats = NDArray[np.float64]

CELLS = 1 << 14  # of equal width, into which more different weights than that are gathered before the search
ROUNDS = 1000  # of Lloyd's iteration at the most
SEED = 0  # of the observations that Forgy's method draws


def centroids(region: NDArray[np.float32], bits: Sequence[int], init: InitName) -> list[NDArray[np.float32]]:
    """The centroids of one region's weights (n,) at each bit-width, ascending, (2^b,) each.

    Where some weights are exactly 0, which is how pruned ones look, 0 is a centroid and stays one. No more different
    weights than centroids: these are the weights themselves, the last one repeated.
    """
    values = np.sort(region, axis=None)
    starts = np.flatnonzero(np.concatenate((np.ones(1, bool), values[1:] != values[:-1])))  # of runs of equal values
    counts = [2**b for b in bits]
    searched = [k for k in counts if k < len(starts)]
    found = dict(zip(searched, _searched(values, starts, searched, init), strict=True)) if searched else {}
    distinct = values[starts[: max(counts)]] + np.float32(0)  # -0 is 0
    return [found[k] if k in found else np.pad(distinct, (0, k - len(distinct)), "edge") for k in counts]


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

    total = _prefix_sums(values)
    first, end = _zeros(values)
    begin = _optimal(values, starts, counts) if init == "optimal" else [_initial(values, k, init) for k in counts]
    for own in begin:
        lloyd(values, total, own, int(np.argmin(np.abs(own))) if end > first else -1, ROUNDS)
    return [own.astype(np.float32) for own in begin]


def _optimal(values: NDArray[np.float32], starts: NDArray[np.int64], counts: Sequence[int]) -> list[Floats]:
    """The best clusterings of the different values, or of CELLS cells of them: one search serves every count."""
    from .kernel_kmeans import last_splits

    first, end = _zeros(values)
    cuts = starts if len(starts) <= CELLS else _cell_starts(values, starts)
    bounds = np.append(cuts, len(values))
    zero = int(np.searchsorted(cuts, first)) if end > first else -1
    # Squares of what is far from zero would cancel.
    origin = 0.0 if zero >= 0 else float(values[0]) / 2 + float(values[-1]) / 2
    shifted = values.astype(np.float64) - origin
    count, total, square = bounds.astype(np.float64), _prefix_sums(shifted)[bounds], _prefix_sums(shifted**2)[bounds]
    splits = last_splits(count, total, square, zero, max(counts))
    found = []
    for k in counts:
        ends = np.empty(k + 1, np.int64)
        ends[k] = len(cuts)
        for j in range(k - 1, -1, -1):
            ends[j] = splits[j, ends[j + 1]]
        own = np.diff(total[ends]) / np.diff(count[ends]) + origin
        if zero >= 0:
            own[np.searchsorted(ends, zero, "right") - 1] = 0.0
        found.append(own)
    return found


def _cell_starts(values: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where cells begin: half of them of equal width, half of as many different values, zeros in one of their own."""
    wide = np.searchsorted(values, np.linspace(values[0], values[-1], CELLS // 2, dtype=np.float64).astype(np.float32))
    even = starts[np.linspace(0, len(starts) - 1, CELLS // 2).astype(np.int64)]
    cuts: NDArray[np.int64] = np.unique(np.concatenate((wide, even, _zeros(values))))
    return cuts[cuts < len(values)]


def _prefix_sums(values: NDArray[np.generic]) -> Floats:
    return np.concatenate((np.zeros(1), np.cumsum(values, dtype=np.float64)))


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
        spread = np.linspace(values[0], values[-1], free, dtype=np.float64)
    else:
        shares = (np.arange(free) + 0.5) / free if init == "density" else np.random.default_rng(SEED).random(free)
        ranks = (shares * others).astype(np.int64)
        spread = values[np.where(ranks < first, ranks, ranks + zeros)].astype(np.float64)
    return np.sort(np.concatenate((spread, np.zeros(k - free))))
