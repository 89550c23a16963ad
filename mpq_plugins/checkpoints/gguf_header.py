"""What a GGUF file says of itself: its metadata, and where its tensors lie. Read without the package gguf.

The layout (ggml/docs/gguf.md): magic, version, counts of tensors and metadata; metadata; of each tensor its name, sides
from the innermost, type and offset; the tensors, each aligned.
"""

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from ..common.files import open_regular
from ..errors import SourceError
from ..plans.ggml import NUMBERS, TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, USUAL_ALIGNMENT = "general.alignment", 32
STRING, ARRAY = 8, 9
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
PLAIN = {0: ("F32", 4), 1: ("F16", 2), 24: ("I8", 1), 25: ("I16", 2), 26: ("I32", 4), 27: ("I64", 8), 28: ("F64", 8),
         30: ("BF16", 2)}  # fmt: skip
"""Types of one element: number -> name as safetensors has it, and bytes."""
BLOCKS = {number: kind for kind, number in NUMBERS.items()}
MOST_SIDES = 4
LONGEST_STRING = 1 << 26  # bytes


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header has it; shape: outermost side first; offset: from the start of the tensors."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def kind(self) -> str | None:
        """ggml's type, of blocks, where it is one that we read; else None."""
        return BLOCKS.get(self.type)

    @property
    def type_name(self) -> str:
        """What the type is called."""
        if self.type in PLAIN:
            return PLAIN[self.type][0]
        return BLOCKS[self.type].upper() if self.type in BLOCKS else f"ggml type {self.type}"

    @property
    def row_bytes(self) -> int | None:
        """Bytes of a row; None for a type that we do not read."""
        columns = self.shape[-1] if self.shape else 1
        if self.type in PLAIN:
            return columns * PLAIN[self.type][1]
        kind = self.kind
        return None if kind is None else columns // TYPES[kind].weights * TYPES[kind].size

    @property
    def rows(self) -> int:
        """How many rows."""
        count = 1
        for side in self.shape[:-1]:
            count *= side
        return count

    @property
    def size(self) -> int | None:
        """Bytes of it all; None for a type that we do not read."""
        return None if self.row_bytes is None else self.rows * self.row_bytes


@dataclass(frozen=True)
class Field:
    """An entry of the metadata: its value, None for an array, and its bytes with the key's in the file."""

    key: str
    value: Any
    start: int
    stop: int


@dataclass(frozen=True)
class GGUFHeader:
    """A GGUF file's header; data_start: where the tensors begin."""

    path: Path
    version: int
    fields: tuple[Field, ...]
    tensors: tuple[TensorEntry, ...]
    data_start: int

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Values by key; None for arrays."""
        return {field.key: field.value for field in self.fields}

    @property
    def alignment(self) -> int:
        """What tensors are aligned to, in bytes."""
        said = self.metadata.get(ALIGNMENT, USUAL_ALIGNMENT)
        return said if type(said) is int else USUAL_ALIGNMENT

    @property
    def architecture(self) -> str | None:
        """llama, qwen3, ..., where the file says it."""
        said = self.metadata.get("general.architecture")
        return said if isinstance(said, str) else None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GGUFHeader:
    """The header of a GGUF file. Raises SourceError for one that is damaged, cut short or of another version."""
    try:
        with open_regular(path) as file:
            return _read(path, _Reader(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: is a damaged GGUF file ({error}); fetch or write it again") from error


def _read(path: Path, reader: "_Reader") -> GGUFHeader:
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number(4)
    if version not in VERSIONS:
        big = version >= 1 << 16
        said = "for processors of the other byte order" if big else f"of version {version}, and 2 and 3 are read"
        raise SourceError(f"{path}: is a GGUF file {said}; convert the model again")
    tensor_count, field_count = reader.number(8), reader.number(8)
    fields = tuple(reader.field() for _ in reader.counted(field_count, 13))
    tensors = tuple(reader.entry() for _ in reader.counted(tensor_count, 24))
    header = GGUFHeader(path, version, fields, tensors, 0)
    if header.alignment < 1:
        raise ValueError(f"{ALIGNMENT} is {header.alignment}")
    start = -(-reader.at // header.alignment) * header.alignment
    _check(tensors, reader.size - start)
    return GGUFHeader(path, version, fields, tensors, start)


def _check(tensors: tuple[TensorEntry, ...], room: int) -> None:
    """Raise ValueError for tensors that go beyond the file, overlap, or are called alike."""
    seen: set[str] = set()
    end = 0
    for entry in sorted(tensors, key=lambda entry: entry.offset):
        if entry.name in seen:
            raise ValueError(f"two tensors are called {entry.name!r}")
        seen.add(entry.name)
        kind = entry.kind
        if kind is not None and (not entry.shape or entry.shape[-1] % TYPES[kind].weights):
            raise ValueError(f"tensor {entry.name!r} of {entry.type_name} has rows that are no whole blocks")
        if entry.offset < end:
            raise ValueError(f"tensor {entry.name!r} overlaps another")
        end = entry.offset + (entry.size or 0)
        if end > room:
            raise ValueError(f"tensor {entry.name!r} is cut short")


class _Reader:
    """Reads a header piece by piece. Raises ValueError where it is cut short or makes no sense."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("its header is cut short")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise ValueError("its header is cut short")
        self.at += count
        self.file.seek(self.at)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def counted(self, count: int, least: int) -> Iterator[int]:
        """So many things of so many bytes at least, for which there must be room."""
        if count * least > self.size - self.at:
            raise ValueError("its header is cut short, or says that it holds more than it does")
        return iter(range(count))

    def text(self) -> str:
        length = self.number(8)
        if length > LONGEST_STRING:
            raise ValueError("a text in its header is beyond all measure")
        return self.take(length).decode()

    def field(self) -> Field:
        start, key = self.at, self.text()
        value = self.value(self.number(4))
        return Field(key, value, start, self.at)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            length = self.number(8)
            if length > LONGEST_STRING:
                raise ValueError("a text in its header is beyond all measure")
            return self.take(length).decode(errors="replace")
        if kind == ARRAY:
            return self.pass_array()
        if kind not in FORMATS:
            raise ValueError(f"its header has a value of type {kind}, which there is not")
        return struct.unpack(FORMATS[kind], self.take(struct.calcsize(FORMATS[kind])))[0]

    def pass_array(self) -> None:
        """Vocabularies have a hundred thousand texts, which nobody here reads."""
        kind, count = self.number(4), self.number(8)
        if kind in FORMATS:
            self.skip(count * struct.calcsize(FORMATS[kind]))
            return
        if kind not in (STRING, ARRAY):
            raise ValueError(f"its header has a value of type {kind}, which there is not")
        one: Callable[[], None] = self.pass_array if kind == ARRAY else self.pass_text
        for _ in self.counted(count, 8):
            one()

    def pass_text(self) -> None:
        self.skip(self.number(8))

    def entry(self) -> TensorEntry:
        name, sides = self.text(), self.number(4)
        if sides > MOST_SIDES:
            raise ValueError(f"tensor {name!r} has {sides} dimensions")
        shape = tuple(self.number(8) for _ in range(sides))[::-1]
        return TensorEntry(name, shape, self.number(4), self.number(8))
