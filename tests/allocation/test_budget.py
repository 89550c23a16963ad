"""Budget against every plan there is, on tables made of plain numbers."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_plugins import Affine, Budget, LatencyTable, LayerStats, LayerTable, Piecewise, Plan, Uniform
from mpq_plugins.allocation.budget_problem import Layout
from mpq_plugins.allocation.objective import predicted
from mpq_plugins.errors import FormatError, PlanWarning, SettingError
from mpq_plugins.plans.scheme import Scheme
from tests.helpers.says import naming
from tests.helpers.tables import BITS, norms_table

FEW = (2, 3, 8)
SCHEME = Affine(granularity="per_channel", range="mse")
SIZES = ("average_bits", "total_average_bits", "size_bytes", "weights_only_bytes")

Combination = tuple[tuple[int, ...], ...]  # widths of the channels of every layer


def layer(name: str, errors: list[list[float]], inputs: int = 8, **changes: Any) -> LayerStats:
    """A linear layer (channels, inputs) with one curve of mean squared errors at 1 to 8 bits for each channel."""
    own = np.array(errors, np.float64).T
    channels = own.shape[1]
    stats = LayerStats(
        name, "linear", (channels, inputs), 0, 1.0, np.ones(channels), {"mse": own.mean(axis=1)}, {"mse": own},
        macs=channels * inputs * 5,
    )  # fmt: skip
    return dataclasses.replace(stats, **changes)


def table_of(*layers: LayerStats, scheme: Scheme = SCHEME) -> LayerTable:
    return LayerTable(tuple(layers), scheme, BITS, ("mse",), False, "sha256:test")


def falling(scale: float) -> list[float]:
    """Four times less with every bit."""
    return [scale * 4.0**-b for b in BITS]


def seeded(
    shapes: list[tuple[int, int]], seed: int = 0, scheme: Scheme = SCHEME, names: list[str] | None = None
) -> LayerTable:
    """Layers of these shapes whose channels differ by orders of magnitude."""
    generator = np.random.default_rng(seed)
    names = names or [f"block.{i}.fc" for i in range(len(shapes))]
    return table_of(
        *(
            layer(name, [falling(own) for own in generator.lognormal(0, 1.5, channels)], inputs)
            for name, (channels, inputs) in zip(names, shapes, strict=True)
        ),
        scheme=scheme,
    )


curves = st.lists(st.floats(0, 4), min_size=8, max_size=8)


@st.composite
def tables(draw: st.DrawFn, layers: int = 3, channels: int = 3) -> LayerTable:
    """Any errors, not only falling ones; few channels, so that every plan can be tried."""
    sizes = draw(st.lists(st.integers(1, channels), min_size=1, max_size=layers))
    return table_of(
        *(
            layer(f"layer{i}", [draw(curves) for _ in range(own)], draw(st.sampled_from([1, 3, 8, 100])))
            for i, own in enumerate(sizes)
        )
    )


def combinations(table: LayerTable, parts: bool, bits: tuple[int, ...] = FEW) -> Iterator[Combination]:
    """The widths of every plan."""
    if parts:
        per_layer = [list(itertools.product(bits, repeat=own.channels)) for own in table.layers]
    else:
        per_layer = [[(b,) * own.channels for b in bits] for own in table.layers]
    return itertools.product(*per_layer)


def cost(table: LayerTable, widths: Combination) -> float:
    """The squared error of all weights together."""
    return math.fsum(
        float(own.channel_errors["mse"][b - 1, c]) * own.shape[1]
        for own, bits in zip(table.layers, widths, strict=True)
        for c, b in enumerate(bits)
    )


def takes(table: LayerTable, widths: Combination, limit: str) -> float:
    """What such a plan takes: codes, and for totals 32-bit scales, zero points of b bits and the map of parts."""
    codes = extra = 0
    for own, bits in zip(table.layers, widths, strict=True):
        codes += own.shape[1] * sum(bits)
        extra += sum(32 + (b if b > 1 else 0) for b in bits)
        parts = len(set(bits))
        extra += own.channels * math.ceil(math.log2(parts))
    count = sum(own.numel for own in table.layers)
    return {
        "average_bits": codes / count,
        "weights_only_bytes": math.ceil(codes / 8),
        "total_average_bits": (codes + extra) / count,
        "size_bytes": math.ceil((codes + extra) / 8),
    }[limit]


def size_of(plan: Plan, limit: str) -> float:
    """The same as the plan itself counts it."""
    return float(getattr(plan.size(), {"size_bytes": "total_bytes"}.get(limit, limit)))


def widths_of(plan: Plan) -> Combination:
    found = []
    for own in plan.layers:
        bits = {channel: part.bits for part in own.all_parts for channel in part.channels}
        found.append(tuple(bits[c] for c in range(own.channels)))
    return tuple(found)


def asked(table: LayerTable, limit: str, share: float) -> float:
    """A limit between what the smallest and the largest plan take, in whole bytes where it counts bytes."""
    least, most = (takes(table, tuple((b,) * own.channels for own in table.layers), limit) for b in (2, 8))
    value = least + share * (most - least)
    return max(1, round(value)) if limit.endswith("bytes") else value


shares = st.one_of(st.floats(-0.2, 1.1), st.sampled_from([0.0, 1 / 3, 1.0]))


@given(tables(), st.sampled_from(["average_bits", "weights_only_bytes"]), shares, st.booleans())
def test_it_is_the_best_of_all_plans(table: LayerTable, limit: str, share: float, parts: bool) -> None:
    most = asked(table, limit, share)
    within = [widths for widths in combinations(table, parts) if takes(table, widths, limit) <= most]
    budget = Budget(**{limit: most}, bits=FEW, parts=parts)  # type: ignore[arg-type]
    if not within:
        with pytest.raises(SettingError, match=f"{limit}: .* cannot be reached"):
            budget(table)
        return
    best = min(cost(table, widths) for widths in within)
    found = budget.solve(table)
    assert found.objective == pytest.approx(best, abs=1e-8)
    assert cost(table, widths_of(found.plan)) == pytest.approx(found.objective, abs=1e-8)
    assert size_of(found.plan, limit) <= most
    assert found.objective * (1 - found.gap) <= best + 1e-8


@given(tables(), st.sampled_from(["total_average_bits", "size_bytes"]), shares, st.booleans())
def test_maps_count_in_total(table: LayerTable, limit: str, share: float, parts: bool) -> None:
    most = asked(table, limit, share)
    costs = {
        per_channel: min(
            (cost(table, widths) for widths in combinations(table, per_channel) if takes(table, widths, limit) <= most),
            default=math.inf,
        )
        for per_channel in (True, False)
    }
    budget = Budget(**{limit: most}, bits=FEW, parts=parts)  # type: ignore[arg-type]
    if costs[parts] == math.inf:
        with pytest.raises(SettingError, match=f"{limit}: .* cannot be reached"):
            budget(table)
        return
    found = budget.solve(table)
    assert size_of(found.plan, limit) == takes(table, widths_of(found.plan), limit) <= most
    assert found.objective == pytest.approx(cost(table, widths_of(found.plan)), abs=1e-8)
    assert found.objective == pytest.approx(costs[parts], abs=1e-8)
    assert found.objective * (1 - found.gap) <= costs[parts] + 1e-8


@given(tables(), shares, shares)
def test_two_limits_are_both_kept(table: LayerTable, first: float, second: float) -> None:
    """Bit operations weigh layers otherwise than sizes do."""
    layers = tuple(dataclasses.replace(own, macs=own.numel * (1 + 7 * i)) for i, own in enumerate(table.layers))
    table = dataclasses.replace(table, layers=layers)
    macs = [own.macs or 0 for own in layers]
    average, bops = asked(table, "average_bits", first), 8 * sum(macs) * (2 + 6 * second)

    def operations(widths: Combination) -> float:
        return math.fsum(
            8 * count * bits[0] if len(set(bits)) == 1 else 8 * count * sum(bits) / len(bits)
            for count, bits in zip(macs, widths, strict=True)
        )

    within = [
        widths
        for widths in combinations(table, False)
        if takes(table, widths, "average_bits") <= average and operations(widths) <= bops
    ]
    budget = Budget(average_bits=average, bops=bops, bits=FEW, parts=False)
    if not within:
        with pytest.raises(SettingError, match=r"cannot be reached|no plan meets all of them"):
            budget(table)
        return
    found = budget.solve(table)
    assert found.objective == pytest.approx(min(cost(table, widths) for widths in within), abs=1e-8)
    assert found.plan.size().average_bits <= average
    assert [limit for _, limit in found.used.values()] == [average, bops]
    assert found.used["average_bits"][0] == pytest.approx(found.plan.size().average_bits)
    assert found.used["bops"][0] == pytest.approx(operations(widths_of(found.plan)))
    assert found.used["bops"][0] <= bops


SHAPES = [(8, 27), (16, 72), (16, 144), (32, 144), (10, 32), (1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("limit", SIZES)
def test_a_network_gets_what_it_may_take(limit: str, parts: bool) -> None:
    table = seeded(SHAPES)
    before = math.inf
    for b in range(2, 8):
        most = size_of(Uniform(bits=b)(table), limit)
        found = Budget(**{limit: most}, parts=parts).solve(table)  # type: ignore[arg-type]
        assert size_of(found.plan, limit) <= most
        unrounded = 1.0 if limit.endswith("bytes") else 1e-9
        assert size_of(found.plan, limit) - unrounded < found.used[limit][0] <= size_of(found.plan, limit)
        assert found.used[limit][1] == most
        assert found.binding == (limit,)
        assert found.objective == pytest.approx(predicted(table, found.plan, "mse"), rel=1e-12)
        uniform = predicted(table, Uniform(bits=b)(table), "mse")
        assert uniform is not None
        assert found.objective <= uniform * (0.9 if parts else 1 + 1e-12)
        assert found.objective <= before
        # Of small layers some sets of widths are left open where maps count.
        assert 0 <= found.gap < (2e-3 if parts and limit in ("total_average_bits", "size_bytes") else 1e-4)
        before = found.objective


@given(tables(), st.sampled_from(SIZES), shares)
def test_channels_apart_are_never_worse_than_layers_whole(table: LayerTable, limit: str, share: float) -> None:
    most = asked(table, limit, max(0.0, share))
    apart, whole = (
        Budget(**{limit: most}, bits=FEW, parts=parts).solve(table)  # type: ignore[arg-type]
        for parts in (True, False)
    )
    assert apart.objective <= whole.objective + 1e-8
    for b in FEW:
        if size_of(uniform := Uniform(bits=b)(table), limit) <= most:
            other = predicted(table, uniform, "mse")
            assert other is not None
            assert whole.objective <= other + 1e-8


@given(tables(), st.sampled_from(SIZES), shares, st.integers(0, 40), st.booleans())
def test_more_room_never_costs_more(table: LayerTable, limit: str, share: float, more: int, parts: bool) -> None:
    most = asked(table, limit, max(0.0, share))
    costs = [
        Budget(**{limit: room}, bits=FEW, parts=parts).solve(table).objective  # type: ignore[arg-type]
        for room in (most, most + more)
    ]
    assert costs[1] <= costs[0] + 1e-8


@pytest.mark.parametrize("parts", [False, True])
def test_the_order_of_layers_and_the_unit_of_errors_do_not_matter(parts: bool) -> None:
    table = seeded(SHAPES)
    order = [3, 0, 5, 4, 1, 2]
    moved = dataclasses.replace(table, layers=tuple(table.layers[i] for i in order))
    scaled = dataclasses.replace(
        table,
        layers=tuple(
            dataclasses.replace(
                own, errors={"mse": own.errors["mse"] * 1e-5}, channel_errors={"mse": own.channel_errors["mse"] * 1e-5}
            )
            for own in table.layers
        ),
    )
    for average in (2.3, 3.0, 4.71):
        budget = Budget(average_bits=average, parts=parts)
        plan = budget(table)
        assert budget(moved).by_name == plan.by_name
        assert [own.name for own in budget(moved).layers] == [table.layers[i].name for i in order]
        assert budget(scaled).layers == plan.layers
        assert budget.solve(scaled).objective == pytest.approx(1e-5 * budget.solve(table).objective)


@pytest.mark.parametrize("limits", [{"average_bits": 3.3}, {"size_bytes": 5000, "bops": 1e6}, {"average_bits": 9}])
@pytest.mark.parametrize("parts", [False, True])
def test_the_same_call_gives_the_same_bytes(tmp_path: Path, limits: dict[str, Any], parts: bool) -> None:
    plans = [Budget(**limits, parts=parts, pin=("*.0.*=8",))(seeded(SHAPES)) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    plans[0].save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plans[0]
    json.loads(plans[0].to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = plans[0].allocator.found
    assert found["objective"] == pytest.approx(predicted(seeded(SHAPES), plans[0], "mse"))
    assert set(found["binding"]) <= set(limits)


def test_equal_values_make_equal_bytes() -> None:
    table = seeded(SHAPES)
    assert Budget(average_bits=3)(table).to_json() == Budget(average_bits=3.0)(table).to_json()
    assert Budget(average_bits=np.float32(3))(table).to_json() == Budget(average_bits=3)(table).to_json()  # type: ignore[arg-type]
    assert Budget(size_bytes=np.int64(5000))(table).to_json() == Budget(size_bytes=5000)(table).to_json()  # type: ignore[arg-type]
    assert Budget(average_bits=3, bits=(8, 2, 4, 2)) == Budget(average_bits=3, bits=(2, 4, 8))


def test_nothing_binds_where_everything_gets_the_most() -> None:
    found = Budget(average_bits=20).solve(seeded(SHAPES))
    assert found.binding == ()
    assert {own.bits for own in found.plan.layers} == {8}
    assert found.gap == 0.0
    assert found.used == {"average_bits": (8.0, 20)}


def test_a_full_limit_binds_only_where_more_would_help() -> None:
    rising = table_of(layer("a", [[9.0, 4.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0]], 10))
    assert Budget(average_bits=4).solve(rising).binding == ()
    assert Budget(average_bits=3.9).solve(rising).binding == ("average_bits",)


def test_room_for_more_bits_of_a_channel_but_not_for_a_map_binds() -> None:
    """Eight channels of one weight at 2 bits take 288 bits: a third bit for one takes 2 more, and the map 8."""
    table = table_of(layer("a", [falling(1.0)] * 8, 1))
    found = Budget(size_bytes=37, bits=(2, 3)).solve(table)
    assert {own.bits for own in found.plan.layers} == {2}
    assert found.binding == ("size_bytes",)


def test_a_time_limit_gives_a_plan_and_its_gap() -> None:
    table = seeded(SHAPES)
    budget = Budget(size_bytes=5000, time_limit=1e-9)
    hurried, patient = budget.solve(table), Budget(size_bytes=5000).solve(table)
    assert size_of(hurried.plan, "size_bytes") <= 5000
    assert patient.objective <= hurried.objective
    assert hurried.objective * (1 - hurried.gap) <= patient.objective
    assert hurried.gap > patient.gap
    assert hurried.plan.allocator.found["gap"] == hurried.gap


def test_without_time_no_plan_found_is_said() -> None:
    """Two limits that only HiGHS can reconcile, and no time for it."""
    table = table_of(layer("a", [falling(1.0)], 8), layer("b", [falling(1.0)], 8))
    times = {"a": {2: 10.0, 8: 1.0}, "b": {2: 10.0, 8: 1.0}}
    with pytest.raises(SettingError, match=naming("time_limit", "1e-09", "seconds", "allow more")):
        Budget(average_bits=4, latency=times, latency_limit=5.0, bits=(2, 8), time_limit=1e-9)(table)  # type: ignore[arg-type]


def test_the_limit_that_binds_is_named() -> None:
    table = seeded(SHAPES)
    assert Budget(average_bits=3, size_bytes=10**9).solve(table).binding == ("average_bits",)
    assert Budget(average_bits=20, size_bytes=5000).solve(table).binding == ("size_bytes",)


def test_what_was_used_is_in_the_unit_that_was_asked() -> None:
    table = table_of(layer("a", [falling(1.0)], 10))
    found = Budget(average_bits=2.55, total_average_bits=9.9).solve(table)
    assert found.plan.layers[0].bits == 2
    assert found.used == {"average_bits": (2.0, 2.55), "total_average_bits": (5.4, 9.9)}
    in_bytes = Budget(weights_only_bytes=7, size_bytes=30).solve(table)
    assert in_bytes.used == {"weights_only_bytes": (6.25, 7), "size_bytes": (10.875, 30)}


@pytest.mark.parametrize("parts", [False, True])
def test_only_allowed_bits_are_given(parts: bool) -> None:
    plan = Budget(average_bits=4.1, bits=(3, 5), parts=parts)(seeded(SHAPES))
    assert {b for bits in widths_of(plan) for b in bits} == {3, 5}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pin": "block.0.fc=8"}, {"block.0.fc": 8}),
        ({"pin": ("block.[01].*=6", "block.4.fc=1")}, {"block.0.fc": 6, "block.1.fc": 6, "block.4.fc": 1}),
        ({"pin": [r"re:block\.[35]\..*=7"]}, {"block.3.fc": 7, "block.5.fc": 7}),
        ({"pin": "block.2.fc=32"}, {"block.2.fc": 32}),
        ({"pin": "head=16"}, {"block.1.fc": 16}),
        ({"pin": ("block.0.*=8", "block.*.fc=8")}, {f"block.{i}.fc": 8 for i in range(6)}),
        ({"ends": 8}, {"block.0.fc": 8, "block.5.fc": 8}),
        ({"ends": 8, "pin": "block.0.fc=7"}, {"block.0.fc": 7, "block.5.fc": 8}),
    ],
)
def test_pins_are_kept(settings: dict[str, Any], expected: dict[str, int]) -> None:
    table = seeded(SHAPES)
    layers = [dataclasses.replace(own, tied=("head",)) if own.name == "block.1.fc" else own for own in table.layers]
    table = dataclasses.replace(table, layers=tuple(layers))
    budget = Budget(average_bits=20.0, bits=(2, 3), **settings)
    found = budget.solve(table)
    for own in found.plan.layers:
        assert own.bits == expected.get(own.name, 3)
    assert found.objective == pytest.approx(predicted(table, found.plan, "mse"))
    tight = Budget(average_bits=found.plan.size().average_bits - 0.1, bits=(2, 3), **settings)
    if len(expected) < len(SHAPES):
        plan = tight(table)
        assert all(plan.by_name[name].bits == bits for name, bits in expected.items())
        assert plan.size().average_bits <= found.plan.size().average_bits - 0.1
    else:
        with pytest.raises(SettingError, match=naming("average_bits", 7.9, 8)):
            tight(table)


def test_needs_are_the_candidates_and_the_pinned_widths() -> None:
    needs = Budget(average_bits=3, bits=(2, 4), pin=("a=8", "b=32"), ends=6, sensitivity="kl * mse").needs
    assert needs.bits == (2, 4, 6, 8)
    assert needs.metrics == ("mse",)
    assert needs.channel_errors
    assert not Budget(average_bits=3, parts=False).needs.channel_errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pin": "conv9=4"}, "pin: 'conv9' matches no layer; names look like block.0.fc, block.1.fc, block.2.fc"),
        ({"pin": ("block.0.fc=4", "*=8")}, "pin: layer 'block.0.fc' is given both 4 and 8 bits; give one"),
        ({"pin": "re:block(=4"}, r"re:block\(.*no regular expression"),
        ({"tie": "block.{x,y}"}, "tie: 'block.{x,y}' finds no layers to tie; names look like block.0.fc"),
        ({"tie": "block.*"}, "tie: 'block.*' names no alternatives"),
        ({"tie": ("block.{0,1}.fc", "block.{1,2}.fc")}, "tie: layer 'block.1.fc' is in two groups"),
        ({"tie": "block.{0,1}.fc", "pin": "block.1.fc=4"}, r"tie: block.0.fc, block.1.fc must agree, but are pinned"),
        ({"tie": "block.{0,1}.fc", "ends": 4}, "pin all alike"),
        ({"bits": (2, 4), "sensitivity": "kl"}, "sensitivity: 'kl' was not measured; this table has mse"),
        ({"bits": (2, 4), "sensitivity": "rmse"}, "sensitivity: 'rmse' was not measured"),
    ],
)
def test_names_that_do_not_fit_the_table_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(average_bits=3, **settings)(seeded(SHAPES))


def test_experts_of_a_layer_agree_and_those_of_another_need_not() -> None:
    words = [f"{n}.experts.{e}.{w}" for n in (0, 1) for e in range(3) for w in ("w1", "w2", "w3")]
    table = seeded([(8, 8)] * len(words))
    pairs = zip(table.layers, words, strict=True)
    named = dataclasses.replace(table, layers=tuple(dataclasses.replace(one, name=name) for one, name in pairs))
    free = Budget(average_bits=3, parts=False)(named)
    plan = Budget(average_bits=3, parts=False, tie=("gate_up", "experts"))(named)
    widths = [{layer.bits for layer in plan.layers if layer.name.startswith(f"{n}.")} for n in (0, 1)]
    assert [len(each) for each in widths] == [1, 1]
    assert len({layer.bits for layer in free.layers[:9]}) > 1  # which tying changes


NAMES = ["0.query", "0.key", "0.value", "0.out", "1.query", "1.key", "1.value", "1.out"]


def test_tied_layers_agree_and_are_best_so() -> None:
    """Of the plans in which they agree, no other costs less."""
    table = seeded([(2, 5), (2, 9), (3, 4), (2, 7)] * 2, names=NAMES)
    budget = Budget(average_bits=4.4, bits=FEW, tie=("*.{query,key,value}",), parts=False)
    plan = budget(table)
    for block in "01":
        assert len({plan.by_name[f"{block}.{word}"].bits for word in ("query", "key", "value")}) == 1
    agreeing = [
        widths
        for widths in combinations(table, False)
        if all(widths[i][0] == widths[i + 1][0] == widths[i + 2][0] for i in (0, 4))
        and takes(table, widths, "average_bits") <= 4.4
    ]
    assert budget.solve(table).objective == pytest.approx(min(cost(table, widths) for widths in agreeing))
    assert budget.solve(table).objective > Budget(average_bits=4.4, bits=FEW, parts=False).solve(table).objective


@pytest.mark.parametrize(("tie", "same"), [("qkv", "*.{query,key,value}"), ("gate_up", "*.{gate_proj,up_proj}")])
def test_what_engines_fuse_is_tied_by_one_word(tie: str, same: str) -> None:
    names = [f"{block}.{word}" for block in "01" for word in ("query", "key", "value", "gate_proj", "up_proj")]
    table = seeded([(6, 5)] * len(names), names=names)
    fused = Budget(average_bits=4, tie=(tie,)).solve(table)
    assert fused.plan.layers == Budget(average_bits=4, tie=(same,)).solve(table).plan.layers
    assert fused.objective > Budget(average_bits=4).solve(table).objective


def test_what_is_fused_already_is_said_and_no_error() -> None:
    table = seeded([(6, 5)] * 8, names=NAMES)
    with pytest.warns(PlanWarning, match=naming("tie", "gate_up", "no layers")):
        plan = Budget(average_bits=4, tie=("gate_up",))(table)
    assert plan.layers == Budget(average_bits=4)(table).layers


def test_layers_outside_a_tie_keep_their_parts() -> None:
    table = seeded([(6, 5)] * 8, names=NAMES)
    plan = Budget(average_bits=4, tie=("{0,1}.query", "0.{key,value}"))(table)
    assert plan.by_name["0.query"].bits == plan.by_name["1.query"].bits is not None
    assert plan.by_name["0.key"].bits == plan.by_name["0.value"].bits is not None
    assert all(plan.by_name[name].parts for name in ("0.out", "1.out", "1.key", "1.value"))


def test_tied_layers_may_be_pinned_alike() -> None:
    table = seeded([(6, 5)] * 8, names=NAMES)
    plan = Budget(average_bits=5, tie=("*.{query,key,value}",), pin=("0.[qkv]*=6",))(table)
    assert {plan.by_name[f"0.{word}"].bits for word in ("query", "key", "value")} == {6}
    assert len({plan.by_name[f"1.{word}"].bits for word in ("query", "key", "value")}) == 1


def test_bit_operations_need_multiply_accumulates() -> None:
    table = seeded(SHAPES)
    layers = [dataclasses.replace(own, macs=None) if own.name == "block.2.fc" else own for own in table.layers]
    with pytest.raises(SettingError, match=naming("bops", "'block.2.fc'", "example_input")):
        Budget(bops=1e6)(dataclasses.replace(table, layers=tuple(layers)))


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_bit_operations_are_multiply_accumulates_by_both_widths(activation_bits: int) -> None:
    table = seeded(SHAPES)
    most = 1.0 * sum((own.macs or 0) * 3 * activation_bits for own in table.layers)
    found = Budget(bops=most, bops_activation_bits=activation_bits, parts=False).solve(table)
    used = sum((own.macs or 0) * (found.plan.by_name[own.name].bits or 0) for own in table.layers) * activation_bits
    assert 0.9 * most < used <= most
    assert found.used["bops"][0] == pytest.approx(used)


def latencies(table: LayerTable, bits: tuple[int, ...]) -> dict[str, dict[str, float]]:
    generator = np.random.default_rng(5)
    return {own.name: {str(b): float(b * generator.uniform(0.5, 2)) for b in bits} for own in table.layers}


@pytest.mark.parametrize("parts", [False, True])
def test_a_latency_table_comes_from_a_mapping_or_a_file(tmp_path: Path, parts: bool) -> None:
    table = seeded([(2, 5), (2, 9), (3, 4)])
    times = latencies(table, FEW)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(times))
    most = sum(own["3"] for own in times.values())
    budgets = [
        Budget(latency=source, latency_limit=most, bits=FEW, parts=parts)  # type: ignore[arg-type]
        for source in (times, path, str(path), LatencyTable.of(times))
    ]
    plans = [budget(table) for budget in budgets]
    assert len({plan.to_json() for plan in plans}) == 1
    assert len(set(budgets)) == 1
    assert plans[0].allocator.parameters["latency"].startswith("3 layers, sha256:")

    def taken(widths: Combination) -> float:
        return math.fsum(
            math.fsum(times[own.name][str(b)] / own.channels for b in bits)
            for own, bits in zip(table.layers, widths, strict=True)
        )

    best = min(cost(table, widths) for widths in combinations(table, parts) if taken(widths) <= most)
    assert taken(widths_of(plans[0])) <= most * (1 + 1e-9)
    assert predicted(table, plans[0], "mse") == pytest.approx(best)


def test_a_limit_just_met_is_met() -> None:
    """A latency is a sum of floats, kept to a billionth; what a plan was timed at must be a limit that it meets."""
    table = seeded(SHAPES)
    times = latencies(table, tuple(BITS))
    for b in BITS:
        most = math.fsum(own[str(b)] for own in times.values())
        found = Budget(latency=times, latency_limit=most, parts=False).solve(table)  # type: ignore[arg-type]
        assert found.used["latency_limit"][0] <= most * (1 + 1e-9)
        uniform = predicted(table, Uniform(bits=b)(table), "mse")
        assert uniform is not None
        assert found.objective <= uniform


def test_an_average_that_a_plan_has_to_the_bit_is_within_reach() -> None:
    table = table_of(layer("a", [falling(1.0)], inputs=1), layer("b", [falling(1.0)], inputs=48))
    tried = 0
    for a, b in itertools.product(BITS, BITS):
        average = (a + 48 * b) / 49
        if math.floor(average * 49) < a + 48 * b:  # a double below the bits that it stands for
            tried += 1
            assert widths_of(Budget(average_bits=average, pin=(f"a={a}", f"b={b}"), parts=False)(table)) == ((a,), (b,))
    assert tried


def test_the_gap_is_of_the_whole_objective_pinned_layers_included(monkeypatch: pytest.MonkeyPatch) -> None:
    table = seeded([(4, 8), (4, 8)], names=["pinned", "free"])
    solved = Layout.solved

    def half_known(self: Layout, *watch: Any) -> Any:
        widths, solution = solved(self, *watch)
        return widths, dataclasses.replace(solution, bound=solution.cost / 2)

    monkeypatch.setattr(Layout, "solved", half_known)
    found = Budget(average_bits=4.0, pin=("pinned=4",), parts=False).solve(table)
    pinned = 4 * 8 * float(table.layers[0].errors["mse"][3])
    assert found.objective > pinned > 0
    assert found.gap == pytest.approx((found.objective - pinned) / 2 / found.objective)


def test_a_change_that_fits_the_room_to_the_bit_is_not_what_a_limit_prevents() -> None:
    table = table_of(layer("a", [falling(1.0)], inputs=8))
    settings: dict[str, Any] = {"bits": (2, 4), "parts": False, "weights_only_bytes": 4}
    assert Budget(average_bits=3.9, **settings).solve(table).binding == ("average_bits",)
    settings["weights_only_bytes"] = 3
    assert Budget(average_bits=4.0, **settings).solve(table).binding == ("weights_only_bytes",)


@pytest.mark.parametrize("limit", ["average_bits", "weights_only_bytes"])
def test_a_layer_in_floating_point_has_no_region_bits(limit: str) -> None:
    table = seeded([(2, 8), (2, 8)], scheme=Piecewise(granularity="per_channel"), names=["float", "free"])
    asked: dict[str, Any] = {limit: 100.0}
    found = Budget(**asked, bits=(4,), pin=("float=16",), parts=False).solve(table)
    assert found.used[limit][0] == size_of(found.plan, limit)


def test_a_width_that_was_not_timed_is_refused() -> None:
    table = seeded(SHAPES)
    times = latencies(table, (4, 8))
    with pytest.raises(SettingError, match=naming("latency", "'block.0.fc'", 4, 8, "not 2, 3")):
        Budget(latency=times, latency_limit=50.0, bits=FEW)(table)  # type: ignore[arg-type]
    del times["block.3.fc"]
    with pytest.raises(SettingError, match=r"latency: 'block\.3\.fc' has no bit-width"):
        Budget(latency=times, latency_limit=50.0, bits=(4, 8))(table)  # type: ignore[arg-type]


def test_a_latency_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere\.json: cannot read it"):
        Budget(latency=str(tmp_path / "nowhere.json"), latency_limit=3.0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"average_bits": 1.5}, r"average_bits: 1\.5 cannot be reached: the least is 2 bits, 0\.5 more"),
        ({"total_average_bits": 2.0}, r"total_average_bits: 2 cannot be reached: the least is 3\.7 bits, 1\.7 more"),
        ({"size_bytes": 50}, r"size_bytes: 50 cannot be reached: the least is 185 bytes, 135 more"),
        ({"weights_only_bytes": 50}, "weights_only_bytes: 50 cannot be reached: the least is 100 bytes, 50 more"),
        ({"bops": 30000.0}, r"bops: 30,000 cannot be reached: the least is 32,000 bit operations, 2,000 more"),
        ({"average_bits": 1.5, "weights_only_bytes": 50}, "average_bits: 1.5 .*; weights_only_bytes: 50 "),
        ({"average_bits": 0.001}, "average_bits: 0.001 cannot be reached: the least is 2 bits, 1.999 more"),
        (
            {"latency": {"a": {"2": 3, "3": 9, "8": 27}, "b": {"2": 1, "3": 1, "8": 2}}, "latency_limit": 3.5},
            r"latency_limit: 3\.5 cannot be reached: the least is 4 of the latency table, 0\.5 more",
        ),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_a_limit_out_of_reach_says_by_how_much(limits: dict[str, Any], message: str, parts: bool) -> None:
    own = [falling(1.0)] * 10
    table = table_of(layer("a", own, 20, macs=1000), layer("b", own, 20, macs=1000))
    with pytest.raises(SettingError, match=message + ".*candidates 2, 3, 8 bits"):
        Budget(**limits, bits=FEW, parts=parts)(table)


def test_a_pin_beyond_the_limit_is_out_of_reach() -> None:
    table = table_of(layer("a", [falling(1.0)] * 2, 10), layer("b", [falling(1.0)] * 2, 10))
    with pytest.raises(SettingError, match=naming("average_bits", 3, 5, 2)):
        Budget(average_bits=3, bits=(2, 3), pin=("a=8",))(table)


def test_limits_that_contradict_each_other_say_how_far() -> None:
    """Of two layers with opposite costs, each limit alone can be met by the other layer's fewest bits."""
    table = table_of(layer("a", [falling(1.0)], 8), layer("b", [falling(1.0)], 8))
    times = {"a": {2: 10.0, 8: 1.0}, "b": {2: 10.0, 8: 1.0}}
    with pytest.raises(SettingError, match=naming("average_bits", "latency_limit", "no plan")) as caught:
        Budget(average_bits=4, latency=times, latency_limit=5.0, bits=(2, 8))(table)  # type: ignore[arg-type]
    assert "with the others met, the least latency_limit is 20, 15 more than asked" in str(caught.value)


