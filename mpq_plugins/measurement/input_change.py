"""How far the network's output moves when one layer's input alone is quantized; kl and distance of output_change.py.

One run for each layer, width and batch, from that layer on (replay.py). With an executor, a few layers on one batch are
a unit of work.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..common.store import Finished, Row
from ..errors import SettingError
from ..models.copying import duplicate
from ..models.input_ranges import InputRange, quantized_input
from ..models.running import evaluating, first_input, sample_count, with_first_input
from ..plans.stats import Array
from .contract import Output, model_logits, model_output
from .output_change import cosine_distance, divergence
from .replay import Replay
from .workers import Call, Workers

LAYERS_A_UNIT = 8  # that share one recorded run, on an executor
COMPARED: Mapping[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], float]]] = {
    "kl": (model_logits, divergence),
    "distance": (model_output, cosine_distance),
}

Said = Callable[[], None]
Found = Iterator[tuple[int, str, Row]]
"""Position of the batch, layer, and the changes by width."""


@dataclass(frozen=True)
class Input:
    """A layer, the modules that use its weight, by their names, and the ranges of their input, one a width."""

    layer: str
    users: tuple[str, ...]
    ranges: tuple[InputRange, ...]


@dataclass(frozen=True)
class Alone:
    """What is measured: of which model, in evaluation mode, on which inputs; kind: `kl` or `distance`."""

    model: nn.Module
    kind: str
    output: Output | None
    inputs: Sequence[Input]
    batches: Sequence[Any]

    def curves(self, finished: Finished | None, executor: Executor | None, said: Said) -> dict[str, Array]:
        """By layer, at each width: the mean over samples. said: called once a layer and batch."""
        rows = self._finished(finished)
        missing = [
            [one for one in self.inputs if (position, one.layer) not in rows] for position in range(len(self.batches))
        ]
        for _ in rows:
            said()
        for position, layer, row in self._here(missing) if executor is None else self._by(executor, missing):
            if not all(map(math.isfinite, row.values())):
                raise SettingError(
                    f"layer {layer!r}: the {self.kind} of its quantized input is NaN or infinite in batch {position}; "
                    "look at the inputs and the model"
                )
            if finished is not None:
                finished.add_row(_key(position, layer), row)
            rows[position, layer] = row
            said()
        return {one.layer: self._mean(one.layer, rows) for one in self.inputs}

    def _mean(self, layer: str, rows: Mapping[tuple[int, str], Row]) -> Array:
        counts = [sample_count(batch) for batch in self.batches]
        values = np.array([list(rows[position, layer].values()) for position in range(len(counts))])
        mean: Array = np.array(counts) @ values / sum(counts)
        return mean

    def _finished(self, finished: Finished | None) -> dict[tuple[int, str], Row]:
        """What an earlier run left."""
        rows: dict[tuple[int, str], Row] = {}
        for position in range(len(self.batches) if finished is not None else 0):
            for one in self.inputs:
                assert finished is not None
                row = finished.row(_key(position, one.layer))
                if row is not None and list(row) == _widths(one) and min(row.values()) >= 0:
                    rows[position, one.layer] = row
        return rows

    def _here(self, missing: Sequence[Sequence[Input]]) -> Found:
        runs = _Runs(self.model, self.kind, self.output)
        for position, inputs in enumerate(missing):
            for layer, row in runs.rows(inputs, self.batches[position]):
                yield position, layer, row

    def _by(self, executor: Executor, missing: Sequence[Sequence[Input]]) -> Found:
        calls = [
            Call(str(position), unit_rows, (self.model, self.kind, self.output, unit, self.batches[position]),
                 unit[0].layer)
            for position, inputs in enumerate(missing)
            for unit in _cut(inputs)
        ]  # fmt: skip
        with closing(Workers(executor, 1)) as workers:
            for call, rows in workers.finished(calls):
                for layer, row in rows.items():
                    yield int(call.name), layer, row


def unit_rows(
    model: nn.Module, kind: str, output: Output | None, inputs: Sequence[Input], batch: Any
) -> dict[str, Row]:
    """What a worker does: the rows of some layers on one batch, by a copy of its own, for threads share the model."""
    copied = duplicate(model)
    with evaluating(copied):
        return dict(_Runs(copied, kind, output).rows(inputs, batch))


class _Runs:
    """Runs of a model, and what is known of replaying it."""

    def __init__(self, model: nn.Module, kind: str, output: Output | None) -> None:
        self._model, self._output = model, output
        self._run, self._compare = COMPARED[kind]
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._checked: set[str] = set()
        self._replays = True

    def rows(self, inputs: Sequence[Input], batch: Any) -> Iterator[tuple[str, Row]]:
        """Each layer with its changes by width."""
        if not inputs:
            return
        replay = Replay(self._model, lambda: self._run(self._model, batch, self._output), self._replays)
        for one in inputs:
            users = [self._modules[name] for name in one.users]
            row = {}
            for input_range in one.ranges:
                with _quantizing(users, input_range):
                    if one.layer not in self._checked:
                        replay.check(users)
                        self._checked.add(one.layer)
                    row[str(input_range.bits)] = self._compare(replay.output, replay.again(users))
            self._replays = replay.replays
            yield one.layer, row


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


def _cut(inputs: Sequence[Input]) -> list[Sequence[Input]]:
    return [inputs[start : start + LAYERS_A_UNIT] for start in range(0, len(inputs), LAYERS_A_UNIT)]


def _key(position: int, layer: str) -> str:
    return f"{position} {layer}"


def _widths(one: Input) -> list[str]:
    return [str(input_range.bits) for input_range in one.ranges]
