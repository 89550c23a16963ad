"""A compressed model in one file: codes, scales and centroids of planned layers, all other tensors, and the plan.

Layout, numbers little-endian:

    prologue   magic (8 bytes), version (uint32), where the header begins (uint64), its bytes (uint64), its bytes when
               decompressed (uint64), its CRC-32, and the CRC-32 of the prologue up to here
    blocks     one for each tensor, in the header's order: its streams one after the other, then their CRC-32
    header     LZMA of a JSON document (header.py): the plan, and for each tensor its name, dtype, and how each of its
               streams is coded and how long it is

The header comes last so that tensors are written as they are encoded; where blocks begin follows from their lengths.
Every byte is under a checksum, which finds any damage to up to four bytes in a row, and other damage but for 1 in 2^32.
"""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.readers import DTYPES
from ..common.checks import path_of
from ..common.checksum import checksum
from ..common.files import open_regular
from ..common.progress import Progress, check_callbacks
from ..common.public import public
from ..common.text import first_sentence
from ..errors import FormatError
from ..plans.layers import LayerChoice, Part
from ..plans.names import layer_name
from ..plans.plan import Plan
from ..quantization.contract import PartCodes, PartShape
from .codes import decode
from .header import CHECKSUM, PROLOGUE, Header, PartRecord, TensorRecord, check_records, choice_of, read_header
from .sparse import RelativeIndex, from_relative, index_bits
from .streams import Stream, read_codes, read_values


