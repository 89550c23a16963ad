"""Rows of a long job, written down as they come, so that the job goes on where it was interrupted."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MeasureWarning, SettingError, SourceError
from .checksum import is_damaged, sealed, unsealed
from .documents import LARGEST_DOCUMENT
from .files import exists, read_regular, write_text

VERSION = 2  # 1 had no checksums, and did not say which it was


class Journal:
    """One JSON line per finished row (names -> numbers) in the file `path`, below a line that says whose they are.

    `rows` holds, by key, what an earlier run of the same job finished; a row that is damaged is not among them. The
    file is made with the first row. Raises SettingError for a file that is there already and holds something else,
    another job's rows included.
    """

    def __init__(self, path: Path, job: Mapping[str, str]) -> None:
        self.path, self._head = path, _sealed({"version": VERSION, "job": dict(job)})
        self.rows: dict[str, Mapping[str, float]] = _read(path, dict(job)) if exists(path) else {}
        if self.rows:  # written anew, for a killed run may have left half a line at the end
            write_text(path, "".join([self._head, *(_line(key, row) for key, row in self.rows.items())]))

    def add(self, key: str, row: Mapping[str, float]) -> None:
        """Write a finished row to the disk."""
        if not self.rows:
            write_text(self.path, self._head)
        self.rows[key] = dict(row)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(key, row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SourceError(f"{self.path}: cannot write there ({error.strerror}). Is the disk full?") from error


def _line(key: str, row: Mapping[str, float]) -> str:
    return _sealed({"key": key, "row": dict(row)})


def _sealed(document: Mapping[str, Any]) -> str:
    return json.dumps(sealed(document)) + "\n"


def _read(path: Path, job: Mapping[str, str]) -> dict[str, Mapping[str, float]]:
    try:
        text = read_regular(path, LARGEST_DOCUMENT).decode("utf-8", errors="replace")
    except OSError as error:
        raise SettingError(f"{path}: is in the way ({error.strerror}); remove it, or name another output") from error
    first, *lines = text.split("\n")
    head = _parsed(first)
    version = 1 if isinstance(head, dict) and head.keys() == {"job"} else VERSION
    if not isinstance(head, dict) or "job" not in head:
        raise SettingError(f"{path}: is in the way, and no journal of ours; remove it, or name another output")
    if version == VERSION and not _is_whole(head, {"version", "job"}):
        raise SettingError(
            f"{path}: its first line is damaged, or of a newer mpq-plugins; remove it, or name another output"
        )
    if head["job"] != job or head.get("version", version) != version:
        raise SettingError(
            f"{path}: holds finished rows of another job (another model or evaluation); remove it to give them up, or "
            "name another output"
        )
    return _rows(path, lines, version)


def _rows(path: Path, lines: list[str], version: int) -> dict[str, Mapping[str, float]]:
    parsed = [_parsed(line) for line in lines]
    rows = [line for line in parsed if _is_row(line) and (version == 1 or _is_whole(line, {"key", "row"}))]
    if len(rows) < len(lines) - 1:  # what follows the last line break is nothing, or what a killed run was writing
        warnings.warn(MeasureWarning(
            f"{path}: {len(lines) - 1 - len(rows)} of its rows are damaged, and done again"
        ), stacklevel=4)  # fmt: skip
    return {line["key"]: line["row"] for line in rows}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_whole(line: dict[str, Any], names: set[str]) -> bool:
    return unsealed(line).keys() == names and line.keys() != names and not is_damaged(line)


def _is_row(line: Any) -> bool:
    if not isinstance(line, dict) or unsealed(line).keys() != {"key", "row"} or not isinstance(line["key"], str):
        return False
    row = line["row"]
    if not isinstance(row, dict) or not row:
        return False
    return all(type(value) in (int, float) and not math.isnan(value) for value in row.values())
