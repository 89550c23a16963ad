"""A handle on a weight, and what a source holds of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    name: the layer's, without `.weight`; channel_axis: the output axis (1 for ConvTranspose, and where a file has
    inputs first, else 0); tied: other names of the same storage.
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
        """Output channels start..stop as a matrix (stop - start, numel / channels), in the stored dtype.

        They may lie in what `allocate(bytes)` gives. Raises SourceError where they cannot be read.
        """
        return self.read_rows(start, stop, allocate)

    def cut(self, start: int, stop: int) -> "Weight":
        """Output channels start..stop as a weight of their own."""
        axis = self.channel_axis
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return replace(self, shape=shape, read_rows=self.read_rows.cut(start, stop), tied=())

    def tensor(self) -> Tensor:
        """The whole weight in its own shape."""
        return from_channel_rows(self.rows(0, self.channels), self.shape, self.channel_axis)


@public
@dataclass(frozen=True)
class Weights:
    """What a source holds: iterate for the quantizable weights, in the source's order.

    skipped: quantizable layers left out on request, or because of a role that is left alone by default; left_alone:
    (parameter name, why) of tensors with two or more dimensions that are no quantizable layer, and of the latter;
    key: of a torch checkpoint, where its weights were found (`state_dict`), None for the top.
    """

    weights: tuple[Weight, ...]
    skipped: tuple[str, ...]
    left_alone: tuple[tuple[str, str], ...]
    folded: bool
    key: str | None = None

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
