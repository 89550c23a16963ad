"""One option for each item at the least cost within several limits: the multiple-choice knapsack.

    minimise  sum_i costs[k_i, i]   subject to   sum_i weights[m, k_i, i] <= limits[m]  for every m

The Lagrangian dual gives a bound and a first solution; only options on the lower convex hull of an item's (weight,
cost) points ever minimise cost + lambda weight, so it walks the hull without building it. What the dual leaves open
is closed by HiGHS: an option whose reduced cost exceeds the gap cannot be part of a better solution (reduced-cost
fixing), so the integer program that remains is small even for a million items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .highs import Matrix, Program, optimum

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]

MOST_CUTS = 200  # evaluations of the dual function
MOST_ROUNDS = 100  # of the greedy filling
CORE_OPTIONS = 2000  # up to which HiGHS decides all that is open, so that its optimum is the problem's
CORE_ITEMS = 60  # of a larger core: it decides these, and the others keep what the filling gave them
NODES = 20_000  # of its search tree; a limit in seconds would make a plan depend on the machine
FEW_NODES = 500  # where the gap is parts in a million anyway
EXACT_ATTEMPTS = 20  # choices over a limit by less than HiGHS sees that are refused one by one
SMALLEST = 1e-200  # below it a limit is 0 but for its last bits, and nothing is measured in it
ROOM = 1e-7  # of the largest weight, beyond a limit: HiGHS's presolve loses choices that meet it to the bit
OBJECTIVE_SCALE = 1e6  # HiGHS stops at an absolute gap of 1e-6


@dataclass(frozen=True)
class Problem:
    """costs: (options, items), infinite where an option is not allowed; weights: (limits, options, items); limits."""

    costs: Floats
    weights: Floats
    limits: Floats

    def cost(self, choice: Choice) -> float:
        """The cost of one option per item."""
        return math.fsum(self.costs[choice, np.arange(choice.size)])

    def used(self, choice: Choice) -> Floats:
        """What it takes of each limit, (limits,)."""
        columns = np.arange(choice.size)
        return np.array([math.fsum(taken[choice, columns]) for taken in self.weights])

    def within(self, choice: Choice) -> bool:
        """Whether it stays within every limit."""
        return bool((self.used(choice) <= self.limits).all())


@dataclass(frozen=True)
class Solution:
    """choice: the option of each item, (items,); bound: no choice within the limits costs less."""

    choice: Choice
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the optimum at most, as a share of the cost."""
        return max(0.0, self.cost - self.bound) / abs(self.cost) if self.cost else 0.0


def solve(problem: Problem, close: bool = True) -> Solution | None:
    """The best choice found, and the bound; None where no choice keeps the limits.

    close: whether HiGHS looks for what the dual leaves open.
    """
    if problem.costs.shape[1] == 0:
        return Solution(np.zeros(0, np.int64), 0.0, 0.0)
    if not np.isfinite(problem.costs).any(axis=0).all():
        return None
    largest = float(np.max(problem.costs, where=np.isfinite(problem.costs), initial=0.0))
    unit = largest or 1.0
    limits = np.where(problem.limits > SMALLEST, problem.limits, 1.0)
    scaled = Problem(problem.costs / unit, problem.weights / limits[:, None, None], problem.limits / limits)
    prices, bound, start = _dual(scaled)
    choice = start if start is not None and problem.within(start) else _any_within(problem)
    if choice is None:
        return None
    choice = _filled(problem, choice)
    if not close:
        cost = problem.cost(choice)
        return Solution(choice, cost, min(bound * unit, cost))
    return _closed(problem, choice, prices * unit / limits, bound * unit)


def least(problem: Problem, limit: int) -> Choice:
    """The choice that takes least of one limit, whatever it costs."""
    allowed = np.where(np.isfinite(problem.costs), problem.weights[limit], np.inf)
    cheapest: Choice = np.argmin(allowed, axis=0)
    return cheapest


@dataclass(frozen=True)
class _Cut:
    """A minimiser of the Lagrangian: as a function of the prices it bounds the dual by cost + prices . excess."""

    choice: Choice
    cost: float
    excess: Floats


def _minimiser(problem: Problem, prices: Floats) -> _Cut:
    """At these prices; of equal options the first, which takes least."""
    best = problem.costs[0] + np.tensordot(prices, problem.weights[:, 0], 1)
    choice = np.zeros(best.size, np.int64)
    for k in range(1, len(problem.costs)):
        value = problem.costs[k] + np.tensordot(prices, problem.weights[:, k], 1)
        better = value < best
        best, choice = np.where(better, value, best), np.where(better, k, choice)
    return _Cut(choice, problem.cost(choice), problem.used(choice) - problem.limits)


