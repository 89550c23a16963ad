"""The knapsack with maps against every choice there is."""

import itertools
import math
import time

import numpy as np
import pytest

from mpq_plugins.allocation import parts_solve
from mpq_plugins.allocation.dual import Choice
from mpq_plugins.allocation.knapsack import Problem, Solution, solve
from mpq_plugins.allocation.parts_knapsack import PartsProblem, option_sets
from mpq_plugins.allocation.parts_solve import solve_parts
from mpq_plugins.allocation.watch import Watch

FOREVER = Watch()


def seeded(sizes: list[int], options: int = 3, limits: int = 1, seed: int = 0, share: float = 0.5) -> PartsProblem:
    """Groups of so many items; costs that fall about fourfold an option, sizes that differ by group, maps that count.

    Some options are forbidden; with several limits, each weighs the groups otherwise.
    """
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes[:-1]])
    group = np.repeat(np.arange(len(sizes)), sizes)
    steps = np.arange(1, options + 1)[:, None]
    costs = generator.lognormal(0, 1.5, group.size) * 4.0**-steps * generator.uniform(0.8, 1.2, (options, group.size))
    costs[1:][generator.uniform(size=costs[1:].shape) < 0.05] = np.inf
    per = generator.integers(1, 9, (limits, len(sizes))).astype(np.float64)
    weights = steps * per[:, None, group]
    maps = np.where(np.array(sizes) > 1, np.array(sizes), 0) * generator.integers(0, 3, (limits, 1)).astype(np.float64)
    least, most = weights[:, 0].sum(axis=1), weights[:, -1].sum(axis=1)
    return PartsProblem(Problem(costs, weights, np.floor(least + share * (most - least))), starts, maps)


def takes(problem: PartsProblem, choice: tuple[int, ...], limit: int) -> float:
    """Worked out apart: the options one by one, and for each group a map of so many bits."""
    total = sum(float(problem.plain.weights[limit, k, i]) for i, k in enumerate(choice))
    ends = [*problem.starts[1:], len(choice)]
    for group, (start, end) in enumerate(zip(problem.starts, ends, strict=True)):
        used = len(set(choice[start:end]))
        total += float(problem.maps[limit, group]) * math.ceil(math.log2(used))
    return total


def cost(problem: PartsProblem, choice: tuple[int, ...]) -> float:
    return math.fsum(float(problem.plain.costs[k, i]) for i, k in enumerate(choice))


def every_choice(problem: PartsProblem) -> list[tuple[int, ...]]:
    options, items = problem.plain.costs.shape
    return list(itertools.product(range(options), repeat=items))


def cheapest(problem: PartsProblem) -> float:
    """The least cost of all choices within the limits, infinite where there is none."""
    within = (
        choice
        for choice in every_choice(problem)
        if all(takes(problem, choice, m) <= most for m, most in enumerate(problem.limits))
    )
    return min((cost(problem, choice) for choice in within), default=math.inf)