def test_maps_alone_never_put_a_limit_out_of_reach() -> None:
    """Eight channels of one weight: what parts could give to a channel is less than their map takes."""
    table = table_of(layer("a", [falling(1.0 + c) for c in range(8)], 1))
    for bits in range(8 * (2 + 32 + 2), 8 * (8 + 32 + 8) + 1, 2):
        found = Budget(total_average_bits=bits / 8, bits=FEW).solve(table)
        assert found.plan.size().total_bits <= bits


def test_parts_are_refused_where_each_would_have_a_scale_of_its_own() -> None:
    table = seeded(SHAPES, scheme=Affine(range="mse"))
    with pytest.raises(SettingError, match=naming("parts", "per_tensor", "per_channel", "parts=False", "--no-parts")):
        Budget(average_bits=3)(table)
    plan = Budget(average_bits=3, parts=False)(table)
    assert plan.size().average_bits <= 3


def with_layer_numbers(table: LayerTable, name: str, scales: list[float]) -> LayerTable:
    """A sensitivity of whole layers alone: the layer's mse curve times a scale of its own."""
    layers = tuple(
        dataclasses.replace(own, sensitivities={name: own.errors["mse"] * scale})
        for own, scale in zip(table.layers, scales, strict=True)
    )
    return dataclasses.replace(table, layers=layers)