def _dual(problem: Problem) -> tuple[Floats, float, Choice | None]:
    """Best prices found, the bound they give, and the cheapest choice within the limits met on the way."""
    free = _minimiser(problem, np.zeros(len(problem.limits)))
    if (free.excess <= 0).all():
        return np.zeros(len(problem.limits)), free.cost, free.choice
    return _one_price(problem, free) if len(problem.limits) == 1 else _many_prices(problem, free)


def _one_price(problem: Problem, over: _Cut) -> tuple[Floats, float, Choice | None]:
    """Where the lines of the last choice over the limit and the last within it cross, until no choice lies below."""
    choice = least(problem, 0)
    within = _Cut(choice, problem.cost(choice), problem.used(choice) - problem.limits)
    if within.excess[0] > 0:
        return np.zeros(1), -math.inf, None
    price, bound = np.zeros(1), over.cost
    for _ in range(MOST_CUTS):
        price = np.array([(within.cost - over.cost) / (over.excess[0] - within.excess[0])])
        crossing = over.cost + price[0] * over.excess[0]
        cut = _minimiser(problem, price)
        bound = cut.cost + price[0] * cut.excess[0]
        if bound >= crossing - 1e-15 * abs(crossing) or (cut.choice == within.choice).all():
            break
        if cut.excess[0] > 0:
            over = cut
        else:
            within = cut
    return price, min(bound, within.cost), within.choice


def _many_prices(problem: Problem, first: _Cut) -> tuple[Floats, float, Choice | None]:
    """Kelley's cutting planes: the best prices of all cuts so far, until their bound is reached."""
    count = len(problem.limits)
    cuts, prices, bound = [first], np.zeros(count), first.cost
    best: _Cut | None = None
    reach = 1.0
    for _ in range(MOST_CUTS):
        master = optimum(_master(cuts, reach))
        if master is None:
            break
        candidate = master.values[1:]
        cut = _minimiser(problem, candidate)
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
    return prices, bound, None if best is None else best.choice


def _master(cuts: Sequence[_Cut], reach: float) -> Program:
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


def _any_within(problem: Problem) -> Choice | None:
    """A choice within limits that the dual's walk never met, by HiGHS."""
    items = problem.costs.shape[1]
    result = _program(problem, np.zeros(items, np.int64), np.arange(items), np.isfinite(problem.costs))
    return None if result is None else result[0]


def _filled(problem: Problem, choice: Choice) -> Choice:
    """Spend what is left: the changes that gain most for what they take, as long as they fit."""
    columns = np.arange(choice.size)
    choice = choice.copy()
    for _ in range(MOST_ROUNDS):
        slack = problem.limits - problem.used(choice)
        gains = problem.costs[choice, columns] - problem.costs
        takes = problem.weights - problem.weights[:, choice, columns][:, None]
        fits = (gains > 0) & (takes <= slack[:, None, None]).all(axis=0)
        if not fits.any():
            break
        relative = np.maximum(takes, 0.0) / np.where(problem.limits > 0, problem.limits, 1.0)[:, None, None]
        rate = np.where(fits, gains / np.maximum(relative.sum(axis=0), 1e-30), 0.0)
        option = rate.argmax(axis=0)
        items = np.flatnonzero(rate[option, columns] > 0)
        items = items[np.argsort(-rate[option[items], items], kind="stable")]
        taken = np.cumsum(np.maximum(takes[:, option[items], items], 0.0), axis=1)
        fitting = max(1, int((taken <= slack[:, None]).all(axis=0).sum()))
        trial = choice.copy()
        trial[items[:fitting]] = option[items[:fitting]]
        if not problem.within(trial):  # the last bit of a float
            trial = choice.copy()
            trial[items[0]] = option[items[0]]
            if not problem.within(trial):
                break
        choice = trial
    return choice


