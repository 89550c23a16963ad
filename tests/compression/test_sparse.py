"""The relative index against the paper's figure and a slow loop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.compression.sparse import RelativeIndex, from_relative, index_bits, to_relative

CODES = st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 3, 200]), max_size=200)


def slow(codes: list[int], bits: int) -> list[tuple[int, int]]:
    """(zeros before, code) of every entry, a filler after each run of 2^bits zeros."""
    found, zeros = [], 0
    for code in codes:
        if code:
            found.append((zeros, code))
            zeros = 0
        elif zeros == 2**bits - 1:
            found.append((zeros, 0))
            zeros = 0
        else:
            zeros += 1
    while found and not found[-1][1]:
        found.pop()  # what follows the last entry goes without saying
    return found


def test_the_papers_figure() -> None:
    # Figure 2 of arXiv 1510.00149: entries at 1, 4 and 15, differences of up to 8 in 3 bits (1 for the next position).
    codes = np.zeros(16, np.uint8)
    codes[[1, 4, 15]] = [34, 9, 17]
    index = to_relative(codes, 3)
    assert (index.gaps + 1).tolist() == [2, 3, 8, 3]
    assert index.values.tolist() == [34, 9, 0, 17]


@given(CODES, st.integers(1, 8))
def test_it_is_the_slow_loop_and_comes_back(codes: list[int], bits: int) -> None:
    index = to_relative(np.array(codes, np.uint8), bits)
    assert list(zip(index.gaps.tolist(), index.values.tolist(), strict=True)) == slow(codes, bits)
    back = from_relative(index, len(codes))
    assert back is not None
    assert back.tolist() == codes


def test_wide_codes_stay_wide() -> None:
    codes = np.zeros(1000, np.uint16)
    codes[[3, 999]] = [511, 300]
    index = to_relative(codes, 5)
    assert index.values.dtype == np.uint16
    back = from_relative(index, 1000)
    assert back is not None
    assert (back == codes).all()


def test_entries_beyond_the_end_are_none() -> None:
    index = RelativeIndex(np.array([200, 200], np.uint8), np.array([1, 1], np.uint8))
    assert from_relative(index, 402) is not None
    assert from_relative(index, 401) is None


def test_gaps_have_the_papers_bits() -> None:
    assert [index_bits(kind) for kind in ("conv2d", "conv_transpose1d", "linear", "embedding")] == [8, 8, 5, 5]
