"""Streams of bits, against Python's integers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.adapters.shared.packing import packed_rows, unpacked_rows


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32))
def test_a_row_is_a_number_whose_digits_are_the_codes(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = packed_rows(codes, bits)
    assert words.shape == (rows, -(-count * bits // 32))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert number == sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(packed))
    assert torch.equal(unpacked_rows(words, bits, count), codes)
