"""One part of a layer as integers and tables, whatever its scheme: what a container stores, and back to weights.

A symbol is a weight's code, put so that 0 stands for the weight 0 where the scheme has one: asymmetric codes count from
the zero point, symmetric ones wrap around below 0 (two's complement), a codebook's from the entry that is 0. So pruned
weights are zeros in every scheme, and the channels of a layer are alike, which is what an entropy coder lives on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..plans.scheme import Affine, Codebook, Piecewise, Scheme
from ..quantization import affine, codebook, piecewise
from ..quantization.affine import QuantizedTensor
from ..quantization.codebook import CodebookTensor
from ..quantization.grid import CodebookGrids, Grids, PiecewiseGrids
from ..quantization.piecewise import PiecewiseTensor
from .bitpack import Codes

Quantized = QuantizedTensor | PiecewiseTensor | CodebookTensor


@dataclass(frozen=True)
class PartCodes:
    """symbols: (weights,), output channel first; tables: float32, what groups have, one after the other: scales; units
    of dense intervals and then of tails; or centroids; zero_points: (groups,), of asymmetric codes, else (0,)."""

    symbols: Codes
    tables: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    def equals(self, other: "PartCodes") -> bool:
        """Whether they are the same, to the bit."""
        pairs = ((self.symbols, other.symbols), (self.tables, other.tables), (self.zero_points, other.zero_points))
        return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@dataclass(frozen=True)
class PartShape:
    """What a part's codes are the codes of: a weight of `shape`, so many bits under a scheme, for `layer`."""

    shape: tuple[int, ...]
    channel_axis: int
    bits: int
    scheme: Scheme
    layer: str

    @property
    def weights(self) -> int:
        """How many weights."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def width(self) -> int:
        """Bits of a symbol, the interval bit included."""
        return self.bits + self.scheme.interval_bits(self.bits)

    @property
    def groups(self) -> int:
        """How many groups."""
        channels = self.shape[self.channel_axis]
        return self.scheme.group_count(self.shape, self.channel_axis, channels, self.layer)

    @property
    def table_entries(self) -> int:
        """How many values `tables` has."""
        return self.groups * (self.scheme.scales_per_group + self.scheme.codebook_entries(self.bits))

    @property
    def zero_points(self) -> int:
        """How many zero points."""
        return self.groups if self.scheme.zero_point_bits(self.bits) else 0


def encode(weight: Tensor, part: PartShape) -> PartCodes:
    """Quantize a part's weights. Raises SettingError and WeightError, naming the layer, as the scheme's quantize."""
    empty = np.zeros(0, np.uint8)
    if not part.weights:
        return PartCodes(empty.astype(_dtype(part)), empty.astype(np.float32), empty)
    if isinstance(part.scheme, Codebook):
        shared = codebook.quantize(weight, part.bits, part.scheme, channel_axis=part.channel_axis, layer=part.layer)
        return PartCodes(_from_entries(shared, part), shared.grid.centroids[0].reshape(-1), empty)
    if isinstance(part.scheme, Piecewise):
        two = piecewise.quantize(weight, part.bits, part.scheme, channel_axis=part.channel_axis, layer=part.layer)
        symbols = _rows(two.codes, part) | _rows(two.tail.to(torch.int16), part) << _sign_and_magnitude(two.grid)
        return PartCodes(_symbols(symbols, part), np.concatenate((two.grid.dense, two.grid.tail)).reshape(-1), empty)
    one = affine.quantize(weight, part.bits, part.scheme, channel_axis=part.channel_axis, layer=part.layer)
    rows, zero_points = _rows(one.codes, part), one.grid.zero_point.astype(np.int16)
    symbols = (rows + 1) // 2 if part.bits == 1 else (rows - zero_points) & (2**part.bits - 1)
    kept = one.grid.zero_point.reshape(-1).astype(np.uint8) if part.zero_points else empty
    return PartCodes(_symbols(symbols, part), one.grid.scale.reshape(-1), kept)


def decode(codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
    """The weights again, in their own shape: those that `simulate_layer` makes."""
    if not part.weights:
        return torch.zeros(part.shape, dtype=dtype)
    quantized = quantized_part(codes, part, dtype)
    if isinstance(quantized, CodebookTensor):
        return codebook.dequantize(quantized)
    if isinstance(quantized, PiecewiseTensor):
        return piecewise.dequantize(quantized)
    return affine.dequantize(quantized)


def are_zero(codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
    """Which weights are 0, (weights,)."""
    if not part.weights or not part.scheme.has_zero(part.bits):
        return np.zeros(part.weights, np.bool_)
    zero: NDArray[np.bool_] = codes.symbols == 0
    if isinstance(part.scheme, Codebook):  # a group without zeros has no such entry
        having = (codes.tables.reshape(part.groups, -1) == 0).any(axis=1)
        zero = (zero.reshape(part.groups, -1) & having[:, None]).reshape(-1)
    return zero


def quantized_part(codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Quantized:
    """Codes and grid as the scheme's own quantizer gives them."""
    rows = codes.symbols.reshape(part.groups, -1).astype(np.int16)
    widths, axis, scheme = np.array([part.bits], np.int64), part.channel_axis, part.scheme
    if isinstance(scheme, Codebook):
        book = codes.tables.reshape(part.groups, -1)
        entries = (rows + _zero_entries(book)) & (2**part.bits - 1)
        return CodebookTensor(_tensor(entries, part), CodebookGrids(widths, (book,)), scheme, axis, dtype)
    if isinstance(scheme, Piecewise):
        dense, tail = codes.tables.reshape(2, part.groups, 1)
        grid = PiecewiseGrids(widths, scheme.storage == "shared", dense, tail)
        outside = _tensor(rows >> _sign_and_magnitude(grid), part).bool()
        own = _tensor(rows & (2 ** _sign_and_magnitude(grid) - 1), part)
        return PiecewiseTensor(own, outside, grid, scheme, axis, dtype)
    assert isinstance(scheme, Affine)
    zero_point = np.zeros((part.groups, 1), np.int32)
    if part.zero_points:
        zero_point = codes.zero_points.astype(np.int32).reshape(-1, 1)
    if part.bits == 1:
        own_codes = rows * 2 - 1
    elif scheme.symmetric:
        half = 2 ** (part.bits - 1)
        own_codes = (rows ^ half) - half
    else:
        own_codes = (rows + zero_point.astype(np.int16)) & (2**part.bits - 1)
    grids = Grids(widths, scheme.symmetric, codes.tables.reshape(-1, 1), zero_point)
    return QuantizedTensor(_tensor(own_codes, part), grids, scheme, axis, dtype)


