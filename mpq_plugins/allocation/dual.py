"""The Lagrangian dual of a problem with limits: prices for what is limited, the bound they give, and a start.

At given prices a problem falls apart into its items, so its least value is found at once; the best prices are found
where the lines of two choices cross (one limit) or by cutting planes (several).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .highs import Matrix, Program, optimum
from .watch import Watch

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

MOST_CUTS = 200  # evaluations of the dual function


@dataclass(frozen=True)
class Cut:
    """A minimiser of the Lagrangian: as a function of the prices it bounds the dual by cost + prices . excess."""

    choice: Choice
    cost: float
    excess: Floats


class Separable(Protocol):
    """A problem whose Lagrangian is minimised at once."""

    @property
    def limits(self) -> Floats:
        """The most of everything that is limited, (limits,)."""

    def minimiser(self, prices: Floats) -> Cut:
        """The choice of the least cost + prices . used."""

    def least(self, limit: int) -> Cut:
        """The choice that takes least of one limit, whatever it costs."""


@dataclass(frozen=True)
class Dual:
    """prices: the best found, (limits,); bound: what they give; choice: the cheapest met on the way that keeps the
    limits, or None."""

    prices: Floats
    bound: float
    choice: Choice | None

    def of(self, unit: float, limits: Floats) -> "Dual":
        """Of the problem whose costs are `unit` times as large, and whose limits are these instead of 1."""
        return replace(self, prices=self.prices * unit / limits, bound=self.bound * unit)


def dual(problem: Separable, watch: Watch) -> Dual:
    """The best prices."""
    free = problem.minimiser(np.zeros(len(problem.limits)))
    if (free.excess <= 0).all():
        return Dual(np.zeros(len(problem.limits)), free.cost, free.choice)
    return _one_price(problem, free, watch) if len(problem.limits) == 1 else _many_prices(problem, free, watch)


def _one_price(problem: Separable, over: Cut, watch: Watch) -> Dual:
    """Where the lines of the last choice over the limit and the last within it cross, until no choice lies below."""
    within = problem.least(0)
    if within.excess[0] > 0:
        return Dual(np.zeros(1), -math.inf, None)
    price, bound = np.zeros(1), over.cost
    for done in range(MOST_CUTS):
        if not watch.left:
            break
        watch.tell("prices", done, MOST_CUTS)
        price = np.array([(within.cost - over.cost) / (over.excess[0] - within.excess[0])])
        crossing = over.cost + price[0] * over.excess[0]
        cut = problem.minimiser(price)
        bound = cut.cost + price[0] * cut.excess[0]
        if bound >= crossing - 1e-15 * abs(crossing) or (cut.choice == within.choice).all():
            break
        if cut.excess[0] > 0:
            over = cut
        else:
            within = cut
    return Dual(price, min(bound, within.cost), within.choice)


def _many_prices(problem: Separable, first: Cut, watch: Watch) -> Dual:
    """Kelley's cutting planes: the best prices of all cuts so far, until their bound is reached."""
    count = len(problem.limits)
    cuts, prices, bound = [first], np.zeros(count), first.cost
    best: Cut | None = None
    reach = 1.0
    for done in range(MOST_CUTS):
        if not watch.left:
            break
        watch.tell("prices", done, MOST_CUTS)
        master = optimum(_master(cuts, reach), watch=watch)
        if master is None:
            break
        candidate = master.values[1:]
        cut = problem.minimiser(candidate)
        value = cut.cost + float(candidate @ cut.excess)
        if value > bound:
            prices, bound = candidate, value
        if (cut.excess <= 0).all() and (best is None or cut.cost < best.cost):
            best = cut
        if (candidate >= reach).any() and reach < 1e12:
            reach *= 10
        elif -master.cost - bound <= 1e-12 * max(1.0, abs(bound)):
            break
        cuts.append(cut)
    return Dual(prices, bound, None if best is None else best.choice)


def _master(cuts: Sequence[Cut], reach: float) -> Program:
    """The greatest value that all cuts allow, at prices from 0 to `reach`; its x is (value, *prices)."""
    count = cuts[0].excess.size
    return Program(
        costs=np.array([-1.0, *[0.0] * count]),
        matrix=Matrix.of(np.array([[1.0, *(-cut.excess)] for cut in cuts])),
        at_least=np.full(len(cuts), -np.inf),
        at_most=np.array([cut.cost for cut in cuts]),
        lowest=np.array([-np.inf, *[0.0] * count]),
        highest=np.array([np.inf, *[reach] * count]),
    )
