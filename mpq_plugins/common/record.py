"""What a long measurement has finished, kept in a file beside its result, so that the next run goes on from there."""

import os
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from ..errors import MeasureWarning, SettingError, SourceError
from .checksum import checksum
from .files import exists

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

Arrays = Mapping[str, NDArray[np.float64]]

MAGIC = b"mpq-partial 1\n"
ENTRY = struct.Struct("<IQI")  # bytes of the name, bytes of the arrays, checksum of both and of the job
LONGEST_NAME = 1 << 10
BLOCK = 1 << 20  # bytes in memory while a file is checked


class Record:
    """Finished units by name: arrays, each entry with its own checksum, below a line that says whose they are.

    A file of another job (other weights, settings or version) is written anew, with a warning; of a damaged one what
    is whole is kept; one that does not begin as ours do is set aside. Nothing in it is ever executed. Raises
    SourceError where it cannot be read or written, on a full disk for one: what was written before stays; SettingError
    where another measurement is writing it.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self._head = MAGIC + job.encode() + b"\n"
        self._seed = checksum(self._head)
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._file: BinaryIO | None = None
        self._end = self._restored() if exists(path) else 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, name: str) -> Arrays:
        """A finished unit's arrays. Raises SourceError where they are no longer what they were."""
        assert self._file is not None, "an entry without a file"
        entry = self._entries[name]
        try:
            with self._lock:
                self._file.seek(entry.start)
                data = self._file.read(entry.length)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read ({error.strerror}); run again") from error
        if entry.checksum != checksum(data, checksum(name.encode(), self._seed)):
            raise SourceError(f"{self.path}: was changed by somebody else while in use; run again")
        return load(data)

    def add(self, name: str, arrays: Arrays) -> None:
        """Write a finished unit."""
        key = name.encode()
        data = save({part: np.ascontiguousarray(array) for part, array in arrays.items()})
        entry = ENTRY.pack(len(key), len(data), checksum(data, checksum(key, self._seed))) + key + data
        with self._lock:
            self._write(entry if self._end else self._head + entry)

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            if self._file is None:
                # Unbuffered: what a full disk did not take must not be tried again on closing.
                self._file = self._locked(os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0))
            self._file.seek(self._end)
            self._file.truncate()  # what a damaged file or a full disk left behind
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise SourceError(
                f"{self.path}: cannot write there ({error.strerror}). What is finished stays in it: make room, and run "
                "again to go on"
            ) from error
        self._end += len(data)

    def _locked(self, file: BinaryIO) -> BinaryIO:
        if fcntl is not None:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise SettingError(
                    f"{self.path}: another measurement is writing it; wait for that, or name another output"
                ) from error
            except OSError:  # a file system without locks
                pass
        return file

    def _restored(self) -> int:
        """Where whole entries end; 0 to begin anew."""
        if not self.path.is_file():
            raise SourceError(f"{self.path}: is in the way, and no ordinary file; remove it")
        try:
            file = self._locked(self.path.open("r+b", 0))
            size = self.path.stat().st_size
            begins = file.read(len(self._head))
            if size and not begins.startswith(MAGIC):
                file.close()
                self._set_aside()
                return 0
        except OSError as error:
            raise SourceError(f"{self.path}: is in the way ({error.strerror}); remove it") from error
        self._file = file
        return self._whole(begins, size)

    def _whole(self, begins: bytes, size: int) -> int:
        assert self._file is not None
        if begins != self._head:
            if size:
                _warn(f"{self.path}: is of another measurement (weights, settings, version or processor), or damaged; "
                      "measuring from the start")  # fmt: skip
            return 0
        end = len(begins)
        for name, entry in _entries(self._file, end, size, self._seed):
            self._entries[name], end = entry, entry.start + entry.length
        if end < size:
            _warn(
                f"{self.path}: is damaged, or its last unit unfinished; going on from {len(self._entries)} units that "
                "are whole"
            )
        return end

    def _set_aside(self) -> None:
        """Whatever it is, it is not ours to write over."""
        aside = self.path.with_name(f"{self.path.name}.old")
        if exists(aside):
            raise SettingError(f"{self.path}: is in the way, and no partial file of ours; so is {aside}: remove them")
        self.path.rename(aside)
        _warn(f"{self.path}: is damaged, or no partial file of ours; moved to {aside}, and measuring from the start")


@dataclass(frozen=True)
class _Entry:
    """Where a unit's arrays lie, and the checksum of its name and them."""

    start: int
    length: int
    checksum: int


def _entries(file: BinaryIO, start: int, size: int, seed: int) -> Iterator[tuple[str, _Entry]]:
    """Each entry and its name, up to the first that is not whole."""
    while start + ENTRY.size <= size:
        file.seek(start)
        key_length, length, wanted = ENTRY.unpack(file.read(ENTRY.size))
        start += ENTRY.size + key_length
        if key_length > LONGEST_NAME or start + length > size:
            return
        key = file.read(key_length)
        found, left = checksum(key, seed), length
        while left and (block := file.read(min(left, BLOCK))):
            found, left = checksum(block, found), left - len(block)
        if left or found != wanted:
            return
        yield key.decode(errors="replace"), _Entry(start, length, wanted)
        start += length


def _warn(text: str) -> None:
    warnings.warn(MeasureWarning(text), stacklevel=8)  # at the call of measure
