"""Where the streams of a compensation meet, found by one run of the float model.

A planned layer is a station, and so is each BatchNorm whose statistics are corrected. Which BatchNorm a layer feeds,
and which tensor is added to its output, is told by the tensors themselves: the same object comes out of one module and
goes into another, or into an addition.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..models.running import first_input, run_model
from ..models.tracing import BATCH_NORMS

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}


@dataclass(frozen=True)
class Sum:
    """What is added to a layer's output: the input or the output of a module that has run before.

    norm: the BatchNorm between the layer and the sum, if there is one.
    """

    module: str
    is_input: bool
    norm: str | None

    @property
    def place(self) -> tuple[str, bool]:
        """The module, and whether it is its input."""
        return self.module, self.is_input


@dataclass(frozen=True)
class Stations:
    """order: layers and norms as they are first called; calls: how often each is; norms: layer -> the BatchNorm that
    takes its output; sums: layer -> what is added to that."""

    order: tuple[str, ...]
    calls: Mapping[str, int]
    norms: Mapping[str, str]
    sums: Mapping[str, Sum]


def find_stations(model: nn.Module, names: Sequence[str], batch: Any) -> Stations:
    """Run the model on a batch and watch. names: layers and norms. Raises SettingError where it does not run."""
    seen = _Seen(dict(model.named_modules()), frozenset(names))
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(seen.before(name), with_kwargs=True))
            stack.enter_context(module.register_forward_hook(seen.after(name)))
        stack.enter_context(_Additions(seen))
        run_model(model, batch)
    # Of a module that is called several times, a place does not say which call is meant.
    found = {layer: [one for one in places if seen.calls[one.module] == 1] for layer, places in seen.sums.items()}
    sums = {layer: places[0] for layer, places in found.items() if places}
    return Stations(tuple(dict.fromkeys(seen.order)), Counter(seen.order), seen.norms, sums)


def version_of(value: Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not say."""
    return 0 if value.is_inference() else value._version


@dataclass
class _Seen:
    """What goes by; tensors are kept, so that none gets the identity of one that is gone.

    places: tensor -> when and where it was seen, and the version that it had; outputs: tensor -> the layer that
    gave it, the norm behind, and the version. A tensor that is changed in place is another one.
    """

    modules: Mapping[str, nn.Module]
    names: frozenset[str]
    order: list[str] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    sums: dict[str, list[Sum]] = field(default_factory=dict)
    places: dict[int, list[tuple[int, str, bool, int]]] = field(default_factory=dict)
    outputs: dict[int, tuple[str, str | None, int]] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = first_input(args, kwargs)
            self.calls[name] += 1
            if name in self.names:
                self.order.append(name)
                self.began.setdefault(name, len(self.kept))
                fed = self._layer_of(given) if isinstance(module, BATCH_NORMS) else None
                if fed is not None and fed[1] is None:
                    self.norms[fed[0]] = name
            self._place(given, name, True)

        return hook

    def after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and name in self.names:
                if isinstance(module, BATCH_NORMS):
                    layer = next((layer for layer, norm in self.norms.items() if norm == name), None)
                    if layer is not None:
                        self.outputs[id(output)] = (layer, name, version_of(output))
                else:
                    self.outputs[id(output)] = (name, None, version_of(output))
            self._place(output, name, False)

        return hook

    def add(self, one: Any, other: Any) -> None:
        """An addition of two tensors of one shape."""
        for output, term in ((one, other), (other, one)):
            layer = self._layer_of(output)
            if layer is None or layer[0] in self.sums or output.shape != term.shape:
                continue
            self.sums[layer[0]] = [
                Sum(module, is_input, layer[1])
                for position, module, is_input, version in self.places.get(id(term), ())
                if position <= self.began[layer[0]] and version == version_of(term)
            ]

    def _layer_of(self, value: Any) -> tuple[str, str | None] | None:
        """The layer whose output a value is, and the norm in between."""
        layer, norm, version = self.outputs.get(id(value), (None, None, None))
        return None if layer is None or version_of(value) != version else (layer, norm)

    def _place(self, value: Any, name: str, is_input: bool) -> None:
        if not isinstance(value, Tensor):
            return
        self.places.setdefault(id(value), []).append((len(self.kept), name, is_input, version_of(value)))
        self.kept.append(value)


class _Additions(TorchFunctionMode):
    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDITIONS and len(args) == 2 and not kwargs and all(isinstance(arg, Tensor) for arg in args):
            self._seen.add(*args)
        return func(*args, **(kwargs or {}))
