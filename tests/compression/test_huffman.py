"""Huffman's code: as short as any prefix code can be, a worked example, round trips, and damaged data."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.compression import huffman
from mpq_plugins.compression.bitpack import packed_bytes
from mpq_plugins.compression.huffman import LONGEST, code_lengths, coded_bytes, decode, encode, entropy_bits

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)
SYMBOLS = st.lists(st.integers(0, 30), max_size=300).map(lambda found: np.array(found, np.uint8))


def best_total(counts: list[int]) -> int:
    """The least number of bits of any prefix code, over all lengths that Kraft's inequality allows."""
    own = [count for count in counts if count]
    return min(
        sum(length * count for length, count in zip(lengths, own, strict=True))
        for lengths in itertools.product(range(1, len(own) + 1), repeat=len(own))
        if sum(2.0**-length for length in lengths) <= 1
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any))
def test_no_prefix_code_is_shorter(counts: list[int]) -> None:
    assert code_lengths(counts) @ counts == best_total(counts)


def test_a_worked_example() -> None:
    # Probabilities .4 .2 .2 .1 .1: 2.2 bits a symbol (Cover and Thomas, Elements of Information Theory, sec. 5.6).
    assert code_lengths([4, 2, 2, 1, 1]) @ np.array([4, 2, 2, 1, 1]) == 22
    assert entropy_bits([4, 2, 2, 1, 1]) == pytest.approx(10 * 2.1219, rel=1e-4)


@given(COUNTS)
def test_lengths_make_a_code_within_a_bit_of_the_entropy(counts: list[int]) -> None:
    lengths = code_lengths(counts)
    present = np.array(counts) > 0
    assert ((lengths > 0) == present).all()
    assert sum(2.0**-length for length in lengths[present]) <= 1
    total = lengths @ np.array(counts)
    assert entropy_bits(counts) - 1e-6 <= total <= entropy_bits(counts) + sum(counts)


def test_rare_symbols_do_not_get_longer_codes_than_the_limit() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert huffman._tree_depths(np.array(fibonacci)).max() == 29
    lengths = code_lengths(fibonacci)
    assert lengths.max() == LONGEST
    assert (2.0**-lengths).sum() <= 1
    assert lengths @ fibonacci <= 1.01 * huffman._tree_depths(np.array(fibonacci)) @ fibonacci
    symbols = np.repeat(np.arange(30), np.minimum(fibonacci, 3000)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(symbols, 32), 32, len(symbols)), symbols)


@given(SYMBOLS)
def test_symbols_come_back_in_as_many_bytes_as_foretold(symbols: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
    data = encode(symbols, 32)
    assert len(data) == coded_bytes(np.bincount(symbols, minlength=32))
    back = decode(data, 32, len(symbols))
    assert back is not None
    assert back.dtype == np.uint8
    assert (back == symbols).all()


def test_nine_bit_symbols() -> None:
    symbols = np.random.default_rng(0).binomial(511, 0.4, 5000).astype(np.uint16)
    back = decode(encode(symbols, 512), 512, 5000)
    assert back is not None
    assert back.dtype == np.uint16
    assert (back == symbols).all()


@given(SYMBOLS, st.data())
def test_damaged_data_are_other_symbols_or_none_and_never_an_error(
    symbols: "np.ndarray[tuple[int], np.dtype[np.uint8]]", data: st.DataObject
) -> None:
    coded = bytearray(encode(symbols, 32))
    for position in data.draw(st.lists(st.integers(0, len(coded) - 1), max_size=4)):
        coded[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(coded)))
    for damaged in (bytes(coded), bytes(coded[:cut]), bytes(coded) + b"\0"):
        back = decode(damaged, 32, len(symbols))
        assert back is None or len(back) == len(symbols)
    assert decode(b"", 32, 1) is None
    assert decode(bytes(packed_bytes(32, 4)), 32, 10**15) is None  # no memory is taken for what cannot be there


def test_the_entropy_is_the_formulas() -> None:
    counts = [5, 0, 3, 8]
    expected = -16 * sum(n / 16 * math.log2(n / 16) for n in (5, 3, 8))
    assert entropy_bits(counts) == pytest.approx(expected)
    assert entropy_bits([0, 7]) == 0
    assert entropy_bits([0]) == 0
