"""A block's cached samples: drawn a few at a time to learn on, and gone through in order to tell what was learned."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ..errors import SettingError, what_it_said
from .cache import IMAGES, Cache, Column
from .capture import Call

IN_ORDER = 128  # samples at a time where nothing is learned

Run = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


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
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in self.fixed]
        for position, values in self.rows.items():
            own = take(values)
            if position in self.exact:
                own = mixed(own, take(self.exact[position]))
            leaves[position] = own
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
        sizes = torch.tensor([float(len(group.target)) for group in self.groups])
        several = len(self.groups) > 1
        group = self.groups[int(torch.multinomial(sizes, 1, generator=generator)) if several else 0]

        def mixed(own: Tensor, exact: Tensor) -> Tensor:
            return torch.where(_chosen(own, mix, generator).to(own.device), exact, own)

        rows = slice(None) if group.whole else torch.randperm(len(group.target), generator=generator)[:count]
        return group.pick(partial(self._take, rows=rows), self.device, mixed)

    def in_order(self) -> Iterator[Sample]:
        """Every sample once, inputs as the quantized model gives them."""
        for group in self.groups:
            count = len(group.target) if group.whole else IN_ORDER
            for start in range(0, len(group.target), max(1, count)):
                rows = slice(start, start + count)
                yield group.pick(partial(self._take, rows=rows), self.device, lambda own, _: own)

    def _take(self, values: Tensor, rows: Tensor | slice) -> Tensor:
        if values.dim() != IMAGES:
            return values[rows].to(self.device)
        images = values.movedim(1, -1)[rows].movedim(-1, 1).to(self.device)  # as they lie in the cache
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


@dataclass
class _Growing:
    """A group as its calls come in."""

    call: Call
    batched: tuple[int, ...]
    whole: bool
    rows: dict[int, Column]
    exact: dict[int, Column]
    target: Column
    importance: Column | None

    def takes(self, call: Call, batched: Sequence[int]) -> bool:
        if self.whole or call.spec != self.call.spec or tuple(batched) != self.batched:
            return False
        pairs = zip(self.call.leaves, call.leaves, strict=True)
        return all(_alike(mine, own, k in batched) for k, (mine, own) in enumerate(pairs))


@dataclass
class Collector:
    """Takes in pairs of calls, the quantized model's and the float one's, and gives them as Samples.

    name: the block's; runs: the float block, to see whether samples can be used apart. mixing: keep the float model's
    inputs too.
    """

    cache: Cache
    name: str
    runs: Run
    mixing: bool
    device: torch.device
    groups: list[_Growing] = field(default_factory=list)

    def add(self, rough: Call, exact: Call, importance: Tensor | None) -> None:
        """Cache one call; exact has the output.

        Raises SettingError where the two nets' calls differ in more than values, or where the block run again gives
        something else.
        """
        assert exact.output is not None
        if rough.spec != exact.spec or list(map(_shape, rough.leaves)) != list(map(_shape, exact.leaves)):
            raise SettingError(
                f"block {self.name!r}: the quantized model gives it inputs of other shapes than the float one, for the "
                "model decides by values; name larger blocks (blocks=)"
            )
        batched = tuple(k for k, leaf in enumerate(rough.leaves) if _has_rows(leaf, len(exact.output)))
        group = next((one for one in self.groups if one.takes(rough, batched)), None)
        if group is None:
            self._require_repeatable(exact)
            whole = not batched or not _apart(self.runs, exact, batched)
            group = self._new(rough, batched, whole, importance is not None)
            self.groups.append(group)
        for position in batched:
            group.rows[position].append(rough.leaves[position])
            if position in group.exact:
                group.exact[position].append(exact.leaves[position])
        group.target.append(exact.output)
        if group.importance is not None and importance is not None:
            group.importance.append(importance)

    def samples(self) -> Samples:
        """Everything taken in."""
        return Samples(tuple(map(_grown, self.groups)), self.device)

    def _require_repeatable(self, call: Call) -> None:
        assert call.output is not None
        args, kwargs = tree_unflatten(list(map(_copied, call.leaves)), call.spec)
        try:
            again = self.runs(args, kwargs)
        except Exception as error:  # a user's module may raise anything
            raise SettingError(
                f"block {self.name!r}: does not run on its own inputs again ({what_it_said(error)}); name others "
                "(blocks=)"
            ) from error
        if again.shape != call.output.shape or not close(again, call.output, call.output):
            raise SettingError(
                f"block {self.name!r}: gives something else when it is run again on its own inputs, for it keeps a "
                "state or draws random numbers; name others (blocks=)"
            )

    def _new(self, call: Call, batched: tuple[int, ...], whole: bool, importance: bool) -> _Growing:
        rows = {k: self.cache.column() for k in batched}
        floating = [k for k in batched if call.leaves[k].is_floating_point()]
        exact = {k: self.cache.column() for k in floating} if self.mixing else {}
        weights = self.cache.column() if importance else None
        return _Growing(call, batched, whole, rows, exact, self.cache.column(), weights)


def _grown(group: _Growing) -> Group:
    fixed = tuple(None if k in group.batched else leaf for k, leaf in enumerate(group.call.leaves))
    return Group(
        group.call.spec, fixed,
        {k: column.tensor() for k, column in group.rows.items()},
        {k: column.tensor() for k, column in group.exact.items()},
        group.target.tensor(), None if group.importance is None else group.importance.tensor(), group.whole,
    )  # fmt: skip


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count


def _alike(mine: Any, own: Any, batched: bool) -> bool:
    """Whether two calls' leaves are the same but for the samples."""
    if not isinstance(mine, Tensor) or not isinstance(own, Tensor):
        return mine is own or (isinstance(mine, bool | int | float | str) and type(mine) is type(own) and mine == own)
    if mine.dtype != own.dtype or mine.shape[1:] != own.shape[1:]:
        return False
    return batched or (mine.shape == own.shape and bool(mine.equal(own)))


def _apart(run: Run, call: Call, batched: Sequence[int]) -> bool:
    """Whether the block gives half of the samples, alone, what it gave them among all."""
    assert call.output is not None
    half = slice(0, max(1, len(call.output) // 2))
    leaves = [_copied(leaf[half] if k in batched else leaf) for k, leaf in enumerate(call.leaves)]
    args, kwargs = tree_unflatten(leaves, call.spec)
    try:
        alone = run(args, kwargs)
    except Exception:  # noqa: BLE001
        return False
    expected = call.output[half]
    return alone.shape == expected.shape and close(alone, expected, call.output)


def close(one: Tensor, other: Tensor, of: Tensor) -> bool:
    """But for the order of additions, which may depend on how many samples there are."""
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(of.abs().amax()))


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _shape(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
