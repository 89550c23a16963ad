"""The knapsack against every choice there is."""

import itertools
import math
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.allocation import knapsack
from mpq_plugins.allocation.dual import Choice
from mpq_plugins.allocation.knapsack import Problem, Solution, solve

CLOSE = 1e-9  # of the largest cost; HiGHS itself stops at 1e-12 of it


@st.composite
def problems(draw: st.DrawFn, whole: bool | None = None, limits: int | None = None) -> Problem:
    """Up to 5 items, 4 options and 2 limits; some options forbidden, some limits met to the last bit."""
    options, items = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = draw(st.integers(1, 2)) if limits is None else limits
    whole = draw(st.booleans()) if whole is None else whole
    amounts = st.integers(0, 12).map(float) if whole else st.floats(0, 10)
    costs = st.one_of(st.floats(0, 10), st.integers(0, 3).map(float), st.just(math.inf))
    grid = np.array([draw(costs) for _ in range(options * items)]).reshape(options, items)
    weights = np.array([draw(amounts) for _ in range(rows * options * items)]).reshape(rows, options, items)
    if draw(st.booleans()):  # the limits are what some choice takes
        choice = np.array([draw(st.integers(0, options - 1)) for _ in range(items)])
        most = Problem(grid, weights, np.zeros(rows)).used(choice)
    else:
        most = np.array([draw(st.floats(-1, 10.0 * items)) for _ in range(rows)])
    return Problem(grid, weights, most)


def every_choice(problem: Problem) -> list[Choice]:
    options, items = problem.costs.shape
    return [np.array(choice, np.int64) for choice in itertools.product(range(options), repeat=items)]


def cheapest(problem: Problem) -> float:
    """The least cost of all choices within the limits, infinite where there is none."""
    found = math.inf
    for choice in every_choice(problem):
        pairs = list(enumerate(choice))
        used = [math.fsum(float(own[k, i]) for i, k in pairs) for own in problem.weights]
        if all(amount <= limit for amount, limit in zip(used, problem.limits, strict=True)):
            found = min(found, math.fsum(float(problem.costs[k, i]) for i, k in pairs))
    return found


def largest(problem: Problem) -> float:
    return float(np.max(problem.costs, where=np.isfinite(problem.costs), initial=1.0))


def cost_of(solution: Solution | None) -> float:
    return math.inf if solution is None else solution.cost


def seeded(items: int, limits: int = 1, share: float = 0.5, seed: int = 0) -> Problem:
    """Errors that fall about fourfold with every bit, sizes that differ; `share` of what eight bits take."""
    generator = np.random.default_rng(seed)
    bits = np.arange(1, 9)[:, None]
    sizes = generator.integers(1, 500, items) * 8
    costs = generator.lognormal(0, 2, items) * sizes * 4.0**-bits * generator.uniform(0.8, 1.2, (8, items))
    weights = [np.asarray(bits * sizes, np.float64)]
    weights += [bits * generator.uniform(1, 100, items) for _ in range(limits - 1)]
    stacked = np.stack(weights)
    most = np.floor(stacked[:, 7].sum(axis=1) * share)
    return Problem(np.sort(costs, axis=0)[::-1].copy(), stacked, most)


@given(problems())
def test_it_is_the_best_of_all_choices(problem: Problem) -> None:
    best = cheapest(problem)
    solution = solve(problem)
    if best == math.inf:
        assert solution is None
        return
    assert solution is not None
    assert solution.cost == pytest.approx(best, abs=CLOSE * largest(problem))
    assert solution.cost == problem.cost(solution.choice)
    assert (problem.used(solution.choice) <= problem.limits).all()
    assert solution.bound <= solution.cost
    assert solution.bound <= best + CLOSE * largest(problem)
    assert 0 <= solution.gap <= 1e-6 or solution.cost < CLOSE * largest(problem)


