"""The plan's own codes as blocks of ggml's plain types: 32 codes, a scale of half precision, and a minimum or none."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq_plugins.errors import SettingError
from mpq_plugins.plans.ggml import TYPES
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.simulation.integers import IntegerWeight

BLOCK = 32
Bytes = NDArray[np.uint8]
WITH_MINIMUM = ("q4_1", "q5_1")
OF_FIVE_BITS = ("q5_0", "q5_1")


@dataclass(frozen=True)
class BlockCodes:
    """What blocks hold. codes: uint8 from 0 (Q8_0: int8's bits), (blocks, 32); scale, minimum: float16 (blocks,)."""

    codes: Bytes
    scale: NDArray[np.float16]
    minimum: NDArray[np.float16] | None

    def same_as(self, other: "BlockCodes") -> bool:
        """Whether others are the same, to the bit."""
        mine, its = (0 if one.minimum is None else one.minimum.tobytes() for one in (self, other))
        return (self.codes.tobytes(), self.scale.tobytes(), mine) == (other.codes.tobytes(), other.scale.tobytes(), its)


def block_codes(weight: IntegerWeight, kind: str, choice: LayerChoice) -> BlockCodes:
    """The integers of some rows, outputs first, as blocks; a scale of more inputs is repeated.

    Raises SettingError, naming the layer, for a scale that half precision does not reach.
    """
    (bits, _), *_ = choice.widths
    codes = weight.codes.numpy().astype(np.int16)
    columns = codes.shape[1]
    repeats = columns // BLOCK // max(1, weight.scale.shape[1])
    exact = np.repeat(weight.scale.numpy(), repeats, axis=1).reshape(-1)
    zero = np.repeat(weight.zero_point.numpy(), repeats, axis=1).reshape(-1)
    scale = _halves(exact, choice)
    shift = 0 if kind == "q8_0" else 2 ** (bits - 1)
    held = (codes.reshape(-1, BLOCK) + shift).astype(np.uint8)
    if kind not in WITH_MINIMUM:
        return BlockCodes(held, scale, None)
    minimum = -(zero + shift).astype(np.float32) * scale.astype(np.float32)
    return BlockCodes(held, scale, _halves(minimum, choice))


def _halves(exact: NDArray[np.float32], choice: LayerChoice) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        halves = exact.astype(np.float16)
    wrong = ~np.isfinite(halves) | ((halves == 0) & (exact != 0))
    if wrong.any():
        raise SettingError(
            f"layer {choice.name!r}: a scale of {float(exact[wrong][0]):g} is beyond half precision, in which GGUF "
            "files keep scales; skip the layer"
        )
    return halves


def packed(blocks: BlockCodes, kind: str) -> Bytes:
    """The blocks' bytes, (blocks, bytes of each)."""
    parts = [blocks.scale.reshape(-1, 1).view(np.uint8)]
    if blocks.minimum is not None:
        parts.append(blocks.minimum.reshape(-1, 1).view(np.uint8))
    if kind == "q8_0":
        return np.hstack([*parts, blocks.codes])
    if kind in OF_FIVE_BITS:
        parts.append(np.packbits(blocks.codes >> 4, axis=1, bitorder="little"))
    low = blocks.codes & 15
    return np.hstack([*parts, low[:, : BLOCK // 2] | low[:, BLOCK // 2 :] << 4])


def unpacked(data: Bytes, kind: str) -> BlockCodes:
    """What blocks of bytes hold."""
    data = np.ascontiguousarray(data.reshape(-1, TYPES[kind].size))
    scale = np.ascontiguousarray(data[:, :2]).view(np.float16).reshape(-1)
    if kind == "q8_0":
        return BlockCodes(np.ascontiguousarray(data[:, 2:]), scale, None)
    minimum = np.ascontiguousarray(data[:, 2:4]).view(np.float16).reshape(-1) if kind in WITH_MINIMUM else None
    nibbles = data[:, -BLOCK // 2 :]
    codes = np.hstack([nibbles & 15, nibbles >> 4])
    if kind in OF_FIVE_BITS:
        high = data[:, -BLOCK // 2 - 4 : -BLOCK // 2]
        codes = codes | np.unpackbits(high, axis=1, bitorder="little") << 4
    return BlockCodes(codes, scale, minimum)
