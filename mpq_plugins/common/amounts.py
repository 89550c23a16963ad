"""Numbers of bytes as people write them: `9MB`, `1.5 MiB`, `90000`."""

import re
from fractions import Fraction
from numbers import Rational
from typing import Any

from ..errors import SettingError
from .checks import is_number, shown

AMOUNT = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,18})?) ?([A-Za-z]*)", re.ASCII)
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip
ALLOWED = "a size such as 9MB, 120kB, 1.5MiB, or a number of bytes"
MOST_BYTES = 10**18
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}


def bytes_of(amount: Any, name: str = "size") -> int:
    """The whole bytes in an amount: a number of them, or a text with a unit.

    kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. Upper and lower case are the same,
    but for `Mb` and its like, which mean bits. A part of a byte is left off.

    Args:
        amount: `9000000`, `"9MB"`, `"1.5 MiB"`.
        name: What the amount is of, for the error.

    Raises:
        SettingError: For anything else, and for less than 1 byte or more than 10^18.

    Examples:
        >>> bytes_of("1.5 MiB")
        1572864
    """
    exact = _exactly(amount) if _is_finite(amount) else _parsed(amount) if isinstance(amount, str) else None
    if exact is None or not 1 <= exact <= MOST_BYTES:
        hint = "; Mb and its like mean bits" if isinstance(amount, str) and _means_bits(amount) else ""
        raise SettingError(f"{name}: {shown(amount)} is not allowed; {ALLOWED}{hint}")
    return int(exact)


def _is_finite(amount: Any) -> bool:
    return is_number(amount) and abs(amount) <= MOST_BYTES


def _exactly(number: Any) -> Fraction:
    """Python's fractions take its own numbers and whole ones, and none of numpy's of another width."""
    return Fraction(number if isinstance(number, float | Rational) else float(number))


def _parsed(text: str) -> Fraction | None:
    written = AMOUNT.fullmatch(text.strip())
    if written is None or _means_bits(text) or written[2].lower() not in _BY_LOWER_CASE:
        return None
    return Fraction(written[1]) * _BY_LOWER_CASE[written[2].lower()]


def _means_bits(text: str) -> bool:
    """Whether a text ends as `Mb` or `Mib`: a large letter, and the small b of bits."""
    return re.search(r"[KMGT]i?b$", text.strip()) is not None
