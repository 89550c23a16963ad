"""Tensors that are read a few rows at a time: where they lie in a safetensors file, or in memory.

A reader is a small value that another process can be sent, so that whoever measures a chunk also reads it.
"""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.documents import parse_json
from ..common.files import open_regular
from ..common.text import first_sentence
from ..errors import SourceError
from ..models.fingerprint import tensor_bytes, tensors_digest
from .buffers import Buffer, chunk_buffer
from .rows import channel_rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Allocate = Callable[[int], Buffer]


class RowReader(Protocol):
    """Rows start..stop of a matrix, (stop - start, elements), in the stored dtype.

    What is returned may lie in what `allocate(bytes)` gave, and is good until that is used again.
    """

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """Read them. Raises SourceError, naming the file, where they cannot be."""
        ...

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """The same, if it can be had without waiting for a disk or a network."""
        ...

    def part(self, index: int, transposed: bool) -> "RowReader":
        """Of a three-dimensional tensor, one matrix: its rows, or if `transposed` its columns."""
        ...

    def along(self, axis: int) -> "RowReader":
        """Of a whole tensor: rows of this axis, 0 or 1, each as the others lie in memory."""
        ...

    def cut(self, start: int, stop: int) -> "RowReader":
        """A reader whose row 0 is this one's row `start`, and that carries no more than rows up to `stop`."""
        ...

    def signature(self) -> str:
        """What tells its values from others': a file's path, size and times, or the values' own digest."""
        ...


@dataclass(frozen=True)
class FileRows:
    """Rows in a file: contiguous, the first at byte `offset`; shape: of the tensor, its first axis the rows'."""

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader. Plain reads, for the pages of a memory map would count as this process's memory."""
        begin, length = self.span(start, stop)
        buffer = allocate(length)
        with _opened(self.path) as file:
            file.seek(begin)
            if file.readinto(buffer) != length:
                raise _cut_short(self.path, self.name)
        return _as_matrix(buffer, self.dtype, stop - start, self.row_elements)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader: what the system has in memory."""
        begin, length = self.span(start, stop)
        if not hasattr(os, "RWF_NOWAIT"):
            return None
        buffer = memoryview(allocate(length))
        done = 0
        with _opened(self.path) as file:
            while done < length:
                try:
                    got = os.preadv(file.fileno(), [buffer[done:]], begin + done, os.RWF_NOWAIT)
                except OSError:  # it would have to wait, or the file system cannot tell
                    return None
                if not got:
                    return None
                done += got
        return _as_matrix(buffer, self.dtype, stop - start, self.row_elements)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Where rows lie: the first byte, and how many."""
        row_bytes = self.row_elements * self.dtype.itemsize
        return self.offset + start * row_bytes, (stop - start) * row_bytes

    def part(self, index: int, transposed: bool) -> "FileRows | FileColumns":
        """See RowReader."""
        whole = replace(self, offset=self.span(index, index + 1)[0], shape=self.shape[1:])
        if not transposed:
            return whole
        return whole.along(1)

    def along(self, axis: int) -> "FileRows | FileColumns":
        """See RowReader."""
        if not axis:
            return self
        inputs, outputs, *inner = self.shape
        return FileColumns(self.path, self.name, self.offset, (inputs, outputs), self.dtype, 0, math.prod(inner))

    def cut(self, start: int, stop: int) -> "FileRows":
        """See RowReader."""
        return replace(self, offset=self.span(start, stop)[0], shape=(stop - start, *self.shape[1:]))

    def signature(self) -> str:
        """See RowReader."""
        return f"{_file_signature(self.path)} {self.offset}"


