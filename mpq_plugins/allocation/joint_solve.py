"""A knapsack whose options are pairs of widths, where some items share the second: weights' and inputs' widths.

    minimise  sum_i costs[b_i, a_g(i), i]   subject to   sum_i weights[m, b_i, a_g(i), i] <= limits[m]  for every m

Items of a group g have one input width a; each has its own weight width b. As in knapsack.py, the Lagrangian dual gives
a bound and a first choice, what costs more than the gap at its prices is ruled out, and HiGHS decides the rest.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .core import Core, decided, shared_unit
from .dual import Choice, Cut, Dual, Floats, dual
from .highs import Matrix
from .knapsack import Problem, Solution, filled
from .watch import Watch

NODES = 1_000  # of the search tree; a limit in seconds would make a plan depend on the machine
STEPS = ((0.1, 100), (1.0, NODES))  # up to which share of the gap options are open: a better choice leaves fewer open


@dataclass(frozen=True)
class JointProblem:
    """plain: of pairs, option = b x inputs + a; inputs: how many input widths there are; group: of each item."""

    plain: Problem
    inputs: int
    group: Choice

    @property
    def limits(self) -> Floats:
        """The most of everything that is limited, (limits,)."""
        return self.plain.limits

    def minimiser(self, prices: Floats) -> Cut:
        """The choice of the least Lagrangian; of equal ones the first, which takes least."""
        return self.cut(self.choice(self.values(prices)))

    def least(self, limit: int) -> Cut:
        """The choice that takes least of one limit, whatever it costs."""
        return self.cut(self.choice(np.where(np.isfinite(self.plain.costs), self.plain.weights[limit], np.inf)))

    def values(self, prices: Floats) -> Floats:
        """What each option costs at these prices, (options, items)."""
        values: Floats = self.plain.costs + np.tensordot(prices, self.plain.weights, 1)
        return values

    def choice(self, values: Floats) -> Choice:
        """The best choice where options have these values."""
        a = self._best(values)[1].argmin(axis=0)[self.group]
        b = self.by_width(values).argmin(axis=0)[a, np.arange(self.group.size)]
        choice: Choice = b * self.inputs + a
        return choice

    def reduced(self, values: Floats) -> Floats:
        """What each option costs beyond the best choice, at least, if it is taken; (options, items)."""
        best, by_group = self._best(values)
        beyond = by_group - by_group.min(axis=0)
        others = np.where(np.isfinite(best), beyond[:, self.group], np.inf)  # what the input width costs its group
        with np.errstate(invalid="ignore"):
            each = self.by_width(values) - np.where(np.isfinite(best), best, 0.0) + others
        reduced: Floats = np.where(np.isfinite(values), each.reshape(values.shape), np.inf)
        return reduced

    def by_width(self, values: Floats) -> Floats:
        """Values by weights' and inputs' widths, (bits, inputs, items)."""
        return values.reshape(-1, self.inputs, self.group.size)

    def cut(self, choice: Choice) -> Cut:
        """The choice as the dual has it."""
        return Cut(choice, self.plain.cost(choice), self.plain.used(choice) - self.plain.limits)

    def _best(self, values: Floats) -> tuple[Floats, Floats]:
        """The best value of each item at each input width, (inputs, items), and of each group, (inputs, groups)."""
        best = self.by_width(values).min(axis=0)
        by_group = np.zeros((self.inputs, self.groups))
        np.add.at(by_group.T, self.group, best.T)
        return best, by_group

    @cached_property
    def groups(self) -> int:
        """How many there are."""
        return int(self.group.max(initial=-1)) + 1


def solve_joint(problem: JointProblem, watch: Watch) -> Solution | None:
    """The best choice found, and the bound; None where no choice keeps the limits."""
    if not problem.group.size:
        return Solution(np.zeros(0, np.int64), 0.0, 0.0)
    problem = _that_bind(problem)
    plain = problem.plain
    unit, limits = plain.units()
    found = dual(replace(problem, plain=plain.scaled(unit, limits)), watch).of(unit, limits)
    choice = found.choice
    if choice is None or not plain.within(choice):
        result = _program(problem, np.zeros(problem.group.size, np.int64), np.isfinite(plain.costs), NODES, watch)
        if result is None:
            return None
        choice = result[0]
    choice = _filled(problem, choice)
    cost = plain.cost(choice)
    solution = Solution(choice, cost, min(found.bound, cost))
    return _closed(problem, solution, found, watch) if watch.left else solution


def _that_bind(problem: JointProblem) -> JointProblem:
    """Without limits that no choice exceeds: of the sets of inputs that are needed at once, most are small."""
    allowed = np.where(np.isfinite(problem.plain.costs), problem.plain.weights, -np.inf)
    most = np.array([math.fsum(rows.max(axis=0)) for rows in allowed])
    kept = most > problem.limits
    plain = replace(problem.plain, weights=problem.plain.weights[kept], limits=problem.limits[kept])
    return replace(problem, plain=plain)


def _filled(problem: JointProblem, choice: Choice) -> Choice:
    """Spend what is left, the input widths of groups of several items as they are."""
    costs = problem.plain.costs.copy()
    shared = np.bincount(problem.group)[problem.group] > 1
    other = np.arange(len(costs))[:, None] % problem.inputs != choice % problem.inputs
    costs[other & shared] = np.inf
    return filled(replace(problem.plain, costs=costs), choice)


def _closed(problem: JointProblem, solution: Solution, found: Dual, watch: Watch) -> Solution:
    """Look for something better among the options that the gap leaves open, the likeliest of them first."""
    plain, reduced = problem.plain, problem.reduced(problem.values(found.prices))
    for share, nodes in STEPS:
        room = (solution.cost - solution.bound) * (1 + 1e-9)
        if room <= 0 or not watch.left:
            break
        open_ = reduced <= room * share
        if (open_.sum(axis=0) <= 1).all():  # nothing else can cost less
            solution = replace(solution, bound=solution.cost) if share == 1 else solution
            continue
        result = _program(problem, solution.choice, open_, nodes, watch)
        if result is None:
            continue
        better, below = result
        if plain.within(better) and plain.cost(better) < solution.cost:
            solution = replace(solution, choice=better, cost=plain.cost(better))
        bound = max(solution.bound, below) if share == 1 else solution.bound
        solution = replace(solution, bound=min(solution.cost, bound))
    return solution


def _program(
    problem: JointProblem, choice: Choice, open_: NDArray[np.bool_], nodes: int, watch: Watch
) -> tuple[Choice, float] | None:
    """HiGHS's best choice among the open options, and a bound on the cost; None where it finds none.

    Of groups with one open option for each item, that one is taken.
    """
    plain = problem.plain
    undecided = np.bincount(problem.group, open_.sum(axis=0) > 1, problem.groups)[problem.group] > 0
    fixed = np.where(undecided, choice, open_.argmax(axis=0))
    items, others = np.flatnonzero(undecided), np.flatnonzero(~undecided)
    if not items.size:  # everything is pinned
        return (fixed, plain.cost(fixed)) if plain.within(fixed) else None
    option, position = np.nonzero(open_[:, items])
    item = items[position]
    rows, equal = _equations(problem, items, option, item)
    core = Core(
        costs=plain.costs[option, item],
        takes=plain.weights[:, option, item],
        left=plain.limits - np.array([math.fsum(weights[fixed[others], others]) for weights in plain.weights]),
        units=np.array([shared_unit(weights) for weights in plain.weights]),
        paid=math.fsum(plain.costs[fixed[others], others]),
        rows=rows,
        equal=equal,
    )

    def choice_of(taken: NDArray[np.bool_]) -> Choice:
        made = fixed.copy()
        made[item[taken]] = option[taken]
        return made

    return decided(core, choice_of, plain.within, nodes, watch)


def _equations(problem: JointProblem, items: Choice, option: Choice, item: Choice) -> tuple[Matrix, Floats]:
    """That each group's first item takes one option, and that each other one takes one of the same input width.

    option, item: of each variable.
    """
    groups, index = np.unique(problem.group[items], return_index=True)
    leaders, variables, a = items[index], np.arange(item.size), option % problem.inputs
    leads = np.isin(item, leaders)
    one = Matrix(np.searchsorted(groups, problem.group[item[leads]]), variables[leads], np.ones(int(leads.sum())))
    matrices, equal = [one], [np.ones(groups.size)]
    for n, follower in enumerate(np.setdiff1d(items, leaders)):
        leader = leaders[np.searchsorted(groups, problem.group[follower])]
        for whose, sign in ((follower, 1.0), (leader, -1.0)):
            own = variables[item == whose]
            row = groups.size + n * problem.inputs + a[own]
            matrices.append(Matrix(row, own, np.full(own.size, sign)))
        equal.append(np.zeros(problem.inputs))
    return Matrix.together(matrices), np.concatenate(equal)
