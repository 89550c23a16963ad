"""GGUF files as checkpoints: float tensors where they lie, those of ggml's types as the values that they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.text import first_few
from ..errors import SettingError, SourceError
from .buffers import chunk_buffer
from .gguf_blocks import dequantize_rows
from .gguf_header import GGUFHeader, TensorEntry, is_gguf, read_gguf
from .readers import DTYPES, Allocate, FileRows, NoRows, RowReader, StoredTensor

SPLIT = "split.count"
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class BlockRows:
    """Rows of a tensor whose last axis is stored in blocks of a type, in float32; shape: of the tensor."""

    blocks: FileRows
    kind: str
    shape: tuple[int, ...]

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader; the values have memory of their own."""
        return self._values(self.blocks(start, stop), stop - start)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader."""
        held = self.blocks.at_once(start, stop, chunk_buffer)
        return None if held is None else self._values(held, stop - start)

    def part(self, index: int, transposed: bool) -> RowReader:
        """See RowReader; GGUF files have no matrices of inputs by outputs."""
        if transposed:
            raise SourceError(f"{self.blocks.path}: {self.blocks.name!r} is stored by rows of its inputs alone")
        part = self.blocks.part(index, False)
        assert isinstance(part, FileRows)
        return BlockRows(part, self.kind, self.shape[1:])

    def along(self, axis: int) -> RowReader:
        """See RowReader."""
        if axis:
            raise SourceError(f"{self.blocks.path}: {self.blocks.name!r} is stored by rows of its inputs alone")
        return self

    def cut(self, start: int, stop: int) -> RowReader:
        """See RowReader."""
        return BlockRows(self.blocks.cut(start, stop), self.kind, (stop - start, *self.shape[1:]))

    def signature(self) -> str:
        """See RowReader."""
        return f"{self.blocks.signature()} {self.kind}"

    def _values(self, blocks: Tensor, rows: int) -> Tensor:
        # One row of a tensor of several dimensions holds several rows of blocks, each whole.
        flat = blocks.reshape(-1, self.blocks.shape[-1]).numpy()
        try:
            values = dequantize_rows(flat, self.kind)
        except SettingError as error:
            raise SourceError(f"{self.blocks.path}: tensor {self.blocks.name!r} is {self.kind}; {error}") from error
        return torch.from_numpy(values).reshape(rows, -1)


def gguf_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by its own names. Raises SourceError, also for one part of several."""
    header = read_gguf(path)
    parts = header.metadata.get(SPLIT)
    if isinstance(parts, int) and parts > 1:
        raise SourceError(
            f"{path}: one of {parts} parts of a model; join them first: llama-gguf-split --merge {path} ALL"
        )
    return {entry.name: _stored(path, header, entry) for entry in header.tensors}


def gguf_configuration(path: Path) -> dict[str, Any]:
    """What is asked of a checkpoint's configuration, as a GGUF file says it: a file without a head ties it."""
    header = read_gguf(path)
    hidden = header.metadata.get(f"{header.architecture}.embedding_length")
    names = {entry.name for entry in header.tensors}
    known: dict[str, Any] = {"hidden_size": hidden} if isinstance(hidden, int) else {}
    return known | {"tie_word_embeddings": EMBEDDING in names and HEAD not in names}


def block_types(path: Path) -> dict[str, int]:
    """ggml's types of blocks that a file's tensors have, and how many tensors have each."""
    counts: dict[str, int] = {}
    for entry in read_gguf(path).tensors:
        if entry.kind is not None:
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return counts


def on_a_grid(path: Path) -> str:
    """What to say of a source whose weights are rounded already, in words; empty for others and for other files."""
    counts: Mapping[str, int] = block_types(path) if is_gguf(path) else {}
    if not counts:
        return ""
    told = first_few([f"{count} in {kind}" for kind, count in counts.items()], ", ")
    return (
        f"{path}: {sum(counts.values())} tensors are quantized already ({told}) and read as what they mean, so weights "
        "lie on those grids; a GGUF file in floating point makes better plans"
    )


def _stored(path: Path, header: GGUFHeader, entry: TensorEntry) -> StoredTensor:
    start, identity = header.data_start + entry.offset, (path, entry.name)
    if entry.kind is not None:
        assert entry.row_bytes is not None
        shape = (*entry.shape[:-1], entry.row_bytes)
        blocks = FileRows(path.absolute(), entry.name, start, shape, torch.uint8)
        if len(entry.shape) == 1:  # one row is all of it, and rows of its first axis are single values
            return _foreign(path, entry)
        reader = BlockRows(blocks, entry.kind, entry.shape)
        return StoredTensor(entry.shape, torch.float32, reader, identity, stored_bytes=entry.size)
    if entry.type_name not in DTYPES:
        return _foreign(path, entry)
    dtype = DTYPES[entry.type_name]
    return StoredTensor(entry.shape, dtype, FileRows(path.absolute(), entry.name, start, entry.shape, dtype), identity)


def _foreign(path: Path, entry: TensorEntry) -> StoredTensor:
    reader, name = NoRows(path, entry.name, entry.type_name), entry.type_name
    return StoredTensor(entry.shape, torch.uint8, reader, (path, entry.name), name, entry.size)
