"""Rows as CSV: a column for every name that some row has, in the order in which they come up."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_text


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a line for each row; atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
