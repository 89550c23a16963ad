"""Codes of b bits one after the other, without gaps: code i takes bits i b .. (i + 1) b - 1, lowest bit first.

Nine bits and more are two runs, the low eight bits of every code and then the rest.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.unsignedinteger[Any]]
"""uint8, or uint16 beyond 8 bits."""

AT_ONCE = 1 << 15  # groups of eight codes; what is worked at stays in the cache


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes take."""
    return -(-count * min(bits, 8) // 8) + (packed_bytes(count, bits - 8) if bits > 8 else 0)


def pack(codes: Codes, bits: int) -> bytes:
    """Codes (n,) below 2^bits, 1 to 16 bits, as packed_bytes(n, bits) bytes."""
    if bits > 8:
        return pack((codes & 255).astype(np.uint8), 8) + pack((codes >> 8).astype(np.uint8), bits - 8)
    if bits == 8:
        return codes.astype(np.uint8).tobytes()
    groups = -(-len(codes) // 8)
    padded = np.zeros(groups * 8, np.uint8)
    padded[: len(codes)] = codes
    out = np.empty((groups, bits), np.uint8)
    for start in range(0, groups, AT_ONCE):
        block = padded[start * 8 : (start + AT_ONCE) * 8].reshape(-1, 8).astype("<u8")
        words = np.bitwise_or.reduce(block << _shifts(bits), axis=1)
        out[start : start + AT_ONCE] = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return out.tobytes()[: packed_bytes(len(codes), bits)]


def unpack(data: bytes | memoryview, bits: int, count: int) -> Codes:
    """Undo pack: (count,) of uint8, or of uint16 beyond 8 bits. `data` must have packed_bytes(count, bits) bytes."""
    assert len(data) == packed_bytes(count, bits), "the caller has checked the length"
    if bits > 8:
        low, high = unpack(data[:count], 8, count), unpack(data[count:], bits - 8, count)
        return low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8)
    if bits == 8:
        return np.frombuffer(data, np.uint8).copy()
    groups = -(-count // 8)
    raw = np.zeros(groups * bits, np.uint8)
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    out = np.empty(groups * 8, np.uint8)
    for start in range(0, groups, AT_ONCE):
        block = raw[start * bits : (start + AT_ONCE) * bits].reshape(-1, bits)
        words = np.zeros((len(block), 8), np.uint8)
        words[:, :bits] = block
        codes = words.view("<u8") >> _shifts(bits) & np.uint64(2**bits - 1)
        out[start * 8 : (start + AT_ONCE) * 8] = codes.astype(np.uint8).reshape(-1)
    unpacked: Codes = out[:count]
    return unpacked


def _shifts(bits: int) -> NDArray[np.uint64]:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)