def test_a_sensitivity_of_whole_layers_makes_no_parts() -> None:
    table = with_layer_numbers(seeded(SHAPES), "kl", [1.0] * 6)
    with pytest.raises(SettingError, match=naming("kl", "per channel", "kl*mse", "parts=False")):
        Budget(average_bits=3, sensitivity="kl")(table)
    assert Budget(average_bits=3, sensitivity="kl", parts=False)(table).size().average_bits <= 3
    whole = dataclasses.replace(
        table, layers=tuple(dataclasses.replace(own, channel_errors={}) for own in table.layers)
    )
    with pytest.raises(SettingError, match=naming("mse", "measure(per_channel=True)")):
        Budget(average_bits=3)(whole)


def test_the_first_of_two_sensitivities_scales_layers_and_the_second_splits_them() -> None:
    scales = [1.0, 1e6, 1.0, 1.0, 1.0, 1.0]
    table = with_layer_numbers(seeded(SHAPES), "kl", scales)
    found = Budget(average_bits=3, sensitivity="kl*mse").solve(table)
    assert found.objective == pytest.approx(predicted(table, found.plan, "kl*mse"))
    plain = Budget(average_bits=3)(table)
    assert found.plan.by_name["block.1.fc"].code_bits > plain.by_name["block.1.fc"].code_bits
    # Its layers are worth kl, each channel of a layer its share of mse; so scaled errors make the same plan.
    layers = tuple(
        dataclasses.replace(own, channel_errors={"mse": own.channel_errors["mse"] * scale / own.numel})
        for own, scale in zip(table.layers, scales, strict=True)
    )
    same = Budget(average_bits=3)(dataclasses.replace(table, layers=layers))
    assert same.layers == found.plan.layers


