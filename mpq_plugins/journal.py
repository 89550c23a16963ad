"""Rows of a long job, written down as they come, so that the job goes on where it was interrupted."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import SourceError
from .files import exists


class Journal:
    """One JSON line per finished row in the file `path`, below a line that says which job they belong to.

    `rows` holds what an earlier run of the same job finished, by key; `stale` says that the file was another job's,
    or unreadable, and was begun anew.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        head = {"job": dict(job)}
        lines = _lines(path)
        self.rows: dict[str, Any] = {}
        self.stale = bool(lines) and lines[0] != head
        if lines and not self.stale:
            self.rows = {line["key"]: line["row"] for line in lines[1:] if line.keys() == {"key", "row"}}
        # Rewritten, for a killed run may have left half a line at the end.
        self._write("w", [head, *({"key": key, "row": row} for key, row in self.rows.items())])

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a finished row to the disk."""
        self.rows[key] = dict(row)
        self._write("a", [{"key": key, "row": dict(row)}])

    def _write(self, mode: str, lines: list[dict[str, Any]]) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SourceError(f"{self.path}: cannot write there ({error.strerror}). Choose another path.") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what follows the first damaged one is not trusted."""
    if not exists(path):
        return []
    found: list[dict[str, Any]] = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if not isinstance(line, dict):
                break
            found.append(line)
    except (OSError, ValueError, RecursionError):
        pass
    return found or [{}]
