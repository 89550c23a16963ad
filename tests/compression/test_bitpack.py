"""Packing against bits written one at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.compression import bitpack
from mpq_plugins.compression.bitpack import Codes, pack, packed_bytes, unpack

CODES = st.integers(1, 9).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=70))
)


def array(codes: list[int], bits: int) -> Codes:
    return np.array(codes, np.dtype(np.uint8 if bits <= 8 else np.uint16))


def by_hand(codes: list[int], bits: int) -> bytes:
    """Code i in bits i b to (i + 1) b - 1 of one long number, lowest first."""
    number = sum(code << (position * bits) for position, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@given(CODES)
def test_codes_come_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(array(codes, bits), bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    back = unpack(packed, bits, len(codes))
    assert back.tolist() == codes
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)


@given(CODES)
def test_every_bit_is_where_it_should_be(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    if bits <= 8:
        assert pack(array(codes, bits), bits) == by_hand(codes, bits)
    else:  # low eight bits of all codes, then the rest of all
        low = by_hand([code & 255 for code in codes], 8)
        assert pack(array(codes, bits), bits) == low + by_hand([code >> 8 for code in codes], bits - 8)


@pytest.mark.parametrize("bits", range(1, 10))
def test_what_is_worked_at_at_a_time_leaves_no_trace(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, 1003).astype(np.uint16)
    whole = pack(codes, bits)
    monkeypatch.setattr(bitpack, "AT_ONCE", 3)
    assert pack(codes, bits) == whole
    assert (unpack(whole, bits, 1003) == codes).all()
