"""Sweeps from the library: rows, the Pareto front against brute force, evaluations and what goes wrong in them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpq_plugins import PTILMPQ, Allocator, MixQuant, Piecewise, Uniform, apply, measure
from mpq_plugins.allocation.objective import predicted
from mpq_plugins.errors import SettingError, SourceError
from mpq_plugins.evaluation.sweep import SweepRow, mark_pareto, sweep
from tests.helpers.nets import conv_net
from tests.helpers.says import naming

PER_CHANNEL = Piecewise(granularity="per_channel", breakpoint="gaussian")


def row(size: int, score: float | None) -> SweepRow:
    return SweepRow("a", {}, 1.0, 1.0, size, size, {"relative": None if score is None else -score}, {})


@given(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(-5, 0)), min_size=1, max_size=8))
def test_the_front_is_what_no_other_row_beats(values: list[tuple[int, float | None]]) -> None:
    marked = mark_pareto([row(size, score) for size, score in values])
    for (size, score), found in zip(values, marked, strict=True):
        beaten = any(
            other is not None and score is not None and s <= size and other >= score and (s, other) != (size, score)
            for s, other in values
        )
        assert found.pareto == (score is not None and not beaten)
        assert any(row(s, other).beats(found) for s, other in values) == beaten


def test_rows_are_the_plans() -> None:
    table = measure(conv_net(), PER_CHANNEL, per_channel=True)
    allocators: list[Allocator] = [
        *(PTILMPQ(alpha=alpha) for alpha in (0.0, 0.5, 1.0)),
        Uniform(bits=4),
        MixQuant(qem=2),
    ]
    rows = sweep(table, [allocator(table) for allocator in allocators])
    for found, allocator in zip(rows, allocators, strict=True):
        plan = allocator(table)
        assert found.allocator == allocator.name
        assert found.parameters == plan.allocator.parameters
        assert found.total_bytes == plan.size().total_bytes
        assert found.errors == {"mse": predicted(table, plan, "mse")}
        assert found.found == plan.allocator.found
        assert found.scores == {}
    assert any(found.pareto for found in rows)


class Counting:
    """An evaluation that counts its calls, and can be made to stop."""

    def __init__(self, stop_at: int = -1) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, net: nn.Module) -> dict[str, float]:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        with torch.no_grad():
            return {"score": float(net(torch.ones(1, 3, 8, 8)).sum()), "calls": self.calls}


def test_every_plan_is_evaluated_on_its_own_copy_and_the_float_model_first() -> None:
    net = conv_net()
    table = measure(net, PER_CHANNEL, per_channel=True)
    evaluate = Counting()
    steps: list[tuple[str, int, int]] = []
    rows = sweep(
        table, [Uniform(bits=2)(table), Uniform(bits=8)(table)], net, evaluate, progress=lambda *s: steps.append(s)
    )
    assert [(r.allocator, r.total_average_bits) for r in rows[:1]] == [("float", 32.0)]
    assert evaluate.calls == 3
    assert rows[0].scores["score"] == Counting()(conv_net())["score"]
    exact, two, eight = (found.scores["score"] for found in rows)
    assert abs(eight - exact) < abs(two - exact)
    assert not rows[0].pareto
    assert steps[-1] == ("", 2, 2)
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), conv_net().state_dict().values(), strict=True))


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    net = conv_net()
    table = measure(net, PER_CHANNEL, per_channel=True)
    plans = [PTILMPQ(alpha=k / 4)(table) for k in range(5)]
    with pytest.raises(KeyboardInterrupt):
        sweep(table, plans, net, Counting(stop_at=3), store=tmp_path / "rows.partial")
    rest = Counting()
    resumed = sweep(table, plans, net, rest, store=tmp_path / "rows.partial")
    assert rest.calls == 3
    assert list(tmp_path.iterdir()) == []
    whole = sweep(table, plans, net, Counting())
    for one, other in zip(resumed, whole, strict=True):
        assert one.scores["score"] == other.scores["score"]
        assert (one.parameters, one.total_bytes, one.pareto) == (other.parameters, other.total_bytes, other.pareto)


BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
HOW: list[tuple[dict[str, Any], str]] = [
    ({}, "nearest"),
    ({"rounding": "nearest"}, "nearest"),
    ({"calibrate": BATCHES, "rounding": "nearest"}, "nearest, corrected"),
    ({"calibrate": BATCHES}, "compensated"),
]


@pytest.mark.parametrize(("how", "label"), HOW)
@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_rows_name_their_rounding_and_score_what_apply_makes(how: dict[str, Any], label: str) -> None:
    net = conv_net()
    table = measure(net, PER_CHANNEL, fold_bn=False)
    plan = Uniform(bits=2)(table)
    exact, found = sweep(table, [plan], net, Counting(), **how)
    assert (exact.rounding, found.rounding) == ("", label)
    assert found.scores["score"] == Counting()(apply(net, plan, **how))["score"]


def test_rows_that_nothing_was_evaluated_for_have_no_rounding() -> None:
    table = measure(conv_net(), PER_CHANNEL)
    (found,) = sweep(table, [Uniform(bits=2)(table)])
    assert found.rounding == ""


def test_a_rounding_that_needs_inputs_is_refused() -> None:
    table, given = measure(conv_net(), PER_CHANNEL), Counting()
    for bad, said in (("learned", "needs calibration inputs"), ("up", "nearest, compensated, learned")):
        word: Any = bad
        with pytest.raises(SettingError, match=said):
            sweep(table, [Uniform(bits=2)(table)], conv_net(), given, rounding=word)
    assert given.calls == 0


@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_an_interrupted_sweep_does_not_go_on_with_another_rounding(tmp_path: Path) -> None:
    net, store = conv_net(), tmp_path / "rows.partial"
    table = measure(net, PER_CHANNEL, fold_bn=False)
    plans = [Uniform(bits=bits)(table) for bits in (2, 4)]
    with pytest.raises(KeyboardInterrupt):
        sweep(table, plans, net, Counting(stop_at=2), calibrate=BATCHES, store=store)
    with pytest.raises(SettingError, match="differs in rounding"):
        sweep(table, plans, net, Counting(), calibrate=BATCHES, rounding="nearest", store=store)
    rest = Counting()
    sweep(table, plans, net, rest, calibrate=BATCHES, rounding="compensated", store=store)
    assert rest.calls == 1


class Marking:
    """An evaluation that leaves its mark on the model it is given."""

    def __call__(self, net: nn.Module) -> float:
        with torch.no_grad():
            score = float(net(torch.ones(1, 3, 8, 8)).abs().sum())
            for tensor in net.state_dict().values():
                tensor.zero_()
        return score


def test_an_evaluation_cannot_spoil_the_rows_after_it() -> None:
    net = conv_net()
    table = measure(net, PER_CHANNEL, fold_bn=False)
    rows = sweep(table, [Uniform(bits=8)(table), Uniform(bits=7)(table)], net, Marking())
    assert min(found.scores["score"] for found in rows) > 0
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), conv_net().state_dict().values(), strict=True))


def test_other_names_for_another_model_are_an_error() -> None:
    net, names = conv_net(), iter("ab")
    table = measure(net, bits=(8,))
    with pytest.raises(SourceError, match=naming("evaluation", "a", "b")):
        sweep(table, [Uniform(bits=8)(table)], net, lambda _: {next(names): 1.0})


def test_no_plans_are_an_error() -> None:
    with pytest.raises(SettingError, match="plans: none given"):
        sweep(measure(conv_net(), bits=(8,)), [])


def exits(_: nn.Module) -> float:
    raise SystemExit(3)


def fails(_: nn.Module) -> float:
    raise ZeroDivisionError("no images")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (fails, r"fails of float: the evaluation failed \(ZeroDivisionError: no images; .*test_sweep.py, line \d+\)"),
        (exits, r"exits of float: the evaluation failed \(SystemExit: 3"),
        (lambda _: 10**400, "returned 1000.*; a number"),
        (lambda _: "good", "returned 'good'; a number"),
        (lambda _: None, "returned None; a number"),
        (lambda _: {}, "returned {}; a number"),
        (lambda _: float("nan"), "returned nan; .* none NaN"),
        (lambda _: {"top-1": [1]}, "returned {'top-1'"),
    ],
)
def test_an_evaluation_that_gives_no_number_is_one_clear_error(evaluate: Callable[..., Any], message: str) -> None:
    net = conv_net()
    table = measure(net, bits=(8,))
    with pytest.raises(SourceError, match=message):
        sweep(table, [Uniform(bits=8)(table)], net, evaluate)


def test_plain_numbers_and_tensors_are_scores() -> None:
    net = conv_net()
    table = measure(net, bits=(8,))
    for value in (3, 3.0, torch.tensor(3.0)):
        (_, found) = sweep(table, [Uniform(bits=8)(table)], net, lambda _, value=value: value)  # type: ignore[misc]
        assert found.scores == {"score": 3.0}
        assert found.score == 3.0


def test_an_error_is_a_score_turned_round() -> None:
    assert [r.score for r in (row(1, -0.5), row(1, None))] == [-0.5, None]
    rows = [row(size, score) for size, score in itertools.product((1, 2), (-0.5, -0.1))]
    assert [r.pareto for r in mark_pareto(rows)] == [False, True, False, False]
