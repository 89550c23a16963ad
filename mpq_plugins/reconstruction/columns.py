"""A layer as a matrix product: its weight as matrices, and its inputs as the columns that they are multiplied with.

    y[n, o] = sum_j U[n, j] W[o, j] + bias[o]

A linear layer's columns are its inputs. A convolution's are the patches under its kernel, one row of U for each output
position; a transposed one's are those of the convolution that it is, its input spread out by the stride and its kernel
turned round. Groups have a matrix each.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.tracing import CONVOLUTIONS, TRANSPOSED

PER_INPUT = 32  # columns for each input of a layer, at least, where there are so many positions
CHUNK = 1 << 24  # values of columns at a time, 64 MB


@dataclass(frozen=True)
class Columns:
    """What of a layer's geometry decides its columns. kernel, stride, padding, dilation: one a spatial axis.

    transposed: whether it is a transposed convolution; linear layers have no spatial axes.
    """

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """The geometry of one of torch's layers: linear, or a convolution of one to three spatial axes."""
        if not isinstance(layer, CONVOLUTIONS):
            return cls(1, (), (), (), False)
        sizes = (layer.kernel_size, layer.stride, layer.dilation)
        kernel, stride, dilation = (tuple(map(int, size)) for size in sizes)
        return cls(layer.groups, kernel, stride, dilation, isinstance(layer, TRANSPOSED))

    @property
    def spatial(self) -> int:
        """How many spatial axes there are."""
        return len(self.kernel)

    def matrices(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, rows, d)."""
        g = self.groups
        if not self.transposed:
            return weight.reshape(g, weight.shape[0] // g, -1)
        turned = weight.flip(tuple(range(2, weight.dim())))
        split = turned.reshape(g, weight.shape[0] // g, *weight.shape[1:])
        return split.transpose(1, 2).reshape(g, weight.shape[1], -1)

    def weight(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `matrices`."""
        if not self.transposed:
            return matrices.reshape(tuple(shape))
        inputs, outputs, *kernel = shape
        split = matrices.reshape(self.groups, outputs, inputs // self.groups, *kernel).transpose(1, 2)
        return split.reshape(tuple(shape)).flip(tuple(range(2, len(shape)))).contiguous()

    def samples(self, given: Tensor) -> int:
        """How many samples an input or output holds; a linear layer's are its rows."""
        if not self.spatial:
            return given.numel() // max(1, given.shape[-1])
        return len(self._batched(given))

    def positions(self, layer: Any, given: Tensor) -> int:
        """Output positions of each sample of an input."""
        if not self.spatial:
            return 1
        windows = self._windows(layer, self._batched(given)[:1])
        return math.prod(windows.shape[2 : 2 + self.spatial])

    def takes_tokens(self, given: Tensor) -> bool:
        """Whether a linear layer's samples are tokens of sequences."""
        return not self.spatial and given.dim() > 2

    def outputs(self, output: Tensor) -> tuple[int, int]:
        """How many samples, and positions of each, an output has."""
        batched = self._batched(output)
        return self.samples(output), math.prod(batched.shape[2:]) if self.spatial else 1

    def drawn(
        self, layer: Any, given: Tensor, most: int, samples: int, generator: torch.Generator
    ) -> Iterator[tuple["Piece", Tensor]]:
        """A layer's input a few samples at a time, and the positions that are drawn of each sample.

        most: positions of all `samples`, or PER_INPUT times the layer's inputs, where that is more.
        """
        d = self.matrices(layer.weight).shape[2]
        share = math.ceil(max(most, PER_INPUT * d) / max(1, samples))
        chosen = choose_positions(self.samples(given), self.positions(layer, given), share, generator)
        yield from self.pieces(given, chosen, max(1, CHUNK // max(1, self.groups * d)))

    def pieces(self, given: Tensor, chosen: Tensor, most: int) -> Iterator[tuple["Piece", Tensor]]:
        """Samples a few at a time, of `most` columns in all or a single sample, and the positions chosen of them."""
        count = max(1, most // max(1, chosen.shape[1]))
        for start in range(0, len(chosen), count):
            yield Piece(self, slice(start, start + count)), chosen[start : start + count]

    def values(self, output: Tensor, chosen: Tensor) -> Tensor:
        """A layer's output (or what has its shape) at these positions (samples, positions): (n, groups, rows)."""
        if not self.spatial:
            return output.reshape(-1, 1, output.shape[-1])
        flat = self._batched(output).flatten(2).transpose(1, 2)
        sample = torch.arange(len(flat), device=flat.device)[:, None]
        return flat[sample, chosen].reshape(chosen.numel(), self.groups, -1)

    def columns(self, layer: Any, given: Tensor, chosen: Tensor) -> Tensor:
        """U, (n, groups, d), of the layer's input at these positions (samples, positions of each)."""
        if not self.spatial:
            return given.reshape(-1, 1, given.shape[-1])
        windows = self._windows(layer, self._batched(given))
        at = torch.unravel_index(chosen, windows.shape[2 : 2 + self.spatial])
        sample = torch.arange(len(windows), device=given.device)[:, None].expand_as(chosen)
        patches = windows.movedim(1, 1 + self.spatial)[(sample, *at)]
        return patches.reshape(-1, self.groups, patches[0, 0].numel() // self.groups)

    def _batched(self, value: Tensor) -> Tensor:
        """With a first axis of samples, which a single sample may come without."""
        return value if value.dim() == self.spatial + 2 else value[None]

    def _windows(self, layer: Any, given: Tensor) -> Tensor:
        """A view of the padded input, (samples, channels, *positions, *kernel)."""
        padded = self._spread(layer, given) if self.transposed else self._padded(layer, given)
        steps = (1,) * self.spatial if self.transposed else self.stride
        lengths = [
            (size - dilation * (kernel - 1) - 1) // step + 1
            for size, dilation, kernel, step in zip(padded.shape[2:], self.dilation, self.kernel, steps, strict=True)
        ]
        strides = padded.stride()
        moves = [stride * step for stride, step in zip(strides[2:], steps, strict=True)]
        inside = [stride * dilation for stride, dilation in zip(strides[2:], self.dilation, strict=True)]
        shape = (*padded.shape[:2], *lengths, *self.kernel)
        return padded.as_strided(shape, (*strides[:2], *moves, *inside), padded.storage_offset())

    def _padded(self, layer: Any, given: Tensor) -> Tensor:
        if layer.padding == "valid":
            return given
        both = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(given, both, mode=mode) if any(both) else given

    def _spread(self, layer: Any, given: Tensor) -> Tensor:
        """The input with stride - 1 zeros between its values, and as many around it as the kernel's turning wants."""
        spread = given
        for axis, stride in enumerate(self.stride, start=2):
            size = spread.shape[axis]
            wide = spread.new_zeros(*spread.shape[:axis], (size - 1) * stride + 1, *spread.shape[axis + 1 :])
            wide[(slice(None),) * axis + (slice(None, None, stride),)] = spread
            spread = wide
        sides: list[int] = []
        sizes = zip(self.kernel, self.dilation, layer.padding, layer.output_padding, strict=True)
        for kernel, dilation, padding, more in reversed(list(sizes)):
            around = dilation * (kernel - 1) - padding
            sides += [around, around + more]
        return F.pad(spread, sides)  # a negative side cuts


@dataclass(frozen=True)
class Piece:
    """Some of a call's samples."""

    columns: Columns
    rows: slice

    def of(self, value: Tensor) -> Tensor:
        """These samples of an input or output."""
        if not self.columns.spatial:
            return value.reshape(-1, value.shape[-1])[self.rows]
        return value[self.rows] if value.dim() == self.columns.spatial + 2 else value


def choose_positions(samples: int, positions: int, share: int, generator: torch.Generator) -> Tensor:
    """`share` different positions at random for each sample, or all there are; int64 (samples, share)."""
    if share >= positions:
        return torch.arange(positions).expand(samples, positions)
    return torch.rand(samples, positions, generator=generator, dtype=torch.float32).argsort(dim=1)[:, :share]
