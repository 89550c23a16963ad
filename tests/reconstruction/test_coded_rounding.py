"""A layer's codes: what is promised is kept, with lambda alone, and lambda is 0 where it can be."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Affine, EntropyCoded, LayerChoice
from mpq_plugins.quantization.coded_bits import coded_bits
from mpq_plugins.reconstruction import coded_feedback
from mpq_plugins.reconstruction.coded_feedback import CodedMatrix
from mpq_plugins.reconstruction.coded_rounding import CodeGrid, round_coded
from mpq_plugins.reconstruction.feedback import damped, factorise
from tests.helpers.plans import linear
from tests.reconstruction.test_feedback import matrix, moments

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices_of(rows: int, d: int, seed: int, grid: CodeGrid, groups: int = 1) -> list[CodedMatrix]:
    """Weights of a layer in groups; one in ten is exactly 0."""
    found = []
    for g in range(groups):
        weight, h = matrix(rows, d, seed + g), moments(d, 4 * d, seed + g)
        weight[torch.rand(rows, d, generator=torch.Generator().manual_seed(seed)) < 0.1] = 0
        factor = factorise(h, 0.01)
        assert factor is not None
        target = weight.double() + 0.05 * matrix(rows, d, seed + 99).double()
        found.append(grid.matrix(weight, target, h, factor))
    return found


def bits_of(codes: list[Tensor]) -> float:
    return coded_bits(torch.cat([each.flatten() for each in codes]).numpy())


def loss_of(matrices: list[CodedMatrix], codes: list[Tensor]) -> float:
    lost = [(one.target - each.double(), damped(one.h, one.factor)) for one, each in zip(matrices, codes, strict=True)]
    return sum(float(((error @ h) * error).sum()) for error, h in lost)


def rounded(
    rows: int, d: int, seed: int, step: float, promised: float | None, moves: bool, **more: Any
) -> list[Tensor]:
    grid = CodeGrid(step, 127, promised)
    return round_coded(matrices_of(rows, d, seed, grid, **more), grid, moves)


LAYERS: Any = {
    "rows": st.integers(4, 24), "d": st.integers(20, 90), "seed": st.integers(0, 2**16),
    "step": st.floats(0.5, 2.5), "moves": st.booleans(), "groups": st.sampled_from([1, 3]),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(**LAYERS, share=st.floats(0.7, 1.2))
def test_the_promise_is_kept_and_used(
    rows: int, d: int, seed: int, step: float, moves: bool, groups: int, share: float
) -> None:
    free = bits_of(rounded(rows, d, seed, step, 1e12, moves, groups=groups))
    codes = rounded(rows, d, seed, step, share * free, moves, groups=groups)
    assert bits_of(codes) <= share * free
    if share >= 1:
        assert bits_of(codes) >= 0.98 * free
    elif rows * d > 400:  # of fewer codes each is a good part of all bits
        assert bits_of(codes) >= 0.97 * share * free


@settings(max_examples=20, deadline=None)
@given(**LAYERS)
def test_zeros_stay_and_codes_have_bounds(rows: int, d: int, seed: int, step: float, moves: bool, groups: int) -> None:
    grid = CodeGrid(step / 20, 7, None)
    matrices = matrices_of(rows, d, seed, grid, groups)
    for one, codes in zip(matrices, round_coded(matrices, grid, moves), strict=True):
        assert codes.abs().max() == 7
        assert not codes[one.zero].any()


def test_a_promise_that_costs_nothing_changes_nothing() -> None:
    """With lambda 0 all promises that are kept give the same codes, and their loss is the least."""
    free = rounded(16, 60, 0, 1.0, 1e12, True)
    again = rounded(16, 60, 0, 1.0, 1.02 * bits_of(free), True)
    assert all(one.equal(other) for one, other in zip(free, again, strict=True))
    matrices = matrices_of(16, 60, 0, CodeGrid(1.0, 127, None))
    losses = [
        loss_of(matrices, rounded(16, 60, 0, 1.0, share * bits_of(free), True)) for share in (1.0, 0.95, 0.85, 0.7)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_bits_are_saved_where_they_are_cheapest() -> None:
    """At as many bits, a coarser step without lambda loses more in H than lambda does."""
    grid = CodeGrid(0.9, 127, None)
    matrices = matrices_of(48, 96, 3, grid)
    coarse_grid = CodeGrid(1.0, 127, 1e12)
    coarse = matrices_of(48, 96, 3, coarse_grid)
    without = round_coded(coarse, coarse_grid, True)
    fine = round_coded(matrices, CodeGrid(0.9, 127, bits_of(without)), True)
    assert bits_of(fine) <= bits_of(without)
    assert loss_of(matrices, fine) * 0.9**2 < loss_of(coarse, without)


def test_moves_are_better_than_none() -> None:
    for share in (1.0, 0.85):
        losses, promised = [], share * bits_of(rounded(16, 60, 5, 1.0, 1e12, False))
        for moves in (False, True):
            codes = rounded(16, 60, 5, 1.0, promised, moves)
            assert bits_of(codes) <= promised
            losses.append(loss_of(matrices_of(16, 60, 5, CodeGrid(1.0, 127, None)), codes))
        assert losses[1] < losses[0]


@pytest.mark.parametrize("moves", [False, True])
def test_in_torch_promises_are_kept_as_well(monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    free = bits_of(rounded(12, 40, 7, 1.0, 1e12, moves))
    monkeypatch.setattr(coded_feedback, "numba_available", lambda: False)
    assert 0.97 * 0.9 * free <= bits_of(rounded(12, 40, 7, 1.0, 0.9 * free, moves)) <= 0.9 * free


def test_what_cannot_be_promised_is_come_close_to() -> None:
    """No codes of many values take next to nothing while weights that differ are kept apart; it ends all the same."""
    assert bits_of(rounded(6, 20, 0, 0.5, 1.0, True)) < 0.2 * bits_of(rounded(6, 20, 0, 0.5, 1e12, True))


# ---- the grid


def choice_of(**changes: Any) -> LayerChoice:
    made = linear("fc", 4, 6, EntropyCoded(step=0.1), 8)
    return LayerChoice(**(made.model_dump() | {"scheme": made.scheme} | changes))


def test_a_grid_is_of_one_width_and_one_step() -> None:
    grid = CodeGrid.of(choice_of(coded_bytes=3))
    assert grid is not None
    assert (grid.step, grid.most, grid.promised) == (float(torch.tensor(0.1)), 127, 24)
    bound = CodeGrid.of(choice_of(bits=3))
    assert bound is not None
    assert (bound.most, bound.promised) == (3, None)
    parts = ({"bits": 8, "channels": range(2)}, {"bits": 32, "channels": range(2, 4)})
    others: list[dict[str, Any]] = [{"scheme": EntropyCoded()}, {"scheme": Affine()}, {"bits": 16}]
    for other in (*(choice_of(**changes) for changes in others), choice_of(bits=None, parts=parts)):
        assert CodeGrid.of(other) is None


def test_bits_of_weights_are_those_of_their_codes() -> None:
    grid = CodeGrid(float(torch.tensor(0.3)), 127, 100.0)
    codes = matrix(5, 7, 0).mul(9).round().to(torch.int16)
    assert grid.bits(grid.values(codes)) == pytest.approx(coded_bits(codes.numpy()))
    assert grid.keeps(100)
    assert not grid.keeps(100.1)
    assert CodeGrid(0.3, 127, None).keeps(1e9)