def _from_entries(shared: CodebookTensor, part: PartShape) -> Codes:
    entries = _rows(shared.codes, part) - _zero_entries(shared.grid.centroids[0])
    return _symbols(entries & (2**part.bits - 1), part)


def _zero_entries(book: NDArray[np.float32]) -> NDArray[np.int16]:
    """Which entry of each group's codebook is 0, (groups, 1); the first where none is."""
    entries: NDArray[np.int16] = np.argmax(book == 0, axis=1).astype(np.int16)
    return entries[:, None]


def _sign_and_magnitude(grid: PiecewiseGrids) -> int:
    """Bits of a code within its interval."""
    return int(grid.magnitude_bits[0]) + 1


def _rows(codes: Tensor, part: PartShape) -> NDArray[np.int16]:
    rows: NDArray[np.int16] = channel_rows(codes.cpu(), part.channel_axis).contiguous().numpy()
    return rows.reshape(part.groups, -1)


def _symbols(rows: NDArray[np.int16], part: PartShape) -> Codes:
    return rows.reshape(-1).astype(_dtype(part))


def _dtype(part: PartShape) -> "np.dtype[np.unsignedinteger[Any]]":
    return np.dtype(np.uint8 if part.width <= 8 else np.uint16)


def _tensor(rows: NDArray[np.int16], part: PartShape) -> Tensor:
    """Rows (groups, n) as a tensor of the part's shape."""
    channels = part.shape[part.channel_axis]
    return from_channel_rows(torch.from_numpy(rows.reshape(channels, -1)), part.shape, part.channel_axis)
