"""Bytes as people write them."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.common.amounts import bytes_of
from mpq_plugins.errors import SettingError
from tests.helpers.says import naming

# Written out, for what is a power of what is the point.
UNITS = {
    "B": 1, "kB": 1000, "MB": 1_000_000, "GB": 1_000_000_000, "KiB": 1024, "MiB": 1_048_576, "GiB": 1_073_741_824,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("9MB", 9_000_000), ("120kB", 120_000), ("1.5MiB", 1_572_864), ("2GiB", 2_147_483_648), ("900B", 900),
        ("90000", 90_000), (90000, 90_000), (9e6, 9_000_000), ("9 mb", 9_000_000), ("120KB", 120_000),
        (" 1.5 mib ", 1_572_864), ("0.5kB", 500), ("1.0009kB", 1000), ("1TB", 10**12), ("1tib", 1024**4),
    ],
)  # fmt: skip
def test_what_people_write(text: object, count: int) -> None:
    assert bytes_of(text) == count


@given(st.integers(1, 10**9), st.integers(0, 999_999), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_what_is_written_is_read_to_the_byte(whole: int, millionths: int, unit: str, space: str) -> None:
    exact = (whole + Fraction(millionths, 10**6)) * UNITS[unit]
    text = f"{whole}.{millionths:06}{space}{unit}"
    if exact > 10**18:
        with pytest.raises(SettingError):
            bytes_of(text)
        return
    assert bytes_of(text) == math.floor(exact)
    assert bytes_of(text.upper().replace("KB", "kB")) == bytes_of(text.lower()) == bytes_of(text)


@given(st.integers(1, 10**18))
def test_a_number_of_bytes_is_itself(count: int) -> None:
    assert bytes_of(count) == bytes_of(str(count)) == bytes_of(f"{count}B") == count


@pytest.mark.parametrize(
    "amount",
    ["", "MB", "-9MB", "9 M", "9Mo", "9,5MB", "9MB!", "1e6", "nine", "\u0669MB", "0", "0.4B", "9  MB", "2000000TB",
     0, -1, 0.5, 10**19, float("inf"), float("nan"), True, None, [9], "9" * 40],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_allowed(amount: object) -> None:
    with pytest.raises(SettingError, match=naming("size", "9MB", "120kB", "1.5MiB", "a number of bytes")):
        bytes_of(amount)


@pytest.mark.parametrize("text", ["9Mb", "9Gb", "1Kib"])
def test_bits_are_no_bytes(text: str) -> None:
    with pytest.raises(SettingError, match=naming("budget", text, "mean bits")):
        bytes_of(text, "budget")
