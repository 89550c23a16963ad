"""How far the network's output moves when one layer's input alone is quantized; kl and distance of alone.py."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..common.store import Finished, Row
from ..errors import SettingError
from ..models.input_ranges import InputRange, quantized_input
from ..models.running import first_input, with_first_input
from ..plans.stats import Array
from .alone import Alone

Said = Callable[[], None]


@dataclass(frozen=True)
class Inputs:
    """Layers' inputs quantized. names: the modules that use a layer's weight; ranges: of their input, one a width."""

    names: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, tuple[InputRange, ...]]

    def users(self, layer: str) -> tuple[str, ...]:
        """The modules whose input it is."""
        return self.names[layer]

    def of_layer(self, model: nn.Module, layer: str) -> Iterator[tuple[int, AbstractContextManager[None]]]:
        """Each width."""
        modules = dict(model.named_modules(remove_duplicate=False))
        users = [modules[name] for name in self.names[layer]]
        for input_range in self.ranges[layer]:
            yield input_range.bits, _quantizing(users, input_range)

    @property
    def widths(self) -> dict[str, list[str]]:
        """By layer, as text."""
        return {layer: [str(each.bits) for each in ranges] for layer, ranges in self.ranges.items()}


def input_curves(alone: Alone, finished: Finished | None, executor: Executor | None, said: Said) -> dict[str, Array]:
    """By layer, at each width: the mean over samples. said: called once a layer and batch. Raises SettingError."""
    rows: dict[tuple[int, str], Row] = {}
    for position, layer, row in alone.rows(finished, executor, said):
        if not all(map(math.isfinite, row.values())):
            raise SettingError(
                f"layer {layer!r}: the {alone.kind} of its quantized input is NaN or infinite in batch {position}; "
                "look at the inputs and the model"
            )
        rows[position, layer] = row
    return {layer: alone.mean(rows, layer) for layer in alone.layers}


@contextmanager
def _quantizing(users: Sequence[nn.Module], input_range: InputRange) -> Iterator[None]:
    """The inputs of these modules at the levels of a range."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_input(args, kwargs)
        return with_first_input(args, kwargs, quantized_input(x, input_range))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in users]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
