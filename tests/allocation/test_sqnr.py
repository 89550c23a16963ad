"""SQNR's closed form against a slow walk over b_0."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import SQNR, Affine, LayerStats, LayerTable, Piecewise, Plan
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.scheme import Scheme
from tests.helpers.says import naming
from tests.helpers.tables import BITS

sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=6)
candidates = st.sets(st.sampled_from(BITS), min_size=1).map(sorted).map(tuple)


def table_of(counts: list[int], scheme: Scheme | None = None) -> LayerTable:
    """One linear layer with each of these numbers of weights."""
    layers = tuple(
        LayerStats(
            f"layer{i}", "linear", (1, count), 0, 1.0, np.ones(1), {"relative": np.array([0.5**b for b in BITS])}
        )
        for i, count in enumerate(counts)
    )
    return LayerTable(layers, scheme or Affine(), BITS, ("relative",), False, "sha256:test")


def nearest(value: float, bits: tuple[int, ...]) -> int:
    """The candidate closest to it; of two as close the larger, up to the last digits of a float."""
    return min(bits, key=lambda b: (round(abs(b - value), 6), -b))


def by_hand(counts: list[int], average: float, bits: tuple[int, ...]) -> list[int] | None:
    """The first b_0, from above, whose rounded widths keep the average."""
    # Where a layer changes its width, b_0 is a middle of two candidates plus half a logarithm; look right at those.
    turns = [(a + b) / 2 + math.log2(n) / 2 for a in bits for b in bits for n in counts]
    for b0 in sorted({0.0, *turns}, reverse=True):
        widths = [nearest(b0 + 1e-9 - math.log2(n) / 2, bits) for n in counts]
        if sum(n * b for n, b in zip(counts, widths, strict=True)) <= average * sum(counts):
            return widths
    return None


def widths(plan: Plan) -> list[int | None]:
    return [layer.bits for layer in plan.layers]


@given(sizes, st.floats(1, 9), candidates)
def test_it_is_the_closed_form_at_the_greatest_b0(counts: list[int], average: float, bits: tuple[int, ...]) -> None:
    expected = by_hand(counts, average, bits)
    allocator = SQNR(average_bits=average, bits=bits)
    if expected is None:
        with pytest.raises(SettingError, match=naming("cannot be reached", min(bits))):
            allocator(table_of(counts))
        return
    plan = allocator(table_of(counts))
    assert widths(plan) == expected
    assert plan.size().average_bits <= average


@given(st.integers(1, 500), st.floats(3, 7))
def test_four_times_the_weights_get_one_bit_less(count: int, average: float) -> None:
    """Wherever no bound cuts it off; 16 times get two less."""
    plan = SQNR(average_bits=average, bits=BITS)(table_of([count, 4 * count, 16 * count]))
    small, middle, large = (layer.bits or 0 for layer in plan.layers)
    assert middle == min(8, large + 1)
    assert small == min(8, large + 2)


@given(sizes, st.floats(2, 8), st.floats(0, 3))
def test_more_bits_on_average_take_no_layer_down(counts: list[int], average: float, more: float) -> None:
    plans = [SQNR(average_bits=bits)(table_of(counts)) for bits in (average, average + more)]
    assert all((a.bits or 0) <= (b.bits or 0) for a, b in zip(plans[0].layers, plans[1].layers, strict=True))


@given(sizes)
def test_larger_layers_never_get_more(counts: list[int]) -> None:
    plan = SQNR(average_bits=4.3)(table_of(sorted(counts)))
    assert widths(plan) == sorted(widths(plan), key=lambda b: -(b or 0))


def test_a_worked_example() -> None:
    # b_0 - log2(n) / 2 is b_0 - 2, b_0 - 3 and b_0 - 5; at b_0 = 8 that is 6, 5 and 3: 3.2 bits on average.
    plan = SQNR(average_bits=3.3)(table_of([16, 64, 1024]))
    assert widths(plan) == [6, 5, 3]
    assert widths(SQNR(average_bits=20)(table_of([16, 64, 1024]))) == [8, 8, 8]
    assert Plan.model_validate_json(plan.to_json()) == plan


@pytest.mark.parametrize(("storage", "extra"), [("region_bit", 1), ("shared", 0)])
def test_interval_bits_count(storage: Any, extra: int) -> None:
    table = table_of([10, 10], Piecewise(storage=storage))
    table = LayerTable(
        tuple(
            LayerStats(layer.name, layer.kind, layer.shape, 0, 1.0, np.ones(1), {"relative": np.ones(7)})
            for layer in table.layers
        ),
        table.scheme, BITS[1:], ("relative",), False, "sha256:test",
    )  # fmt: skip
    plan = SQNR(average_bits=5)(table)
    assert widths(plan) == [5 - extra, 5 - extra]
    assert plan.size().average_bits == 5
    with pytest.raises(SettingError, match="bits: 1 is not allowed with two regions"):
        SQNR(bits=BITS)(table)


def test_a_layer_without_weights_is_no_trouble() -> None:
    table = table_of([10, 0, 40])
    assert SQNR(average_bits=4)(table).size().average_bits <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average_bits": 0}, "average_bits: 0 is not allowed; a number above 0"),
        ({"average_bits": -1.0}, r"average_bits: -1\.0"),
        ({"average_bits": math.nan}, "average_bits: nan"),
        ({"average_bits": math.inf}, "average_bits: inf"),
        ({"average_bits": True}, "average_bits: True"),
        ({"average_bits": "4"}, "average_bits: '4' is not allowed"),
        ({"average_bits": None}, "average_bits: None is not allowed"),
        ({"bits": ()}, r"bits: \(\) is not allowed; a list"),
        ({"bits": (4, 9)}, "bits: 9 is not allowed; 1 to 8"),
        ({"bits": 4}, "bits: 4 is not allowed"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SQNR(**arguments)


def test_equal_values_make_equal_bytes() -> None:
    table = table_of([10, 500])
    assert SQNR(average_bits=4)(table).to_json() == SQNR(average_bits=4.0)(table).to_json()
    assert SQNR(bits=(8, 2, 2)) == SQNR(bits=(2, 8))
