"""JSON that others may have written: one reader, which is strict, and the model that all documents' models are."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .files import read_regular

LARGEST_DOCUMENT = 1 << 27  # bytes; the plan of a network of 100,000 layers takes some 30 MB
DEEPEST = 64
MOST_INNER = 1 << 22  # lists and objects, which take many times the memory of their text
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Strict(BaseModel):
    """A document or a part of one: no other fields, and no number for a text, text for a number, or true for 1."""

    model_config = STRICT


def load_json(path: Path, most: int = LARGEST_DOCUMENT) -> Any:
    """What a JSON file says. Raises OSError where no ordinary file of so many bytes is there, ValueError as
    parse_json."""
    return parse_json(read_regular(path, most))


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says.

    Raises ValueError for what is no JSON, and for what readers of JSON take differently or cannot write again: a name
    twice, NaN and infinity, half a surrogate pair, more than 64 levels, and what would fill the memory.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    if text.count("[") + text.count("{") > MOST_INNER:
        raise ValueError(f"holds more than {MOST_INNER} lists and objects")
    try:
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"nested more than {DEEPEST} deep") from error
    _check(document, DEEPEST)
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in mapping if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} appears twice")
    return mapping


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond all numbers here")
    return number


def _check(value: Any, deeper: int) -> None:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{value[:60]!r} is no text: it holds half a surrogate pair")
        return
    if isinstance(value, dict | list):
        if not deeper:
            raise ValueError(f"nested more than {DEEPEST} deep")
        for inner in value:
            _check(inner, deeper - 1)
        for inner in value.values() if isinstance(value, dict) else ():
            _check(inner, deeper - 1)
