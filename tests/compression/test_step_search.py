"""The search for steps, on curves that are even, that jump, that turn, and that end."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.compression.step_search import Point, StepSearch


def searched(
    curve: Callable[[float], float], most: float, finest: float = -50.0, per_bit: float = 1.0, beside: float = 0.0
) -> StepSearch:
    search = StepSearch(most, 0.005, finest, per_bit)
    octaves = 0.0
    for _ in range(14):
        bits = curve(octaves)
        search.add(Point(octaves, bits * per_bit + beside, bits))
        if search.settled:
            break
        octaves = search.next()
    return search


def best(search: StepSearch) -> float:
    return max((point.taken for point in search.tried if point.taken <= search.most), default=-math.inf)


@given(st.floats(0.05, 7), st.floats(-3, 6), st.floats(0.5, 2))
def test_rates_as_codes_have_them_are_met(most: float, start: float, steepness: float) -> None:
    """A bit for each octave at high rate, and less and less below one bit."""
    search = searched(lambda octaves: math.log2(1 + 2 ** (steepness * (start - octaves))), most)
    assert 0.98 * most <= best(search) <= most


@pytest.mark.parametrize("most", [0.4, 1.0, 5.0])
def test_bytes_beside_the_codes_are_seen(most: float) -> None:
    search = searched(lambda octaves: 2.0 * 2**-octaves, 1e6 + 1e5 * most, per_bit=1e5, beside=1e6)
    assert 1e6 + 0.99 * 1e5 * most <= best(search) <= 1e6 + 1e5 * most
    assert len(search.tried) <= 8


def test_a_jump_is_closed_in_on_and_given_up() -> None:
    search = searched(lambda octaves: 2.0 if octaves < 1.3 else 0.5, 1.0)
    assert best(search) == 0.5
    over = max(point.octaves for point in search.tried if point.taken > 1.0)
    within = min(point.octaves for point in search.tried if point.taken <= 1.0)
    assert over < 1.3 <= within < over + 0.1


def test_no_factor_is_tried_twice_and_none_is_finer_than_int8() -> None:
    search = searched(lambda octaves: 3.0 - 0.1 * octaves, 6.0, finest=-1.5)
    octaves = [point.octaves for point in search.tried]
    assert octaves[-1] == -1.5
    assert search.settled
    assert len(octaves) == len({*octaves})


def test_what_turns_is_left_behind() -> None:
    """A coarser step may take more before it takes less, as that of pruned and compensated weights does."""
    search = searched(lambda octaves: 1.2 + 0.1 * octaves if octaves < 1 else 1.3 * 2 ** (1 - octaves), 1.0)
    assert 0.9 <= best(search) <= 1.0
