"""Where everything of the written file lies: the source's metadata, other types, other offsets."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mpq_plugins.checkpoints.gguf_header import GGUFHeader, TensorEntry
from mpq_plugins.common.files import open_regular
from mpq_plugins.plans.ggml import NUMBERS

from .checks import Target

FILE_TYPE, VERSION_KEY = "general.file_type", "general.quantization_version"
QUANTIZATION_VERSION, UINT32, F16 = 2, 4, 1


@dataclass(frozen=True)
class Layout:
    """The new file's header, as bytes, and its tensors' entries, in the source's order."""

    head: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def tensor_bytes(self) -> int:
        """What all tensors take."""
        return sum(entry.size or 0 for entry in self.entries)


def layout(header: GGUFHeader, targets: Iterable[Target]) -> Layout:
    """The layout of a file with these tensors.

    Metadata is the source's to the byte, but for the type of the whole file, which is left out so that llama.cpp says
    the most frequent one, and the version of quantization, which files with quantized tensors say.
    """
    entries, offset = [], 0
    for target in targets:
        number = target.entry.type if target.kind is None else NUMBERS.get(target.kind, F16)
        entry = replace(target.entry, type=number, offset=offset)
        entries.append(entry)
        offset = _aligned(offset + (_size(header, target) if entry.size is None else entry.size), header.alignment)
    fields = list(metadata(header))
    head = b"GGUF" + struct.pack("<IQQ", header.version, len(entries), len(fields)) + b"".join(fields)
    head += b"".join(map(_entry, entries))
    return Layout(head + bytes(_aligned(len(head), header.alignment) - len(head)), tuple(entries))


def metadata(header: GGUFHeader) -> Iterator[bytes]:
    """Each entry of the new file's metadata, as bytes."""
    with open_regular(header.path) as file:
        for field in header.fields:
            if field.key not in (FILE_TYPE, VERSION_KEY):
                file.seek(field.start)
                yield file.read(field.stop - field.start)
    yield _text(VERSION_KEY) + struct.pack("<II", UINT32, QUANTIZATION_VERSION)


def span(header: GGUFHeader, entry: TensorEntry) -> tuple[int, int]:
    """Where a tensor's bytes lie in its file: from and to; of a type that we do not read, to the next or the end."""
    start = header.data_start + entry.offset
    if entry.size is not None:
        return start, start + entry.size
    later = [other.offset for other in header.tensors if other.offset > entry.offset]
    return start, header.data_start + min(later) if later else header.path.stat().st_size


def copied(path: Path, start: int, stop: int, step: int = 1 << 24) -> Iterator[bytes]:
    """A file's bytes, some at a time."""
    with open_regular(path) as file:
        file.seek(start)
        while start < stop:
            data = file.read(min(step, stop - start))
            if not data:
                raise OSError(None, "it is cut short")
            start += len(data)
            yield data


def _size(header: GGUFHeader, target: Target) -> int:
    start, stop = span(header, target.entry)
    return stop - start


def _entry(entry: TensorEntry) -> bytes:
    sides = entry.shape[::-1]
    return _text(entry.name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, entry.type, entry.offset)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
