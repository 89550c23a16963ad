"""Budget over weights and inputs against every plan there is, on tables made of plain numbers."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Activations, Affine, Budget, InputStats, LatencyTable, LayerStats, LayerTable, Plan, compare
from mpq_plugins.errors import SettingError
from tests.conftest import Ran
from tests.helpers.tables import BITS

FEW, FEW_INPUTS = (2, 4, 8), (3, 8)
MEASURED = (2, 3, 4, 8, 16)
HOW = Activations(8, symmetric=True, range="minmax")

Pairs = tuple[tuple[int, int], ...]  # of every layer the widths of its weights and of its input


def layer(name: str, weights: list[float], inputs: list[float] | None, numel: int = 10, **changes: Any) -> LayerStats:
    """A linear layer (4, 10) with a curve of kl at 1 to 8 bits, and one at the measured widths of its input."""
    tensor = changes.pop("tensor", name)
    own = None if inputs is None else InputStats(numel, tensor, {"mse": np.array(inputs)}, {"kl": np.array(inputs)})
    stats = LayerStats(
        name, "linear", (4, 10), 0, 1.0, np.ones(4), {"mse": np.array(weights)}, {}, {"kl": np.array(weights)},
        inputs=own, macs=40,
    )  # fmt: skip
    return dataclasses.replace(stats, **changes)


def table_of(*layers: LayerStats, live: tuple[tuple[str, ...], ...] = (), **changes: Any) -> LayerTable:
    scheme = Affine(granularity="per_channel", range="mse")
    table = LayerTable(
        tuple(layers), scheme, BITS, ("mse",), False, "sha256:test", activations=HOW, input_bits=MEASURED, live=live
    )
    return dataclasses.replace(table, **changes)


def falling(scale: float, widths: tuple[int, ...] = BITS) -> list[float]:
    return [scale * 4.0**-b for b in widths]


def chain(count: int = 3, **changes: Any) -> LayerTable:
    """Layers one after another, each with a tensor of its own, of which two at a time are needed."""
    layers = [layer(f"fc{i}", falling(1 + i), falling(2.0, MEASURED), 10 * (i + 1)) for i in range(count)]
    live = tuple((f"fc{i}", f"fc{i + 1}") for i in range(count - 1))
    return table_of(*layers, live=live, **changes)


@st.composite
def tables(draw: st.DrawFn) -> LayerTable:
    """Any costs, not only falling ones; some layers read what an earlier one reads."""
    layers: list[LayerStats] = []
    for i in range(draw(st.integers(1, 4))):
        weights = draw(st.lists(st.floats(0, 4), min_size=8, max_size=8))
        inputs = draw(st.lists(st.floats(0, 4), min_size=5, max_size=5))
        before = draw(st.sampled_from([None, *layers]))
        tensor = f"fc{i}" if before is None or before.inputs is None else before.inputs.tensor
        numel = draw(st.integers(1, 50)) if before is None or before.inputs is None else before.inputs.numel
        layers.append(layer(f"fc{i}", weights, inputs, numel, tensor=tensor, macs=draw(st.integers(1, 100))))
    tensors = [own.inputs.tensor for own in layers if own.inputs is not None]
    sets = st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True).map(tuple)
    return table_of(*layers, live=tuple(draw(st.lists(sets, min_size=1, max_size=3))))


def tensor_of(own: LayerStats) -> str:
    assert own.inputs is not None
    return own.inputs.tensor


def plans(table: LayerTable) -> Iterator[Pairs]:
    """The widths of every plan in which readers of one tensor agree."""
    for pairs in itertools.product(itertools.product(FEW, FEW_INPUTS), repeat=len(table.layers)):
        read: dict[str, set[int]] = {}
        for own, (_, a) in zip(table.layers, pairs, strict=True):
            read.setdefault(tensor_of(own), set()).add(a)
        if all(len(widths) == 1 for widths in read.values()):
            yield pairs


def cost(table: LayerTable, pairs: Pairs) -> float:
    return math.fsum(
        float(own.sensitivities["kl"][b - 1]) + float(own.inputs.sensitivities["kl"][MEASURED.index(a)])
        for own, (b, a) in zip(table.layers, pairs, strict=True)
        if own.inputs is not None
    )


def takes(table: LayerTable, pairs: Pairs) -> dict[str, float]:
    """What such a plan takes of every limit, counted by hand."""
    held: dict[str, int] = {}
    values: dict[str, int] = {}
    for own, (_, a) in zip(table.layers, pairs, strict=True):
        assert own.inputs is not None
        held[own.inputs.tensor], values[own.inputs.tensor] = own.inputs.numel * a, own.inputs.numel
    return {
        "average_bits": sum(b for b, _ in pairs) / len(pairs),
        "bops": sum((own.macs or 0) * b * a for own, (b, a) in zip(table.layers, pairs, strict=True)),
        "activation_average_bits": sum(held.values()) / sum(values.values()),
        "activation_bytes": sum(held.values()) / 8,
        "activation_memory": max(sum(held[name] for name in live) for live in table.live) / 8,
    }


def pairs_of(plan: Plan) -> Pairs:
    return tuple((own.bits or 0, own.activation_bits or 0) for own in plan.layers)


def within(table: LayerTable, limits: dict[str, float]) -> list[Pairs]:
    return [pairs for pairs in plans(table) if all(takes(table, pairs)[name] <= most for name, most in limits.items())]


def asked(table: LayerTable, name: str, share: float) -> float:
    """A limit between what the smallest and the largest plan take, whole where it counts bytes."""
    least, most = (takes(table, ((b, a),) * len(table.layers))[name] for b, a in ((2, 3), (8, 8)))
    value = least + share * (most - least)
    return max(1, round(value)) if name in ("activation_bytes", "activation_memory") else value


NAMES = ("bops", "activation_average_bits", "activation_bytes", "activation_memory", "average_bits")
SHARES = st.one_of(st.floats(-0.1, 1.1), st.sampled_from([0.0, 0.5, 1.0]))


@given(tables(), st.dictionaries(st.sampled_from(NAMES), SHARES, min_size=1, max_size=3))
def test_it_is_the_best_of_all_plans(table: LayerTable, shares: dict[str, float]) -> None:
    limits = {name: asked(table, name, share) for name, share in shares.items()}
    allowed = within(table, limits)
    budget = Budget(**limits, bits=FEW, input_bits=FEW_INPUTS, sensitivity="kl")  # type: ignore[arg-type]
    if not allowed:
        with pytest.raises(SettingError, match=r"cannot be reached|no plan meets all of them"):
            budget(table)
        return
    best = min(cost(table, pairs) for pairs in allowed)
    found = budget.solve(table)
    assert pairs_of(found.plan) in allowed
    assert found.objective == pytest.approx(cost(table, pairs_of(found.plan)), abs=1e-8)
    assert found.objective == pytest.approx(best, abs=1e-8)
    assert found.gap <= 1e-9
    assert {name: used for name, (used, _) in found.used.items()} == pytest.approx(
        {name: takes(table, pairs_of(found.plan))[name] for name in limits}
    )


@given(tables(), st.sampled_from(FEW), st.sampled_from(FEW_INPUTS))
def test_pinned_and_tied_layers_keep_their_widths(table: LayerTable, bits: int, inputs: int) -> None:
    """The first layer is pinned, and all others tied: both of their widths agree."""
    others = tuple(own.name for own in table.layers[1:])
    tie = ("{" + ",".join(others) + "}",) if len(others) > 1 else ()
    bops = asked(table, "bops", 0.5)

    def kept(pairs: Pairs) -> bool:
        return pairs[0] == (bits, inputs) and len(set(pairs[1:])) <= 1 and takes(table, pairs)["bops"] <= bops

    allowed = [pairs for pairs in plans(table) if kept(pairs)]
    budget = Budget(
        bops=bops, bits=FEW, input_bits=FEW_INPUTS, sensitivity="kl", pin=(f"fc0={bits}/{inputs}",), tie=tie
    )
    if not allowed:
        with pytest.raises(SettingError, match=r"bops: .* cannot be reached"):
            budget(table)
        return
    found = budget.solve(table)
    assert pairs_of(found.plan) in allowed
    assert found.objective == pytest.approx(min(cost(table, pairs) for pairs in allowed), abs=1e-8)


def test_a_plan_says_how_inputs_are_quantized_and_round_trips() -> None:
    table = chain()
    found = Budget(bops=120 * 16, input_bits=(2, 3, 4, 8), sensitivity="kl").solve(table)
    plan = found.plan
    assert {own.activations for own in plan.layers} <= {dataclasses.replace(HOW, bits=b) for b in (2, 3, 4, 8)}
    assert Plan.model_validate_json(plan.to_json()) == plan
    record = plan.allocator
    assert (record.parameters["input_bits"], record.parameters["parts"]) == ([2, 3, 4, 8], False)
    assert record.found["objective"] == found.objective
    assert found.binding == ("bops",)
    used, asked_for = found.used["bops"]
    assert used <= asked_for == 120 * 16


def test_candidates_are_the_measured_widths_that_are_asked_for() -> None:
    """16 bits are codes as all others are."""
    plan = Budget(average_bits=8, input_bits=(16, 4, 4), sensitivity="kl")(chain())
    assert [own.activation_bits for own in plan.layers] == [16, 16, 16]


def test_ends_give_weights_and_inputs_their_width() -> None:
    plan = Budget(average_bits=8, activation_bytes=1000, bits=(2, 3), input_bits=(2, 3), ends=8, sensitivity="kl")(
        chain()
    )
    assert pairs_of(plan) == ((8, 8), (3, 3), (8, 8))
    pinned = Budget(average_bits=8, bits=(2, 3), input_bits=(2, 3), ends=8, pin=("fc0=4/3",), sensitivity="kl")(chain())
    assert pairs_of(pinned) == ((4, 3), (3, 3), (8, 8))
    weights = Budget(average_bits=8, bits=(2, 3), input_bits=(2, 3), ends=8, pin=("fc0=4",), sensitivity="kl")(chain())
    assert pairs_of(weights) == ((4, 8), (3, 3), (8, 8)), "a pin of weights alone leaves the input to the rule"


def test_layers_left_in_float_read_float() -> None:
    """Their tensor is held in float, whoever else reads it, and their operations count both widths of it."""
    table = table_of(
        layer("a", falling(1.0), falling(1.0, MEASURED), 8),
        layer("b", falling(1.0), falling(1.0, MEASURED), 8, tensor="a"),
        layer("c", falling(1.0), falling(1.0, MEASURED), 16),
        live=(("a",), ("c",)),
    )
    found = Budget(
        bops=1e9, activation_bytes=1000, activation_average_bits=32, activation_memory="1kB", pin=("a=16",),
        input_bits=(4,), bits=(4,), sensitivity="kl",
    ).solve(table)  # fmt: skip
    assert [own.activation_bits for own in found.plan.layers] == [None, 4, 4]
    assert {name: used for name, (used, _) in found.used.items()} == {
        "bops": 40 * (16 * 16 + 4 * 4 + 4 * 4),
        "activation_average_bits": (8 * 16 + 16 * 4) / 24,
        "activation_bytes": (8 * 16 + 16 * 4) / 8,
        "activation_memory": 8 * 16 / 8,
    }


def test_embeddings_have_no_inputs() -> None:
    table = table_of(
        layer("embed", falling(1.0), None, kind="embedding", macs=0), layer("fc", falling(1.0), falling(1.0, MEASURED))
    )
    plan = Budget(bops=1e9, bits=(4,), input_bits=(8,), ends=8, sensitivity="kl")(table)
    assert [(own.bits, own.activation_bits) for own in plan.layers] == [(8, None), (8, 8)]
    assert Budget(average_bits=4, input_bits=(8,), sensitivity="kl", pin=("*=32",))(table).quantizes_inputs is False


def test_two_sensitivities_scale_and_split_inputs_too() -> None:
    """kl says what an input costs, mse how that falls with its width: here by 16 from 2 to 4 bits."""
    errors = np.array([16.0, 4.0, 1.0, 1 / 256, 1e-9])
    kl = np.exp(np.log(errors).mean()) * np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    inputs = InputStats(1, "fc", {"mse": errors}, {"kl": kl})
    table = table_of(dataclasses.replace(layer("fc", falling(1.0), falling(1.0, MEASURED)), inputs=inputs))
    costs = [
        Budget(average_bits=8, bits=(8,), input_bits=(a,), sensitivity="kl*mse").solve(table).objective for a in (2, 4)
    ]
    assert costs[0] - costs[1] == pytest.approx(15.0)


def test_a_time_limit_is_kept_with_a_gap() -> None:
    found = Budget(bops=120 * 16, input_bits=(2, 4, 8), sensitivity="kl", time_limit=1e-6).solve(chain())
    assert found.gap >= 0
    assert found.used["bops"][0] <= 120 * 16


def test_joint_plans_are_not_compared_with_uniform_weights() -> None:
    """Weights alone would be, whose bits went to the inputs."""
    plan = Budget(bops=120 * 16, input_bits=(2, 3, 4, 8), bits=(2, 4, 8), pin=("fc0=4/8",), sensitivity="kl")(chain())
    assert len({own.activation_bits for own in plan.layers}) > 1
    assert compare(chain(), plan) is None


def test_the_command_line_plans_inputs_too(
    mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = chain(metrics=("mse", "relative"))
    layers = [dataclasses.replace(own, errors={**own.errors, "relative": own.errors["mse"]}) for own in table.layers]
    table = dataclasses.replace(table, layers=tuple(layers))
    table.save(tmp_path / "net.mpqt")
    monkeypatch.setattr(LayerTable, "load", lambda path: table)
    limits = ("--bops", 120 * 16, "--activation-memory", "25", "--sensitivity", "kl", "--pin", "fc0=4/8")
    ran = mpq("plan", tmp_path / "net.mpqt", "--input-bits", "2-4,8", *limits, "-o", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    assert "not compared with uniform widths: inputs differ in width" in " ".join(ran.out.split())
    budget = Budget(bops=1920, activation_memory=25, sensitivity="kl", pin=("fc0=4/8",), input_bits=(2, 3, 4, 8))
    assert Plan.load(tmp_path / "plan.json") == budget(table)
    twice = mpq("plan", tmp_path / "net.mpqt", "--input-bits", "2-4,8", *limits, "--activation-bits", 8)
    assert (twice.code != 0, "--input-bits gives each input its own width" in twice.err) == (True, True)


def test_limits_on_inputs_are_in_the_help_beside_their_widths(mpq: Callable[..., Ran]) -> None:
    """A page has so many lines."""
    limits = ("--activation-average-bits", "--activation-bytes", "--activation-memory")
    alone, beside = mpq("plan", "--help").out, mpq("plan", "--input-bits", "2-8", "--help").out
    assert [limit in alone for limit in limits] == [False] * 3
    assert [limit in beside for limit in limits] == [True] * 3


def asked_with(usual: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {"sensitivity": "kl", **usual, **changes}


UNMEASURED = dataclasses.replace(
    chain(), layers=tuple(dataclasses.replace(own, inputs=None) for own in chain().layers), activations=None
)


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (UNMEASURED, {}, "input_bits: no layer's input was measured in this table; .*measure_activations"),
        (
            dataclasses.replace(chain(), layers=(*chain().layers[:2], UNMEASURED.layers[2])),
            {},
            "layer 'fc2': its input was not measured",
        ),
        (chain(), {"input_bits": (5,)}, "input_bits: 5 was not measured; this table has 2, 3, 4, 8, 16 of inputs"),
        (chain(), {"pin": "fc0=8/6"}, "input_bits: 6 was not measured"),
        (chain(), {"ends": 1}, "ends: 1 bits were not measured of inputs"),
        (chain(), {"sensitivity": "mse"}, "'mse' is an error of weights, and of inputs in another unit.*kl"),
        (chain(), {"sensitivity": "kl*fisher"}, "'fisher' was not measured"),
        (chain(), {"pin": ("fc0=8/4", "fc0=8/3")}, "input of layer 'fc0' is given both 4 and 3"),
        (chain(), {"pin": "fc9=8/4"}, "pin: 'fc9' matches no layer"),
        (
            chain(),
            {"activation_memory": 1},
            "activation_memory: 1 cannot be reached: the least is 12.5 bytes, 11.5 more",
        ),
        (chain(1), {"bops": 1, "pin": ("fc0=8/8",)}, "bops: 1 cannot be reached: the least is 2,560 bit operations"),
        (chain(), {"bops": 1}, r"bops: 1 cannot be reached: the least is 240 bit operations, 239 more .*inputs 2, 4"),
        (
            table_of(layer("fc", falling(1.0), falling(1.0, MEASURED), macs=None)),
            {"bops": 1e9},
            "layer 'fc' has no multiply-accumulates",
        ),
        (
            table_of(layer("fc", falling(1.0), falling(1.0, MEASURED))),
            {"activation_memory": 9},
            "activation_memory: this table does not tell which inputs are needed at once",
        ),
        (
            table_of(layer("fc", falling(1.0), [math.nan] * 5)),
            {},
            "layer 'fc': the kl of its input is NaN, or infinite",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(table: LayerTable, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(**asked_with({"average_bits": 8, "input_bits": (2, 4)}, changes))(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_bits": (1, 2)}, "input_bits: 1 is not allowed; a list of one or more of 2 to 16"),
        ({"input_bits": (32,)}, "input_bits: 32 is not allowed"),
        ({"input_bits": ()}, r"input_bits: \(\) is not allowed"),
        ({"input_bits": 8}, "input_bits: 8 is not allowed; a list"),
        ({"input_bits": None}, "activation_bytes: limits widths of inputs; say which"),
        ({"input_bits": None, "activation_bytes": None, "pin": "a=8/8"}, "pin: 'a=8/8' gives an input a width"),
        ({"pin": "a=8/1"}, "pin: 'a=8/1': an input of '1' bits is not allowed; 2 to 16"),
        ({"pin": "a=8/"}, "an input of '' bits is not allowed"),
        ({"pin": "a=16/8"}, "a layer in float reads its input in float; give 'a=16'"),
        ({"bops_activation_bits": 4}, "bops_activation_bits: means nothing with input_bits"),
        ({"activation_bytes": "many"}, "activation_bytes: 'many' is not allowed"),
        ({"activation_average_bits": 0}, "activation_average_bits: 0 is not allowed"),
        (
            {"activation_bytes": None, "average_bits": None, "file_bits": 2.0},
            "input_bits: means nothing with file_bits",
        ),
    ],
)
def test_what_means_nothing_is_refused_before(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(**asked_with({"average_bits": 8, "activation_bytes": 9, "input_bits": (2, 4)}, changes))


def test_readers_of_one_tensor_pinned_apart_are_named() -> None:
    table = table_of(
        layer("q", falling(1.0), falling(1.0, MEASURED)), layer("k", falling(1.0), falling(1.0, MEASURED), tensor="q")
    )
    with pytest.raises(
        SettingError, match=r"'q' and 'k' read the same tensor.* pinned to 8 and 4 bits; pin them alike"
    ):
        Budget(average_bits=8, input_bits=(4,), sensitivity="kl", pin=("q=8/8", "k=8/4"))(table)


def test_limits_that_contradict_each_other_say_how_far() -> None:
    """Each can be met: the fewest bits take most time here."""
    table = table_of(layer("a", falling(1.0), falling(1.0, MEASURED)), layer("b", falling(1.0), falling(1.0, MEASURED)))
    latency = LatencyTable.of({"a": {"2": 9.0, "4": 1.0}, "b": {"2": 9.0, "4": 1.0}})
    budget = Budget(
        average_bits=3, latency=latency, latency_limit=2.5, bits=(2, 4), input_bits=(3, 8), sensitivity="kl"
    )
    with pytest.raises(SettingError, match="average_bits and latency_limit can each be met, but no plan meets all"):
        budget(table)
