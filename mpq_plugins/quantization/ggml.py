"""Quantization under ggml's types: rows to blocks by ggml itself, blocks to values by the package gguf."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.gguf_blocks import by_gguf, dequantize_rows
from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError, WeightError
from ..plans.ggml import GGML, TYPES
from ..weights.dtypes import check_weight
from .contract import Each, PartCodes, PartShape
from .ggml_library import library, required_library
from .grid import Floats, GroupStats
from .kernel import reciprocal_of, reduce_errors

Rows = NDArray[np.float32]
PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
"""What the package gguf rounds too, to the same bytes."""


def quantize_rows(rows: Rows, kind: str, importance: Rows | None = None) -> NDArray[np.uint8]:
    """Rows (R, n) of whole blocks -> the bytes of their blocks, (R, n / weights of a block * its bytes).

    importance: how much each column matters, (n,): the mean square of its inputs, as an importance matrix of llama.cpp
    has it. Types that ggml cannot round without one take all columns alike where it is None. Raises SettingError where
    the packages are missing, and WeightError for NaN, infinity and what float16 scales cannot reach.
    """
    if rows.ndim != 2 or rows.shape[1] % TYPES[kind].weights:
        raise SettingError(
            f"type: ggml's {kind} has blocks of {TYPES[kind].weights}; rows of {list(rows.shape)} do not divide"
        )
    whole = np.ascontiguousarray(rows, dtype=np.float32)
    if not np.isfinite(whole).all():
        raise WeightError(f"ggml's {kind}: weights are NaN or infinite")
    if importance is not None:
        importance = _checked_importance(importance, whole.shape[1])
    found = library()
    if (
        importance is None
        and kind in PLAIN
        and (found is None or not found.has(kind))
        and find_spec("gguf") is not None
    ):
        return by_gguf("quantize", whole, kind)
    return required_library(kind).quantize(whole, kind, importance)


def rounded_rows(rows: Rows, kind: str, importance: Rows | None = None) -> Rows:
    """What the type makes of rows. Raises as `quantize_rows`."""
    values = dequantize_rows(quantize_rows(rows, kind, importance), kind)
    if not np.isfinite(values).all():
        most = float(np.abs(rows).max())
        raise WeightError(f"ggml's {kind}: weights up to {most:.4g} are beyond what its half-precision scales reach")
    return values


@dataclass(frozen=True)
class GGMLQuantizer:
    """Quantizes under `GGML`; see contract.py."""

    scheme: GGML

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> "GGMLGrids":
        """What measures the type; the blocks are rounded then."""
        return GGMLGrids(np.array([self.scheme.check_bits(b) for b in bits], np.int64), self.scheme.type)

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that the type can hold, what lies beyond its dtype at its end."""
        check_weight(weight, layer)
        try:
            self.scheme.check_bits(bits)
            self.scheme.groups_per_channel(weight.shape, channel_axis, layer)
            rows = rounded_rows(channel_rows(weight.detach().float(), channel_axis).cpu().numpy(), self.scheme.type)
        except (SettingError, WeightError) as error:
            named = str(error) if repr(layer) in str(error) else f"layer {layer!r}: {error}"
            raise type(error)(named) from error
        limit = torch.finfo(weight.dtype).max
        values = torch.from_numpy(rows).clamp(-limit, limit).to(weight.device, weight.dtype)
        return from_channel_rows(values, weight.shape, channel_axis)

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Raise SettingError: its codes are blocks of bytes, not a symbol a weight and a table a group."""
        raise SettingError(
            f"layer {part.layer!r}: ggml's {self.scheme.type} is stored in GGUF files alone, which mpq export --to "
            "gguf writes; containers, and roundings that look for better codes, have no place for it"
        )

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """Raise SettingError, as `encode`."""
        raise SettingError(f"layer {part.layer!r}: ggml's {self.scheme.type} has no codes in a container")

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Raise SettingError, as `encode`."""
        raise SettingError(f"layer {part.layer!r}: ggml's {self.scheme.type} has no codes in a container")


@dataclass(frozen=True)
class GGMLGrids:
    """A type's quantizer for any groups, which are blocks; bits: int (K,), all the type's own."""

    bits: NDArray[np.int64]
    kind: str

    def error_sums(self, rows: Tensor, largest: bool) -> Floats:
        """As kernel.error_sums."""
        plain = rows.detach().float().cpu()
        values = plain.double()
        rounded = torch.from_numpy(rounded_rows(plain.numpy(), self.kind)).double()
        sums = reduce_errors((values - rounded).abs(), reciprocal_of(values.abs()), largest)
        return np.repeat(sums[:, None], len(self.bits), axis=1)


def _checked_importance(importance: Rows, columns: int) -> Rows:
    given = np.ascontiguousarray(importance, dtype=np.float32)
    if given.shape != (columns,) or not np.isfinite(given).all() or (given < 0).any():
        raise SettingError(
            f"importance: {columns} finite numbers of 0 or more are needed, one a column; got shape {list(given.shape)}"
        )
    return given
