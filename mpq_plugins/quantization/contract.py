"""The contract of a quantizer: the half of a scheme that touches tensors, imported when a weight is quantized.

A scheme (plans/scheme.py) is a frozen value that answers in numbers, and names a class: `quantizer = "module:Class"`.
That class is called with the scheme, and its instance offers what is below. `RowQuantizer` (row_quantizer.py) offers it
all to a class that says three things of rows: how tables are fitted, how weights become codes, and codes weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..common.public import public
from ..plans.scheme import Scheme
from .grid import AnyGrids, Floats, GroupStats

Each = Callable[[Callable[[Tensor], Floats]], Floats]
"""Applies a function to every block of a weight, and joins what it gives along the first axis: with one group for all,
blocks are matrices of any shape; otherwise there is one, (groups, elements)."""

Symbols = NDArray[np.uint8] | NDArray[np.uint16]


@public
@dataclass(frozen=True)
class PartCodes:
    """What a container stores of some channels of a layer.

    symbols: (weights,), output channel first; tables: float32, what groups have, one after the other: scales; units of
    dense intervals and then of tails; or centroids; zero_points: (groups,), of asymmetric codes, else (0,).
    """

    symbols: Symbols
    tables: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    def equals(self, other: "PartCodes") -> bool:
        """Whether they are the same, to the bit."""
        pairs = ((self.symbols, other.symbols), (self.tables, other.tables), (self.zero_points, other.zero_points))
        return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@public
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

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """Of the symbols."""
        return np.dtype(np.uint8 if self.width <= 8 else np.uint16)

    def rows(self, codes: Tensor) -> NDArray[np.int16]:
        """Codes of the part's shape as rows, (groups, n)."""
        rows: NDArray[np.int16] = channel_rows(codes.cpu(), self.channel_axis).contiguous().numpy()
        return rows.reshape(self.groups, -1)

    def tensor(self, rows: NDArray[np.int16]) -> Tensor:
        """Rows (groups, n) as a tensor of the part's shape."""
        channels = self.shape[self.channel_axis]
        return from_channel_rows(torch.from_numpy(rows.reshape(channels, -1)), self.shape, self.channel_axis)

    def symbols(self, rows: NDArray[np.int16]) -> Symbols:
        """Rows (groups, n) as symbols, (weights,)."""
        return rows.reshape(-1).astype(self.dtype)


@public
class Quantizer(Protocol):
    """What quantizes weights under one scheme; made by calling the class with the scheme."""

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> AnyGrids:
        """The levels of each group at these bit-widths, which are chosen by looking at the weights through `each`.

        stats: of each group, R of them. The grids have K = len(bits) quantizers for each of R groups. Raises
        SettingError for a bit-width that the scheme does not have.
        """

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """The weight that `bits` can hold, in its own dtype, shape and on its device.

        Raises SettingError and, for NaN, infinity or another dtype than floating point, WeightError, naming `layer`.
        """

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """The same as symbols and tables; `weight` has weights. Raises as fake_quantize."""

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """The weight that fake_quantize gives, to the bit, on the CPU."""

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Which weights are 0, (weights,), under a scheme whose weights can be."""


QUANTIZER = ("grids", "fake_quantize", "encode", "decode", "zeros")
"""The names of what a quantizer has."""