def check(problem: PartsProblem, best: float) -> Solution:
    """What holds of every answer."""
    found = solve_parts(problem, FOREVER)
    assert found is not None
    choice = tuple(found.choice.tolist())
    assert all(takes(problem, choice, m) <= most for m, most in enumerate(problem.limits))
    assert found.cost == pytest.approx(cost(problem, choice), rel=1e-12)
    assert found.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.cost
    assert found.cost * (1 - found.gap) <= best * (1 + 1e-9)
    return found


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(limits: int, seed: int) -> None:
    """Three options at most 3^8 ways; so few that HiGHS decides everything."""
    sizes = [[3, 4], [2, 2, 3], [4, 1, 3], [1, 1, 4, 2]][seed % 4]
    problem = seeded(sizes, limits=limits, seed=seed, share=0.15 + 0.06 * seed)
    best = cheapest(problem)
    if best == math.inf:
        assert solve_parts(problem, FOREVER) is None
        return
    assert check(problem, best).cost == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_what_was_not_decided_is_within_the_gap_that_is_said(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program cut down to nothing the bound stays true, and so does the gap."""
    monkeypatch.setattr(parts_solve, "ALTERNATIVES", 1)
    problem = seeded([3, 4], seed=seed, share=0.3)
    found = check(problem, cheapest(problem))
    assert found.gap >= 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("price", [0.0, 1e-3, 0.02, 0.3])
def test_no_choice_has_a_lesser_lagrangian(seed: int, price: float) -> None:
    problem = seeded([3, 2, 1], options=4, seed=seed)
    cut = problem.minimiser(np.array([price]))
    value = cut.cost + price * (cut.excess[0] + problem.limits[0])
    least = min(cost(problem, choice) + price * takes(problem, choice, 0) for choice in every_choice(problem))
    assert value == pytest.approx(least, rel=1e-12)
    assert cut.excess[0] + problem.limits[0] == takes(problem, tuple(cut.choice.tolist()), 0)


@pytest.mark.parametrize("seed", range(8))
def test_least_is_what_takes_least(seed: int) -> None:
    problem = seeded([3, 2, 1], options=4, limits=2, seed=seed)
    allowed = [choice for choice in every_choice(problem) if cost(problem, choice) < math.inf]
    for m in range(2):
        found = tuple(problem.least(m).choice.tolist())
        assert takes(problem, found, m) == min(takes(problem, choice, m) for choice in allowed)


def test_out_of_reach_is_none() -> None:
    problem = seeded([3, 4], share=-0.5)
    assert solve_parts(problem, FOREVER) is None


def test_without_maps_it_is_the_plain_knapsack() -> None:
    problem = seeded([30, 20, 7], options=5, seed=3)
    free = PartsProblem(problem.plain, problem.starts, np.zeros_like(problem.maps))
    plain, parts = solve(free.plain), solve_parts(free, FOREVER)
    assert plain is not None
    assert parts is not None
    assert parts.cost == pytest.approx(plain.cost, rel=1e-4)
    assert parts.bound <= plain.cost * (1 + 1e-12)


@pytest.mark.parametrize(("options", "count"), [(1, 1), (2, 3), (3, 7), (5, 21), (8, 107)])
def test_sets_are_those_that_fill_an_index(options: int, count: int) -> None:
    """Of 1, 2, 4 or 8 options, or of all."""
    sets = option_sets(options)
    assert len({tuple(row) for row in sets}) == len(sets) == count
    assert set(sets.sum(axis=1)) == {min(size, options) for size in (1, 2, 4, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_a_network_is_solved_to_a_tenth_of_a_percent(limits: int, share: float) -> None:
    problem = seeded([16] * 7 + [32] * 6 + [64] * 6 + [10], options=8, limits=limits, share=share)
    found = solve_parts(problem, FOREVER)
    assert found is not None
    assert problem.within(found.choice)
    assert found.gap < 1e-3
    for price in np.geomspace(1e-9, 1e3, 40):  # weak duality, worked out apart
        prices = np.full(limits, price / len(found.choice))
        cut = problem.minimiser(prices)
        assert cut.cost + prices @ cut.excess <= found.cost * (1 + 1e-9)


@pytest.mark.slow
def test_the_same_problem_gets_the_same_choice() -> None:
    first, second = (solve_parts(seeded([16] * 10, options=8), FOREVER) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.choice == second.choice).all()
    assert (first.cost, first.bound) == (second.cost, second.bound)


def test_without_time_there_is_a_choice_and_its_gap() -> None:
    problem = seeded([16] * 10, options=8, seed=1)
    start = time.monotonic()
    hurried, patient = solve_parts(problem, Watch(1e-9)), solve_parts(problem, FOREVER)
    assert time.monotonic() - start < 60
    assert hurried is not None
    assert patient is not None
    assert problem.within(hurried.choice)
    assert hurried.bound <= patient.cost <= hurried.cost
    assert hurried.gap > patient.gap


def test_groups_of_one_block_after_another_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = seeded([5, 1, 9, 3, 3], options=6, seed=2)
    prices = np.array([0.01])
    values = problem.values(prices)
    expected = problem.by_set(values, prices)
    for block in (1, 4, 8):
        monkeypatch.setattr("mpq_plugins.allocation.parts_knapsack.BLOCK", block)
        assert (problem.by_set(values, prices) == expected).all()


def test_a_choice_counts_what_it_uses() -> None:
    problem = seeded([3, 4], seed=5)
    choice: Choice = np.array([0, 0, 1, 2, 2, 2, 2])
    assert problem.used(choice)[0] == takes(problem, tuple(choice.tolist()), 0)
    assert problem.used_options(choice).tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize("seed", range(6))
def test_a_change_takes_what_the_changed_choice_takes_more(seed: int) -> None:
    problem = seeded([3, 4, 1], options=4, limits=2, seed=seed)
    choice = np.random.default_rng(seed).integers(0, 4, 8)
    changes = problem.changes(choice)
    for k, i in itertools.product(range(4), range(8)):
        changed = choice.copy()
        changed[i] = k
        if k != choice[i]:
            assert changes[:, k, i] == pytest.approx(problem.used(changed) - problem.used(choice))
