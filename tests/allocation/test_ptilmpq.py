"""PTILMPQ against its two partitions written out as loops."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import PTILMPQ, Affine, LayerTable, Piecewise, Plan, measure
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.stats import LayerStats
from tests.helpers.nets import conv_net
from tests.helpers.says import naming
from tests.helpers.tables import norms_table

importances = st.floats(0, 100)
networks = st.lists(st.tuples(importances, st.lists(importances, min_size=1, max_size=6)), min_size=1, max_size=5)
shares = st.sampled_from([0.0, 0.07, 0.1, 1 / 3, 0.5, 0.9, 1.0])
pairs = st.tuples(st.integers(2, 8), st.integers(2, 8)).map(lambda pair: (max(pair), min(pair)))


def table_of(network: list[tuple[float, list[float]]], **settings: Any) -> LayerTable:
    return norms_table([layer for layer, _ in network], [own for _, own in network], **settings)


def most_important(values: list[float], share: float) -> set[int]:
    """The ceil(share n) greatest, equals in order."""
    count = math.ceil(round(share * len(values), 9))
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def widths(plan: Plan) -> list[list[int]]:
    """Bits of every channel of every layer."""
    found = []
    for layer in plan.layers:
        own = {channel: part.bits for part in layer.all_parts for channel in part.channels}
        found.append([own[channel] for channel in range(layer.channels)])
    return found


@given(networks, shares, st.tuples(shares, shares), st.tuples(pairs, pairs))
def test_it_is_the_two_partitions(
    network: list[tuple[float, list[float]]],
    alpha: float,
    betas: tuple[float, float],
    bits: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    other = min(bits)
    important = tuple(max(pair) for pair in zip(*bits, strict=True))
    plan = PTILMPQ(alpha, max(betas), min(betas), important, other)(table_of(network))  # type: ignore[arg-type]
    layers = most_important([layer for layer, _ in network], alpha)
    expected = []
    for i, (_, norms) in enumerate(network):
        high, low = important if i in layers else other
        channels = most_important(norms, max(betas) if i in layers else min(betas))
        expected.append([high if c in channels else low for c in range(len(norms))])
    assert widths(plan) == expected
    assert Plan.model_validate_json(plan.to_json()) == plan


@pytest.mark.slow
@given(networks, st.tuples(shares, shares), st.tuples(pairs, pairs), st.sampled_from(["region_bit", "shared"]))
def test_size_never_falls_as_alpha_rises(
    network: list[tuple[float, list[float]]],
    betas: tuple[float, float],
    bits: tuple[tuple[int, int], tuple[int, int]],
    storage: Any,
) -> None:
    other, important = min(bits), tuple(max(pair) for pair in zip(*bits, strict=True))
    table = table_of(network, scheme=Piecewise(granularity="per_channel", storage=storage))
    sizes = [
        PTILMPQ(k / 20, max(betas), min(betas), important, other)(table).size().weights_only_bits  # type: ignore[arg-type]
        for k in range(21)
    ]
    assert sizes == sorted(sizes)


@given(networks, st.floats(3.9, 6.2), st.booleans())
def test_a_size_gets_the_greatest_alpha_that_stays_within_it(
    network: list[tuple[float, list[float]]], bits: float, in_bytes: bool
) -> None:
    table = table_of(network)
    numel = sum(layer.numel for layer in table.layers)
    every = [PTILMPQ(alpha=k / len(network))(table) for k in range(len(network) + 1)]
    sizes = [p.size().total_bits if in_bytes else p.size().weights_only_bits for p in every]
    limit = 8 * math.floor(bits * numel / 8) if in_bytes else bits * numel
    allocator = PTILMPQ(size_bytes=limit // 8) if in_bytes else PTILMPQ(average_bits=bits)  # type: ignore[arg-type]
    if min(sizes) > limit:
        with pytest.raises(SettingError, match=naming("cannot be reached", "smallest")):
            allocator(table)
        return
    plan = allocator(table)
    best = max(k for k, size in enumerate(sizes) if size <= limit)
    assert plan.layers == every[best].layers
    assert plan.allocator.found["alpha"] == best / len(network)
    assert widths(PTILMPQ(alpha=plan.allocator.found["alpha"])(table)) == widths(plan)


@given(networks, shares)
def test_the_size_a_plan_reports_gives_that_plan_back(network: list[tuple[float, list[float]]], alpha: float) -> None:
    table = table_of(network)
    plan = PTILMPQ(alpha=alpha)(table)
    same = PTILMPQ(average_bits=plan.size().average_bits)(table)
    assert same.size().average_bits == plan.size().average_bits


def test_a_share_is_not_one_more_by_the_last_bit_of_a_double() -> None:
    table = table_of([(1.0, [float(c) for c in range(100)])])
    assert math.ceil(0.07 * 100) == 8
    plan = PTILMPQ(alpha=1.0, beta_important=0.07, beta_other=0.07)(table)
    (bits,) = widths(plan)
    assert bits.count(max(bits)) == 7


def test_a_size_that_a_plan_has_to_the_byte_is_within_reach() -> None:
    table = table_of([(2.0, [1.0] * 8), (1.0, [1.0] * 8)])
    for alpha in (0.0, 0.5, 1.0):
        size = PTILMPQ(alpha)(table).size()
        assert size.total_bits == 8 * size.total_bytes
        assert PTILMPQ(size_bytes=size.total_bytes)(table).size().total_bits == size.total_bits


def test_a_layer_without_channels_is_no_trouble(tmp_path: Path) -> None:
    table = norms_table([1.0, 2.0], [[], [1.0, 2.0]])
    plan = PTILMPQ()(table)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_numpys_numbers_are_numbers() -> None:
    assert PTILMPQ(alpha=np.float32(0.5)) == PTILMPQ(alpha=0.5)  # type: ignore[arg-type]


def test_thresholds_are_absolute() -> None:
    table = norms_table([10.0, 5.0, 20.0], [[1.0, 3.0], [4.0, 2.0], [3.0, 3.0]])
    plan = PTILMPQ(layer_threshold=10.0, channel_threshold=3.0, important_bits=(8, 6), other_bits=(5, 2))(table)
    assert widths(plan) == [[6, 8], [5, 2], [8, 8]]
    assert [layer.bits for layer in plan.layers] == [None, None, 8]


def test_a_worked_example() -> None:
    table = norms_table([1.0, 4.0, 3.0, 2.0], [[1.0, 2.0, 3.0]] * 4)
    plan = PTILMPQ(alpha=0.3, beta_important=0.5, beta_other=0.3, important_bits=(8, 4), other_bits=(4, 2))(table)
    # ceil(1.2) = 2 layers of 4; ceil(1.5) = 2 channels of 3 in those, ceil(0.9) = 1 in the others.
    assert widths(plan) == [[2, 2, 4], [4, 8, 8], [4, 8, 8], [2, 2, 4]]
    assert [(part.bits, part.channels) for part in plan.layers[0].all_parts] == [(2, (0, 1)), (4, (2,))]
    size = plan.size()
    assert size.weights_only_bits == 10 * (8 + 20 + 20 + 8) + 120  # an interval bit for each of the 120 weights
    assert size.total_bits == size.weights_only_bits + 12 * 64 + 12


@pytest.mark.parametrize("scheme", [Piecewise(granularity="per_channel"), Affine(), Affine(granularity="per_channel")])
def test_the_scheme_and_the_importances_are_the_tables(scheme: Affine | Piecewise) -> None:
    net = conv_net()
    plan = PTILMPQ(alpha=0.5)(measure(net, scheme, (3, 4, 5), fold_bn=False))
    assert {layer.scheme for layer in plan.layers} == {scheme}
    sums = {name: net.get_submodule(name).weight.detach().abs().sum().item() for name in plan.by_name}  # type: ignore[operator]
    for name in sorted(sums, key=lambda name: -sums[name])[:2]:
        assert max(part.bits for part in plan.by_name[name].all_parts) == 5
    norms = net.fc.weight.norm(dim=1)
    high = max(plan.by_name["fc"].all_parts, key=lambda part: part.bits)
    assert set(high.channels) == set(norms.topk(5).indices.tolist())


def test_equal_values_make_equal_bytes() -> None:
    table = norms_table([1.0, 1.0, 1.0], [[1.0] * 4] * 3)
    assert PTILMPQ(alpha=1)(table).to_json() == PTILMPQ(alpha=1.0)(table).to_json()
    assert widths(PTILMPQ(alpha=0.3, beta_important=0.25)(table)) == [[5, 4, 4, 4], [4, 3, 3, 3], [4, 3, 3, 3]]


def test_a_beta_left_out_follows_the_other() -> None:
    assert (PTILMPQ(beta_important=0.3).beta_important, PTILMPQ(beta_important=0.3).beta_other) == (0.3, 0.3)
    assert (PTILMPQ(beta_other=0.2).beta_important, PTILMPQ(beta_other=0.7).beta_important) == (0.5, 0.7)


def resnet152_table() -> LayerTable:
    """ResNet-152's shapes, with seeded importances."""
    from tests.benchmarks.shapes import ARCHITECTURES

    generator = np.random.default_rng(0)
    layers = tuple(
        LayerStats(
            name, "conv2d" if len(shape) == 4 else "linear", shape, 0, generator.random(), generator.random(shape[0]),
            {"relative": np.ones(8)},
        )
        for name, shape in ((f"layer{i}", tuple(shape)) for i, shape in enumerate(ARCHITECTURES["ResNet-152"]()))
    )  # fmt: skip
    return LayerTable(
        layers, Piecewise(granularity="per_channel"), tuple(range(1, 9)), ("relative",), False, "sha256:t"
    )


