"""What a long measurement has finished, kept in a file beside its result, so that the next run goes on from there."""

import json
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
        self._entries: dict[str, _Entry] = {}
        self._end = self._restored() if exists(path) else 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, name: str) -> Arrays:
        """A finished unit's arrays."""
        entry = self._entries[name]
        try:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                data = file.read(entry.length)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read ({error.strerror}); run again") from error
        if entry.checksum != zlib.crc32(data, zlib.crc32(name.encode())):
            raise SourceError(f"{self.path}: was changed by somebody else while in use; run again")
        return load(data)

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
            with self.path.open("rb") as file:
                return self._read(file, self.path.stat().st_size)
        except OSError as error:
            raise SourceError(f"{self.path}: is in the way ({error.strerror}); remove it") from error

    def _read(self, file: BinaryIO, size: int) -> int:
        head = file.read(len(self._head))
        if head != self._head:
            what = "of another measurement (weights, settings or version)" if head.startswith(MAGIC) else "damaged"
            if size:
                _warn(f"{self.path}: is {what}; measuring from the start")
            return 0
        end = len(head)
        for name, entry in _entries(file, end, size):
            self._entries[name], end = entry, entry.start + entry.length
        if end < size:
            _warn(
                f"{self.path}: is damaged, or its last unit unfinished; going on from {len(self._entries)} units that "
                "are whole"
            )
        return end


@dataclass(frozen=True)
class _Entry:
    """Where a unit's arrays lie, and the checksum of its name and them."""

    start: int
    length: int
    checksum: int


def _entries(file: BinaryIO, start: int, size: int) -> Iterator[tuple[str, _Entry]]:
    """Each entry and its name, up to the first that is not whole; one at a time is in memory."""
    while start + ENTRY.size <= size:
        file.seek(start)
        key_length, length, checksum = ENTRY.unpack(file.read(ENTRY.size))
        start += ENTRY.size + key_length
        if key_length > LONGEST_NAME or start + length > size:
            return
        key, data = file.read(key_length), file.read(length)
        if zlib.crc32(data, zlib.crc32(key)) != checksum:
            return
        try:
            load(data)
            yield key.decode(), _Entry(start, length, checksum)
        except (SafetensorError, ValueError):
            return
        start += length


def _warn(text: str) -> None:
    warnings.warn(MeasureWarning(text), stacklevel=6)  # at the call of measure


def job_line(facts: Mapping[str, object]) -> str:
    """What a job is told apart by, on one line."""
    return json.dumps(facts, sort_keys=True)