def without_one_bit(table: LayerTable) -> LayerTable:
    """As two regions are measured."""
    layers = tuple(
        dataclasses.replace(
            own,
            errors={name: curve[1:] for name, curve in own.errors.items()},
            channel_errors={name: curves[1:] for name, curves in own.channel_errors.items()},
        )
        for own in table.layers
    )
    return dataclasses.replace(table, layers=layers, bits=table.bits[1:])


@pytest.mark.parametrize("storage", ["region_bit", "shared"])
@pytest.mark.parametrize("limit", ["average_bits", "total_average_bits"])
def test_two_regions_are_counted_as_the_plan_counts_them(limit: str, storage: Any) -> None:
    scheme = Piecewise(granularity="per_channel", storage=storage)
    table = without_one_bit(seeded(SHAPES, scheme=scheme))
    for b in (3, 5):
        most = size_of(Uniform(bits=b)(table), limit)
        found = Budget(**{limit: most}, bits=tuple(range(2, 9))).solve(table)  # type: ignore[arg-type]
        assert 0.98 * most < size_of(found.plan, limit) <= most
        assert found.used[limit][0] == pytest.approx(size_of(found.plan, limit))
    with pytest.raises(SettingError, match="bits: 1 is not allowed with two regions"):
        Budget(average_bits=4)(table)


