"""Error feedback against GPTQ as the paper writes it, and against brute force where there are few enough roundings."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Affine, Codebook
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization.kernel import numba_available
from mpq_plugins.reconstruction import feedback
from mpq_plugins.reconstruction.feedback import BLOCK, Factor, descend, factorise, round_with_feedback, solve
from mpq_plugins.reconstruction.levels import Levels
from tests.helpers.plans import linear

pytestmark = pytest.mark.usefixtures("one_thread")

compiled = pytest.mark.skipif(not numba_available(), reason="numba is not there")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled loops."""
    monkeypatch.setattr(feedback, "numba_available", lambda: False)


def moments(d: int, n: int, seed: int) -> Tensor:
    """H of n correlated inputs; of rank n, where that is less than d."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    inputs = inputs + inputs.roll(1, 1) * 0.7 + torch.rand(d, generator=generator).double() + 0.2
    return inputs.T @ inputs / n


def matrix(rows: int, d: int, seed: int) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(1000 + seed))


def levels_of(weight: Tensor, bits: int, scheme: Scheme | None = None) -> Levels:
    scheme = scheme or Affine(granularity="per_channel")
    return Levels.of(weight, linear("fc", weight.shape[0], weight.shape[1], scheme, bits))


def factor_of(h: Tensor, damping: float = 0.01) -> Factor:
    factor = factorise(h, damping)
    assert factor is not None
    return factor


def damped(h: Tensor, share: float) -> Tensor:
    return h + share * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def nearest(table: Tensor, value: float) -> float:
    """The level of least distance; of two, the lower."""
    return float(table[(table.double() - value).abs().argmin()])


def gptq(weight: Tensor, h: Tensor, order: list[int], levels: Levels) -> Tensor:
    """OBQ in a fixed order: the inverse of H of the columns that are left is worked out anew for each column.

    arXiv 2210.17323, eq. 2: err = (w_j - quant(w_j)) / [H^-1]_jj, and the weights left lose err [H^-1]_j.
    """
    left, done = weight.double().clone(), weight.clone()
    for k, j in enumerate(order):
        rest = order[k:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        for r in range(len(weight)):
            low, high = levels.first[levels.group[r, j]], levels.first[levels.group[r, j] + 1]
            held = float(levels.held[r, j])
            level = nearest(levels.values[low:high], float(left[r, j])) if np.isnan(held) else held
            error = (float(left[r, j]) - level) / inverse[0, 0]
            left[r, rest] -= error * inverse[0]
            done[r, j] = level
    return done


def loss(target: Tensor, rounded: Tensor, h: Tensor) -> float:
    lost = target.double() - rounded.double()
    return float(((lost @ h) * lost).sum())


def by_row(target: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    lost = target.double() - rounded.double()
    return ((lost @ h) * lost).sum(1)


SIZES: Any = {
    "rows": st.integers(1, 4),
    "d": st.integers(1, 12),
    "bits": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
}


# ---- the column loop


def check_gptq(rows: int, d: int, bits: int, seed: int, scheme: Scheme | None = None) -> None:
    weight, h = matrix(rows, d, seed), moments(d, 4 * d, seed)
    factor, levels = factor_of(h), levels_of(weight, bits, scheme)
    expected = gptq(weight, damped(h, factor.damping), factor.order.tolist(), levels)
    assert round_with_feedback(weight, factor, levels).equal(expected)


@compiled
@settings(max_examples=100)
@given(**SIZES)
def test_rounding_is_gptqs(rows: int, d: int, bits: int, seed: int) -> None:
    check_gptq(rows, d, bits, seed)


@pytest.mark.usefixtures("in_torch")
def test_rounding_in_torch_is_gptqs() -> None:
    @settings(max_examples=40)
    @given(**SIZES)
    def check(rows: int, d: int, bits: int, seed: int) -> None:
        check_gptq(rows, d, bits, seed)

    check()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("scheme", [Affine(), Affine(granularity="per_group", group_size=4), Codebook()], ids=str)
def test_any_grid_will_do(scheme: Scheme, bits: int) -> None:
    for seed in range(4):
        check_gptq(6, 12, min(bits, 6) if isinstance(scheme, Codebook) else bits, seed, scheme)


@pytest.mark.parametrize("d", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_blocks_carry_all_errors_over(d: int) -> None:
    check_gptq(2, d, 3, d)


@compiled
@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 150), st.integers(1, 8), st.integers(0, 2**16))
def test_torch_and_the_compiled_loop_round_alike(rows: int, d: int, bits: int, seed: int) -> None:
    weight, h = matrix(rows, d, seed), moments(d, d + 1, seed)
    levels, factor = levels_of(weight, bits), factor_of(h)
    with pytest.MonkeyPatch.context() as patch:
        fast = round_with_feedback(weight, factor, levels)
        patch.setattr(feedback, "numba_available", lambda: False)
        slow = round_with_feedback(weight, factor, levels)
    assert (fast != slow).double().mean() < 0.01  # a tie may fall either way
    assert loss(weight, fast, h) == pytest.approx(loss(weight, slow, h), rel=0.02, abs=1e-12)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = matrix(3, 9, 0)
    levels = levels_of(weight, 3)
    rounded = round_with_feedback(weight, factor_of(torch.eye(9, dtype=torch.float64)), levels)
    for r, j in itertools.product(range(3), range(9)):
        table = levels.values[levels.first[r] : levels.first[r + 1]]
        held = float(levels.held[r, j])
        assert float(rounded[r, j]) == (nearest(table, float(weight[r, j])) if np.isnan(held) else held)


def test_held_weights_stay_and_their_errors_are_carried_over() -> None:
    weight, h = matrix(2, 6, 1), moments(6, 30, 1)
    levels, factor = levels_of(weight, 2), factor_of(h)
    first = int(factor.order[0])
    held = levels.held.clone()
    held[:, first] = 5.0  # far from anything
    moved = Levels(levels.values, levels.first, levels.group, held)
    rounded = round_with_feedback(weight, factor, moved)
    assert (rounded[:, first] == 5).all()
    assert rounded.equal(gptq(weight, damped(h, factor.damping), factor.order.tolist(), moved))
    rest = [j for j in range(6) if j != first]
    assert not rounded[:, rest].equal(round_with_feedback(weight, factor, levels)[:, rest])


# ---- factor and solve


@given(st.integers(1, 20), st.integers(0, 2**16), st.sampled_from([0.001, 0.01, 1.0]))
def test_the_factor_is_that_of_the_damped_moments(d: int, seed: int, damping: float) -> None:
    h = moments(d, 2 * d + 1, seed)
    factor = factor_of(h, damping)
    assert factor.damping == damping
    assert h.diagonal()[factor.order].diff().le(0).all()
    assert sorted(factor.order.tolist()) == list(range(d))
    # H = A D A^T in the order of rounding, A unit upper triangular.
    a = factor.feedback(0, d).double()
    assert a.equal(a.triu())
    torch.testing.assert_close(a.diagonal(), torch.ones(d, dtype=torch.float64))
    pivots = factor.lower.diagonal().flip(0) ** 2
    wanted = damped(h, damping)[factor.order][:, factor.order]
    torch.testing.assert_close(a @ torch.diag(pivots) @ a.T, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@given(st.integers(2, 100), st.data())
def test_feedback_by_blocks_is_the_whole_in_parts(d: int, data: st.DataObject) -> None:
    factor = factor_of(moments(d, 2 * d, d))
    start = data.draw(st.integers(0, d - 1))
    stop = data.draw(st.integers(start + 1, d))
    assert factor.feedback(start, stop).equal(factor.feedback(0, d)[:stop, start:stop])


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**16))
def test_solve_is_the_inverse_times(d: int, rows: int, seed: int) -> None:
    h, right = moments(d, 2 * d + 1, seed), matrix(rows, d, seed).double()
    expected = torch.linalg.solve(damped(h, 0.01), right.T).T
    torch.testing.assert_close(solve(factor_of(h), right), expected, rtol=1e-8, atol=1e-8)


def test_dead_inputs_get_the_mean_on_their_diagonal_and_are_rounded_to_nearest() -> None:
    h, weight = moments(7, 30, 3), matrix(4, 7, 3)
    h[2], h[:, 2] = 0, 0
    alive = [0, 1, 3, 4, 5, 6]
    factor, levels = factor_of(h), levels_of(weight, 3)
    full = h.clone()
    mean = h.diagonal()[alive].mean()
    full += 0.01 * mean * torch.eye(7, dtype=torch.float64)
    full[2, 2] = 1.01 * mean
    torch.testing.assert_close(
        solve(factor, weight.double()), torch.linalg.solve(full, weight.double().T).T, rtol=1e-8, atol=1e-8
    )
    rounded = round_with_feedback(weight, factor, levels)
    assert rounded.equal(gptq(weight, full, factor.order.tolist(), levels))
    for r in range(4):
        if levels.held[r, 2].isnan():
            table = levels.values[levels.first[r] : levels.first[r + 1]]
            assert float(rounded[r, 2]) == nearest(table, float(weight[r, 2]))


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_inputs_than_columns_are_damped(n: int) -> None:
    h, weight = moments(10, n, 5), matrix(2, 10, 5)
    factor, levels = factor_of(h), levels_of(weight, 3)
    assert round_with_feedback(weight, factor, levels).equal(
        gptq(weight, damped(h, factor.damping), factor.order.tolist(), levels)
    )


def test_damping_grows_until_it_helps() -> None:
    h = moments(6, 2, 0)  # of rank 2: without damping it has no factor
    factor = factorise(h, 0.0)
    assert factor is not None
    assert factor.damping > 0
    spoiled = h - 0.5 * h.diagonal().mean() * torch.eye(6, dtype=torch.float64)  # eigenvalues of half the mean below 0
    tried = factorise(spoiled + torch.diag(torch.full((6,), 0.4 * float(h.diagonal().mean())).double()), 0.01)
    assert tried is not None
    assert tried.damping > 0.01


def test_moments_without_a_factor_have_none() -> None:
    assert factorise(torch.zeros(4, 4, dtype=torch.float64), 0.01) is None
    indefinite = torch.tensor([[1.0, 1e6], [1e6, 1.0]], dtype=torch.float64)
    assert factorise(indefinite, 0.01) is None


def test_factorising_changes_no_moments() -> None:
    h = moments(5, 9, 0)
    before = h.clone()
    factorise(h, 0.01)
    assert h.equal(before)


# ---- single moves


@compiled
@settings(max_examples=80)
@given(**SIZES)
def test_moves_end_where_no_single_one_is_better(rows: int, d: int, bits: int, seed: int) -> None:
    target, h = matrix(rows, d, seed), damped(moments(d, 4 * d, seed), 0.01)
    levels = levels_of(target, bits)
    start = round_with_feedback(target, factor_of(h, 0.0), levels)
    moved = descend(target, h, start, levels, 1000)
    assert (by_row(target, moved, h) <= by_row(target, start, h) * (1 + 1e-12)).all()
    fixed = ~levels.held.isnan()
    assert moved[fixed].equal(start[fixed])
    reached = by_row(target, moved, h)
    for r, j in itertools.product(range(rows), range(d)):
        if fixed[r, j]:
            continue
        for level in levels.values[levels.first[levels.group[r, j]] : levels.first[levels.group[r, j] + 1]]:
            other = moved.clone()
            other[r, j] = level
            assert float(by_row(target, other, h)[r]) >= float(reached[r]) * (1 - 1e-9) - 1e-12


@compiled
@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(1, 2), st.integers(0, 2**16))
def test_the_best_of_all_roundings_is_the_bound(d: int, bits: int, seed: int) -> None:
    target, h = matrix(1, d, seed), damped(moments(d, 4 * d, seed), 0.01)
    levels = levels_of(target, bits)
    tables = [[float(levels.held[0, j])] if not levels.held[0, j].isnan() else levels.values.tolist() for j in range(d)]
    best = min(loss(target, torch.tensor([q]), h) for q in itertools.product(*tables))
    start = round_with_feedback(target, factor_of(h, 0.0), levels)
    moved = descend(target, h, start, levels, 100)
    assert best * (1 - 1e-9) - 1e-12 <= loss(target, moved, h) <= loss(target, start, h) * (1 + 1e-12)


@compiled
def test_moves_find_a_better_rounding_than_the_columns_alone() -> None:
    """Over many matrices feedback is better than nearest, and moves are better than feedback."""
    totals = [0.0, 0.0, 0.0]
    for seed in range(20):
        target, h = matrix(4, 16, seed), damped(moments(16, 80, seed), 0.01)
        levels = levels_of(target, 2)
        near = round_with_feedback(target, factor_of(torch.eye(16, dtype=torch.float64)), levels)
        start = round_with_feedback(target, factor_of(h, 0.0), levels)
        moved = descend(target, h, start, levels, 10)
        for k, rounded in enumerate((near, start, moved)):
            totals[k] += loss(target, rounded, h)
    assert totals[2] < 0.95 * totals[1]
    assert totals[1] < 0.7 * totals[0]


@compiled
def test_moves_may_be_none_and_are_none_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    target, h = matrix(2, 6, 0), moments(6, 20, 0)
    levels = levels_of(target, 2)
    start = round_with_feedback(target, factor_of(h), levels)
    before = start.clone()
    assert descend(target, h, start, levels, 0).equal(before)
    descend(target, h, start, levels, 10)
    assert start.equal(before)  # it works on a copy
    monkeypatch.setattr(feedback, "numba_available", lambda: False)
    assert descend(target, h, start, levels, 10).equal(before)
