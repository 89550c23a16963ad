"""What a plan is predicted to cost, against sums written out and the weights it makes; sensitivities on disk."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mpq_plugins import PTILMPQ, Affine, LayerStats, LayerTable, MixQuant, Piecewise, Plan, Uniform, apply, measure
from mpq_plugins.allocation.objective import channel_curves, check, layer_curve, parts_of, predicted
from mpq_plugins.errors import FormatError, MeasureWarning, SettingError
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.scheme import Scheme
from tests.helpers.nets import conv_net
from tests.helpers.plans import linear, plan_of, with_layer
from tests.helpers.says import naming
from tests.helpers.tables import resealed, version_1

BITS = (2, 4, 8)
SCHEME = Affine(granularity="per_channel", range="mse")
METRICS = ("relative", "mse", "rmse", "sqnr_db", "max_abs")
SHAPES = {"a": (3, 4), "b": (2, 10), "c": (1, 7)}


def table_of(seed: int = 0, scheme: Scheme = SCHEME) -> LayerTable:
    """Three layers with every metric, `kl` of whole layers and `output_mse` of their channels too."""
    generator = np.random.default_rng(seed)
    layers = []
    for name, (channels, inputs) in SHAPES.items():
        own = {metric: generator.uniform(0.1, 2, (3, channels)) for metric in METRICS}
        output = generator.uniform(0.1, 2, (3, channels))
        layers.append(
            LayerStats(
                name, "linear", (channels, inputs), 0, 1.0, np.ones(channels),
                {metric: errors.mean(axis=1) for metric, errors in own.items()}, own,
                {"kl": generator.uniform(0.1, 2, 3), "output_mse": output.sum(axis=1)}, {"output_mse": output},
            )
        )  # fmt: skip
    return LayerTable(tuple(layers), scheme, BITS, METRICS, False, "sha256:test")


def changed(table: LayerTable, name: str, **fields: Any) -> LayerTable:
    layers = tuple(dataclasses.replace(own, **fields) if own.name == name else own for own in table.layers)
    return dataclasses.replace(table, layers=layers)


def plan_for(widths: dict[str, list[int]], scheme: Scheme = SCHEME) -> Plan:
    """Layers with these bits for each channel."""
    layers = []
    for name, own in widths.items():
        parts = {b: tuple(c for c, width in enumerate(own) if width == b) for b in sorted(set(own))}
        layers.append(linear(name, *SHAPES[name], scheme, own[0] if len(parts) == 1 else parts))
    return plan_of(*layers)


widths = st.fixed_dictionaries(
    {
        name: st.lists(st.sampled_from([2, 4, 8, 16, 32]), min_size=channels, max_size=channels)
        for name, (channels, _) in SHAPES.items()
    }
)


@given(widths)
def test_squared_errors_and_sensitivities_add_up_over_channels(chosen: dict[str, list[int]]) -> None:
    table = table_of()
    plan = plan_for(chosen)
    expected = {"mse": 0.0, "relative": 0.0, "output_mse": 0.0}
    for layer in table.layers:
        for channel, b in enumerate(chosen[layer.name]):
            if b < 16:
                k = BITS.index(b)
                expected["mse"] += layer.channel_errors["mse"][k, channel] * layer.shape[1]
                expected["relative"] += layer.channel_errors["relative"][k, channel] * layer.shape[1]
                expected["output_mse"] += layer.channel_sensitivities["output_mse"][k, channel]
    for name, cost in expected.items():
        assert predicted(table, plan, name) == pytest.approx(cost)


@given(st.lists(st.sampled_from(BITS), min_size=3, max_size=3))
def test_whole_layers_add_up(chosen: list[int]) -> None:
    table = table_of()
    plan = plan_for({name: [b] * SHAPES[name][0] for name, b in zip(SHAPES, chosen, strict=True)})
    own = [(layer, BITS.index(b)) for layer, b in zip(table.layers, chosen, strict=True)]
    expected = {
        "kl": sum(layer.sensitivities["kl"][k] for layer, k in own),
        "mse": sum(layer.errors["mse"][k] * layer.numel for layer, k in own),
        "rmse": sum(layer.errors["rmse"][k] for layer, k in own),
        "max_abs": sum(layer.errors["max_abs"][k] for layer, k in own),
        "sqnr_db": sum(10 ** (-layer.errors["sqnr_db"][k] / 10) for layer, k in own),
    }
    for name, cost in expected.items():
        assert predicted(table, plan, name) == pytest.approx(float(cost))


def test_twenty_decibels_are_a_hundredth_of_the_power() -> None:
    table = changed(table_of(), "a", errors={"sqnr_db": np.array([0.0, 20.0, math.inf])})
    assert layer_curve(table, table.layers[0], "sqnr_db", BITS).tolist() == [1.0, 0.01, 0.0]


@pytest.mark.parametrize("name", ["mse", "kl", "kl*mse", "output_mse"])
def test_curves_come_in_the_order_that_was_asked(name: str) -> None:
    table = table_of()
    layer = table.layers[0]
    whole = layer_curve(table, layer, name, BITS)
    assert whole.shape == (3,)
    assert layer_curve(table, layer, name, (8, 2)).tolist() == whole[[2, 0]].tolist()
    if name != "kl":
        curves = channel_curves(table, layer, name, (8, 8, 4))
        assert curves.shape == (3, 3)
        assert (curves[0] == curves[1]).all()
        assert channel_curves(table, layer, name, BITS).sum(axis=1) == pytest.approx(whole)


def test_the_first_scales_the_layer_and_the_second_splits_it() -> None:
    table = table_of()
    for layer in table.layers:
        split, both = (channel_curves(table, layer, name, BITS) for name in ("mse", "kl * mse"))
        ratios = both / split
        assert ratios == pytest.approx(np.full(ratios.shape, ratios[0, 0]))
        # On a logarithmic scale the layer's curve lies where the first's lies.
        first, combined = (layer_curve(table, layer, name, BITS) for name in ("kl", "kl*mse"))
        assert np.log(first).mean() == pytest.approx(np.log(combined).mean())
    assert layer_curve(table, table.layers[0], "mse*mse", BITS) == pytest.approx(
        layer_curve(table, table.layers[0], "mse", BITS)
    )


@given(st.floats(1e-6, 1e6))
def test_the_unit_of_the_second_does_not_matter(unit: float) -> None:
    table = table_of()
    layer = table.layers[0]
    other = changed(
        table,
        "a",
        errors={**layer.errors, "mse": layer.errors["mse"] * unit},
        channel_errors={**layer.channel_errors, "mse": layer.channel_errors["mse"] * unit},
    )
    for curves in (layer_curve, channel_curves):
        assert curves(other, other.layers[0], "kl*mse", BITS) == pytest.approx(curves(table, layer, "kl*mse", BITS))


def test_widths_without_cost_do_not_decide_the_scale() -> None:
    """Zero has no logarithm; where nothing is known, a layer without the first cost costs nothing."""
    table = table_of()
    layer = table.layers[0]
    kl = layer.sensitivities["kl"] * [1, 1, 0]
    partly = changed(table, "a", sensitivities={"kl": kl})
    ratio = np.exp(np.log(kl[:2] / (layer.errors["mse"][:2] * layer.numel)).mean())
    expected = layer.errors["mse"] * layer.numel * ratio
    assert layer_curve(partly, partly.layers[0], "kl*mse", BITS) == pytest.approx(expected)
    without = changed(table, "a", sensitivities={"kl": np.zeros(3)})
    assert layer_curve(without, without.layers[0], "kl*mse", BITS).tolist() == [0.0, 0.0, 0.0]
    assert not channel_curves(without, without.layers[0], "kl*mse", BITS).any()


def test_what_the_table_cannot_tell_is_none() -> None:
    table = table_of()
    parts = {"a": [2, 4, 8], "b": [2, 2], "c": [8]}
    plan = plan_for(parts)
    assert predicted(table, plan, "mse") is not None
    assert predicted(table, plan, "kl") is None  # not known for parts
    assert predicted(table, plan, "kl*mse") is not None
    assert predicted(table, with_layer(plan, "b", bits=3), "mse") is None  # not measured
    assert predicted(table, with_layer(plan, "b", scheme=Affine()), "mse") is None  # another scheme
    assert predicted(table, plan_for({"a": [2] * 3, "b": [2] * 2}), "mse") is None  # another set of layers
    tensor = table_of(scheme=Affine())
    assert predicted(tensor, plan_for(parts, Affine()), "mse") is None  # parts with scales of their own
    assert predicted(tensor, Uniform(bits=4)(tensor), "mse") is not None
    assert predicted(changed(table, "a", channel_errors={}), plan, "mse") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "sensitivity: '' is not allowed; an error or a sensitivity of the table, or two as in kl"),
        ("kl*", r"sensitivity: 'kl\*' is not allowed"),
        ("*", r"sensitivity: '\*' is not allowed"),
        ("a*b*c", r"sensitivity: 'a\*b\*c' is not allowed"),
        (3, "sensitivity: 3 is not allowed"),
        ("hessian", "sensitivity: 'hessian' was not measured; this table has relative, mse, .*, kl, output_mse"),
        ("hessian*mse", "sensitivity: 'hessian' was not measured"),
        ("kl*fisher", "sensitivity: 'fisher' was not measured"),
    ],
)
def test_names_that_the_table_has_not_are_refused(name: Any, message: str) -> None:
    table = table_of()
    for refuse in (
        lambda: check(table, name),
        lambda: layer_curve(table, table.layers[0], name, BITS),
        lambda: channel_curves(table, table.layers[0], name, BITS),
        lambda: predicted(table, plan_for({own: [2] * SHAPES[own][0] for own in SHAPES}), name),
    ):
        with pytest.raises(SettingError, match=message):
            refuse()


def test_names_are_read_with_spaces() -> None:
    assert parts_of("mse") == ("mse",)
    assert parts_of(" kl * mse ") == ("kl", "mse")


def test_what_was_not_measured_is_refused_with_what_to_do() -> None:
    table = table_of()
    with pytest.raises(SettingError, match=naming("bits", 3, 2, 4, 8)):
        layer_curve(table, table.layers[0], "mse", (2, 3))
    with pytest.raises(SettingError, match=naming("'a'", "kl", "per channel", "kl*mse")):
        channel_curves(table, table.layers[0], "kl", BITS)
    bare = changed(table, "a", channel_errors={})
    with pytest.raises(SettingError, match=naming("'a'", "mse", "measure(per_channel=True)")):
        channel_curves(bare, bare.layers[0], "kl*mse", BITS)


def test_a_measured_layer_costs_what_its_channels_cost() -> None:
    """The squared error is that of all weights, whether counted by layer or by channel."""
    table = measure(conv_net(), SCHEME, BITS, metrics=("mse",), per_channel=True)
    for layer in table.layers:
        whole = layer_curve(table, layer, "mse", BITS)
        assert channel_curves(table, layer, "mse", BITS).sum(axis=1) == pytest.approx(whole, rel=1e-5)


def test_sensitivities_come_back_from_disk(tmp_path: Path) -> None:
    table = table_of()
    table.save(tmp_path / "net.mpqt")
    loaded = LayerTable.load(tmp_path / "net.mpqt")
    assert loaded.sensitivities == table.sensitivities == ("kl", "output_mse")
    assert loaded.channel_sensitivities == table.channel_sensitivities == ("output_mse",)
    for ours, theirs in zip(table.layers, loaded.layers, strict=True):
        for field in ("errors", "channel_errors", "sensitivities", "channel_sensitivities"):
            before, after = getattr(ours, field), getattr(theirs, field)
            assert list(before) == list(after)
            assert all((before[name] == after[name]).all() for name in before)
    plan = plan_for({"a": [2, 4, 8], "b": [2, 2], "c": [8]})
    assert predicted(loaded, plan, "output_mse") == predicted(table, plan, "output_mse")


def test_a_table_without_sensitivities_is_as_before(tmp_path: Path) -> None:
    measure(conv_net()).save(tmp_path / "net.mpqt")
    with safe_open(version_1(tmp_path / "net.mpqt"), "numpy") as file:
        assert not [name for name in sorted(file.keys()) if "sensitivities" in name]
        description = json.loads(file.metadata()["table"])
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    for field in ("sensitivities", "channel_sensitivities"):
        assert description.pop(field) == []
    save_file(arrays, tmp_path / "older.mpqt", metadata | {"table": json.dumps(description)})
    with pytest.warns(MeasureWarning, match="had no checksums"):
        loaded = LayerTable.load(tmp_path / "older.mpqt")
    assert loaded.sensitivities == loaded.channel_sensitivities == ()
    assert loaded.layers[0].sensitivities == {}


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("sensitivities", None, r"array 'sensitivities' should be F64 \[3, 2, 3\], got nothing"),
        ("sensitivities", np.zeros((3, 2, 4)), r"array 'sensitivities' .* got F64 \[3, 2, 4\]"),
        ("sensitivities", np.zeros((3, 2, 3), np.float32), "array 'sensitivities' .* got F32"),
        ("sensitivities", np.full((3, 2, 3), np.nan), "array 'sensitivities' holds NaN"),
        ("channel_sensitivities", None, r"array 'channel_sensitivities' should be F64 \[1, 3, 6\], got nothing"),
        ("channel_sensitivities", np.zeros((1, 3, 7)), r"array 'channel_sensitivities' .* got F64 \[1, 3, 7\]"),
        ("channel_sensitivities", np.full((1, 3, 6), np.nan), "array 'channel_sensitivities' holds NaN"),
    ],
)
def test_damaged_sensitivities_are_refused(tmp_path: Path, array: str, value: Any, message: str) -> None:
    path = tmp_path / "net.mpqt"
    table_of().save(path)
    resealed(path, {array: value})
    with pytest.raises(FormatError, match=message) as caught:
        LayerTable.load(path)
    assert str(path) in str(caught.value)


def actual_error(plan: Plan, metric: str) -> float:
    net = conv_net()
    before, after = quantizable_weights(net), quantizable_weights(apply(net, plan))
    error = torch.cat([(after[name] - before[name]).detach().double().flatten() for name in before])
    weights = torch.cat([before[name].detach().double().flatten() for name in before])
    return float((error.abs() / weights.abs()).sum() if metric == "relative" else error.square().sum())


def measured_table(scheme: Scheme, per_channel: bool = True) -> LayerTable:
    return measure(conv_net(), scheme, per_channel=per_channel, fold_bn=False)


@pytest.mark.parametrize("metric", ["relative", "mse"])
@pytest.mark.parametrize(
    "scheme",
    [Affine(granularity="per_channel"), Piecewise(granularity="per_channel"),
     Piecewise(granularity="per_channel", storage="shared")],
)  # fmt: skip
def test_a_plans_error_is_that_of_the_weights(scheme: Scheme, metric: str) -> None:
    measured = measured_table(scheme)
    for allocator in (MixQuant(qem=3), PTILMPQ(alpha=0.5, other_bits=(4, 2))):
        plan = allocator(measured)
        assert predicted(measured, plan, metric) == pytest.approx(actual_error(plan, metric), rel=1e-5)


def test_a_plans_error_is_none_where_the_table_cannot_tell() -> None:
    per_tensor = measured_table(Affine())
    assert predicted(per_tensor, MixQuant()(per_tensor), "relative") is not None
    assert predicted(per_tensor, PTILMPQ()(per_tensor), "relative") is None  # parts get scales of their own
    without = measured_table(Affine(granularity="per_channel"), per_channel=False)
    assert predicted(without, PTILMPQ()(without), "relative") is None
    other = PTILMPQ()(measured_table(Piecewise(granularity="per_channel")))
    assert predicted(without, other, "relative") is None
