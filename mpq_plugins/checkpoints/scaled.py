"""Weights stored in 8-bit floating point with scales beside: read as the weights they mean, w = code x scale.

DeepSeek's checkpoints have a scale for each block of 128 x 128 (NAME.weight_scale_inv, which multiplies all the same),
compressed-tensors and FBGEMM one for each output (NAME.weight_scale), others one for all. Products are float32's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .buffers import chunk_buffer
from .readers import Allocate, RowReader, StoredTensor

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale_weight")
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
USUAL_BLOCK = 128


@dataclass(frozen=True)
class ScaledRows:
    """Rows of codes (outputs, inputs) times their scales, in float32. See tensor_files.RowReader.

    scales: of the scale's tensor, (block rows, block columns); block: rows and columns that share a scale; first: the
    row of the whole matrix that is this reader's row 0.
    """

    codes: RowReader
    scales: RowReader
    scale_rows: int
    block: tuple[int, int]
    first: int = 0

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader."""
        return self._scaled(self.codes(start, stop, allocate), start, stop)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader."""
        codes = self.codes.at_once(start, stop, allocate)
        return None if codes is None else self._scaled(codes, start, stop)

    def part(self, index: int, transposed: bool) -> RowReader:
        """Of a matrix there are none."""
        raise NotImplementedError

    def along(self, axis: int) -> RowReader:
        """They are along one already."""
        raise NotImplementedError

    def cut(self, start: int, stop: int) -> "ScaledRows":
        """See RowReader."""
        return replace(self, codes=self.codes.cut(start, stop), first=self.first + start)

    def signature(self) -> str:
        """See RowReader."""
        return f"{self.codes.signature()} {self.scales.signature()} {self.block}"

    def _scaled(self, codes: Tensor, start: int, stop: int) -> Tensor:
        rows, columns = self.block
        scales = self.scales(0, self.scale_rows).float().reshape(self.scale_rows, -1)
        factors = scales[torch.arange(self.first + start, self.first + stop) // rows]
        if factors.shape[1] > 1:
            factors = factors.repeat_interleave(columns, dim=1)[:, : codes.shape[1]]
        return codes.float() * factors


def scale_name(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """The tensor that scales a layer's codes, or None."""
    names = (f"{name}.{candidate}" if name else candidate for candidate in SCALE_NAMES)
    return next((candidate for candidate in names if candidate in stored), None)


def scaled_reader(tensor: StoredTensor, name: str, scale: StoredTensor, config: Mapping[str, Any]) -> ScaledRows | None:
    """A reader of codes times scales, or None where shapes or dtypes do not say for certain what scales what."""
    if len(tensor.shape) != 2 or len(scale.shape) > 2 or scale.dtype not in SCALE_DTYPES:
        return None
    rows = scale.shape[0] if scale.shape else 1
    blocks = _blocks(tensor.shape, (rows, *scale.shape[1:], 1)[:2], _said_block(config))
    if name.endswith("weight_scale_inv"):  # which is by blocks wherever it can be
        blocks = blocks[:1]
    if len(set(blocks)) != 1:
        return None
    return ScaledRows(tensor.read_rows, scale.read_rows, rows, blocks[0])


def _blocks(codes: Sequence[int], scales: Sequence[int], block: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns that may share a scale, by how many scales there are: squares, a tensor, parts of each row."""
    (outputs, inputs), (rows, columns) = codes, scales
    blocks = []
    if rows == -(-outputs // block[0]) and columns == -(-inputs // block[1]):
        blocks.append(block)
    if rows == columns == 1:  # and then a square holds all of it
        blocks = [(max(1, outputs), max(1, inputs))]
    elif rows == outputs and columns and inputs % columns == 0:
        blocks.append((1, inputs // columns))
    return blocks


def _said_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """By the configuration, or DeepSeek's."""
    said = config.get("quantization_config")
    block = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    return USUAL_BLOCK, USUAL_BLOCK
