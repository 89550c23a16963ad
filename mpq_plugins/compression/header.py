"""The header of a container: what is in the file, where, and how it is coded; read only if it holds together."""

import json
import lzma
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, ValidationError

from ..checkpoints.checkpoint import CONTAINER_MAGIC
from ..checkpoints.readers import DTYPES
from ..common.checks import first_problem, shown
from ..common.checksum import checksum
from ..common.documents import Strict, parse_json
from ..common.text import first_few
from ..errors import FormatError
from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice, beyond_memory
from ..plans.names import layer_name
from ..plans.plan import Plan
from ..weights.dtypes import WEIGHT_DTYPES
from .streams import Coding, Stream, possible

VERSION = 2
READABLE = (1, 2)  # version 1 kept layers at 16 bits in their own dtype, and had no `halves`
FIELDS = struct.Struct("<8sIQQQI")
CHECKSUM = struct.Struct("<I")
PROLOGUE = FIELDS.size + CHECKSUM.size
LARGEST_HEADER = 1 << 26  # bytes of JSON
MOST_TIMES, ANYWAY = 200, 1 << 20  # as large as it is compressed, or this many bytes
RESERVED = "__metadata__"  # in safetensors files
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}]

Length = Annotated[int, Field(ge=0, le=1 << 62)]
StreamRecord = tuple[Coding, Length]


class PartRecord(Strict):
    """Streams of one part of a layer, in this order; `gaps` and `entries`, their number, where zeros are left out."""

    tables: StreamRecord
    zero_points: StreamRecord | None = None
    gaps: StreamRecord | None = None
    entries: Length | None = None
    codes: StreamRecord

    @property
    def streams(self) -> list[StreamRecord]:
        """Those that there are, in the file's order."""
        return [stream for stream in (self.tables, self.zero_points, self.gaps, self.codes) if stream is not None]


class TensorRecord(Strict):
    """One tensor: `parts` where it is a planned layer's (a float part being a `StreamRecord`), `data` where it is kept
    as it is, or `same` as another by name. dtype: the source's; halves: whether parts at 16 bits are kept in float16.
    """

    name: str
    dtype: str = "F32"
    shape: tuple[Length, ...] = ()
    parts: tuple[PartRecord | StreamRecord, ...] | None = None
    data: StreamRecord | None = None
    same: str | None = None
    halves: bool = False

    @property
    def streams(self) -> list[StreamRecord]:
        """All of its streams, in the file's order."""
        streams = [self.data] if self.data is not None else []
        for part in self.parts or ():
            streams += part.streams if isinstance(part, PartRecord) else [part]
        return streams

    @property
    def block_bytes(self) -> int:
        """Bytes of its block, checksum included; none for one that is the same as another."""
        return sum(length for _, length in self.streams) + CHECKSUM.size if self.same is None else 0


class Header(Strict):
    """What a container says of itself before its blocks.

    made_with: versions, and what was done to the weights; left_out: of the source, what is no tensor; stacks: which
    tensors stack others, called by their layer's name and .0, .1 ..., and how many; joined: which of them have these
    one below the other, without an axis for them.
    """

    made_with: dict[str, str]
    left_out: tuple[str, ...] = ()
    stacks: Mapping[str, int] = Field(default_factory=dict)
    joined: tuple[str, ...] = ()
    plan: dict[str, Any]
    tensors: tuple[TensorRecord, ...]


def write_block(file: BinaryIO, streams: Sequence[Stream]) -> None:
    """A tensor's streams, and their checksum."""
    crc = 0
    for stream in streams:
        file.write(stream.data)
        crc = checksum(stream.data, crc)
    file.write(CHECKSUM.pack(crc))


def write_header(file: BinaryIO, header: Header) -> None:
    """The header where the file is at, and the prologue at its start."""
    document = json.dumps(header.model_dump(mode="json", exclude_defaults=True), separators=(",", ":")).encode()
    packed = lzma.compress(document, lzma.FORMAT_RAW, filters=FILTERS)
    fields = FIELDS.pack(CONTAINER_MAGIC, VERSION, file.tell(), len(packed), len(document), checksum(packed))
    file.write(packed)
    file.seek(0)
    file.write(fields + CHECKSUM.pack(checksum(fields)))


