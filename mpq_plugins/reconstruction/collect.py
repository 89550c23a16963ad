"""From calls of a block, batch by batch, to its cached samples; and whether samples can be used one without another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ..common.text import what_it_said
from ..errors import SettingError
from .cache import Cache, Column
from .capture import PLAIN, Call, own_leaf
from .samples import Group, Samples

Run = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


@dataclass
class _Growing:
    """A group as its calls come in.

    call: the first, with the float model's inputs and output; apart: whether samples do not depend on one another, None
    while there was only one to tell by.
    """

    call: Call
    fixed: tuple[Any, ...]
    batched: tuple[int, ...]
    apart: bool | None
    rows: dict[int, Column]
    exact: dict[int, Column]
    target: Column
    importance: Column | None

    def takes(self, rough: Call, call: Call, batched: Sequence[int], run: Run) -> bool:
        """Whether a call differs from the first in its samples alone, and these can be mixed with the first's."""
        if self.apart is False or call.spec != self.call.spec or tuple(batched) != self.batched:
            return False
        pairs = enumerate(zip(self.call.leaves, call.leaves, self.fixed, rough.leaves, strict=True))
        if not all(_alike(a, b, k in batched) and (k in batched or _alike(c, d, False)) for k, (a, b, c, d) in pairs):
            return False
        if self.apart is None:
            self.apart = _together(run, self.call, call, batched)
        return self.apart


@dataclass
class Collector:
    """Takes in pairs of calls, the quantized model's and the float one's, and gives them as Samples.

    name: the block's; runs: the float block. mixing: keep the float model's inputs too.
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
        if not len(exact.output):  # an expert that no token was sent to
            return
        if rough.spec != exact.spec or list(map(_shape, rough.leaves)) != list(map(_shape, exact.leaves)):
            raise SettingError(
                f"block {self.name!r}: the quantized model gives it inputs of other shapes than the float one, for the "
                "model decides by values; name larger blocks (blocks=)"
            )
        batched = tuple(k for k, leaf in enumerate(rough.leaves) if _has_rows(leaf, len(exact.output)))
        group = next((one for one in self.groups if one.takes(rough, exact, batched, self.runs)), None)
        if group is None:
            self._require_repeatable(exact)
            group = self._new(rough, exact, batched, importance is not None)
            self.groups.append(group)
        for position in batched:
            group.rows[position].append(rough.leaves[position])
            if position in group.exact:
                group.exact[position].append(exact.leaves[position])
        group.target.append(exact.output)
        if group.importance is not None and importance is not None:
            group.importance.append(importance)

    def samples(self) -> Samples:
        """Everything taken in. Raises SettingError where nothing was."""
        if not self.groups:
            raise SettingError(f"block {self.name!r}: no batch reaches it; give batches that do")
        return Samples(tuple(map(_grown, self.groups)), self.device)

    def _require_repeatable(self, call: Call) -> None:
        assert call.output is not None
        args, kwargs = tree_unflatten(list(map(own_leaf, call.leaves)), call.spec)
        try:
            again = self.runs(args, kwargs)
        except Exception as error:  # a user's module may raise anything
            raise SettingError(
                f"block {self.name!r}: does not run on its own inputs again ({what_it_said(error)}); name others "
                "(blocks=)"
            ) from error
        if again.shape != call.output.shape or not close(again, call.output):
            raise SettingError(
                f"block {self.name!r}: gives something else when it is run again on its own inputs, for it keeps a "
                "state, draws random numbers or relies on what is around it (autocast); name others (blocks=), or "
                "switch that off (a transformer's cache: model.config.use_cache = False)"
            )

    def _new(self, rough: Call, exact: Call, batched: tuple[int, ...], importance: bool) -> _Growing:
        rows = {k: self.cache.column() for k in batched}
        floating = [k for k in batched if rough.leaves[k].is_floating_point()]
        kept = {k: self.cache.column() for k in floating} if self.mixing else {}
        fixed = tuple(None if k in batched else leaf for k, leaf in enumerate(rough.leaves))
        weights = self.cache.column() if importance else None
        apart = _apart(self.runs, exact, batched)
        return _Growing(exact, fixed, batched, apart, rows, kept, self.cache.column(), weights)


def _grown(group: _Growing) -> Group:
    return Group(
        group.call.spec, group.fixed,
        {k: column.tensor() for k, column in group.rows.items()},
        {k: column.tensor() for k, column in group.exact.items()},
        group.target.tensor(), None if group.importance is None else group.importance.tensor(), not group.apart,
    )  # fmt: skip


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of additions, which may depend on how many samples there are."""
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().amax())) if other.numel() else True


def _apart(run: Run, call: Call, batched: Sequence[int]) -> bool | None:
    """Whether the block gives either half of the samples, alone, what it gave them among all; None for one sample.

    Halves at random, and not in order, for what a sample meets may depend on where it stands, as windows meet masks.
    """
    assert call.output is not None
    count = len(call.output)
    if not batched or count < 2:
        return False if not batched else None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(call.output.device)
    halves = (order[: count // 2], order[count // 2 :])
    return all(
        _gives(
            run, call, [leaf[half] if k in batched else leaf for k, leaf in enumerate(call.leaves)], call.output[half]
        )
        for half in halves
    )


def _together(run: Run, call: Call, other: Call, batched: Sequence[int]) -> bool:
    """Whether the block gives two calls' samples, as one batch, what it gave them apart."""
    assert call.output is not None
    assert other.output is not None
    pairs = enumerate(zip(call.leaves, other.leaves, strict=True))
    leaves = [torch.cat([kept, new]) if k in batched else kept for k, (kept, new) in pairs]
    if call.output.shape[1:] != other.output.shape[1:]:
        return False
    return _gives(run, call, leaves, torch.cat([call.output, other.output]))


def _gives(run: Run, call: Call, leaves: Sequence[Any], expected: Tensor) -> bool:
    args, kwargs = tree_unflatten(list(map(own_leaf, leaves)), call.spec)
    try:
        given = run(args, kwargs)
    except Exception:  # noqa: BLE001
        return False  # a user's module may raise anything on samples that it takes only together
    return given.shape == expected.shape and close(given, expected)


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count


def _alike(kept: Any, new: Any, batched: bool) -> bool:
    """Whether two calls' leaves are the same but for the samples."""
    if not isinstance(kept, Tensor) or not isinstance(new, Tensor):
        return kept is new or (isinstance(kept, PLAIN) and type(kept) is type(new) and kept == new)
    if kept.dtype != new.dtype or kept.shape[1:] != new.shape[1:]:
        return False
    return batched or (kept.shape == new.shape and bool(kept.equal(new)))


def _shape(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
