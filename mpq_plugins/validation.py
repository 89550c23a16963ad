"""pydantic's findings as one sentence."""

from pydantic import ValidationError


def first_problem(error: ValidationError) -> str:
    """`layers[3].bits: 9 is not allowed: ...`, and how many more problems there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in ("missing", "value_error") else f"{str(first['input'])[:60]!r}: "
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place or 'the document'}: {value}{message}{more}"
