"""A handle on a weight, and what a source holds of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checkpoints.buffers import chunk_buffer
from ..checkpoints.readers import Allocate, RowReader
from ..checkpoints.rows import from_channel_rows
from ..common.public import public


@public
@dataclass(frozen=True)
class Weight:
    """A handle on one layer's weight. Reading happens in `rows` and `tensor`, not before.

    Attributes:
        name: The layer's, without `.weight`.
        kind: What the layer is, as `linear` or `conv2d`.
        shape: The weight's shape.
        dtype: Its dtype, as it is stored.
        channel_axis: The output axis: 1 for ConvTranspose, and where a file has inputs first, else 0.
        read_rows: What reads it.
        tied: Other names of the same storage.
        refusal: Why it cannot be quantized, for a layer that must be skipped; else empty.
        scale: Of a checkpoint of 8-bit floating point, the tensor that its codes are multiplied by; else empty.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> weight, = mpq.find_weights(torch.nn.Sequential(torch.nn.Linear(8, 2)))
        >>> weight.channels, tuple(weight.rows(0, 1).shape)
        (2, (1, 8))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channel_axis: int
    read_rows: RowReader
    tied: tuple[str, ...] = ()
    refusal: str = ""  # why it cannot be quantized, for a layer that must be skipped
    scale: str = ""  # of a checkpoint of 8-bit floating point, the tensor that its codes are multiplied by

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then its tied ones."""
        return (self.name, *self.tied)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]

    def rows(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """Read output channels as a matrix, in the stored dtype.

        Args:
            start: The first channel.
            stop: The channel after the last.
            allocate: What gives room for so many bytes; the rows may lie there.

        Returns:
            The rows, (stop - start, numel / channels).

        Raises:
            SourceError: They cannot be read.
        """
        return self.read_rows(start, stop, allocate)

    def cut(self, start: int, stop: int) -> "Weight":
        """Cut some output channels out, as a weight of their own.

        Args:
            start: The first channel.
            stop: The channel after the last.

        Returns:
            A handle on them.
        """
        axis = self.channel_axis
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return replace(self, shape=shape, read_rows=self.read_rows.cut(start, stop), tied=())

    def tensor(self) -> Tensor:
        """Read the whole weight.

        Returns:
            The weight, in its own shape and stored dtype.

        Raises:
            SourceError: It cannot be read.
        """
        return from_channel_rows(self.rows(0, self.channels), self.shape, self.channel_axis)


@public
@dataclass(frozen=True)
class Weights:
    """What a source holds: iterate for the quantizable weights, in the source's order.

    Attributes:
        weights: The quantizable weights.
        skipped: Quantizable layers left out on request, or because of a role that is left alone by default.
        left_alone: (parameter name, why) of tensors with two or more dimensions that are no quantizable layer, and of
            those whose role is left alone.
        folding: Convolution -> the BatchNorm that is folded into it, by name.
        key: Of a torch checkpoint, where its weights were found (`state_dict`); None for the top.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> found = mpq.find_weights(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), skip=["0"])
        >>> len(found), found.skipped
        (1, ('0',))
    """

    weights: tuple[Weight, ...]
    skipped: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    folding: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None

    @property
    def folded(self) -> bool:
        """Whether BatchNorm is folded into some of them."""
        return bool(self.folding)

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
