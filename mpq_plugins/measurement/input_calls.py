"""Which tensors layers read, in which order: ties between layers' inputs, and what is needed at once.

A tensor is its place in memory, shape, strides and state: views that are alike in these are one tensor, and one that
was changed in place is another.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..models.running import call_model, first_input, sample_count
from ..quantization.input_values import InputValues

Reads = tuple[tuple[str, int], ...]
"""One forward pass: the layers in the order of their calls, each with the number of the tensor that it read."""


class InputCalls:
    """What the inputs of layers are, over some forward passes. modules: those that use a layer's weight, by layer."""

    def __init__(self, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        self._modules = modules
        self.values = {name: InputValues(name) for name in modules}
        self.passes: dict[Reads, None] = {}  # the different ones
        self._numel = dict.fromkeys(modules, 0)
        self._samples = self._batches = 0

    def run(self, model: nn.Module, batch: Any) -> None:
        """Look at one forward pass. Raises SettingError, naming the layer, for an input that is not finite."""
        held: list[Tensor] = []  # so that no other tensor comes to lie in the same place
        numbers: dict[tuple[Any, ...], int] = {}
        reads: list[tuple[str, int]] = []
        with self._watching(held, numbers, reads), torch.no_grad():
            call_model(model, batch)
        self._samples += sample_count(batch)
        self._batches += 1
        self.passes[tuple(reads)] = None

    def numel(self, layer: str) -> int:
        """Values of one sample's input, at least 1."""
        return max(1, round(self._numel[layer] / self._samples))

    @property
    def unreached(self) -> list[str]:
        """Layers that no batch has reached, or that are used without being called."""
        return [name for name, count in self._numel.items() if not count]

    @contextmanager
    def _watching(
        self, held: list[Tensor], numbers: dict[tuple[Any, ...], int], reads: list[tuple[str, int]]
    ) -> Iterator[None]:
        names = {module: name for name, users in self._modules.items() for module in users}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name, x = names[module], first_input(args, kwargs)
            self._check(name, x)
            if not x.numel():
                return
            held.append(x)
            read = name, numbers.setdefault(_identity(x), len(numbers))
            if read not in reads:
                self._numel[name] += x.numel()
            reads.append(read)
            self.values[name].look(x)

        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, layer: str, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise SettingError(f"layer {layer!r}: its input is {got}, and no floating tensor to quantize; skip it")
        if not bool(torch.isfinite(x).all()):
            raise SettingError(
                f"layer {layer!r}: its input holds NaN or infinity in batch {self._batches}; look at that batch and at "
                "the model, or skip the layer"
            )


def tensor_names(passes: Sequence[Reads]) -> dict[str, str]:
    """By layer the first layer, in the order of calls, that reads the same tensor.

    A layer that is called on several tensors ties all that read one of them.
    """
    order = list(dict.fromkeys(name for reads in passes for name, _ in reads))
    rank = {name: place for place, name in enumerate(order)}
    leader = {name: name for name in order}

    def found(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for reads in passes:
        readers: dict[int, str] = {}
        for name, tensor in reads:
            one, other = found(name), found(readers.setdefault(tensor, name))
            first, second = sorted((one, other), key=rank.__getitem__)
            leader[second] = first
    return {name: found(name) for name in order}


def live_sets(passes: Sequence[Reads], names: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """The largest sets of tensors, by name, that have been read at a call or before, and are at that call or after."""
    sets: dict[frozenset[str], tuple[str, ...]] = {}
    for reads in passes:
        order = [names[name] for name, _ in reads]
        first = {name: place for place, name in reversed(list(enumerate(order)))}
        last = {name: place for place, name in enumerate(order)}
        live: list[str] = []
        for place, name in enumerate(order):
            live = [one for one in live if last[one] >= place]
            if first[name] == place:
                live.append(name)
            sets.setdefault(frozenset(live), tuple(live))
    return _largest(sets)


def _largest(sets: Mapping[frozenset[str], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Those that are in no other."""
    holding: dict[str, list[frozenset[str]]] = {}
    for one in sets:
        for name in one:
            holding.setdefault(name, []).append(one)
    return tuple(
        listed for one, listed in sets.items() if not any(one < other for other in holding[listed[0]])
    )  # fmt: skip


def _identity(x: Tensor) -> tuple[Any, ...]:
    version = 0 if x.is_inference() else x._version
    place = (x.numel(),) if x.is_contiguous() else (tuple(x.shape), x.stride())  # a reshaped view is the same tensor
    return x.data_ptr(), place, x.dtype, version