def test_every_layer_of_resnet_152_is_planned() -> None:
    table = resnet152_table()
    assert sum(layer.channels for layer in table.layers) >= 26_560
    assert len(PTILMPQ()(table).layers) == len(table.layers)
    assert PTILMPQ(average_bits=5.2)(table).size().average_bits <= 5.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, "alpha: 1.5 is not allowed; a share from 0 to 1"),
        ({"alpha": -0.1}, "alpha: -0.1"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"alpha": "half"}, "alpha: 'half'"),
        ({"beta_important": 1.01}, "beta_important: 1.01"),
        ({"beta_other": -1}, "beta_other: -1"),
        ({"beta_important": 0.2, "beta_other": 0.5}, "beta_important: 0.2 is below beta_other 0.5"),
        ({"important_bits": (3, 4)}, "important_bits: high 3 is below low 4; write 4,3"),
        ({"other_bits": (2, 9)}, "other_bits: 9 is not allowed; 1 to 8"),
        ({"other_bits": (4,)}, r"other_bits: \(4,\) is not allowed; two widths"),
        ({"important_bits": 4}, "important_bits: 4 is not allowed; two widths"),
        ({"important_bits": (4, 2)}, "important_bits: 4,2 is below other_bits 4,3"),
        ({"alpha": 0.5, "size_bytes": 9}, "alpha and size_bytes say the same thing twice"),
        ({"channel_threshold": 1.0, "beta_other": 0.1}, "channel_threshold and the betas"),
        ({"layer_threshold": -1.0}, "layer_threshold: -1.0 is not allowed; a number from 0 up"),
        ({"average_bits": math.inf}, "average_bits: inf"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        PTILMPQ(**arguments)


def test_one_bit_needs_the_affine_scheme() -> None:
    allocator = PTILMPQ(other_bits=(2, 1))
    with pytest.raises(SettingError, match="other_bits: 1 is not allowed with two regions"):
        allocator(norms_table([1.0], [[1.0, 2.0]]))
    assert widths(allocator(norms_table([1.0], [[1.0, 2.0]], scheme=Affine()))) == [[4, 5]]


@pytest.mark.parametrize("norms", [[], [1.0], [1.0, float("nan")]])
def test_a_table_without_channel_norms_is_refused(norms: list[float]) -> None:
    table = norms_table([1.0], [[1.0, 2.0]])
    object.__setattr__(table.layers[0], "channel_importance", np.array(norms))
    with pytest.raises(SettingError, match=naming("'layer0'", "norm", 2)):
        PTILMPQ()(table)
