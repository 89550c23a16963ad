"""The best choice for a knapsack with maps: within the sets of options that the dual's prices prefer, then by HiGHS.

Within given sets, one for each group, it is the plain knapsack, which is solved all but exactly. What is left is which
sets: HiGHS decides between those whose reduced cost is within the gap, together with the options of their items.
"""

from dataclasses import dataclass, replace

import numpy as np

from .core import decided
from .dual import Choice, Dual, Floats, dual
from .knapsack import Problem, Solution, solve
from .parts_core import OpenSet, parts_core
from .parts_knapsack import Flags, PartsProblem, bits_of, option_sets
from .watch import Watch

ALTERNATIVES = 150  # sets and options beside the best that HiGHS decides between
NODES = 50  # of its search tree: the dual's bound leaves a hundredth of a percent
ENOUGH = 1e-4  # a gap that another search for seconds would not be worth
ROUNDS = 2  # a better choice narrows what is open


def solve_parts(problem: PartsProblem, watch: Watch) -> Solution | None:
    """The best choice found, and the bound; None where no choice keeps the limits."""
    plain = problem.plain
    if not plain.costs.shape[1]:
        return Solution(np.zeros(0, np.int64), 0.0, 0.0)
    if not np.isfinite(plain.costs).any(axis=0).all() or _out_of_reach(problem):
        return None
    unit, limits = plain.units()
    scaled = PartsProblem(plain.scaled(unit, limits), problem.starts, problem.maps / limits[:, None])
    found = dual(scaled, watch).of(unit, limits)
    prices = _Prices.of(problem, found.prices)
    best = _started(problem, prices, found, watch)
    if best is None:
        return None
    best = replace(best, bound=min(found.bound, best.cost))
    for _ in range(ROUNDS):
        closer = _closer(problem, best, prices, watch) if watch.left else best
        if closer.cost == best.cost or closer.gap < ENOUGH:
            return closer
        best = closer
    return best


def _out_of_reach(problem: PartsProblem) -> bool:
    return any(problem.least(m).excess[m] > 0 for m in range(len(problem.limits)))


@dataclass(frozen=True)
class _Prices:
    """values: what each option costs at the dual's prices, (options, items); reduced: what each set costs a group
    beyond the best of its sets, (sets, groups)."""

    values: Floats
    reduced: Floats

    @classmethod
    def of(cls, problem: PartsProblem, prices: Floats) -> "_Prices":
        values = problem.values(prices)
        by_set = problem.by_set(values, prices)
        return cls(values, by_set - by_set.min(axis=0))

    def best_with(self, used: Flags) -> Choice:
        """The cheapest set that has all these options, (groups, options), and no larger map, for each group."""
        sets = option_sets(used.shape[1])
        has_all = (sets[:, None, :] >= used).all(axis=2) & (bits_of(sets)[:, None] == bits_of(used))
        return np.asarray(np.where(has_all, self.reduced, np.inf).argmin(axis=0))

    def beyond(self, problem: PartsProblem, index: int, group: int) -> Floats:
        """What each option of each item costs beyond the group's best, if the group has this set; (options, items)."""
        values = self.values[option_sets(len(self.values))[index], problem.items(group)]
        return np.asarray(values - values.min(axis=0) + self.reduced[index, group])


def _started(problem: PartsProblem, prices: _Prices, found: Dual, watch: Watch) -> Solution | None:
    """The plain knapsack within the sets that the prices prefer, or with one option for all of a group."""
    sets = option_sets(len(prices.values))
    starts = [prices.reduced.argmin(axis=0)]
    if found.choice is not None:
        starts.append(prices.best_with(problem.used_options(found.choice)))
    solutions = [solve(problem.within_sets(sets[start]), False, watch) for start in starts]
    best = min((each for each in solutions if each is not None), key=_cost, default=None)
    plain, sizes = problem.plain, np.bincount(problem.group)
    merged = Problem(
        np.add.reduceat(plain.costs, problem.starts, axis=1),
        np.add.reduceat(plain.weights, problem.starts, axis=2),
        plain.limits,
    )
    if best is not None and dual(merged, watch).bound >= best.cost:
        return best
    whole = solve(merged, watch=watch)
    if whole is None or (best is not None and best.cost <= whole.cost):
        return best
    return replace(whole, choice=np.repeat(whole.choice, sizes))


def _cost(solution: Solution) -> float:
    return solution.cost


def _closer(problem: PartsProblem, best: Solution, prices: _Prices, watch: Watch) -> Solution:
    """Something better among the sets and options that the gap leaves open, if there is."""
    room = (best.cost - best.bound) * (1 + 1e-9)
    if room <= 0:
        return best
    most = _narrowed(problem, prices, room)
    sets = _open_sets(problem, prices, best.choice, most)
    if not sets:
        return replace(best, bound=best.cost) if most == room else best
    core, choice_of = parts_core(problem, sets, best.choice)
    result = decided(core, choice_of, problem.within, NODES, watch)
    if result is None:
        return best
    choice, below = result
    bound = best.bound
    if problem.plain.cost(choice) < best.cost:
        best = Solution(choice, problem.plain.cost(choice), bound)
    return replace(best, bound=min(best.cost, max(bound, below))) if most == room else best


def _narrowed(problem: PartsProblem, prices: _Prices, room: float) -> float:
    """The reduced cost up to which sets and options are open: `room`, or less where there are too many."""
    index, group = np.nonzero(prices.reduced <= room)
    order = np.argsort(prices.reduced[index, group], kind="stable")[: problem.starts.size + ALTERNATIVES + 1]
    costs = [prices.reduced[index[order], group[order]][problem.starts.size :]]
    for s, g in zip(index[order], group[order], strict=True):
        beyond = np.sort(prices.beyond(problem, s, g), axis=0)[1:]
        costs.append(beyond[beyond <= room])
    beside = np.sort(np.concatenate(costs))
    return room if beside.size <= ALTERNATIVES else float(beside[ALTERNATIVES - 1])


def _open_sets(problem: PartsProblem, prices: _Prices, choice: Choice, most: float) -> list[OpenSet]:
    """Of the groups in which something is open: the sets and options up to this reduced cost, and what is chosen."""
    members = option_sets(len(prices.values))
    chosen = prices.best_with(problem.used_options(choice))
    open_ = prices.reduced <= most
    open_[chosen, np.arange(chosen.size)] = True
    found: list[OpenSet] = []
    for group, index in np.argwhere(open_.T):
        beyond = prices.beyond(problem, index, group)
        allowed, items = beyond <= most, np.arange(beyond.shape[1])
        allowed[beyond.argmin(axis=0), items] = True
        options = np.flatnonzero(members[index])
        if chosen[group] == index:
            allowed[np.searchsorted(options, choice[problem.items(group)]), items] = True
        found.append(OpenSet(int(group), options, allowed))
    alone = open_.sum(axis=0) == 1
    return [each for each in found if not (alone[each.group] and each.decided)]
