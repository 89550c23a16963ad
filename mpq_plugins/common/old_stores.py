"""What versions before the one store left of an interrupted run: told apart, so that none is misread as anything else.

A measurement had a file of checksummed arrays, evaluations and sensitivities a JSON line for each row, and a
reconstruction a folder of safetensors.
"""

import json
from pathlib import Path

from ..errors import SettingError
from .files import exists, open_regular

ARRAYS = b"mpq-partial "
HEAD = 1 << 16  # bytes in which the first line of a journal ends
JOB = "job.json"


def refuse_old_store(path: Path) -> None:
    """Raise SettingError, saying what it is and what to do, for one of them."""
    what = _old_store(path)
    if what is not None:
        raise SettingError(
            f"{path}: is {what} that an earlier mpq-plugins left, which this version does not go on from; remove it to "
            "start anew, or finish that run with the version that began it"
        )


def _old_store(path: Path) -> str | None:
    """What it is, with its article; None for everything else, and for what is not there."""
    try:
        if exists(path) and path.is_dir():
            return "a folder of finished blocks" if (path / JOB).is_file() else None
        with open_regular(path) as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if head.startswith(ARRAYS):
        return "a partial file of a measurement"
    return "a journal of finished rows" if _is_journal(head.partition(b"\n")[0]) else None


def _is_journal(line: bytes) -> bool:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and isinstance(document.get("job"), dict)