@dataclass(frozen=True)
class FileColumns:
    """Columns in a file as rows: of a matrix (inputs, outputs) that starts at byte `offset`, from column `first`.

    cell: elements that stand at each place of the matrix, as a transposed convolution's kernels do.
    """

    path: Path
    name: str
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    first: int
    cell: int = 1

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader: one read for each input, a memory's worth of columns at a time."""
        inputs, outputs = self.shape
        size = self.dtype.itemsize * self.cell
        length = (stop - start) * size
        buffer = memoryview(allocate(inputs * length))
        begin = self.offset + (self.first + start) * size
        with _opened(self.path) as file:
            for row in range(inputs):
                file.seek(begin + row * outputs * size)
                if file.readinto(buffer[row * length : (row + 1) * length]) != length:
                    raise _cut_short(self.path, self.name)
        if self.cell == 1:
            return _as_matrix(buffer, self.dtype, inputs, stop - start).T
        cells = _as_matrix(buffer, self.dtype, inputs, (stop - start) * self.cell)
        return cells.view(inputs, stop - start, self.cell).transpose(0, 1).reshape(stop - start, inputs * self.cell)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader; so many reads are not."""
        return None

    def part(self, index: int, transposed: bool) -> RowReader:
        """Of a matrix there are none."""
        raise NotImplementedError

    def along(self, axis: int) -> RowReader:
        """They are along one already."""
        raise NotImplementedError

    def cut(self, start: int, stop: int) -> "FileColumns":
        """See RowReader."""
        return replace(self, first=self.first + start)

    def signature(self) -> str:
        """See RowReader."""
        return f"{_file_signature(self.path)} {self.offset}"


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows of a tensor in memory along `axis`; sent elsewhere, a reader takes along its own rows and no others."""

    tensor: Tensor
    axis: int = 0

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader; a view where that can be."""
        part = self.tensor.narrow(self.axis, start, stop - start) if self.tensor.dim() else self.tensor
        return channel_rows(part, self.axis)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor:
        """See RowReader."""
        return self(start, stop, allocate)

    def part(self, index: int, transposed: bool) -> "MemoryRows":
        """See RowReader."""
        return MemoryRows(self.tensor[index], int(transposed))

    def along(self, axis: int) -> "MemoryRows":
        """See RowReader."""
        return MemoryRows(self.tensor, axis)

    def cut(self, start: int, stop: int) -> "MemoryRows":
        """See RowReader."""
        return MemoryRows(self.tensor.narrow(self.axis, start, stop - start), self.axis)

    def signature(self) -> str:
        """See RowReader."""
        return tensors_digest({"": self.tensor})

    def __reduce__(self) -> Any:
        # As plain bytes: torch would send all of the storage that this is a view of, or a shared-memory handle each.
        return _received, (tensor_bytes(self.tensor).copy(), self.tensor.dtype, tuple(self.tensor.shape), self.axis)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is somewhere: read_rows(start, stop) gives rows of its first axis, (stop - start, rest).

    identity is equal for two names of the same storage; foreign: what the file calls a dtype that we do not read, in
    whose place `dtype` has bytes; stored_bytes: what it takes in its file, where that is not `dtype`'s.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: RowReader
    identity: object
    foreign: str = ""
    stored_bytes: int | None = None

    def tensor(self) -> Tensor:
        """All of it, in its own shape. Raises SourceError where it cannot be read."""
        return self.read_rows(0, self.shape[0] if self.shape else 1).reshape(self.shape)


@dataclass(frozen=True)
class NoRows:
    """Rows of a dtype that we do not read: of such a tensor nobody should ask for any."""

    path: Path
    name: str
    dtype: str

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """Raise SourceError."""
        raise SourceError(f"{self.path}: tensor {self.name!r} has dtype {self.dtype}, which is not supported")

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """Raise SourceError."""
        return self(start, stop, allocate)

    def part(self, index: int, transposed: bool) -> RowReader:
        """See RowReader."""
        return self

    def along(self, axis: int) -> RowReader:
        """See RowReader."""
        return self

    def cut(self, start: int, stop: int) -> RowReader:
        """See RowReader."""
        return self

    def signature(self) -> str:
        """See RowReader."""
        return f"{_file_signature(self.path)} {self.name}"


COMPARED = 1 << 21  # elements at a time


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same shape, dtype and values, to the bit but for NaN. Raises SourceError."""
    if one.identity == other.identity:
        return True
    if (one.shape, one.dtype, one.foreign) != (other.shape, other.dtype, other.foreign) or not one.shape:
        return False
    step = max(1, COMPARED // max(1, math.prod(one.shape[1:])))
    spans = [(start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step)]
    return all(torch.equal(one.read_rows(*span), other.read_rows(*span)) for span in spans)


def safetensors_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name. Raises SourceError."""
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as checked:  # the library validates names, types, offsets and length
            names = list(checked.offset_keys())
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path}: truncated or not a safetensors file ({first_sentence(error)}); fetch or write it again"
        ) from error
    header, start = _header(path)
    return {name: _stored(path, name, header[name], start) for name in names}


def read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, and `__metadata__`. Raises SourceError."""
    return _header(path)[0]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The same, and where the tensors begin."""
    try:
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return parse_json(file.read(length)), 8 + length
    except (OSError, ValueError, struct.error) as error:
        raise SourceError(f"{path}: its header cannot be read ({error}); fetch or write it again") from error


def _stored(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
    if dtype is None:
        return StoredTensor(shape, torch.uint8, NoRows(path, name, entry["dtype"]), (path, name), entry["dtype"])
    # Absolute, for another process may work in another folder.
    reader = FileRows(path.absolute(), name, data_start + entry["data_offsets"][0], shape, dtype)
    return StoredTensor(shape, dtype, reader, (path, name))


def _opened(path: Path) -> Any:
    try:
        return open_regular(path)
    except OSError as error:
        raise SourceError(
            f"{path}: cannot be read ({error.strerror}); every process that measures needs the file under this path"
        ) from error


def _file_signature(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"  # the second is not put back by tools that keep the first
    return f"{path.resolve()} {status.st_ino} {status.st_size} {times}"


def _cut_short(path: Path, name: str) -> SourceError:
    return SourceError(f"{path}: tensor {name!r} is cut short; the file changed while being read")


def _as_matrix(buffer: Buffer, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    if not rows * columns:
        return torch.empty((rows, columns), dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(rows, columns)


def _received(data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> MemoryRows:
    # A copy can be written to, which torch would warn of, though nobody does.
    values = torch.frombuffer(data.copy(), dtype=dtype) if data.size else torch.empty(0, dtype=dtype)
    return MemoryRows(values.reshape(shape), axis)
