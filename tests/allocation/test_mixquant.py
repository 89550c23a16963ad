from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, MixQuant, measure
from mpq_plugins.errors import SettingError
from tests.helpers.nets import conv_net
from tests.helpers.tables import BITS, table

curves = st.lists(st.floats(0, 10), min_size=8, max_size=8)


def algorithm_1(curve: list[float], qem: float, candidates: tuple[int, ...], baseline: int) -> int:
    """The paper's loop, literally: from the fewest bits up, the first within the bound."""
    for b in sorted(candidates):
        if curve[b - 1] <= qem * curve[baseline - 1]:
            return b
    return baseline


@given(
    st.lists(curves, min_size=1, max_size=5),
    st.floats(0.1, 50),
    st.sets(st.sampled_from(BITS), min_size=1).map(tuple),
    st.sampled_from(BITS),
)
def test_it_is_algorithm_1(errors: list[list[float]], qem: float, bits: tuple[int, ...], baseline: int) -> None:
    named = {f"layer{i}": curve for i, curve in enumerate(errors)}
    plan = MixQuant(qem=qem, bits=bits, baseline=baseline)(table(named))
    for layer in plan.layers:
        assert layer.bits == algorithm_1(named[layer.name], qem, bits, baseline)


@given(curves.map(lambda c: sorted(c, reverse=True)), st.floats(1, 20), st.floats(1, 20))
def test_a_larger_qem_never_takes_more_bits(curve: list[float], first: float, second: float) -> None:
    low, high = sorted((first, second))
    measured = table({"fc": curve})
    plans = [MixQuant(qem=q)(measured).layers[0].bits or 0 for q in (low, high)]
    assert plans[1] <= plans[0]


def test_a_worked_example() -> None:
    halving = {"a": [0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625], "b": [9.0, 8, 7, 6, 5, 4, 3, 2]}
    bits = {q: [layer.bits for layer in MixQuant(qem=q)(table(halving)).layers] for q in (1, 2, 3.9, 4)}
    assert bits == {1: [8, 8], 2: [7, 6], 3.9: [7, 3], 4: [6, 2]}


def test_an_error_of_zero_takes_the_fewest_bits() -> None:
    assert MixQuant(qem=2)(table({"constant": [0.0] * 8})).layers[0].bits == 2


def test_below_one_nothing_qualifies_and_the_baseline_stays() -> None:
    assert MixQuant(qem=0.5)(table({"fc": [8, 7, 6, 5, 4, 3, 2, 1]})).layers[0].bits == 8


def test_the_metric_is_the_one_asked_for() -> None:
    net = conv_net()
    measured = measure(net, metrics=("relative", "mse", "max_abs"))
    for metric in ("relative", "mse", "max_abs"):
        plan = MixQuant(qem=3, metric=metric)(measured)
        for layer in measured.layers:
            expected = algorithm_1([9.0, *layer.errors[metric]], 3, tuple(range(2, 9)), 8)
            assert plan.by_name[layer.name].bits == expected


def test_the_scheme_must_be_the_tables() -> None:
    measured = measure(conv_net())
    assert MixQuant(scheme=Affine())(measured).layers[0].scheme == Affine()
    with pytest.raises(SettingError, match="not what the table was measured with"):
        MixQuant(scheme=Affine(symmetric=True))(measured)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qem": 0}, "qem: 0 is not allowed; a number above 0"),
        ({"qem": -1.0}, r"qem: -1\.0 is not allowed"),
        ({"qem": float("nan")}, "qem: nan is not allowed"),
        ({"qem": float("inf")}, "qem: inf is not allowed"),
        ({"bits": (0, 4)}, "bits: 0 is not allowed; 1 to 8"),
        ({"bits": (4, 9)}, "bits: 9 is not allowed"),
        ({"bits": ()}, r"bits: \(\) is not allowed; a list"),
        ({"bits": 4}, "bits: 4 is not allowed; a list"),
        ({"baseline": 16}, "baseline: 16 is not allowed"),
        ({"metric": "sqnr_db"}, "metric: 'sqnr_db' is not allowed; relative, mse"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MixQuant(**fields)


def test_a_table_without_the_numbers_says_so() -> None:
    with pytest.raises(SettingError, match="bits: 2 was not measured"):
        MixQuant()(measure(conv_net(), bits=(4, 8)))


def test_equal_values_give_equal_bytes() -> None:
    net = conv_net()
    assert MixQuant(qem=2)(measure(net)).to_json() == MixQuant(qem=2.0)(measure(net)).to_json()
