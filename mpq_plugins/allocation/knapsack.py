"""One option for each item at the least cost within several limits: the multiple-choice knapsack.

    minimise  sum_i costs[k_i, i]   subject to   sum_i weights[m, k_i, i] <= limits[m]  for every m

The Lagrangian dual gives a bound and a first solution; only options on the lower convex hull of an item's (weight,
cost) points ever minimise cost + lambda weight, so it walks the hull without building it. What the dual leaves open
is closed by HiGHS: an option whose reduced cost exceeds the gap cannot be part of a better solution (reduced-cost
fixing), so the integer program that remains is small even for a million items.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .core import Core, decided, shared_unit
from .dual import Choice, Cut, Dual, Floats, dual
from .highs import Matrix
from .watch import Watch

MOST_ROUNDS = 100  # of the greedy filling
CORE_OPTIONS = 2000  # up to which HiGHS decides all that is open, so that its optimum is the problem's
CORE_ITEMS = 60  # of a larger core: it decides these, and the others keep what the filling gave them
NODES = 20_000  # of the search tree; a limit in seconds would make a plan depend on the machine
FEW_NODES = 500  # where the gap is parts in a million anyway
MANY_ITEMS = 1000  # channels of a network, and no layers; the last 1e-5 of their cost would take seconds to prove
NODES_OF_MANY = 100
SMALLEST = 1e-200  # below it a limit is 0 but for its last bits, and nothing is measured in it


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

    def units(self) -> tuple[float, Floats]:
        """The largest cost and the limits, in units of which numbers are near 1."""
        largest = float(np.max(self.costs, where=np.isfinite(self.costs), initial=0.0))
        return largest or 1.0, np.where(self.limits > SMALLEST, self.limits, 1.0)

    def scaled(self, unit: float, limits: Floats) -> "Problem":
        """The same in these units."""
        return Problem(self.costs / unit, self.weights / limits[:, None, None], self.limits / limits)

    def minimiser(self, prices: Floats) -> Cut:
        """The choice of the least Lagrangian; of equal options the first, which takes least."""
        best = self.costs[0] + np.tensordot(prices, self.weights[:, 0], 1)
        choice = np.zeros(best.size, np.int64)
        for k in range(1, len(self.costs)):
            value = self.costs[k] + np.tensordot(prices, self.weights[:, k], 1)
            better = value < best
            best, choice = np.where(better, value, best), np.where(better, k, choice)
        return self._cut(choice)

    def least(self, limit: int) -> Cut:
        """The choice that takes least of one limit, whatever it costs."""
        allowed = np.where(np.isfinite(self.costs), self.weights[limit], np.inf)
        return self._cut(np.argmin(allowed, axis=0))

    def _cut(self, choice: Choice) -> Cut:
        return Cut(choice, self.cost(choice), self.used(choice) - self.limits)


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


def solve(problem: Problem, close: bool = True, watch: Watch | None = None) -> Solution | None:
    """The best choice found, and the bound; None where no choice keeps the limits.

    close: whether HiGHS looks for what the dual leaves open.
    """
    watch = watch or Watch()
    if problem.costs.shape[1] == 0:
        return Solution(np.zeros(0, np.int64), 0.0, 0.0)
    if not np.isfinite(problem.costs).any(axis=0).all():
        return None
    unit, limits = problem.units()
    found = dual(problem.scaled(unit, limits), watch).of(unit, limits)
    start = found.choice
    choice = start if start is not None and problem.within(start) else _any_within(problem, watch)
    if choice is None:
        return None
    choice = filled(problem, choice)
    cost = problem.cost(choice)
    solution = Solution(choice, cost, min(found.bound, cost))
    return _closed(problem, solution, found, watch) if close and watch.left else solution


def _any_within(problem: Problem, watch: Watch) -> Choice | None:
    """A choice within limits that the dual's walk never met, by HiGHS."""
    items = problem.costs.shape[1]
    result = _program(problem, np.zeros(items, np.int64), np.arange(items), np.isfinite(problem.costs), NODES, watch)
    return None if result is None else result[0]


def filled(problem: Problem, choice: Choice) -> Choice:
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


def _closed(problem: Problem, solution: Solution, found: Dual, watch: Watch) -> Solution:
    """Look for something better among the options that the gap leaves open."""
    choice, cost, bound = solution.choice, solution.cost, found.bound
    reduced = problem.costs + np.tensordot(found.prices, problem.weights, 1)
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
    most = NODES if choice.size <= MANY_ITEMS else NODES_OF_MANY
    result = _program(problem, fixed, items, open_, most if whole else FEW_NODES, watch)
    if result is None:
        return solution
    better, below = result
    if problem.within(better) and problem.cost(better) < cost:
        solution = replace(solution, choice=better, cost=problem.cost(better))
    return replace(solution, bound=min(solution.cost, max(bound, below))) if whole else solution


def _program(
    problem: Problem, fixed: Choice, items: Choice, open_: NDArray[np.bool_], nodes: int, watch: Watch
) -> tuple[Choice, float] | None:
    """HiGHS's best choice for these items among the open options, the others fixed; and a bound on the whole cost.

    None where it finds none.
    """
    option, position = np.nonzero(open_[:, items])
    item = items[position]
    others = np.setdiff1d(np.arange(fixed.size), items)
    spent = np.array([math.fsum(weights[fixed[others], others]) for weights in problem.weights])
    core = Core(
        costs=problem.costs[option, item],
        takes=problem.weights[:, option, item],
        left=problem.limits - spent,
        units=np.array([shared_unit(weights) for weights in problem.weights]),
        paid=math.fsum(problem.costs[fixed[others], others]),
        rows=Matrix(position, np.arange(option.size), np.ones(option.size)),
        equal=np.ones(items.size),
    )

    def choice_of(taken: NDArray[np.bool_]) -> Choice:
        choice = fixed.copy()
        choice[item[taken]] = option[taken]
        return choice

    return decided(core, choice_of, problem.within, nodes, watch)
