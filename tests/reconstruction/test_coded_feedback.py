"""Codes whose bits count: against OBQ as it is written, torch against the compiled loops, and brute force."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mpq_plugins import EntropyCoded
from mpq_plugins.quantization.kernel import numba_available
from mpq_plugins.reconstruction import coded_feedback
from mpq_plugins.reconstruction.coded_feedback import CodedMatrix
from mpq_plugins.reconstruction.feedback import BLOCK, damped, factorise, round_with_feedback
from mpq_plugins.reconstruction.levels import Levels
from tests.helpers.plans import linear
from tests.reconstruction.test_feedback import damped as damped_by
from tests.reconstruction.test_feedback import matrix, moments

pytestmark = pytest.mark.usefixtures("one_thread")

compiled = pytest.mark.skipif(not numba_available(), reason="numba is not there")
Costs = NDArray[np.float64]
SIZES: Any = {"rows": st.integers(1, 4), "d": st.integers(1, 10), "seed": st.integers(0, 2**16)}
PRICES = st.sampled_from([0.0, 0.02, 0.3, 3.0])


def costs_of(most: int, seed: int) -> Costs:
    """Any costs, 0 the cheapest more often than not."""
    costs = np.random.default_rng(seed).uniform(0.5, 6, 2 * most + 1)
    costs[most] = 0.4
    return costs


def coded(rows: int, d: int, seed: int, size: float = 1.5) -> CodedMatrix:
    """A matrix in steps, some of it held at 0."""
    h = moments(d, 4 * d, seed)
    factor = factorise(h, 0.01)
    assert factor is not None
    target = size * matrix(rows, d, seed).double()
    zero = torch.rand(rows, d, generator=torch.Generator().manual_seed(seed)) < 0.15
    return CodedMatrix(target, h, factor, zero)


def cheapest(wanted: float, price: float, costs: Costs, most: int) -> int:
    """The best of all codes that may be looked at."""
    nearest = int(np.rint(np.clip(wanted, -most, most)))
    allowed = {0, *(code for code in (nearest - 1, nearest, nearest + 1) if abs(code) <= most)}
    return min(allowed, key=lambda code: (wanted - code) ** 2 + price * costs[code + most])


def obq(given_: CodedMatrix, price: float, costs: Costs) -> Tensor:
    """The inverse of H of the columns that are left, anew for each column; its corner is 1 / D_j."""
    most, h = len(costs) // 2, damped_by(given_.h, given_.factor.damping)
    left, codes = given_.target.clone(), torch.zeros(given_.target.shape, dtype=torch.int16)
    order = given_.factor.order.tolist()
    for k, j in enumerate(order):
        rest = order[k:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        for r in range(len(left)):
            wanted = float(left[r, j])
            code = 0 if given_.zero[r, j] else cheapest(wanted, price * float(inverse[0, 0]), costs, most)
            left[r, rest] -= (wanted - code) / inverse[0, 0] * inverse[0]
            codes[r, j] = code
    return codes


def objective(given_: CodedMatrix, codes: Tensor, price: float, costs: Costs) -> Tensor:
    """Of each row: the loss, in squared steps, and the price of its codes' bits."""
    lost = given_.target - codes.double()
    bits = torch.from_numpy(costs)[codes.long() + len(costs) // 2].sum(1)
    return ((lost @ damped(given_.h, given_.factor)) * lost).sum(1) + price * bits


def in_torch(act: Callable[[], Any]) -> Any:
    """What it gives without compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coded_feedback, "numba_available", lambda: False)
        return act()


# ---- the column loop


@settings(max_examples=80)
@given(**SIZES, price=PRICES, most=st.sampled_from([1, 3, 127]))
def test_rounding_is_obqs(rows: int, d: int, seed: int, price: float, most: int) -> None:
    given_, costs = coded(rows, d, seed), costs_of(most, seed)
    expected = obq(given_, price, costs)
    for codes in (given_.with_feedback(price, costs), in_torch(lambda: given_.with_feedback(price, costs))):
        assert codes.dtype == torch.int16
        assert codes.equal(expected)


@pytest.mark.parametrize("d", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_blocks_carry_all_errors_over(d: int) -> None:
    given_, costs = coded(2, d, d), costs_of(127, d)
    assert given_.with_feedback(0.05, costs).equal(obq(given_, 0.05, costs))


@compiled
@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 150), st.integers(0, 2**16), PRICES)
def test_torch_and_the_compiled_loop_round_alike(rows: int, d: int, seed: int, price: float) -> None:
    given_, costs = coded(rows, d, seed), costs_of(127, seed)
    fast = given_.with_feedback(price, costs)
    slow = in_torch(lambda: given_.with_feedback(price, costs))
    assert (fast != slow).double().mean() < 0.01  # a tie may fall either way


@pytest.mark.parametrize("d", [9, 70])
def test_where_bits_cost_nothing_codes_are_those_of_any_grid(d: int) -> None:
    """The same as over a table of all levels, which is another loop."""
    weight, h, scheme = matrix(5, d, d), moments(d, 3 * d, d), EntropyCoded(step=0.25)
    weight[0, 1] = 0
    factor = factorise(h, 0.01)
    assert factor is not None
    given_ = CodedMatrix(weight.double() / 0.25, h, factor, weight == 0)
    expected = round_with_feedback(weight, factor, Levels.of(weight, linear("fc", 5, d, scheme, 8)))
    assert (given_.with_feedback(0.0, costs_of(127, 0)) * 0.25).equal(expected)


def test_codes_stay_within_their_bounds_and_zeros_stay_zero() -> None:
    for seed, price in itertools.product(range(5), (0.0, 0.5)):
        given_, costs = coded(4, 20, seed, size=40.0), costs_of(7, seed)
        assert given_.nearest(7).abs().max() == 7
        moving = given_.moving(given_.with_feedback(price, costs))
        for codes in (given_.nearest(7), moving.codes.clone(), (moving.sweep(price, costs), moving.codes)[1]):
            assert codes.abs().max() <= 7
            assert not codes[given_.zero].any()


def test_where_bits_cost_nothing_rounding_is_to_nearest_for_uncorrelated_inputs() -> None:
    factor = factorise(torch.eye(9, dtype=torch.float64), 0.01)
    assert factor is not None
    target = 3 * matrix(3, 9, 0).double()
    given_ = CodedMatrix(target, torch.eye(9, dtype=torch.float64), factor, target > 100)
    assert given_.with_feedback(0.0, costs_of(127, 0)).equal(target.round().to(torch.int16))


@given(**SIZES)
def test_variances_are_those_given_later_columns(rows: int, d: int, seed: int) -> None:
    given_ = coded(rows, d, seed)
    h, order = damped_by(given_.h, given_.factor.damping), given_.factor.order.tolist()
    for k, j in enumerate(order):
        rest = order[k:]
        wanted = 1 / torch.linalg.inv(h[rest][:, rest])[0, 0]
        assert float(given_.variances[j]) == pytest.approx(float(wanted), rel=1e-6)


# ---- single moves


@compiled
@settings(max_examples=60)
@given(**SIZES, price=PRICES)
def test_no_sweep_raises_loss_and_bits_together(rows: int, d: int, seed: int, price: float) -> None:
    given_, costs = coded(rows, d, seed), costs_of(7, seed)
    price = price * float(given_.variances.mean())
    for compiled_code in (True, False):
        moving = given_.moving(given_.with_feedback(price, costs))
        before = objective(given_, moving.codes, price, costs)
        for _ in range(200):
            earlier = moving.codes.clone()
            sweep = partial(moving.sweep, price, costs)
            moved = sweep() if compiled_code else in_torch(sweep)
            after = objective(given_, moving.codes, price, costs)
            assert (after <= before + 1e-9).all()
            assert (moved == 0) == moving.codes.equal(earlier)
            before = after
            if not moved:
                break
        torch.testing.assert_close(moving.slope, (given_.target - moving.codes) @ moving.h, rtol=1e-9, atol=1e-9)
        assert not moved
        for r, j in itertools.product(range(rows), range(d)):
            near = int(moving.codes[r, j])
            for code in {near - 1, near + 1, 0} - ({near - 1, near + 1, 0} if given_.zero[r, j] else set()):
                other = moving.codes.clone()
                other[r, j] = max(-7, min(7, code))
                # Codes beside the nearest one to what is wanted are looked at: those beside what is there may not be.
                wanted = near + float(moving.slope[r, j] / moving.h[j, j])
                if abs(code - round(wanted)) <= 1 or code == 0:
                    assert objective(given_, other, price, costs)[r] >= before[r] - 1e-9


@compiled
@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(0, 2**16), PRICES)
def test_the_best_of_all_codes_is_the_bound(d: int, seed: int, price: float) -> None:
    given_, costs = coded(1, d, seed), costs_of(3, seed)
    allowed = [[0] if given_.zero[0, j] else list(range(-3, 4)) for j in range(d)]
    every = torch.tensor(list(itertools.product(*allowed)), dtype=torch.int16)
    whole = CodedMatrix(given_.target.expand(len(every), -1), given_.h, given_.factor, given_.zero)
    best = float(objective(whole, every, price, costs).min())
    start = given_.with_feedback(price, costs)
    moving = given_.moving(start)
    for _ in range(50):
        moving.sweep(price, costs)
    found = float(objective(given_, moving.codes, price, costs)[0])
    assert best - 1e-9 <= found <= float(objective(given_, start, price, costs)[0]) + 1e-9


@compiled
@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 80), st.integers(0, 2**16), PRICES)
def test_torch_and_the_compiled_loop_move_alike(rows: int, d: int, seed: int, price: float) -> None:
    given_, costs = coded(rows, d, seed), costs_of(127, seed)
    start = given_.nearest(127)
    fast, slow = given_.moving(start), given_.moving(start)
    assert fast.sweep(price, costs) == in_torch(lambda: slow.sweep(price, costs))
    assert fast.codes.equal(slow.codes)
    assert start.equal(given_.nearest(127))  # they work on copies


def test_inputs_that_are_always_zero_keep_their_codes() -> None:
    """No error there costs anything now; but later inputs may not be zero."""
    given_ = coded(3, 6, 1)
    h = given_.h.clone()
    h[2], h[:, 2] = 0, 0
    factor = factorise(h, 0.01)
    assert factor is not None
    target = torch.where(given_.zero, 0.3, given_.target)
    target[:, 2] = torch.tensor([2.1, -1.9, 3.0])
    dead = CodedMatrix(target, h, factor, torch.zeros_like(given_.zero))
    price, costs = 0.04 * float(dead.variances.log().mean().exp()), costs_of(7, 1)
    moving = dead.moving(dead.with_feedback(price, costs))
    moving.sweep(price, costs)
    assert moving.codes[:, 2].tolist() == [2, -2, 3]
