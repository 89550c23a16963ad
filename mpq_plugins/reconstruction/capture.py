"""What a block is called with and gives: its inputs in the quantized model, its outputs in the float one."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ..errors import SettingError, WeightError
from ..models.running import call_model

PLAIN = (bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """One call of a block: flattened (args, kwargs), how to put them together again, and its output where wanted."""

    leaves: tuple[Any, ...]
    spec: Any
    output: Tensor | None = None


class _Enough(BaseException):
    """Ends a forward when the block has been seen; no model catches it, for it is no Exception."""


def call_order(model: nn.Module, names: Sequence[str], batch: Any) -> dict[str, int]:
    """How often each module is called on a batch, in the order of their first calls; those never called are absent."""
    counts: dict[str, int] = {}
    modules = dict(model.named_modules())

    def seen(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [modules[name].register_forward_pre_hook(seen(name)) for name in names]
    try:
        with torch.no_grad():
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def inputs_of(model: nn.Module, block: nn.Module, batch: Any, calls: int) -> list[Call]:
    """What the block is called with on a batch. calls: how often, so that the run ends with the last."""
    seen: list[Call] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_call(args, kwargs))
        if len(seen) == calls:
            raise _Enough

    with _hook(block.register_forward_pre_hook(before, with_kwargs=True)), torch.no_grad():
        _run(model, batch)
    return seen


def calls_of(model: nn.Module, block: nn.Module, name: str, batch: Any, calls: int) -> list[Call]:
    """As inputs_of, with the block's outputs. Raises SettingError or WeightError for one that is of no use."""
    begun: list[Call] = []
    open_calls: list[int] = []
    outputs: dict[int, Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_calls.append(len(begun))
        begun.append(_call(args, kwargs))

    def after(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        outputs[open_calls.pop()] = first_tensor(output, name).detach().clone()
        if len(outputs) == calls:
            raise _Enough

    first = block.register_forward_pre_hook(before, with_kwargs=True)
    with _hook(first), _hook(block.register_forward_hook(after, with_kwargs=True)), torch.no_grad():
        _run(model, batch)
    complete = [Call(call.leaves, call.spec, outputs[position]) for position, call in enumerate(begun)]
    for output in outputs.values():
        if not torch.isfinite(output).all():
            raise WeightError(f"block {name!r}: gives NaN or infinite values in the float model; look at the batches")
    return complete


def first_tensor(output: Any, name: str) -> Tensor:
    """A block's output; of several, the first. Raises SettingError, naming the block, where there is none."""
    tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if tensor is None or not tensor.dim() or not tensor.is_floating_point():
        raise SettingError(f"block {name!r}: gives a {type(output).__name__}, no values to come close to; name others")
    return tensor


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    leaves, spec = tree_flatten((args, kwargs))
    return Call(tuple(map(own_leaf, leaves)), spec)


def own_leaf(leaf: Any) -> Any:
    """A copy of an argument, for a block, or what comes after it, may change it: a tensor in place, a cache at all."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if leaf is None or isinstance(leaf, PLAIN):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001
        return leaf  # a user's object may be anything


def _run(model: nn.Module, batch: Any) -> None:
    with suppress(_Enough):
        call_model(model, batch)


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
