"""The search for lambda on curves that are known: it is found in few passes, whatever the curve."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.reconstruction.code_lambda import FULL, Lambda


def searched(free: float, slope: float, power: float, promised: float, passes: int) -> tuple[Lambda, float, int]:
    """The search on bits = free exp(-slope lambda^power), what the last pass took, and how many there were."""
    search = Lambda(promised)
    number, bits = 1, free
    while not search.full(bits) and number < passes:
        search.look_on(bits)
        number, bits = number + 1, free * math.exp(-slope * search.value**power)
    return search, bits, number


@given(st.floats(1e3, 1e7), st.floats(0.3, 20), st.floats(0.5, 2), st.floats(0.2, 0.99))
def test_lambda_is_found(free: float, slope: float, power: float, share: float) -> None:
    search, bits, _ = searched(free, slope, power, share * free, 30)
    assert FULL * share * free <= bits <= share * free
    assert search.value > 0


@given(st.floats(1e3, 1e7), st.floats(1.5, 5), st.floats(0.6, 0.99))
def test_it_is_found_soon_where_curves_are_as_usual(free: float, slope: float, share: float) -> None:
    assert searched(free, slope, 1.0, share * free, 30)[2] <= 5


@pytest.mark.parametrize("promised", [1000.0, 5000.0])
def test_without_need_lambda_is_zero(promised: float) -> None:
    search, bits, passes = searched(1000.0, 2.0, 1.0, promised, 30)
    assert (search.value, bits, passes) == (0, 1000, 1)


def test_a_jump_in_the_bits_ends_the_search() -> None:
    """Where codes change all at once no lambda uses the promise up."""
    search, seen = Lambda(900.0), []
    while not search.exhausted:
        seen.append(search.value)
        search.look_on(1000.0 if search.value < 0.3 else 100.0)
    assert 0.29 < seen[-1] < 0.31
    assert len(seen) < 100


def test_what_is_forgotten_does_not_bound() -> None:
    search = Lambda(500.0)
    for bits in (1000.0, 600.0, 400.0):
        search.look_on(bits)
    highest = search.high
    assert highest is not None
    search.forget()
    for _ in range(3):
        search.look_on(900.0)
    assert search.value > highest[0]
