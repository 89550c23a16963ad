"""Tensors of a torch checkpoint where they lie in its file, read as they are needed. No pickle is executed.

Nothing is mapped into memory: a file that is cut short under a map ends the process, and no error can be raised. So the
content is loaded without values, on torch's meta device, where each storage says at which byte it begins.
"""

import os
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..common.files import open_regular
from ..errors import SourceError
from .buffers import chunk_buffer
from .readers import Allocate, FileRows, MemoryRows, RowReader, StoredTensor

LARGEST_PICKLE = 1 << 26  # bytes; that of 100,000 tensors takes some 15 MB
MOST_TIMES, ANYWAY = 16, 1 << 20  # so much larger may something be than what is stored of it, or so many bytes
FORMAT = b"PK\x03\x04"
LENGTHS_AT, LENGTHS = 26, struct.Struct("<HH")  # of a record's name and of what else comes first


def archive_places(path: Path) -> dict[int, int] | None:
    """Where in a torch checkpoint a record begins -> its bytes; None for a format without such places.

    Raises OSError for what is no ordinary file, ValueError for an archive that would fill the memory.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(len(FORMAT)) != FORMAT:
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            _check_sizes(entries, size)
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return None
            return {_begin(file, entry): entry.file_size for entry in entries}
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error):
            return None  # torch says what is wrong with it


def _check_sizes(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_TIMES * size + ANYWAY:
        raise ValueError(f"its {size} bytes would unpack to {unpacked}")
    pickles = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickles > LARGEST_PICKLE:
        raise ValueError(f"its pickles have {pickles} bytes, and {LARGEST_PICKLE} is the most")


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a record's own bytes begin, behind its name and what else comes first."""
    file.seek(entry.header_offset + LENGTHS_AT)
    name, extra = LENGTHS.unpack(file.read(LENGTHS.size))
    return int(entry.header_offset + LENGTHS_AT + LENGTHS.size + name + extra)


def lie_there(content: Any, places: Mapping[int, int]) -> bool:
    """Whether every tensor of a content that was loaded without values lies where an archive has a record.

    torch works the places out from those before, which is wrong in an archive that another program wrote.
    """
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if not _lies_there(value, places):
                return False
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
    return True


def _lies_there(tensor: Tensor, places: Mapping[int, int]) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested:
        return True  # refused by name, once it is known which are weights
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    return begin is None or places.get(begin, -1) == storage.nbytes()


def in_file(path: Path, name: str, tensor: Tensor, places: Mapping[int, int]) -> StoredTensor:
    """A tensor that was loaded without values; places: archive_places(path).

    Raises SourceError for one that has no values in the file either, or whose place is no record's.
    """
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None:
        raise SourceError(f"{path}: tensor {name!r} is on the meta device and has no values; save it from another")
    if not _lies_there(tensor, places):
        raise SourceError(f"{path}: tensor {name!r} does not lie where its archive says; the file is damaged")
    shape, size = tuple(tensor.shape), tensor.dtype.itemsize
    place = begin + tensor.storage_offset() * size
    reader: RowReader
    if expands(tensor):
        reader = expanded(path, name, tensor)
    elif not tensor.numel() or (tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()):
        reader = FileRows(path.absolute(), name, place, shape, tensor.dtype)
    else:
        last = sum((side - 1) * step for side, step in zip(shape, tensor.stride(), strict=True))
        whole = FileRows(path.absolute(), name, place, (last + 1,), tensor.dtype)
        reader = Strided(whole, shape, tensor.stride(), tensor.is_neg())
    identity = (path, place, tensor.dtype, shape, tensor.stride()) if tensor.numel() else name
    return StoredTensor(shape, tensor.dtype, reader, identity)


def expands(tensor: Tensor) -> bool:
    """Whether a tensor has many times the values that are stored of it, and more than a little."""
    claimed, stored = tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes()
    return claimed > ANYWAY and claimed > stored


def refuse_overlaps(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise SourceError where tensors that lie on one another have together many times the values that are stored."""
    seen: set[tuple[object, ...]] = set()
    claimed: Counter[int] = Counter()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_nested or expands(tensor):
            continue
        storage = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", storage.data_ptr())
        key = (begin, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        claimed[begin] += 0 if key in seen else tensor.numel() * tensor.dtype.itemsize
        seen.add(key)
        if claimed[begin] > MOST_TIMES * storage.nbytes() + ANYWAY:
            raise SourceError(
                f"{path}: tensor {name!r} lies with others in {storage.nbytes()} bytes, of which they would make more "
                f"than {MOST_TIMES} times as many; save copies, tensor.clone()"
            )


def expanded(path: Path, name: str, tensor: Tensor) -> "Expanded":
    """What stands for the rows of such a tensor."""
    return Expanded(path, name, tensor.numel(), tensor.untyped_storage().nbytes() // tensor.dtype.itemsize)


def refuse_expanded(path: Path, name: str, tensor: Tensor) -> None:
    """Raise SourceError for such a tensor, which would fill the memory if it were made."""
    if expands(tensor):
        raise expanded(path, name, tensor).error


@dataclass(frozen=True)
class Strided:
    """Rows of a tensor whose values do not lie one after the other in its file; all that it spans is read at once."""

    whole: FileRows
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool = False

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader."""
        return self._read()(start, stop, allocate)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> None:
        """See RowReader."""

    def part(self, index: int, transposed: bool) -> MemoryRows:
        """See RowReader."""
        return self._read().part(index, transposed)

    def along(self, axis: int) -> MemoryRows:
        """See RowReader."""
        return self._read().along(axis)

    def cut(self, start: int, stop: int) -> MemoryRows:
        """See RowReader."""
        return self._read().cut(start, stop)

    def signature(self) -> str:
        """See RowReader."""
        return f"{self.whole.signature()} {self.shape} {self.stride}"

    def _read(self) -> MemoryRows:
        values = self.whole(0, self.whole.shape[0]).reshape(-1).as_strided(self.shape, self.stride)
        return MemoryRows(values.neg() if self.negative else values)


@dataclass(frozen=True)
class Expanded:
    """What stands for the rows of a tensor that has far more values than its file: they are refused."""

    path: Path
    name: str
    values: int
    stored: int

    @property
    def error(self) -> SourceError:
        """What is wrong with it."""
        return SourceError(
            f"{self.path}: tensor {self.name!r} has {self.values} values, and {self.stored} are stored (it was "
            "expanded, or overlaps itself); save a copy of it, tensor.clone(), or leave it out"
        )

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader. Raises SourceError."""
        raise self.error

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader. Raises SourceError."""
        raise self.error

    def part(self, index: int, transposed: bool) -> "Expanded":
        """See RowReader."""
        return self

    def along(self, axis: int) -> "Expanded":
        """See RowReader."""
        return self

    def cut(self, start: int, stop: int) -> "Expanded":
        """See RowReader."""
        return self

    def signature(self) -> str:
        """See RowReader. Raises SourceError."""
        raise self.error
