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
from ..plans.scheme import Scheme, scales_per_layer
from .grid import AnyGrids, Floats, GroupStats

Each = Callable[[Callable[[Tensor], Floats]], Floats]
"""Applies a function to every block of a weight, and joins what it gives along the first axis: with one group for all,
blocks are matrices of any shape; otherwise there is one, (groups, elements)."""

Symbols = NDArray[np.uint8] | NDArray[np.uint16]


@public
@dataclass(frozen=True)
class PartCodes:
    """What a container stores of some channels of a layer.

    Attributes:
        symbols: The codes, (weights,), output channel first.
        tables: What groups have, float32, one after the other: scales; units of dense intervals and then of tails; or
            centroids. Scales of the layer come last.
        zero_points: (groups,) of asymmetric codes, else (0,).
    """

    symbols: Symbols
    tables: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    def equals(self, other: "PartCodes") -> bool:
        """Tell whether others are the same, to the bit.

        Args:
            other: The codes they are compared with.

        Returns:
            Whether they are.
        """
        pairs = ((self.symbols, other.symbols), (self.tables, other.tables), (self.zero_points, other.zero_points))
        return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@public
@dataclass(frozen=True)
class PartShape:
    """What a part's codes are the codes of.

    Attributes:
        shape: The part's weight's shape.
        channel_axis: Its axis of output channels.
        bits: Bits of a code.
        scheme: The scheme.
        layer: What names the layer in errors.

    Examples:
        >>> import mpq_plugins as mpq
        >>> part = mpq.PartShape((4, 8), 0, 3, mpq.Affine(granularity="per_channel"), "fc")
        >>> part.weights, part.groups, part.zero_points
        (32, 4, 4)
    """

    shape: tuple[int, ...]
    channel_axis: int
    bits: int
    scheme: Scheme
    layer: str

    @property
    def weights(self) -> int:
        """The number of weights."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def width(self) -> int:
        """Bits of a symbol, the interval bit included."""
        return self.bits + self.scheme.interval_bits(self.bits)

    @property
    def groups(self) -> int:
        """The number of groups."""
        channels = self.shape[self.channel_axis]
        return self.scheme.group_count(self.shape, self.channel_axis, channels, self.layer)

    @property
    def table_entries(self) -> int:
        """The number of values that `tables` has."""
        of_groups = self.groups * (self.scheme.scales_per_group + self.scheme.codebook_entries(self.bits))
        return of_groups + (scales_per_layer(self.scheme) if self.groups else 0)

    @property
    def zero_points(self) -> int:
        """The number of zero points."""
        return self.groups if self.scheme.zero_point_bits(self.bits) else 0

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger[Any]]":
        """The dtype of the symbols."""
        return np.dtype(np.uint8 if self.width <= 8 else np.uint16)

    def rows(self, codes: Tensor) -> NDArray[np.int16]:
        """Turn codes of the part's shape into rows.

        Args:
            codes: The codes.

        Returns:
            The rows, (groups, n).
        """
        rows: NDArray[np.int16] = channel_rows(codes.cpu(), self.channel_axis).contiguous().numpy()
        return rows.reshape(self.groups, -1)

    def tensor(self, rows: NDArray[np.int16]) -> Tensor:
        """Turn rows into a tensor of the part's shape.

        Args:
            rows: The rows, (groups, n).

        Returns:
            The tensor.
        """
        channels = self.shape[self.channel_axis]
        return from_channel_rows(torch.from_numpy(rows.reshape(channels, -1)), self.shape, self.channel_axis)

    def symbols(self, rows: NDArray[np.int16]) -> Symbols:
        """Turn rows into symbols.

        Args:
            rows: The rows, (groups, n).

        Returns:
            The symbols, (weights,).
        """
        return rows.reshape(-1).astype(self.dtype)


@public
class Quantizer(Protocol):
    """What quantizes weights under one scheme; made by calling the class with the scheme."""

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> AnyGrids:
        """Fit the levels of each group at these bit-widths.

        Args:
            each: What looks at the weights: it applies a function to every block of them.
            stats: What is known of each group, R of them.
            bits: The widths, K of them.

        Returns:
            Grids of K quantizers for each of R groups.

        Raises:
            SettingError: The scheme does not have one of the widths.
        """

    def fake_quantize(self, weight: Tensor, bits: int, *, channel_axis: int, layer: str) -> Tensor:
        """Make the weight that `bits` can hold.

        Args:
            weight: The weight.
            bits: The width.
            channel_axis: The axis of output channels.
            layer: What names the layer in errors.

        Returns:
            The weight, in its own dtype and shape and on its device.

        Raises:
            SettingError: The scheme does not have the width, or not for this shape.
            WeightError: The weight holds NaN or infinity, or has another dtype than floating point.
        """

    def encode(self, weight: Tensor, part: PartShape) -> PartCodes:
        """Make the same as symbols and tables.

        Args:
            weight: The part's weight; there are weights in it.
            part: Its shape, width and scheme.

        Returns:
            The codes.

        Raises:
            SettingError: As `fake_quantize`.
            WeightError: As `fake_quantize`.
        """

    def decode(self, codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
        """Make the weight that `fake_quantize` gives, to the bit, on the CPU.

        Args:
            codes: What `encode` gave.
            part: The part's shape, width and scheme.
            dtype: The weight's dtype.

        Returns:
            The weight, of the part's shape.
        """

    def zeros(self, codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
        """Tell which weights are 0, under a scheme whose weights can be.

        Args:
            codes: What `encode` gave.
            part: The part's shape, width and scheme.

        Returns:
            Flags, (weights,), in the order of the symbols.
        """


QUANTIZER = ("grids", "fake_quantize", "encode", "decode", "zeros")
"""The names of what a quantizer has."""