def read_header(file: BinaryIO, size: int, path: Path) -> tuple[Header, int]:
    """The header, and the bytes of all blocks."""
    prologue = file.read(PROLOGUE)
    if prologue[: len(CONTAINER_MAGIC)] != CONTAINER_MAGIC[: len(prologue)] or not prologue:
        raise FormatError(f"{path}: is no container, or its first bytes are damaged; `mpq compress` writes containers")
    if len(prologue) < PROLOGUE:
        raise FormatError(f"{path}: is cut short: {len(prologue)} bytes; write or fetch it again")
    _, version, start, length, document_length, wanted = FIELDS.unpack(prologue[: FIELDS.size])
    intact = CHECKSUM.pack(checksum(prologue[: FIELDS.size])) == prologue[FIELDS.size :]
    if version not in READABLE:
        hint = "Upgrade mpq-plugins" if intact else "The file is damaged: write or fetch it again"
        raise FormatError(f"{path}: container version {version}, and this mpq-plugins reads 1 to {VERSION}. {hint}.")
    if not intact:
        raise FormatError(f"{path}: its prologue is damaged; write or fetch the file again")
    if start + length != size or start < PROLOGUE:
        raise FormatError(f"{path}: has {size} bytes, and should have {start + length}; it is cut short or damaged")
    most = min(LARGEST_HEADER, max(ANYWAY, MOST_TIMES * length))
    if document_length > most:
        raise FormatError(f"{path}: its header claims {document_length} bytes; {most} is the most that it may have")
    file.seek(start)
    packed = file.read(length)
    if checksum(packed) != wanted:
        raise FormatError(f"{path}: its header is damaged, the checksum differs; write or fetch the file again")
    return _parse_header(packed, document_length, path), start - PROLOGUE


def _parse_header(packed: bytes, length: int, path: Path) -> Header:
    try:
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS).decompress(packed, max_length=length + 1)
        parse_json(unpacked)
    except (lzma.LZMAError, ValueError, EOFError, MemoryError) as error:
        raise FormatError(f"{path}: its header is none ({error}); write the file again") from error
    if len(unpacked) != length:
        raise FormatError(f"{path}: its header is not as long as it says; write the file again")
    try:
        return Header.model_validate_json(unpacked)
    except ValidationError as error:
        raise FormatError(f"{path}: header: {first_problem(error)}") from error


def check_records(header: Header, plan: Plan, blocks: int, path: Path) -> None:
    """Everything that can be known before a tensor is read: names, dtypes, sizes, and that the plan is all there.

    Raises FormatError.
    """
    records = {record.name: record for record in header.tensors}
    if len(records) < len(header.tensors):
        raise FormatError(f"{path}: two tensors have the same name; the file is damaged")
    if sum(record.block_bytes for record in header.tensors) != blocks:
        raise FormatError(f"{path}: its tensors do not add up to its length; the file is damaged")
    stacked: set[str] = set()
    for name, count in header.stacks.items():
        problem = _stack_problem(name, count, records, stacked, plan)
        if problem is not None:
            raise FormatError(f"{path}: tensor {name!r}: {problem}; the file is damaged")
        stacked |= {f"{layer_name(name)}.{k}" for k in range(count)}
    for name in header.joined:
        if name not in header.stacks or len(_shape(records[f"{layer_name(name)}.0"], plan)) != 2:
            raise FormatError(f"{path}: tensor {name!r}: is joined, and no stack of matrices; the file is damaged")
    whole = {name for name, record in records.items() if record.same is None and name not in stacked}
    whole |= header.stacks.keys()
    for record in header.tensors:
        problem = _record_problem(record, plan, whole)
        if problem is not None:
            raise FormatError(f"{path}: tensor {record.name!r}: {problem}; the file is damaged")
    missing = missing_layers(header.tensors, plan)
    if missing:
        raise FormatError(f"{path}: lacks layers that its plan has: {first_few(missing, ', ')}")


