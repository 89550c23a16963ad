"""The range whose histogram says most of that of all values: Migacz, 8-bit Inference with TensorRT, GTC 2017.

A candidate leaves out the outermost bins and counts what was in them into its last one: that is the reference P. The
bins that it keeps, without what was added, are joined into as many cells as there are levels, and each cell's count is
spread evenly over those of its bins that hold anything: that is Q. The least sum of P log(P / Q) wins, of equal ones
the widest; where a bin holds something in P and nothing in Q it is infinite.

The slides are about magnitudes at 8 bits, and begin with 128 of 2,048 bins for as many levels. Of fewer levels
candidates begin with a sixteenth of the bins too: narrower ones have a level for almost each bin, which next to a peak
says more than any wide range, however little of the values is in them.

Where there are two sides, bins go off both ends in proportion to their distance from 0, and the outermost bin of either
side has what was beyond it.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

BINS = 2048
LEAST_BINS = 128
LEAST_PART = 16


def kl_window(counts: Floats, below: int, levels: int) -> tuple[int, int]:
    """The first bin to keep and the one after the last; `below`: how many bins lie on the negative side."""
    starts, stops = windows(counts.size, below, levels)
    found = divergences(counts, starts, stops, levels)
    best = len(found) - 1 - int(found[::-1].argmin())
    return int(starts[best]), int(stops[best])


def windows(bins: int, below: int, levels: int) -> tuple[Places, Places]:
    """Every candidate's first bin and the one after its last, the narrowest first."""
    kept = np.arange(min(max(levels, bins // LEAST_PART), bins), bins + 1)
    starts = (2 * below * (bins - kept) + bins) // (2 * bins)
    return starts, starts + kept


def divergences(counts: Floats, starts: Places, stops: Places, levels: int) -> Floats:
    """The divergence of each candidate, of two bins or more, in nats."""
    cells = min(levels, counts.size)
    edges = starts[:, None] - (-np.arange(cells + 1) * (stops - starts)[:, None]) // cells
    total, filled, entropies = (_summed(each) for each in (counts, (counts > 0).astype(float), _entropy(counts)))
    inside, holding = np.diff(total[edges]), np.diff(filled[edges])
    kept = total[stops] - total[starts]
    first, last = counts[starts], counts[stops - 1]
    under, over = total[starts], total[-1] - total[stops]
    with np.errstate(divide="ignore", invalid="ignore"):
        height = np.log(inside / holding / kept[:, None])  # of Q, in each cell
        own = entropies[stops] - entropies[starts] - _entropy(first) - _entropy(last)
        own += _entropy(first + under) + _entropy(last + over)
        crossed = np.where(inside > 0, inside * height, 0.0).sum(axis=1)
        crossed += np.where(under > 0, under * height[:, 0], 0.0) + np.where(over > 0, over * height[:, -1], 0.0)
        found: Floats = (own - crossed) / total[-1] - np.log(total[-1])
    lost = (kept <= 0) | ((under > 0) & (first <= 0)) | ((over > 0) & (last <= 0))
    return np.where(lost, np.inf, found)


def _summed(each: Floats) -> Floats:
    return np.concatenate([[0.0], each.cumsum()])


def _entropy(counts: Floats) -> Floats:
    """c log c."""
    return counts * np.log(np.where(counts > 0, counts, 1.0))
