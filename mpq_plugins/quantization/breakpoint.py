"""Where to split a symmetric weight distribution on [-m, m] into a dense interval [-p, p] and a tail.

Expected squared error of two b-bit quantizers (PWLQ, arXiv 2002.00104, sec. 3), F the distribution function:

    E(p) = C ((m - p)^2 + m (2p - m) (2F(p) - 1)),

C = 1 / (12 n^2) with n steps across each interval. It is convex on (0, m/2), and its minimum satisfies
2m F(p) = 2m - p + m (m - 2p) f(p).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from ..plans.piecewise import Piecewise
from .grid import Floats, GroupStats, PiecewiseGrids, SquaredErrors, piecewise_grids

HALVINGS = 60  # of (0, m/2): down to the last bit
COARSE = np.geomspace(0.02, 1.0, 24)  # of m; at 1 there is no tail, and what is left is one symmetric quantizer
FINE = np.geomspace(1 / 1.16, 1.16, 9)  # of the best so far: half way to its coarse neighbours and a bit


@dataclass(frozen=True)
class Distribution:
    """A symmetric distribution of unit standard deviation: F, its density f, and PWLQ's closed-form breakpoint."""

    cdf: Callable[[Floats], Floats]
    density: Callable[[Floats], Floats]
    closed_form: Callable[[Floats], Floats]


GAUSSIAN = Distribution(
    cdf=ndtr,
    density=lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
    closed_form=lambda m: np.log(0.8614 * m + 0.6079),
)
# Of unit deviation, so of scale sqrt(1/2).
LAPLACIAN = Distribution(
    cdf=lambda x: np.where(x < 0, np.exp(np.sqrt(2) * np.minimum(x, 0)) / 2, 1 - np.exp(-np.sqrt(2) * np.abs(x)) / 2),
    density=lambda x: np.exp(-np.sqrt(2) * np.abs(x)) / np.sqrt(2),
    closed_form=lambda m: 0.8030 * np.sqrt(m) - 0.3167,
)
DISTRIBUTIONS = {"gaussian": GAUSSIAN, "laplacian": LAPLACIAN}


def expected_error(p: Floats, m: Floats, steps: int, distribution: Distribution) -> Floats:
    """E(p) in units of the variance; p and m in standard deviations, `steps` n across each of the two intervals.

    n = 2^(b-1) - 1 where each interval has b bits, 2^(b-2) where 2^b levels serve both.
    """
    inside = 2 * distribution.cdf(p) - 1
    error: Floats = ((m - p) ** 2 + m * (2 * p - m) * inside) / (12 * steps**2)
    return error


def optimal_root(m: Floats, distribution: Distribution) -> Floats:
    """The p in (0, m/2) at which E is least, for each m (standard deviations), by bisection of E's slope."""
    low, high = np.zeros_like(m), m / 2
    for _ in range(HALVINGS):
        p = (low + high) / 2
        slope = 2 * m * distribution.cdf(p) - (2 * m - p + m * (m - 2 * p) * distribution.density(p))
        low, high = np.where(slope < 0, p, low), np.where(slope < 0, high, p)
    return (low + high) / 2


def choose_breakpoints(
    stats: GroupStats, bits: Sequence[int], scheme: Piecewise, squared_errors: SquaredErrors
) -> PiecewiseGrids:
    """The two-interval grids of each group at these bit-widths, breakpoints by the scheme's rule, (R, len(bits))."""
    widths = np.array([scheme.check_bits(b) for b in bits], np.int64)
    choice = _Groups(stats, scheme.storage == "shared")
    if scheme.breakpoint != "search":
        split = choice.by_formula(scheme.breakpoint)
        return choice.grids(np.repeat(split, len(widths), axis=1), widths)
    splits = [choice.search(b, squared_errors) for b in widths]
    return choice.grids(np.hstack(splits), widths)


class _Groups:
    """What a breakpoint is chosen from: the greatest magnitude and root mean square of each group, (R, 1)."""

    def __init__(self, stats: GroupStats, shared: bool) -> None:
        self.highest = np.maximum(-stats.low, stats.high)[:, None]
        self.deviation = np.sqrt(stats.squared / max(1, stats.count))[:, None]
        self.constant = (stats.low == stats.high)[:, None]
        self.shared = shared

    def grids(self, split: Floats, bits: NDArray[np.int64]) -> PiecewiseGrids:
        return piecewise_grids(split, self.highest, self.constant, bits, self.shared)

    def by_formula(self, name: str) -> Floats:
        """The optimum for a distribution of this deviation; the mean of a symmetric one is 0."""
        family, _, root = name.partition("_")
        deviation = np.where(self.deviation > 0, self.deviation, 1.0)
        m = self.highest / deviation
        distribution = DISTRIBUTIONS[family]
        p = optimal_root(m, distribution) if root else distribution.closed_form(m)
        # The optimum lies in (0, m/2); for an all-zero group that is 0.
        return np.clip(p, 0.0, m / 2) * deviation

    def search(self, bits: int, squared_errors: SquaredErrors) -> Floats:
        """The split with the least squared error: of every formula's, then of coarse steps, then of fine ones."""
        formulas = [self.by_formula(f"{family}{root}") for family in DISTRIBUTIONS for root in ("", "_root")]
        best = self._best(np.hstack([*formulas, self.highest * COARSE]), bits, squared_errors)
        return self._best(np.minimum(best * FINE, self.highest), bits, squared_errors)

    def _best(self, splits: Floats, bits: int, squared_errors: SquaredErrors) -> Floats:
        errors = squared_errors(self.grids(splits, np.full(splits.shape[1], bits)))
        return np.take_along_axis(splits, errors.argmin(axis=1, keepdims=True), axis=1)
