"""Steps for a budget of a file's bytes, on tables of plain numbers and on weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Budget, CodedCurve, EntropyCoded, LayerStats, LayerTable
from mpq_plugins.allocation.file_steps import coded_bytes
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.steps import steps_of
from tests.helpers.says import naming

BITS = (4, 8)


def layer(name: str, numel: int, spread: float, sensitivity: float = 1.0) -> LayerStats:
    """A layer whose codes cost log2(spread / step) bits each and lose step^2 / 12, until all are 0."""
    steps = spread / 127 * 2.0 ** (np.arange(73) / 8)
    rate = np.maximum(np.log2(4 * spread / steps), 0.0)
    lost = np.minimum(steps**2 / 12, spread**2)
    curve = CodedCurve(steps, numel * rate, numel * lost)
    mse = np.array([spread**2 / 4.0**b for b in BITS])
    return LayerStats(
        name, "linear", (10, numel // 10), 0, 1.0, np.ones(10), {"mse": mse},
        sensitivities={"cost": numel * sensitivity * mse}, coded=curve,
    )  # fmt: skip


def table_of(*layers: LayerStats, rest: int | None = 1000) -> LayerTable:
    return LayerTable(layers, EntropyCoded(), BITS, ("mse",), False, "sha256:test", rest_bytes=rest)


LAYERS = (layer("a", 20_000, 0.1), layer("b", 50_000, 1.0, 4.0), layer("c", 8_000, 0.3, 0.25))


def test_under_squared_error_all_layers_have_one_step() -> None:
    steps = steps_of(Budget(file_bits=3)(table_of(*LAYERS)))
    assert len({*steps.values()}) == 1


def test_under_a_sensitivity_steps_go_with_its_root() -> None:
    steps = steps_of(Budget(file_bits=4, sensitivity="cost")(table_of(*LAYERS)))
    assert steps["a"] / steps["b"] == pytest.approx(2, rel=1e-5)
    assert steps["c"] / steps["a"] == pytest.approx(2, rel=1e-5)


@given(st.floats(0.5, 6), st.lists(st.tuples(st.floats(0.01, 3), st.floats(0.1, 10)), min_size=1, max_size=5))
@settings(max_examples=60)
def test_the_budget_is_kept_and_a_finer_step_would_break_it(bits: float, spreads: list[tuple[float, float]]) -> None:
    layers = [layer(str(k), 20_000, spread, weight) for k, (spread, weight) in enumerate(spreads)]
    table = table_of(*layers)
    found = Budget(file_bits=bits, sensitivity="cost").solve(table)
    steps = steps_of(found.plan)
    used, asked = found.used["file_bits"]
    assert used <= asked + 1e-9
    curves = {one.name: one.coded for one in layers}
    taken = {name: coded_bytes(curve, steps[name]) for name, curve in curves.items() if curve is not None}
    assert {one.name: one.coded_bytes for one in found.plan.layers} == taken
    if "at_finest_step" not in found.plan.allocator.found:
        finer = sum(coded_bytes(curve, steps[name] * 0.999) for name, curve in curves.items() if curve is not None)
        room = asked * 20_000 * len(layers) / 8 - (used * 20_000 * len(layers) / 8 - sum(taken.values()))
        assert finer > room - 8 * len(layers)


def test_no_shift_of_steps_between_layers_at_equal_bytes_has_less_error() -> None:
    """Against brute force: one layer's step up by an eighth of an octave, another's down until the bytes are equal."""
    table = table_of(*LAYERS)
    found = Budget(file_bits=4, sensitivity="cost").solve(table)
    steps = steps_of(found.plan)
    weights = {"a": 1.0, "b": 4.0, "c": 0.25}
    curves = {one.name: one.coded for one in LAYERS if one.coded is not None}

    def at(curve: CodedCurve, values: Any, step: float) -> float:
        return float(np.interp(math.log(step), np.log(curve.steps), values))

    def cost(trial: dict[str, float]) -> float:
        return sum(weights[name] * at(curve, curve.squared_error, trial[name]) for name, curve in curves.items())

    def taken(trial: dict[str, float]) -> float:
        return sum(at(curve, curve.bits, trial[name]) for name, curve in curves.items())

    for up in steps:
        for down in steps:
            if up == down:
                continue
            trial = {**steps, up: steps[up] * 2 ** (1 / 8)}
            while taken(trial) < taken(steps):
                trial[down] *= 0.999
            assert cost(trial) > cost(steps) * (1 - 1e-3), (up, down)


def test_a_layer_that_int8_cannot_hold_finer_stays_at_its_finest_step() -> None:
    table = table_of(layer("wide", 20_000, 100.0), layer("narrow", 20_000, 0.1))
    plan = Budget(file_bits=7)(table)
    assert plan.allocator.found["at_finest_step"] == ["wide"]
    assert steps_of(plan)["wide"] == pytest.approx(100 / 127)


def test_a_size_counts_what_lies_beside_the_layers() -> None:
    bare, with_rest = table_of(*LAYERS, rest=0), table_of(*LAYERS, rest=5000)
    assert Budget(file_size=30_000)(bare).layers == Budget(file_size="35kB")(with_rest).layers


@pytest.mark.parametrize(
    ("budget", "table", "facts"),
    [
        ({"file_size": 900}, table_of(*LAYERS), ("file_size", "900", "1,000", "header")),
        ({"file_bits": 0.01}, table_of(*LAYERS), ("file_bits", "header", "ask for")),
        ({"file_size": 5000}, table_of(*LAYERS, rest=None), ("file_size", "measure again", "file_bits")),
        ({"file_bits": 2, "sensitivity": "kl"}, table_of(*LAYERS), ("kl", "was not measured", "cost")),
        ({"file_bits": 2}, table_of(*(replace(one, coded=None) for one in LAYERS)), ("no entropies", "EntropyCoded()")),
    ],
)
def test_what_cannot_be_met_is_said(budget: dict[str, Any], table: LayerTable, facts: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match=naming(*facts)):
        Budget(**budget)(table)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"file_bits": 1, "average_bits": 3}, ("average_bits and file_bits", "given alone")),
        ({"file_bits": 1, "file_size": 3000}, ("file_bits and file_size",)),
        ({"file_bits": 1, "pin": "a=8"}, ("pin", "file_bits", "skip")),
        ({"file_bits": 1, "ends": 8}, ("ends", "file_bits", "skip")),
        ({"file_bits": 0}, ("file_bits", "0")),
        ({"file_bits": math.nan}, ("file_bits", "nan")),
        ({"file_size": "60 bits"}, ("file_size", "60 bits")),
    ],
)
def test_what_goes_with_no_file_is_refused(given: dict[str, Any], facts: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match=naming(*facts)):
        Budget(**given)


def test_a_table_of_other_widths_says_what_to_measure() -> None:
    table = mpq.measure(nn.Sequential(nn.Linear(64, 64)), Affine(granularity="per_channel"))
    with pytest.raises(SettingError, match=naming("EntropyCoded()", "--scheme entropy_coded")):
        Budget(file_bits=3)(table)


def test_the_prediction_is_what_the_written_file_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    for name in ("0.weight", "2.weight"):
        nn.init.normal_(net.get_parameter(name), std=0.1)
    plan = Budget(file_bits=1.5)(mpq.measure(net, EntropyCoded()))
    container = mpq.compress(net, plan, tmp_path / "net.mpqc")
    assert container.file_bits == pytest.approx(1.5, rel=0.02)
