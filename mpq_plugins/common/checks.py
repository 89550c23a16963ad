"""Checks that several places make, and pydantic's findings as one sentence."""

from numbers import Real

from pydantic import ValidationError


def is_number(value: object) -> bool:
    """Whether it is a real number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_integer(text: str) -> int | None:
    """The number that ASCII digits write, of up to 18; None for any other text. Python itself reads other scripts'."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def first_problem(error: ValidationError) -> str:
    """`layers[3].bits: 9 is not allowed: ...`, and how many more problems there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("missing", "value_error") else f"{str(first['input'])[:60]!r}: "
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place or 'the document'}: {value}{message}{more}"
