"""Rows of a long job, written down as they come, so that the job goes on where it was interrupted."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import SettingError, SourceError
from .files import exists, write_text


class Journal:
    """One JSON line per finished row (names -> numbers) in the file `path`, below a line that says whose they are.

    `rows` holds, by key, what an earlier run of the same job finished. The file is made with the first row. Raises
    SettingError for a file that is there already and holds something else, another job's rows included.
    """

    def __init__(self, path: Path, job: Mapping[str, str]) -> None:
        self.path, self._head = path, json.dumps({"job": dict(job)})
        self.rows: dict[str, Mapping[str, float]] = _read(path, {"job": dict(job)}) if exists(path) else {}
        if self.rows:  # written anew, for a killed run may have left half a line at the end
            write_text(path, "".join([f"{self._head}\n", *(_line(key, row) for key, row in self.rows.items())]))

    def add(self, key: str, row: Mapping[str, float]) -> None:
        """Write a finished row to the disk."""
        if not self.rows:
            write_text(self.path, f"{self._head}\n")
        self.rows[key] = dict(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(key, row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SourceError(f"{self.path}: cannot write there ({error.strerror}). Is the disk full?") from error


def _line(key: str, row: Mapping[str, float]) -> str:
    return json.dumps({"key": key, "row": dict(row)}) + "\n"


def _read(path: Path, head: object) -> dict[str, Mapping[str, float]]:
    try:
        first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    except OSError as error:
        raise SettingError(f"{path}: is in the way ({error.strerror}); remove it, or name another output") from error
    found = _parsed(first)
    if not isinstance(found, dict) or found.keys() != {"job"}:
        raise SettingError(f"{path}: is in the way, and no journal of ours; remove it, or name another output")
    if found != head:
        raise SettingError(
            f"{path}: holds finished rows of another job (another model or evaluation); remove it to give them up, or "
            "name another output"
        )
    rows = [line for line in map(_parsed, lines) if _is_row(line)]
    return {line["key"]: line["row"] for line in rows}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_row(line: Any) -> bool:
    if not isinstance(line, dict) or line.keys() != {"key", "row"} or not isinstance(line["key"], str):
        return False
    row = line["row"]
    if not isinstance(row, dict) or not row:
        return False
    return all(type(value) in (int, float) and not math.isnan(value) for value in row.values())
