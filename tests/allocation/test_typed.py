"""Budget over types against brute force: every assignment of every type to every layer."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_plugins import Affine, Budget, LayerStats, LayerTable, Plan, SettingError, TypeColumn, TypeTable, named_type
from mpq_plugins.allocation.typed import layer_costs
from mpq_plugins.plans.types import NamedType

KINDS = tuple(map(named_type, ("mxfp4", "mxfp6_e2m3", "fp8_e4m3", "mxfp8_e4m3")))


def stats(name: str, shape: tuple[int, int], errors: dict[str, float]) -> LayerStats:
    arrays = {metric: np.array([value]) for metric, value in errors.items()}
    return LayerStats(name, "linear", shape, 0, 1.0, np.ones(shape[0]), arrays)


def table(layers: Sequence[tuple[str, tuple[int, int], Sequence[float]]], kinds: Sequence[NamedType]) -> TypeTable:
    """layers: names, shapes and a mean squared error as each type."""
    base = tuple(stats(name, shape, {"mse": 0.0}) for name, shape, _ in layers)
    columns = []
    for k, kind in enumerate(kinds):
        of_kind = tuple(stats(name, shape, {"mse": e[k]}) for name, shape, e in layers if kind.fits(shape))
        made = LayerTable(of_kind, kind.scheme, (kind.bits,), ("mse",), False, "sha256:test")
        columns.append(TypeColumn(kind, made))
    whole = LayerTable(base, Affine(symmetric=True, granularity="per_channel"), (8,), ("mse",), False, "sha256:test")
    return TypeTable(whole, tuple(columns))


@st.composite
def tables(draw: st.DrawFn) -> TypeTable:
    shapes = draw(st.lists(st.sampled_from([(4, 32), (3, 64), (5, 8), (2, 96)]), min_size=1, max_size=4))
    error = st.floats(1e-6, 1.0, allow_nan=False)
    errors = [draw(st.lists(error, min_size=len(KINDS), max_size=len(KINDS))) for _ in shapes]
    return table([(f"l{i}", shape, e) for i, (shape, e) in enumerate(zip(shapes, errors, strict=True))], KINDS)


def assignments(made: TypeTable) -> Iterator[tuple[float, float]]:
    """(cost, bits in total) of every plan."""
    options = []
    for layer in made.base.layers:
        options.append([
            (
                float(column.by_name[layer.name].errors["mse"][0]) * layer.numel,
                column.type.bits_a_weight(layer.shape) * layer.numel,
            )
            for column in made.columns
            if layer.name in column.by_name
        ])  # fmt: skip
    for chosen in itertools.product(*options):
        yield math.fsum(cost for cost, _ in chosen), sum(bits for _, bits in chosen)


@settings(max_examples=60, deadline=None)
@given(tables(), st.floats(4.0, 12.0))
def test_the_plan_is_the_best_of_all(made: TypeTable, average: float) -> None:
    weights = sum(layer.numel for layer in made.base.layers)
    within = [cost for cost, bits in assignments(made) if bits <= average * weights]
    if not within:
        with pytest.raises(SettingError, match=r"total_average_bits: .* cannot be reached: the least is .* more"):
            Budget(total_average_bits=average)(made)
        return
    found = Budget(total_average_bits=average).solve(made)
    assert found.plan.size().total_bits <= average * weights
    assert found.objective == pytest.approx(min(within), rel=1e-9)
    used, asked = found.used["total_average_bits"]
    assert used == pytest.approx(found.plan.size().total_average_bits)
    assert asked == average
    for layer in found.plan.layers:
        assert layer.type in made.types_for(layer.name)


THREE = [
    ("q", (4, 32), (0.4, 0.1, 0.03, 0.02)), ("k", (4, 32), (0.1, 0.05, 0.02, 0.01)), ("o", (4, 8), (1.0, 1.0, 0.5, 1.0))
]  # fmt: skip


def test_pins_ties_and_float() -> None:
    made = table(THREE, KINDS)
    plan = Budget(total_average_bits=12, pin=("q=mxfp4", "o=32"))(made)
    assert [layer.bits_text for layer in plan.layers] == ["mxfp4", "mxfp8_e4m3", "float32"]
    tied = Budget(total_average_bits=9, tie=("{q,k}",))(made)
    assert tied.layers[0].type == tied.layers[1].type
    assert Plan.model_validate_json(tied.to_json()) == tied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pin": ["o=mxfp4"]}, "pin: layer 'o' cannot be mxfp4, for its shape; it can be fp8_e4m3"),
        ({"pin": ["x=mxfp4"]}, "pin: 'x' matches no layer; names look like q, k, o"),
        ({"pin": ["q=int4"]}, "type: 'int4' was not measured"),
        ({"pin": ["q=4"]}, "pin: 'q=4' is not allowed with types; a type, as int4, or 16 or 32 for float"),
        ({"pin": ["q=mxfp4", "*=fp8_e4m3"]}, "pin: layer 'q' is given both mxfp4 and fp8_e4m3; give one"),
        ({"tie": ["{q,k}"], "pin": ["q=mxfp4"]}, "tie: .* must agree, but are pinned to"),
        ({"bits": (4, 8)}, "bits: means nothing with a table of types"),
        ({"ends": 8}, "ends: means nothing with a table of types"),
        ({"input_bits": (4, 8)}, "input_bits: inputs are planned beside weights' widths"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Budget(total_average_bits=12, **options)(table(THREE, KINDS))  # type: ignore[arg-type]


def test_a_pin_means_the_tables_own_type() -> None:
    own = NamedType("mine", KINDS[0].scheme, KINDS[0].bits)
    made = table(THREE[:2], (own, *KINDS[1:]))
    plan = Budget(total_average_bits=12, pin=("q=mine",))(made)
    assert plan.layers[0].scheme == own.scheme
    with pytest.raises(SettingError, match="type: 'mxfp4' was not measured; this table has mine"):
        Budget(total_average_bits=12, pin=("q=mxfp4",))(made)


def test_layers_that_share_no_type_cannot_be_tied() -> None:
    made = table([("q", (4, 32), (0.4,)), ("k", (4, 8), (0.4,))], KINDS[:1])
    with pytest.raises(SettingError, match="tie: no type is common to layers that must agree: 'q' can be mxfp4"):
        Budget(total_average_bits=12, tie=("{q,k}",))(made)


def test_the_first_of_two_sensitivities_gives_each_layer_its_scale() -> None:
    made = table(THREE[:1], KINDS)
    for k, column in enumerate(made.columns):
        layer = column.table.layers[0]
        object.__setattr__(layer, "sensitivities", {"kl": np.array([2.0 * (k + 1)])})
    mse = np.array([0.4, 0.1, 0.03, 0.02]) * 128
    scale = np.exp(np.mean(np.log(np.array([2.0, 4.0, 6.0, 8.0]) / mse)))
    assert np.allclose(layer_costs(made, "q", "kl*mse"), mse * scale)


def test_a_scale_of_the_layer_counts_in_a_budget() -> None:
    made = table([("fc", (32, 64), (2.0, 1.0))], [named_type("mxfp4"), named_type("nvfp4")])
    exact = 4 + 8 / 16 + 32 / (64 * 32)
    for bits, kind in ((exact, "nvfp4"), (exact - 1e-4, "mxfp4")):
        plan = Budget(total_average_bits=bits)(made)
        assert [layer.type for layer in plan.layers] == [kind]
        assert plan.size().total_average_bits <= bits