@pytest.mark.parametrize("limit", SIZES)
def test_groups_have_scales_of_their_own(limit: str) -> None:
    table = seeded([(8, 16), (4, 32)], scheme=Affine(granularity="per_group", group_size=8))
    most = size_of(Uniform(bits=4)(table), limit)
    found = Budget(**{limit: most}).solve(table)  # type: ignore[arg-type]
    assert 0.98 * most < size_of(found.plan, limit) <= most


EMPTY = LayerStats(
    "none", "linear", (0, 4), 0, 0.0, np.zeros(0), {"mse": np.zeros(8)}, {"mse": np.zeros((8, 0))}, macs=0
)


@settings(max_examples=20)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(1, 8))
def test_a_layer_with_one_channel_or_without_any_is_no_trouble(first: int, second: int, average: float) -> None:
    table = table_of(layer("a", [falling(1.0)], first), EMPTY, layer("b", [falling(2.0)] * 2, second))
    found = Budget(average_bits=average, bops=1e9).solve(table)
    assert found.plan.size().average_bits <= average
    assert Plan.model_validate_json(found.plan.to_json()) == found.plan


def test_a_layer_without_channels_is_no_trouble_where_maps_count() -> None:
    table = seeded([(8, 16), (8, 16)])
    beside = table_of(*table.layers, EMPTY)
    for average in np.linspace(4.5, 7, 6):
        one, other = (Budget(total_average_bits=float(average)).solve(measured) for measured in (table, beside))
        assert widths_of(one.plan) == widths_of(other.plan)[:-1]
        assert one.objective == other.objective