def missing_layers(records: Iterable[TensorRecord], plan: Plan) -> list[str]:
    """The plan's layers, in quotes, that no record is coded as."""
    held = {layer_name(record.name) for record in records if record.parts is not None}
    return [repr(layer.name) for layer in plan.layers if held.isdisjoint(layer.names)]


def name_problem(name: str) -> str | None:
    """Why a tensor cannot be called so, in words."""
    if name == RESERVED:
        return "safetensors files keep that name for themselves"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is no text"
    return None


def _stack_problem(
    name: str, count: int, records: dict[str, TensorRecord], stacked: set[str], plan: Plan
) -> str | None:
    members = [f"{layer_name(name)}.{k}" for k in range(count if 0 < count <= len(records) else 0)]
    matrices = [records[member] for member in members if member in records and member not in stacked]
    if not members or len(matrices) < count or any(record.same is not None for record in matrices):
        return f"stacks {count} others, which are not all there"
    if name in records or name_problem(name) is not None:
        return "is not alone in having its name, or has none"
    if len({(record.dtype, _shape(record, plan)) for record in matrices}) > 1:
        return "stacks tensors of different shapes or dtypes"
    return None


def _shape(record: TensorRecord, plan: Plan) -> tuple[int, ...]:
    choice = choice_of(plan, record) if record.parts is not None else None
    return record.shape if choice is None else choice.shape


def _record_problem(record: TensorRecord, plan: Plan, whole: set[str]) -> str | None:
    """What is wrong with a tensor's record, in words; `same` may name one of `whole`."""
    if (record.parts is not None) + (record.data is not None) + (record.same is not None) != 1:
        return "is neither a layer, nor plain, nor the same as another"
    if (record.same or record.parts) and record.shape:
        return "has a shape that others say"
    if record.halves and (record.parts is None or record.dtype != "F32"):
        return "has halves, which parts of float32 weights alone have"
    problem = name_problem(record.name)
    if problem is not None:
        return problem
    if record.same is not None:
        return None if record.same in whole else f"is the same as {record.same!r}, which is not there"
    return _plain_problem(record) if record.parts is None else _layer_problem(record, record.parts, plan)


def _plain_problem(record: TensorRecord) -> str | None:
    if record.dtype not in DTYPES:
        return f"dtype {shown(record.dtype)} is not allowed; {', '.join(DTYPES)}"
    if beyond_memory(record.shape):
        return "has a shape beyond any memory"
    return _size_problem(math.prod(record.shape), record.streams[0][1])


def _layer_problem(record: TensorRecord, parts: Sequence[PartRecord | StreamRecord], plan: Plan) -> str | None:
    choice = choice_of(plan, record)
    if choice is None:
        return "is coded, and its plan has no such layer"
    if DTYPES.get(record.dtype) not in WEIGHT_DTYPES:
        return f"dtype {shown(record.dtype)} is not allowed for a layer; F32, F16, BF16"
    if len(choice.widths) != len(parts):
        return f"has {len(parts)} parts, and {len(choice.widths)} in its plan"
    pairs = list(zip(choice.widths, parts, strict=True))
    if any((bits in FLOAT_BITS) == isinstance(part, PartRecord) for (bits, _), part in pairs):
        return "has codes where its plan has floating point, or the other way round"
    if any(isinstance(part, PartRecord) and (part.gaps is None) != (part.entries is None) for part in parts):
        return "has gaps without entries, or entries without gaps"
    return _size_problem(choice.numel, record.block_bytes)


def _size_problem(count: int, given: int) -> str | None:
    return None if possible(count, given) else f"claims {count} values, which cannot come out of {given} bytes"


def choice_of(plan: Plan, record: TensorRecord) -> LayerChoice | None:
    """The plan's choice for the layer that a tensor would be the weight of."""
    return plan.by_any_name.get(layer_name(record.name))
