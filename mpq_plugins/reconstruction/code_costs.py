"""What each code of a layer costs in an entropy-coded file, as rounding takes it: bits by the codes that there were."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]

PRIOR = 4.0  # codes of a two-sided geometric distribution that are counted in, so that none is impossible
RAREST = 1e-12  # share of a code, at least


def counts_of(codes: Sequence[Tensor], most: int) -> Counts:
    """How many codes of each value there are, -most first; codes: int16, any shapes."""
    total = np.zeros(2 * most + 1, np.int64)
    for each in codes:
        total += (each.int().flatten() + most).bincount(minlength=2 * most + 1).cpu().numpy()
    return total


def code_costs(counts: Counts) -> NDArray[np.float64]:
    """-log2 of the share of each code among those counted and PRIOR more, two-sided geometric of the same mean size."""
    most, total = len(counts) // 2, max(1, int(counts.sum()))
    sizes = np.abs(np.arange(-most, most + 1))
    mean = max(float((counts * sizes).sum()), 1.0) / total
    ratio = mean / (1 + math.sqrt(1 + mean * mean))
    prior = ratio**sizes * (1 - ratio) / (1 + ratio)
    shares = counts + PRIOR * prior
    costs: NDArray[np.float64] = -np.log2(np.maximum(shares / shares.sum(), RAREST))
    return costs