def test_everything_pinned_leaves_nothing_to_decide() -> None:
    found = Budget(average_bits=4, pin=("*=4",)).solve(seeded(SHAPES))
    assert {own.bits for own in found.plan.layers} == {4}
    assert (found.gap, found.binding) == (0.0, ())
    assert found.objective == pytest.approx(predicted(seeded(SHAPES), found.plan, "mse"))


def test_relative_errors_serve_too() -> None:
    table = norms_table([1.0, 2.0], [[1.0, 2.0, 3.0], [1.0]], scheme=Affine(granularity="per_channel"))
    found = Budget(average_bits=4, bits=(2, 3, 8), sensitivity="relative").solve(table)
    assert found.plan.size().average_bits <= 4
    assert found.objective == pytest.approx(predicted(table, found.plan, "relative"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget: no limit given; one or more of average_bits, total_average_bits, size_bytes"),
        *(({field: 0}, f"{field}: 0 is not allowed; a number above 0") for field in (*SIZES, "bops")),
        ({"average_bits": -1.0}, r"average_bits: -1\.0 is not allowed"),
        ({"average_bits": math.nan}, "average_bits: nan"),
        ({"average_bits": math.inf}, "average_bits: inf"),
        ({"average_bits": "3"}, "average_bits: '3'"),
        ({"size_bytes": True}, "size_bytes: True"),
        ({"size_bytes": 100.5}, r"size_bytes: 100\.5 is not allowed; a whole number"),
        ({"latency": {"a": {"4": 1.0}}}, "latency and latency_limit belong together"),
        ({"latency_limit": 3.0}, "latency and latency_limit belong together"),
        ({"latency": {}, "latency_limit": 3.0}, "latency: {} is no table"),
        ({"latency": {"a": {"4": 1.0}}, "latency_limit": -3.0}, "latency_limit: -3.0"),
        ({"average_bits": 3, "bits": ()}, r"bits: \(\) is not allowed; a list"),
        ({"average_bits": 3, "bits": 4}, "bits: 4 is not allowed; a list"),
        ({"average_bits": 3, "bits": (4, 16)}, "bits: 16 is not allowed; 1 to 8"),
        ({"average_bits": 3, "bits": (0,)}, "bits: 0 is not allowed"),
        ({"average_bits": 3, "bits": "48"}, "bits: '4' is not allowed"),
        ({"average_bits": 3, "sensitivity": ""}, "sensitivity: '' is not allowed"),
        ({"average_bits": 3, "sensitivity": "a*b*c"}, r"sensitivity: 'a\*b\*c' is not allowed"),
        ({"average_bits": 3, "sensitivity": None}, "sensitivity: None is not allowed"),
        ({"average_bits": 3, "pin": "conv1"}, "pin: 'conv1' is not allowed; a layer's name or glob, and its bits"),
        ({"average_bits": 3, "pin": "=8"}, "pin: '=8' is not allowed"),
        ({"average_bits": 3, "pin": "conv1=2.5"}, "pin: 'conv1=2.5' is not allowed"),
        ({"average_bits": 3, "pin": "conv1=9"}, "pin: conv1: 9 is not allowed; 1 to 8, or 16 or 32"),
        ({"average_bits": 3, "pin": 5}, "pin: 5 is not allowed"),
        ({"average_bits": 3, "tie": 5}, "tie: 5 is not allowed"),
        ({"average_bits": 3, "ends": 9}, "ends: 9 is not allowed; 1 to 8, or 16 or 32"),
        ({"average_bits": 3, "ends": True}, "ends: True is not allowed"),
        ({"bops": 1e9, "bops_activation_bits": 0}, "bops_activation_bits: 0 is not allowed"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize("value", ["no", "yes", "", 0, 1, 2.0, None, (), [True]], ids=repr)
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(SettingError, match=naming("parts", repr(value), "True or False")):
        Budget(average_bits=4.0, parts=value)
