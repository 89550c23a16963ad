"""What a long measurement has finished, kept in a file beside its result, so that the next run goes on from there."""

import json
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import MeasureWarning, SourceError
from ..files import exists

Arrays = Mapping[str, NDArray[np.float64]]

MAGIC = b"mpq-partial 1\n"
ENTRY = struct.Struct("<IQI")  # bytes of the name, bytes of the arrays, checksum of both
LONGEST_NAME = 1 << 10


class Record:
    """Finished units by name: arrays, each entry with its own checksum, below a line that says whose they are.

    A file of another job (other weights, settings or version), or none of ours, is written anew, with a warning; of
    a damaged one what is whole is kept. Nothing in it is ever executed. Raises SourceError where it cannot be read or
    written, on a full disk for one: what was written before stays.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self._head = MAGIC + job.encode() + b"\n"
        self._lock = threading.Lock()
        self._entries: dict[str, Arrays] = {}
        self._end = self._restored() if exists(path) else 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, name: str) -> Arrays:
        """A finished unit's arrays; it is held no longer, for the file has it."""
        return self._entries.pop(name)

    def add(self, name: str, arrays: Arrays) -> None:
        """Write a finished unit."""
        key = name.encode()
        data = save({part: np.ascontiguousarray(array) for part, array in arrays.items()})
        entry = ENTRY.pack(len(key), len(data), zlib.crc32(data, zlib.crc32(key))) + key + data
        with self._lock:
            self._write(entry if self._end else self._head + entry)

    def _write(self, data: bytes) -> None:
        try:
            with self.path.open("r+b" if self._end else "wb") as file:
                file.seek(self._end)
                file.truncate()  # what a damaged file or a full disk left behind
                file.write(data)
        except OSError as error:
            raise SourceError(
                f"{self.path}: cannot write there ({error.strerror}). What is finished stays in it: make room, and run "
                "again to go on"
            ) from error
        self._end += len(data)

    def _restored(self) -> int:
        """Where whole entries end; 0 to begin anew."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise SourceError(f"{self.path}: is in the way ({error.strerror}); remove it") from error
        if not content.startswith(self._head):
            what = "of another measurement (weights, settings or version)" if content.startswith(MAGIC) else "damaged"
            if content:
                warnings.warn(MeasureWarning(f"{self.path}: is {what}; measuring from the start"), stacklevel=4)
            return 0
        end = len(self._head)
        for name, arrays, after in _entries(content, end):
            self._entries[name], end = arrays, after
        if end < len(content):
            warnings.warn(
                MeasureWarning(
                    f"{self.path}: is damaged, or its last unit unfinished; going on from {len(self._entries)} units "
                    "that are whole"
                ),
                stacklevel=4,
            )
        return end


def _entries(content: bytes, start: int) -> Iterator[tuple[str, Arrays, int]]:
    """Name, arrays and end of every entry up to the first that is not whole."""
    while start + ENTRY.size <= len(content):
        key_length, length, checksum = ENTRY.unpack_from(content, start)
        begin = start + ENTRY.size
        end = begin + key_length + length
        if key_length > LONGEST_NAME or end > len(content):
            return
        key, data = content[begin : begin + key_length], content[begin + key_length : end]
        if zlib.crc32(data, zlib.crc32(key)) != checksum:
            return
        try:
            yield key.decode(), load(data), end
        except (SafetensorError, ValueError):
            return
        start = end


def job_line(facts: Mapping[str, object]) -> str:
    """What a job is told apart by, on one line."""
    return json.dumps(facts, sort_keys=True)
