"""Arrays as bytes: as they are, packed, or entropy coded, whichever is smallest.

Two entropy coders take part. pcodec's (https://github.com/pcodec/pcodec), asymmetric numeral systems by table, comes
within a percent of the entropy of what is large and is the fastest to read; its format is one that later versions go on
reading. Huffman's has the smaller table, which decides where a layer is small.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from ..errors import FormatError
from .bitpack import Codes, pack, packed_bytes, unpack
from .huffman import coded_bytes, decode, encode

Coding = Literal["raw", "packed", "huffman", "pcodec"]
Choice = Literal["smallest", "packed"]
CHOICES: tuple[Choice, ...] = ("smallest", "packed")

MOST_A_BYTE = 1024
"""Values that a byte may stand for: what a damaged or malicious file can make of its own size."""

LEVEL = 8  # at which 256 different codes have a bin each
CODES = ChunkConfig(LEVEL, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op(), enable_8_bit=True)
VALUES = ChunkConfig(LEVEL, enable_8_bit=True)


@dataclass(frozen=True)
class Stream:
    """How an array is stored, and its bytes."""

    coding: Coding
    data: bytes


def code_stream(codes: Codes, bits: int, choice: Choice = "smallest") -> Stream:
    """Codes (n,) of so many bits, packed or entropy coded."""
    packed = Stream("packed", pack(codes, bits))
    if choice == "packed":
        return packed
    best = _smaller(packed, codes, CODES)
    counts = np.bincount(codes, minlength=2**bits)
    return Stream("huffman", encode(codes, 2**bits)) if coded_bytes(counts) < len(best.data) else best


def value_stream(values: NDArray[Any], choice: Choice = "smallest") -> Stream:
    """Numbers of any dtype (n,), as they are or entropy coded."""
    raw = Stream("raw", values.tobytes())
    return raw if choice == "packed" else _smaller(raw, values, VALUES)


def _smaller(plain: Stream, values: NDArray[Any], config: ChunkConfig) -> Stream:
    if not len(values):
        return plain
    coded = bytes(standalone.simple_compress(np.require(values, requirements=["C", "ALIGNED"]), config))
    # What is all alike takes a few bytes; padded, for no reader believes so few (see possible).
    coded = coded.ljust(-(-len(values) // MOST_A_BYTE), b"\0")
    return Stream("pcodec", coded) if len(coded) < len(plain.data) else plain


def read_codes(stream: Stream, bits: int, count: int, where: str) -> Codes:
    """Undo code_stream. Raises FormatError, beginning with `where`, for bytes that are no such codes."""
    if stream.coding == "huffman":
        symbols = decode(stream.data, 2**bits, count)
        if symbols is None:
            raise FormatError(f"{where}: its Huffman code is none; the file is damaged")
        return symbols
    if stream.coding == "pcodec":
        codes = _decoded(stream.data, count, np.dtype(np.uint8 if bits <= 8 else np.uint16), where)
        if len(codes) and int(codes.max()) >> bits:
            raise FormatError(f"{where}: holds codes of more than {bits} bits; the file is damaged")
        return codes
    _check_length(stream, "packed", packed_bytes(count, bits), where)
    return unpack(stream.data, bits, count)


def read_values(stream: Stream, dtype: np.dtype[Any], count: int, where: str) -> NDArray[Any]:
    """Undo value_stream. Raises FormatError, beginning with `where`, for bytes that are no such numbers."""
    if stream.coding == "pcodec":
        return _decoded(stream.data, count, dtype, where)
    _check_length(stream, "raw", count * dtype.itemsize, where)
    return np.frombuffer(stream.data, dtype).copy()


def possible(values: int, data: int) -> bool:
    """Whether so many bytes may stand for so many values."""
    return values <= data * MOST_A_BYTE


def _check_length(stream: Stream, coding: Coding, wanted: int, where: str) -> None:
    if stream.coding != coding or len(stream.data) != wanted:
        raise FormatError(
            f"{where}: {len(stream.data)} bytes {stream.coding}, not the {wanted} {coding} that it needs; the file is "
            "damaged"
        )


def _decoded(data: bytes, count: int, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    if not possible(count, len(data)):
        raise FormatError(f"{where}: {count} values cannot come out of {len(data)} bytes; the file is damaged")
    values = np.empty(count, dtype)
    try:
        progress = standalone.simple_decompress_into(data, values)
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"{where}: cannot be decoded ({error}); the file is damaged") from error
    if progress.n_processed != count or not progress.finished:
        raise FormatError(f"{where}: holds {progress.n_processed} values or more, not {count}; the file is damaged")
    return values
