"""Streams: what is written is read, in the fewest bytes, and what is not what it says is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mpq_plugins.compression.bitpack import packed_bytes
from mpq_plugins.compression.huffman import coded_bytes, entropy_bits
from mpq_plugins.compression.streams import (
    MOST_A_BYTE,
    Stream,
    code_stream,
    possible,
    read_codes,
    read_values,
    value_stream,
)
from mpq_plugins.errors import FormatError

RNG = np.random.default_rng(0)
VALUES = st.sampled_from(["u1", "u2", "f2", "f4", "f8", "i8", "i4"]).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), st.integers(0, 60), elements=hnp.from_dtype(np.dtype(dtype)))
)


def bell(count: int, bits: int) -> NDArray[np.uint8]:
    codes = np.round(RNG.standard_normal(count) * 2**bits / 7 + 2 ** (bits - 1))
    clipped: NDArray[np.uint8] = np.clip(codes, 0, 2**bits - 1).astype(np.uint8)
    return clipped


@given(st.integers(1, 9), st.integers(0, 400), st.floats(0.02, 0.98), st.sampled_from(["smallest", "packed"]))
def test_codes_come_back(bits: int, count: int, spread: float, choice: str) -> None:
    codes = np.random.default_rng(count).binomial(2**bits - 1, spread, count)
    own = codes.astype(np.dtype(np.uint8 if bits <= 8 else np.uint16))
    stream = code_stream(own, bits, choice)  # type: ignore[arg-type]
    back = read_codes(stream, bits, count, "here")
    assert back.dtype == own.dtype
    np.testing.assert_array_equal(back, own)
    assert len(stream.data) <= packed_bytes(count, bits)
    assert choice == "smallest" or stream.coding == "packed"


@given(VALUES, st.sampled_from(["smallest", "packed"]))
def test_numbers_come_back_to_the_bit(values: "NDArray[np.generic]", choice: str) -> None:
    stream = value_stream(values, choice)  # type: ignore[arg-type]
    back = read_values(stream, values.dtype, len(values), "here")
    assert back.tobytes() == values.tobytes()  # NaN and -0 included
    assert len(stream.data) <= values.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_codes_come_close_to_their_entropy(bits: int) -> None:
    codes = bell(300_000, bits)
    stream = code_stream(codes, bits)
    counts = np.bincount(codes, minlength=2**bits)
    assert stream.coding == "pcodec"
    assert len(stream.data) * 8 <= 1.01 * entropy_bits(counts)
    assert len(stream.data) < coded_bytes(counts)


def test_few_codes_take_the_smallest_table() -> None:
    codes = bell(1500, 4)
    stream = code_stream(codes, 4)
    assert stream.coding == "huffman"
    assert len(stream.data) == coded_bytes(np.bincount(codes, minlength=16)) < packed_bytes(1500, 4)
    flat = code_stream(np.tile(np.arange(16, dtype=np.uint8), 20), 4)
    assert flat.coding == "packed"  # nothing to gain


def test_no_byte_stands_for_more_than_it_may_and_what_is_all_alike_is_small_all_the_same() -> None:
    many = np.zeros(4_000_000, np.uint8)
    stream = code_stream(many, 4)
    assert stream.coding == "pcodec"
    assert len(stream.data) == -(-len(many) // MOST_A_BYTE)
    np.testing.assert_array_equal(read_codes(stream, 4, len(many), "here"), many)
    steps = np.arange(1_000_000)
    assert possible(len(steps), len(value_stream(steps).data))
    assert len(value_stream(steps).data) < 1000
    np.testing.assert_array_equal(read_values(value_stream(steps), steps.dtype, len(steps), "here"), steps)


@pytest.mark.parametrize(
    ("stream", "bits", "count", "message"),
    [
        (Stream("packed", b"abc"), 4, 9, "here: 3 bytes packed, not the 5 packed"),
        (Stream("raw", b"abcd"), 4, 8, "here: 4 bytes raw, not the 4 packed"),
        (Stream("pcodec", b"abcd"), 4, 8, "here: cannot be decoded"),
        (Stream("pcodec", b"abcd"), 4, 10**15, "here: 1000000000000000 values cannot come out of 4 bytes"),
        (Stream("huffman", b"abcd"), 4, 8, "here: its Huffman code is none"),
        (Stream("huffman", b""), 4, 10**15, "here: its Huffman code is none"),
        (code_stream(bell(50_000, 4), 4), 4, 49_999, "here: holds 49999 values or more, not 49999"),
        (code_stream(bell(50_000, 4), 4), 4, 50_001, "here: holds 50000 values or more, not 50001"),
        (code_stream(bell(50_000, 5), 5), 4, 50_000, "here: holds codes of more than 4 bits"),
    ],
)
def test_streams_that_are_not_what_they_say_are_refused(stream: Stream, bits: int, count: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_codes(stream, bits, count, "here")


def test_numbers_that_are_not_what_they_say_are_refused() -> None:
    values = RNG.standard_normal(5000).astype(np.float32)
    stream = value_stream(values)
    assert stream.coding == "pcodec"
    with pytest.raises(FormatError, match="here: cannot be decoded"):
        read_values(stream, np.dtype(np.float64), 5000, "here")
    with pytest.raises(FormatError, match="here: 16 bytes raw, not the 20 raw"):
        read_values(Stream("raw", bytes(16)), np.dtype(np.float32), 5, "here")
