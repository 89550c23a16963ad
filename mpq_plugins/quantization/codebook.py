"""Codebook quantization of a weight (weight sharing): w' = c[code], c the 2^b centroids of its group.

Deep Compression (arXiv 1510.00149), sec. 3; how centroids are found is in kmeans.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.codebook import Codebook
from .calibrate import fitted_rows, whole_rows
from .contract import Each, PartCodes, PartShape
from .grid import CodebookGrids, Floats, GroupStats
from .kmeans import centroids, edges


@dataclass(frozen=True)
class CodebookTensor:
    """Codes and the centroids they stand for.

    codes: int16, the weight's shape; grid: one codebook per group, ascending, groups ordered by output channel, then
    along the input; dtype: the weight's.
    """

    codes: Tensor
    grid: CodebookGrids
    scheme: Codebook
    channel_axis: int
    dtype: torch.dtype

    @property
    def centroids(self) -> Tensor:
        """(groups, 2^b), float32."""
        return torch.from_numpy(self.grid.centroids[0])


def quantize(
    weight: Tensor, bits: int, scheme: Codebook | None = None, *, channel_axis: int = 0, layer: str = "weight"
) -> CodebookTensor:
    """Codes of `weight` at 1 to 8 bits, each that of the nearest centroid.

    weight: float32, float16 or bfloat16, any shape, any strides; `channel_axis` is its output axis. A group of no more
    than 2^b different values is represented exactly, and a weight of 0 always is. Raises SettingError for bits outside
    1..8, more centroids than weights, or groups that do not divide the input, and WeightError, naming `layer`, for NaN,
    infinity or another dtype.
    """
    scheme = scheme or Codebook()
    try:
        scheme.check_bits(bits)
    except SettingError as error:
        raise SettingError(f"layer {layer!r}: {error}") from error
    scheme.check_part(
        bits, weight.shape or (1,), channel_axis, weight.shape[channel_axis] if weight.dim() else 1, layer
    )
    rows, shape, grid = fitted_rows(weight, scheme, channel_axis, layer, partial(_grids, scheme, [bits]))
    codes = encode(rows, torch.from_numpy(grid.centroids[0]).to(rows.device)).reshape(shape)
    return CodebookTensor(
        from_channel_rows(codes, weight.shape, channel_axis), grid, scheme, channel_axis, weight.dtype
    )


def dequantize(quantized: CodebookTensor) -> Tensor:
    """The weight, in the original dtype and shape."""
    codes = channel_rows(quantized.codes, quantized.channel_axis)
    centroids = quantized.centroids.to(codes.device)
    rows = codes.reshape(centroids.shape[0], -1) if codes.numel() else codes
    values = (decode(rows, centroids) if rows.numel() else rows).to(quantized.dtype).reshape(codes.shape)
    return from_channel_rows(values, quantized.codes.shape, quantized.channel_axis)


@dataclass(frozen=True)
class CodebookQuantizer:
    """Quantizes under a codebook scheme; see contract.py. A symbol counts from the entry of its group that is 0."""

    scheme: Codebook

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> CodebookGrids:
        """The centroids of each group."""
        return _grids(self.scheme, bits, each, stats)

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that `bits` can hold."""
        return dequantize(quantize(weight, bits, self.scheme, channel_axis=channel_axis, layer=layer))

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Symbols and centroids."""
        shared = quantize(weight, part.bits, self.scheme, channel_axis=part.channel_axis, layer=part.layer)
        book = shared.grid.centroids[0]
        entries = (part.rows(shared.codes) - _zero_entries(book)) & (2**part.bits - 1)
        return PartCodes(part.symbols(entries), book.reshape(-1), np.zeros(0, np.uint8))

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """The weight again."""
        return dequantize(self.restored(codes, part, dtype))

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Which weights are 0: none of a group whose codebook has no 0."""
        having = (codes.tables.reshape(part.groups, -1) == 0).any(axis=1)
        zero: NDArray[np.bool_] = (codes.symbols == 0).reshape(part.groups, -1) & having[:, None]
        return zero.reshape(-1)

    def restored(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> CodebookTensor:
        """Codes and centroids as `quantize` gives them."""
        rows, book = codes.symbols.reshape(part.groups, -1).astype(np.int16), codes.tables.reshape(part.groups, -1)
        entries = (rows + _zero_entries(book)) & (2**part.bits - 1)
        grid = CodebookGrids(np.array([part.bits], np.int64), (book,))
        return CodebookTensor(part.tensor(entries), grid, self.scheme, part.channel_axis, dtype)


def _grids(scheme: Codebook, bits: Sequence[int], each: Each, stats: GroupStats) -> CodebookGrids:
    return choose_codebooks(whole_rows(each, scheme), bits, scheme)


def choose_codebooks(rows: Floats, bits: Sequence[int], scheme: Codebook) -> CodebookGrids:
    """The codebooks of each group's weights, float32 values in (R, n), at these bit-widths."""
    widths = [scheme.check_bits(b) for b in bits]
    books = tuple(np.zeros((len(rows), 2**b), np.float32) for b in widths)
    for r, row in enumerate(rows if rows.size else ()):
        for book, levels in zip(books, centroids(row.astype(np.float32), widths, scheme.init), strict=True):
            book[r] = levels
    return CodebookGrids(np.array(widths, np.int64), books)


def _zero_entries(book: NDArray[np.float32]) -> NDArray[np.int16]:
    """Which entry of each group's codebook is 0, (groups, 1); the first where none is."""
    entries: NDArray[np.int16] = np.argmax(book == 0, axis=1).astype(np.int16)
    return entries[:, None]


def encode(rows: Tensor, centroids: Tensor) -> Tensor:
    """Rows (groups, n), float32, and centroids (groups, k) -> codes int16 (groups, n)."""
    if rows.numel() == 0:
        return rows.to(torch.int16)
    between = torch.from_numpy(edges(centroids.cpu().numpy())).to(rows.device)
    return torch.searchsorted(between, rows.contiguous(), out_int32=True).to(torch.int16)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Codes (groups, n) and centroids (groups, k) -> values, float32 (groups, n)."""
    first = torch.arange(len(centroids), device=codes.device, dtype=torch.int32) * centroids.shape[1]
    return centroids.reshape(-1)[first[:, None] + codes.int()]
