"""A block's cached samples: drawn a few at a time to learn on, and gone through in order to tell what was learned."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from .cache import IMAGES
from .capture import own_leaf

IN_ORDER = 128  # samples at a time where nothing is learned


@dataclass(frozen=True)
class Sample:
    """Inputs of a block, the float model's output, and how much each of its values counts, where not all the same."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    importance: Tensor | None

    @property
    def count(self) -> int:
        """How many samples, going by the first dimension."""
        return len(self.target)


@dataclass(frozen=True)
class Group:
    """Calls that differ in their samples alone.

    rows: tensors with a row for each sample, by position among the leaves; exact: the float model's own, where inputs
    are mixed; fixed: the other leaves. whole: samples depend on one another, so they are only used together.
    """

    spec: Any
    fixed: tuple[Any, ...]
    rows: dict[int, Tensor]
    exact: dict[int, Tensor]
    target: Tensor
    importance: Tensor | None
    whole: bool

    def pick(
        self, take: Callable[[Tensor], Tensor], device: torch.device, mixed: Callable[[Tensor, Tensor], Tensor]
    ) -> Sample:
        """Some of the samples, by `take`; mixed: (the quantized model's input, the float model's) -> what to use."""
        # Copies, as `take` gives them, for a block may change its inputs in place.
        leaves = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else own_leaf(leaf) for leaf in self.fixed]
        for position, values in self.rows.items():
            rows_taken = take(values)
            if position in self.exact:
                rows_taken = mixed(rows_taken, take(self.exact[position]))
            leaves[position] = rows_taken
        args, kwargs = tree_unflatten(leaves, self.spec)
        return Sample(args, kwargs, take(self.target), None if self.importance is None else take(self.importance))


@dataclass(frozen=True)
class Samples:
    """All groups of a block. channels_last: images are given in that memory format, which convolutions prefer."""

    groups: tuple[Group, ...]
    device: torch.device
    channels_last: bool = False

    def draw(self, count: int, mix: float, generator: torch.Generator) -> Sample:
        """`count` samples at random, of one group; mix: how likely each input value is the float model's."""
        sizes = torch.tensor([float(len(group.target)) for group in self.groups], dtype=torch.float32)
        several = len(self.groups) > 1
        group = self.groups[int(torch.multinomial(sizes, 1, generator=generator)) if several else 0]

        def mixed(rough: Tensor, exact: Tensor) -> Tensor:
            return torch.where(_chosen(rough, mix, generator).to(rough.device), exact, rough)

        rows = slice(None) if group.whole else torch.randperm(len(group.target), generator=generator)[:count]
        return group.pick(partial(self._take, rows=rows), self.device, mixed)

    def in_order(self) -> Iterator[Sample]:
        """Every sample once, inputs as the quantized model gives them."""
        for group in self.groups:
            count = len(group.target) if group.whole else IN_ORDER
            for start in range(0, len(group.target), max(1, count)):
                rows = slice(start, start + count)
                yield group.pick(partial(self._take, rows=rows), self.device, lambda rough, _: rough)

    def _take(self, values: Tensor, rows: Tensor | slice) -> Tensor:
        """A copy of these rows; images as they lie in the cache, or contiguous."""
        stored = values.movedim(1, -1) if values.dim() == IMAGES else values
        taken = (stored[rows].clone() if isinstance(rows, slice) else stored[rows]).to(self.device)
        if values.dim() != IMAGES:
            return taken
        images = taken.movedim(-1, 1)
        return images if self.channels_last else images.contiguous()


def _chosen(values: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """True with this probability, to 2^-16, for each value; laid out as the values are."""
    count, least = values.numel(), round(share * 65536)
    if least == 65536:
        return torch.ones(values.shape, dtype=torch.bool)
    # Four at once out of 64 random bits: a tenth of the time that as many random floats take.
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    chosen = bits.view(torch.int16)[:count] < least - 32768
    if values.dim() != IMAGES:
        return chosen.reshape(values.shape)
    n, c, h, w = values.shape
    return chosen.reshape(n, h, w, c).movedim(-1, 1)
