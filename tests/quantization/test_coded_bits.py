"""What codes take, against sums over a counter of them."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.quantization.coded_bits import bits_of_counts, coded_bits


def by_counter(codes: list[int]) -> float:
    counts = Counter(codes)
    return -sum(math.log2(counts[code] / len(codes)) for code in codes)


@given(st.lists(st.integers(-128, 127), max_size=200))
def test_bits_are_the_surprise_of_each_code(codes: list[int]) -> None:
    assert coded_bits(np.array(codes, np.int8)) == pytest.approx(by_counter(codes), abs=1e-9)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_bits_of_counts_are_those_of_the_codes(counts: list[int]) -> None:
    codes = [value for value, count in enumerate(counts) for _ in range(count)]
    assert bits_of_counts(np.array(counts)) == pytest.approx(by_counter(codes), abs=1e-9)


def test_what_is_known() -> None:
    assert coded_bits(np.zeros((0, 4), np.int16)) == 0
    assert coded_bits(np.full((3, 5), -7)) == 0
    assert coded_bits(np.array([[-1, 1], [1, -1]])) == 4
    assert coded_bits(np.arange(256, dtype=np.uint8)) == 2048
    assert coded_bits(np.array([0, 0, 0, 1])) == pytest.approx(3 * math.log2(4 / 3) + 2)