@public
class Container:
    """A container that was opened: its header is whole and agrees with its length; tensors are read one at a time.

    `open` makes one from a file.

    Args:
        path: The file.
        header: What it says of its tensors.
        plan: The plan that it carries.
        size: Its bytes.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> written = mpq.compress(net, mpq.Uniform(bits=4)(mpq.measure(net)), "net.mpqc")
        >>> list(mpq.Container.open("net.mpqc").records)
        ['0.weight', '0.bias']
    """

    def __init__(self, path: Path, header: Header, plan: Plan, size: int) -> None:
        self.path, self.header, self.plan, self.size = path, header, plan, size
        lengths = [record.block_bytes for record in header.tensors]
        starts = accumulate([PROLOGUE, *lengths])
        self._starts = {record.name: start for record, start in zip(header.tensors, starts, strict=False)}
        self.records = {record.name: record for record in header.tensors}

    @classmethod
    def open(cls, path: str | Path) -> "Container":
        """Read and check prologue and header.

        Args:
            path: The container's file.

        Returns:
            The container; no tensor has been read.

        Raises:
            FormatError: The file cannot be read, is no container, or is damaged. The message names it and says what is
                wrong.
        """
        path = path_of("path", path)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                header, blocks = read_header(file, size, path)
        except OSError as error:
            raise FormatError(f"{path}: cannot read it ({error.strerror}). Give a container file.") from error
        plan = Plan.from_document(header.plan, f"{path}: its plan")
        check_records(header, plan, blocks, path)
        return cls(path, header, plan, size)

    @property
    def file_bits(self) -> float:
        """Bits for each weight of the plan's layers: of all bytes of the file but those of other tensors."""
        others = sum(record.block_bytes for record in self.header.tensors if record.parts is None)
        weights = sum(layer.numel for layer in self.plan.layers)
        return 8 * (self.size - others) / max(1, weights)

    @property
    def layer_bytes(self) -> dict[str, int]:
        """What each of the plan's layers takes, in the plan's order; by name."""
        taken = {layer.name: 0 for layer in self.plan.layers}
        for record in self.header.tensors:
            choice = self.choice(record)
            if choice is not None:
                taken[choice.name] += record.block_bytes
        return taken

    def choice(self, record: TensorRecord) -> LayerChoice | None:
        """Look up the plan's choice for a tensor.

        Args:
            record: What the header says of it.

        Returns:
            The choice, or None for a tensor that is kept as it is.
        """
        return choice_of(self.plan, record) if record.parts is not None else None

    def tensors(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Read all tensors, dequantized, stacks put together, tied ones the same tensor.

        Args:
            progress: Called with a name, values done and values in all.

        Returns:
            The tensors by name.

        Raises:
            FormatError: A tensor is damaged.
        """
        sizes = {name: self.values(record) for name, record in self.records.items()}
        tensors: dict[str, Tensor] = {}
        done, total = 0, sum(sizes.values())
        for name, record in self.records.items():
            if progress is not None:
                progress(name, done, total)
            if record.same is None:
                tensors[name] = self.tensor(name)
            done += sizes[name]
        for name, count in self.header.stacks.items():
            tensors[name] = self._stacked(name, [tensors.pop(f"{layer_name(name)}.{k}") for k in range(count)])
        tensors |= {name: tensors[record.same] for name, record in self.records.items() if record.same is not None}
        if progress is not None:
            progress("", total, total)
        return tensors

    def check(self) -> None:
        """Read every tensor.

        Raises:
            FormatError: A tensor is damaged. The message names it.
        """
        for record in self.header.tensors:
            self.tensor(record.name)

    def values(self, record: TensorRecord) -> int:
        """Count the values that a tensor has by itself.

        Args:
            record: What the header says of it.

        Returns:
            The number.
        """
        choice = self.choice(record)
        return math.prod(record.shape if choice is None else choice.shape) if record.same is None else 0

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, dequantized.

        Args:
            name: Its name.

        Returns:
            The tensor, in its stored shape and dtype.

        Raises:
            FormatError: Its bytes are damaged, or say more than memory holds.
        """
        try:
            return self._tensor(name)
        except (MemoryError, RuntimeError) as error:  # the latter is torch's
            raise FormatError(f"{self.path}: tensor {name!r}: cannot be read ({first_sentence(error)})") from error

    def _tensor(self, name: str) -> Tensor:
        if name in self.header.stacks:
            layer = layer_name(name)
            return self._stacked(name, [self._tensor(f"{layer}.{k}") for k in range(self.header.stacks[name])])
        record = self.records[name]
        if record.same is not None:
            return self._tensor(record.same)
        choice = self.choice(record)
        if choice is None:
            assert record.data is not None
            return _plain(self._streams(record)[0], record.shape, DTYPES[record.dtype], self._where(record))
        dtype = kept_dtype(record, choice)
        values = [
            codes.to(dtype) if isinstance(codes, Tensor) else decode(codes, part_shape(choice, part), dtype)
            for part, codes in zip(choice.all_parts, self.parts(name), strict=True)
        ]
        if len(values) == 1:
            return values[0]
        index = torch.from_numpy(np.concatenate([part.runs.array() for part in choice.all_parts]))
        return torch.cat(values, choice.channel_axis).index_select(choice.channel_axis, index.argsort())

    def _stacked(self, name: str, matrices: Sequence[Tensor]) -> Tensor:
        """A stack as its source had it."""
        return torch.cat(list(matrices)) if name in self.header.joined else torch.stack(list(matrices))

    def parts(self, name: str) -> list[PartCodes | Tensor]:
        """Read a planned layer's codes part by part.

        Args:
            name: The name of its weight.

        Returns:
            Codes for each part; weights for a part in floating point.

        Raises:
            FormatError: Its bytes are damaged.
        """
        record = self.records[name]
        choice = self.choice(record)
        assert choice is not None, "the caller asks for a planned layer"
        assert record.parts is not None
        streams = iter(self._streams(record))
        where = self._where(record)
        decoded: list[PartCodes | Tensor] = []
        for part, stored in zip(choice.all_parts, record.parts, strict=True):
            shape = part_shape(choice, part)
            if isinstance(stored, PartRecord):
                decoded.append(read_part(stored, shape, streams, index_bits(choice.kind), where))
            else:
                dtype = torch.float16 if record.halves and part.bits == 16 else DTYPES[record.dtype]
                decoded.append(_plain(next(streams), shape.shape, dtype, where))
        return decoded

    def _where(self, record: TensorRecord) -> str:
        return f"{self.path}: tensor {record.name!r}"

    def _streams(self, record: TensorRecord) -> list[Stream]:
        """The streams of a block whose checksum is right."""
        try:
            with open_regular(self.path) as file:
                file.seek(self._starts[record.name])
                block = file.read(record.block_bytes)
        except OSError as error:
            raise FormatError(f"{self.path}: cannot read it ({error.strerror})") from error
        data, wanted = block[: -CHECKSUM.size], block[-CHECKSUM.size :]
        if len(block) != record.block_bytes or CHECKSUM.pack(checksum(data)) != wanted:
            raise FormatError(f"{self._where(record)}: is damaged, its checksum differs; write or fetch the file again")
        ends = list(accumulate(length for _, length in record.streams))
        pairs = zip(record.streams, ends, strict=True)
        return [Stream(coding, data[end - length : end]) for (coding, length), end in pairs]


def kept_dtype(record: TensorRecord, choice: LayerChoice) -> torch.dtype:
    """The dtype that a layer's weight has when it is read: float16 where all of it is kept so, else the source's."""
    return torch.float16 if record.halves and choice.in_float16 else DTYPES[record.dtype]


def part_shape(choice: LayerChoice, part: Part) -> PartShape:
    """What the codes of a part of a layer are the codes of."""
    axis = choice.channel_axis
    shape = (*choice.shape[:axis], len(part.channels), *choice.shape[axis + 1 :])
    return PartShape(shape, axis, part.bits, choice.scheme, choice.name)


def _plain(stream: Stream, shape: Sequence[int], dtype: torch.dtype, where: str) -> Tensor:
    values = read_values(stream, numpy_dtype(dtype), math.prod(shape), where)
    return torch.from_numpy(values.view(np.uint8)).view(dtype).reshape(tuple(shape))


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What a tensor's values are stored as: themselves, or unsigned integers where numpy has no such type."""
    if dtype in (torch.bfloat16, torch.bool) or dtype.itemsize == 1:
        return np.dtype(f"u{dtype.itemsize}")
    return np.dtype(str(dtype).removeprefix("torch."))


def read_part(record: PartRecord, part: PartShape, streams: Iterator[Stream], gap_bits: int, where: str) -> PartCodes:
    """The codes of a part from its streams. Raises FormatError, beginning with `where`, for what is damaged."""
    tables = read_values(next(streams), np.dtype(np.float32), part.table_entries, f"{where}: tables")
    zero_points = np.zeros(0, np.uint8)
    if (record.zero_points is not None) != bool(part.zero_points):
        raise FormatError(f"{where}: has zero points where its scheme has none, or lacks them; the file is damaged")
    if record.zero_points is not None:
        zero_points = read_codes(next(streams), part.bits, part.zero_points, f"{where}: zero points").astype(np.uint8)
    if record.gaps is None:
        symbols = read_codes(next(streams), part.width, part.weights, f"{where}: codes")
        return PartCodes(symbols, tables, zero_points)
    entries = record.entries or 0
    gaps = read_codes(next(streams), gap_bits, entries, f"{where}: gaps").astype(np.uint8)
    values = read_codes(next(streams), part.width, entries, f"{where}: codes")
    whole = from_relative(RelativeIndex(gaps, values), part.weights)
    if whole is None:
        raise FormatError(f"{where}: has entries beyond its end; the file is damaged")
    return PartCodes(whole, tables, zero_points)


def decompress(path: str | Path | Container, *, progress: Progress | None = None) -> dict[str, Tensor]:
    """Read all tensors of a container, dequantized: a state dict.

    Names are the source's; of a checkpoint, without the `module.` that DataParallel puts before them.

    Args:
        path: The container's file, or a container that is open.
        progress: Called with a name, values done and values in all.

    Returns:
        The tensors by name. Tied ones are the same tensor.

    Raises:
        FormatError: The file is no container, damaged, or newer than this version.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> state = mpq.decompress(mpq.compress(net, plan, "net.mpqc"))
        >>> torch.equal(state["0.weight"], mpq.apply(net, plan)[0].weight)
        True
    """
    check_callbacks(progress=progress)
    container = path if isinstance(path, Container) else Container.open(path_of("path", path))
    return container.tensors(progress)