def _closed(problem: Problem, choice: Choice, prices: Floats, bound: float) -> Solution:
    """Look for something better among the options that the gap leaves open."""
    cost = problem.cost(choice)
    solution = Solution(choice, cost, min(bound, cost))
    reduced = problem.costs + np.tensordot(prices, problem.weights, 1)
    reduced -= reduced.min(axis=0)
    room = (cost - bound) * (1 + 1e-9)
    if room <= 0:
        return solution
    open_ = (reduced <= room) & np.isfinite(problem.costs)
    items = np.flatnonzero(open_.sum(axis=0) > 1)
    whole = int(open_[:, items].sum()) <= CORE_OPTIONS
    if not items.size:
        return replace(solution, bound=cost)  # nothing else can cost less
    if not whole:
        second = np.partition(np.where(open_[:, items], reduced[:, items], np.inf), 1, axis=0)[1]
        items = items[np.argsort(second, kind="stable")[:CORE_ITEMS]]
    fixed = choice if not whole else np.where(open_.sum(axis=0) == 1, open_.argmax(axis=0), choice)
    result = _program(problem, fixed, items, open_, NODES if whole else FEW_NODES)
    if result is None:
        return solution
    better, below = result
    if problem.within(better) and problem.cost(better) < cost:
        solution = replace(solution, choice=better, cost=problem.cost(better))
    return replace(solution, bound=min(solution.cost, max(bound, below))) if whole else solution


@dataclass(frozen=True)
class _Core:
    """What HiGHS decides of a problem: options of some items, the others fixed; in units that it adds exactly.

    option, item: (open options,), which option of which item each is; costs: in `unit` of the problem's, beyond
    `paid` for the fixed items; takes: (limits, open options) in `scale`, of what is `left`.
    """

    option: Choice
    item: Choice
    costs: Floats
    takes: Floats
    left: Floats
    unit: float
    paid: float
    one_each: Matrix
    items: int

    @classmethod
    def of(cls, problem: Problem, fixed: Choice, items: Choice, open_: NDArray[np.bool_]) -> "_Core":
        """The open options of these items."""
        option, position = np.nonzero(open_[:, items])
        others = np.setdiff1d(np.arange(fixed.size), items)
        spent = np.array([math.fsum(weights[fixed[others], others]) for weights in problem.weights])
        costs = problem.costs[option, items[position]]
        unit = OBJECTIVE_SCALE / max(float(np.abs(costs).max()), 1e-300)
        scale = np.array([_unit(weights) for weights in problem.weights])
        return cls(
            option=option,
            item=items[position],
            costs=costs * unit,
            takes=problem.weights[:, option, items[position]] / scale[:, None],
            left=(problem.limits - spent) / scale,
            unit=unit,
            paid=math.fsum(problem.costs[fixed[others], others]),
            one_each=Matrix(position, np.arange(option.size), np.ones(option.size)),
            items=items.size,
        )

    def program(self, refused: Floats, tight: float) -> Program:
        """One option for each item, with this much less room; refused: (choices, open options), not to be made."""
        limits = Matrix.of(np.concatenate([self.takes, refused]), below=self.items)
        most_refused = np.full(len(refused), self.items - 1.0)
        return Program(
            costs=self.costs,
            matrix=self.one_each.beside(limits),
            at_least=np.concatenate([np.ones(self.items), np.full(len(self.left) + len(refused), -np.inf)]),
            at_most=np.concatenate([np.ones(self.items), self.left - tight, most_refused]),
            lowest=np.zeros(self.option.size),
            highest=np.ones(self.option.size),
            whole=True,
        )


def _program(
    problem: Problem, fixed: Choice, items: Choice, open_: NDArray[np.bool_], nodes: int = NODES
) -> tuple[Choice, float] | None:
    """HiGHS's best choice for these items among the open options, the others fixed; and a bound on the whole cost.

    None where it finds none.
    """
    core = _Core.of(problem, fixed, items, open_)
    refused = np.zeros((0, core.option.size))
    below, tight = -math.inf, -ROOM
    for attempt in range(2 * EXACT_ATTEMPTS):  # HiGHS keeps a limit to a tolerance; ours is kept to the bit
        best = optimum(core.program(refused, tight), nodes)
        if best is None:
            return None
        # Refusing a choice that is over a limit keeps the bound true; taking room away does not.
        if attempt < EXACT_ATTEMPTS:
            below = max(below, best.bound / core.unit + core.paid)
        taken = best.values > 0.5
        choice = fixed.copy()
        choice[core.item[taken]] = core.option[taken]
        if problem.within(choice):
            return choice, below
        refused = np.vstack([refused, taken.astype(np.float64)])
        if attempt >= EXACT_ATTEMPTS - 1:
            tight += 1e-6
    return None


def _unit(weights: Floats) -> float:
    """What every entry is a whole multiple of, so that HiGHS adds small integers; the largest where there is none."""
    if (np.abs(weights) < 2.0**62).all():  # what is larger, or infinite, is no integer that numpy has
        whole = weights.astype(np.int64)
        if (whole == weights).all():
            return float(np.gcd.reduce(whole, axis=None)) or 1.0
    return float(weights.max()) or 1.0
