"""Where a range of codes begins and ends, by the values that it is for: the rules that weights and inputs share."""

import numpy as np
import torch

from ..models.input_ranges import range_grid
from .kl_range import BINS, LEAST_BINS, kl_window
from .value_sample import SortedValues

Ends = tuple[float, float]

COARSE = (*np.linspace(1.0, 0.04, 33).tolist(), *(0.04 * 2.0**-k for k in range(1, 9)))  # outliers lie far out
STEPS = (0.08, 0.03, 0.01)
MOST_MOVES = 20  # of each length of step


def percentile_ends(values: SortedValues, share: float, *, symmetric: bool) -> Ends:
    """Ends that hold this share of the values: as many lie beyond one as beyond the other, unless all have one sign.

    Symmetric ends hold it of the magnitudes.
    """
    if symmetric:
        reach = values.magnitudes().quantile(share)
        return -reach, reach
    if values.low == 0:
        return 0.0, values.quantile(share)
    if values.high == 0:
        return values.quantile(1 - share), 0.0
    return min(0.0, values.quantile((1 - share) / 2)), max(0.0, values.quantile((1 + share) / 2))


def kl_ends(values: SortedValues, bits: int, *, symmetric: bool) -> Ends:
    """Ends of least divergence; see kl_range.py. Codes of more levels than bins reach the extremes.

    Values that are exactly 0 do not count: 0 is a level of every range, and as a peak, such as ReLU leaves, they would
    be spread over the first cell and make a narrow range of any. Bins are 2,048, or one for each value, at least 128.
    """
    low, high, active = values.low, values.high, values.nonzero()
    bins = min(BINS, max(LEAST_BINS, active.values.size))
    if symmetric:
        reach = max(-low, high)
        _, stop = kl_window(active.magnitudes().histogram(0.0, reach, bins), 0, 2 ** (bits - 1))
        return -reach * stop / bins, reach * stop / bins
    width = (high - low) / bins
    start, stop = kl_window(active.histogram(low, high, bins), round(-low / width), 2**bits)
    return min(0.0, low + start * width), max(0.0, high - (bins - stop) * width)


def mse_ends(values: SortedValues, bits: int, *, symmetric: bool) -> Ends:
    """Ends of least squared error among shrunk extremes: coarsely, both ends or one, then in finer steps."""
    low, high = values.low, values.high
    if symmetric:
        low, high = -max(-low, high), max(-low, high)

    def error(shrunk: Ends) -> float:
        first, last = torch.tensor((shrunk[0] * low, shrunk[1] * high), dtype=torch.float32)
        scale, zero_point = range_grid(first, last, bits, symmetric=symmetric)
        return values.squared_error(float(scale), float(zero_point), bits)

    tried = [(ratio, ratio) for ratio in COARSE]
    directions = [(-1, -1), (1, 1)]
    if not symmetric and low < 0 < high:
        farthest = max(-low, high)
        tried += [(1.0, ratio) for ratio in COARSE] + [(ratio, 1.0) for ratio in COARSE]
        tried += [(min(1.0, -ratio * farthest / low), min(1.0, ratio * farthest / high)) for ratio in COARSE]
        directions = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    best = min((error(ratios), ratios) for ratios in tried)
    for step in STEPS:
        for _ in range(MOST_MOVES):
            a, b = best[1]
            near = [(min(1.0, a * (1 + i * step)), min(1.0, b * (1 + j * step))) for i, j in directions]
            found = min((error(ratios), ratios) for ratios in near)
            if found[0] >= best[0]:
                break
            best = found
    return best[1][0] * low, best[1][1] * high
