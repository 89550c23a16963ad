"""Checks that several places make, and pydantic's findings as one sentence."""

import math
import sys
from contextlib import suppress
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingError

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from pydantic import ValidationError

LARGEST_INTEGER = (1 << 63) - 1


def shown(value: object) -> str:
    """How an error shows what was given, as Python writes it: one line, of at most 60 letters."""
    return f"{' '.join(line.strip() for line in repr(value).splitlines()):.60}"


def is_number(value: object) -> bool:
    """Whether it is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number(
    name: str, value: Any, allowed: str, *, least: float = -math.inf, above: float = -math.inf,
    most: float = sys.float_info.max,
) -> float:  # fmt: skip
    """`value` as a float, if it is a number from `least`, or beyond `above`, to `most`.

    Raises SettingError naming it and what is allowed. 2 and 2.0 are the same setting, and make the same file.
    """
    with suppress(OverflowError):  # of integers that no float holds
        if is_number(value) and least <= float(value) <= most and float(value) > above:
            return float(value)
    raise SettingError(f"{name}: {shown(value)} is not allowed; {allowed}")


def integer(name: str, value: Any, allowed: str, *, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """`value`, if it is an integer from `least` to `most`. Raises SettingError naming it and what is allowed."""
    if type(value) is not int or not least <= value <= most:
        raise SettingError(f"{name}: {shown(value)} is not allowed; {allowed}")
    return value


def listed(name: str, values: Any, allowed: str) -> list[Any]:
    """The values as a list. Raises SettingError where they are a text, which is a series of letters, or no series."""
    with suppress(TypeError):
        if not isinstance(values, str | bytes):
            return list(values)
    raise SettingError(f"{name}: {shown(values)} is not allowed; {allowed}")


def words(name: str, values: Any, allowed: str) -> tuple[str, ...]:
    """The values, if they are texts. Raises SettingError naming the first that is none, or what is no series."""
    given = listed(name, values, allowed)
    for value in given:
        if not isinstance(value, str):
            raise SettingError(f"{name}: {shown(value)} is not allowed; {allowed}")
    return tuple(given)


def path_of(name: str, value: Any) -> Path:
    """The path that a text or a path says. Raises SettingError for anything else."""
    if not isinstance(value, str | PathLike):
        raise SettingError(f"{name}: {shown(value)} is no path; give a text or a pathlib.Path")
    return Path(value)


def as_integer(text: str) -> int | None:
    """The number that ASCII digits write, of up to 18; None for any other text. Python itself reads other scripts'."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def first_problem(error: "ValidationError") -> str:
    """`layers[3].bits: 9 is not allowed: ...`, and how many more problems there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("missing", "value_error") else f"{str(first['input'])[:60]!r}: "
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place or 'the document'}: {value}{message}{more}"