@pytest.mark.parametrize("limits", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_it_is_the_best_of_all_choices_where_no_two_are_alike(limits: int, scale: float) -> None:
    """Costs all different, so that what the greedy filling leaves open has to be closed."""
    for seed in range(50):
        generator = np.random.default_rng(seed)
        weights = np.asarray(scale * generator.integers(0, 10, (limits, 4, 5)), np.float64)
        most = np.asarray(scale * generator.integers(10, 25, limits), np.float64)
        problem = Problem(generator.uniform(0, 10, (4, 5)), weights, most)
        solution, best = solve(problem), cheapest(problem)
        assert cost_of(solution) == pytest.approx(best)
        assert solution is None or (solution.bound <= best * (1 + 1e-12) and solution.gap < 1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_it_is_the_best_that_dynamic_programming_finds(seed: int) -> None:
    """Tens of items: the least cost within every whole amount, one item after another."""
    generator = np.random.default_rng(seed)
    options, items, most = 6, int(generator.integers(20, 80)), int(generator.integers(150, 300))
    costs, takes = generator.uniform(0, 10, (options, items)), generator.integers(0, 12, (options, items))
    table = np.zeros(most + 1)
    for i in range(items):
        shifted = [np.concatenate([np.full(t, np.inf), table])[: most + 1] for t in takes[:, i]]
        table = np.min(np.array(shifted) + costs[:, i, None], axis=0)
    best = float(table[most])
    solution = solve(Problem(costs, takes[None].astype(np.float64), np.array([float(most)])))
    assert cost_of(solution) == pytest.approx(best, rel=1e-12)
    assert solution is None or best * (1 - 1e-9) <= solution.bound <= best * (1 + 1e-12)


@pytest.mark.slow
@given(problems(), st.lists(st.floats(0, 5), min_size=2, max_size=2))
def test_more_room_never_costs_more(problem: Problem, more: list[float]) -> None:
    wider = Problem(problem.costs, problem.weights, problem.limits + more[: len(problem.limits)])
    assert cost_of(solve(wider)) <= cost_of(solve(problem)) + CLOSE * largest(problem)


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(problem: Problem, random: Random) -> None:
    order = list(range(problem.costs.shape[1]))
    random.shuffle(order)
    moved = Problem(problem.costs[:, order], problem.weights[:, :, order], problem.limits)
    assert cost_of(solve(moved)) == pytest.approx(cost_of(solve(problem)), abs=CLOSE * largest(problem))


@given(problems(), st.sampled_from([1e-12, 1e-3, 0.3, 7.0, 1e5, 1e12]))
def test_the_unit_of_cost_does_not_matter(problem: Problem, unit: float) -> None:
    other = Problem(problem.costs * unit, problem.weights, problem.limits)
    expected = cost_of(solve(problem))
    assert cost_of(solve(other)) / unit == pytest.approx(expected, abs=CLOSE * largest(problem))


@pytest.mark.slow
@given(problems(), st.sampled_from([1e-9, 1 / 3, 1e9]))
def test_the_unit_of_a_limit_does_not_matter(problem: Problem, unit: float) -> None:
    other = Problem(
        problem.costs, problem.weights * unit, problem.limits * unit * (1 + 1e-12 * np.sign(problem.limits))
    )
    assert cost_of(solve(other)) <= cost_of(solve(problem)) + CLOSE * largest(problem)


@given(problems(limits=1))
def test_least_is_what_takes_least(problem: Problem) -> None:
    amounts = [problem.used(choice)[0] for choice in every_choice(problem) if problem.cost(choice) < math.inf]
    if amounts:
        assert problem.used(problem.least(0).choice)[0] == min(amounts)


def test_of_options_that_cost_the_same_the_one_that_takes_least_is_chosen() -> None:
    problem = Problem(np.ones((3, 4)), np.arange(12.0).reshape(1, 3, 4), np.array([1000.0]))
    solution = solve(problem)
    assert solution is not None
    assert solution.choice.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("known", [-math.inf, 0.999])
def test_what_a_search_that_was_cut_short_knows_is_the_bound(known: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = seeded(20)
    exact = solve(problem)
    assert exact is not None
    below = known * exact.cost if math.isfinite(known) else known

    def cut_short(problem: Problem, fixed: Choice, *_: Any) -> tuple[Choice, float]:
        return fixed, below

    monkeypatch.setattr(knapsack, "_program", cut_short)
    solution = solve(problem)
    assert solution is not None
    assert below <= solution.bound <= exact.cost * (1 + 1e-12)
    assert solution.bound < solution.cost
    assert solution.gap > 0


def test_an_item_without_options_cannot_be_met() -> None:
    assert solve(Problem(np.full((2, 1), math.inf), np.zeros((1, 2, 1)), np.ones(1))) is None
    assert solve(Problem(np.array([[math.inf, 0.0]]), np.zeros((2, 1, 2)), np.ones(2))) is None


def test_no_items_cost_nothing() -> None:
    solution = solve(Problem(np.zeros((3, 0)), np.zeros((1, 3, 0)), np.zeros(1)))
    assert solution is not None
    assert (solution.cost, solution.bound, solution.choice.size) == (0.0, 0.0, 0)


def test_a_negative_cost_is_a_gain() -> None:
    costs = np.array([[-1.0, -2.0, -4.0], [-3.0, -2.5, -4.5]])
    weights = np.array([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]])
    for room in (3.0, 4.0, 5.0, 6.0):
        problem = Problem(costs, weights, np.array([room]))
        solution = solve(problem)
        assert solution is not None
        assert solution.cost == pytest.approx(cheapest(problem))


@pytest.mark.parametrize(
    ("costs", "weights", "limits"),
    [
        # The first choices HiGHS finds are over by 1e-7, which it cannot tell from keeping the limit.
        (
            [[6.0, 2.0, 6.0], [8.0, 1.0, 5.0]],
            [[[2.9999999, 2.9999998, 2.9999998], [5.0, 2.9999999, 2.9999997]]],
            [8.9999995],
        ),
        (
            [[2.0, 3.0, 5.0], [9.0, 8.0, 3.0]],
            [
                [[0.9999998, 4.0000001, 0.0000001], [3.0000003, 3.9999999, 0.9999998]],
                [[0.0000001, 1.0000003, 3.0000003], [3.0000003, 1.0000001, 1.9999999]],
            ],
            [5.9999995, 3.0000001],
        ),
        (
            [[7.0, 1.0, 7.0], [6.0, 5.0, 5.0]],
            [[[1.0000001, 3.0000001, 1.0000001], [2.0, 1.9999998, 1.0000003]]],
            [5.0000001],
        ),
    ],
)
def test_weights_that_nearly_agree_are_told_apart(
    costs: list[list[float]], weights: list[list[list[float]]], limits: list[float]
) -> None:
    problem = Problem(np.array(costs), np.array(weights), np.array(limits))
    solution = solve(problem)
    assert solution is not None
    assert solution.cost == cheapest(problem)
    assert solution.bound <= solution.cost


@pytest.mark.parametrize("room", range(3, 13))
def test_huge_costs_raise_no_warning(room: int) -> None:
    costs = np.array([[9e11, 5e12, 5e12], [5e11, 3e12, 1e12], [1e11, 1e12, 4e12]])
    weights = np.array([[[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [5.0, 4.0, 2.0]]])
    problem = Problem(costs, weights, np.array([float(room)]))
    assert cost_of(solve(problem)) == cheapest(problem)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("limits", "share", "most"), [(1, 0.3, 1e-6), (1, 0.5, 1e-6), (2, 0.5, 1e-3)])
def test_thousands_of_items_are_solved_all_but_exactly(limits: int, share: float, most: float, seed: int) -> None:
    problem = seeded(2000, limits, share, seed)
    solution = solve(problem)
    assert solution is not None
    assert problem.within(solution.choice)
    assert solution.cost == problem.cost(solution.choice)
    assert 0 <= solution.gap < most
    # Weak duality, worked out apart: no prices can promise more than the cost found.
    for price in np.geomspace(1e-9, 1e3, 50):
        prices = np.full(limits, price)
        dual = (problem.costs + np.tensordot(prices, problem.weights, 1)).min(axis=0).sum() - prices @ problem.limits
        assert dual <= solution.cost * (1 + 1e-12)
        assert solution.bound >= dual - 1e-9 * abs(dual)


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_that_only_the_least_keeps_is_kept(seed: int) -> None:
    """Quotients of sizes and limit add up to 1 and a rounding; the limit itself is kept to the bit."""
    problem = seeded(300, seed=seed)
    choice = problem.least(0).choice
    tight = Problem(problem.costs, problem.weights, problem.used(choice))
    solution = solve(tight)
    assert solution is not None
    assert (solution.choice == choice).all()
    assert solution.gap == 0.0


def test_the_same_problem_gets_the_same_choice() -> None:
    first, second = solve(seeded(500)), solve(seeded(500))
    assert first is not None
    assert second is not None
    assert (first.choice == second.choice).all()
    assert (first.cost, first.bound) == (second.cost, second.bound)


@pytest.mark.parametrize("limits", [1, 2])
def test_it_prints_nothing(capfd: pytest.CaptureFixture[str], limits: int) -> None:
    for seed in range(3):
        assert solve(seeded(40, limits, 0.4, seed)) is not None
    print("a program's own line")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("a program's own line\n", "")
