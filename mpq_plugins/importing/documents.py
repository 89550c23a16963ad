"""JSON files of other tools, read strictly: what is not as expected is refused by its name."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.checks import is_number, shown
from ..common.documents import load_json
from ..errors import FormatError


def document_of(path: Path) -> Any:
    """What a JSON file says. Raises FormatError."""
    try:
        return load_json(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot read it ({error.strerror or error})") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error})") from error


def mapping_in(where: str, document: Any, key: str) -> Mapping[str, Any]:
    """What a document has under a key, an object with something in it. Raises FormatError."""
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, dict) or not value:
        raise FormatError(f"{where}: has no {key!r} with anything in it")
    return value


def finite(where: str, value: Any) -> float:
    """A finite number. Raises FormatError for what is none."""
    if not is_number(value) or not math.isfinite(value):
        raise FormatError(f"{where}: {shown(value)} is no finite number")
    return float(value)
