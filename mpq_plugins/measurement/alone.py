"""How far the network's output moves when one layer alone is changed, its weight or its input: kl and distance.

One run for each layer, width and batch, from that layer on (replay.py). A few layers on one batch are a unit of work.
Every run draws the same random numbers, if the model draws any: a change is told from what is drawn, and units need
nothing of each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.store import Finished, Row
from ..models.copying import duplicate
from ..models.running import evaluating, sample_count
from ..models.units import Job as Work
from ..models.units import Unit
from ..plans.stats import Array
from .contract import Output, model_logits, model_output
from .replay import Replay

LAYERS_A_UNIT = 4  # that share one recorded run, on an executor

Compare = Callable[[Tensor, Tensor], float]
Said = Callable[[], None]
Rows = dict[str, Row]
"""By layer, what its change does at each width, by the width as text."""


class Changes(Protocol):
    """What is done to a layer; other processes can be sent it."""

    def users(self, layer: str) -> Sequence[str]:
        """Names of the modules that compute otherwise once the layer is changed."""
        ...

    def of_layer(self, model: nn.Module, layer: str) -> Iterator[tuple[int, AbstractContextManager[None]]]:
        """Each width with a block in which the model's layer is changed."""
        ...


def divergence(exact: Tensor, rough: Tensor) -> float:
    """KL, sum_k p_k log(p_k / q_k), of two models' logits, the mean over samples and positions, in nats."""
    p, q = (output.double().log_softmax(-1) for output in (exact, rough))
    mean = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    return float(mean.clamp_min(0))  # NaN stays NaN


def cosine_distance(exact: Tensor, rough: Tensor) -> float:
    """1 - cosine of two models' outputs, the mean over samples."""
    cosine = torch.nn.functional.cosine_similarity(exact.double().flatten(1), rough.double().flatten(1), dim=1)
    return float((1 - cosine.mean()).clamp_min(0))


COMPARED: Mapping[str, tuple[Callable[[nn.Module, Any, Output | None], Tensor], Compare]] = {
    "kl": (model_logits, divergence),
    "distance": (model_output, cosine_distance),
}


@dataclass(frozen=True)
class Alone:
    """What is measured: of which model, in evaluation mode, on which inputs.

    kind: `kl` or `distance`; layers: with their widths, as text; what: of the layers, for errors; seed: of what the
    model draws at random.
    """

    model: nn.Module
    kind: str
    output: Output | None
    changes: Changes
    layers: Mapping[str, Sequence[str]]
    batches: Sequence[Any]
    seed: int
    what: str = "weights"

    def rows(self, finished: Finished | None, executor: Executor | None, said: Said) -> Iterator[tuple[int, str, Row]]:
        """Every batch's position and layer with what the change does; said: called after each.

        What was finished comes first, and what is found is to be kept by `keep`.
        """
        missing: dict[int, list[str]] = {}
        for position in range(len(self.batches)):
            for layer in self.layers:
                row = finished.row(_key(position, layer)) if finished is not None else None
                if row is None or list(row) != list(self.layers[layer]) or min(row.values()) < 0:
                    missing.setdefault(position, []).append(layer)
                    continue
                yield position, layer, row
                said()
        for position, layer, row in self._found(missing, executor):
            if finished is not None and all(np.isfinite(list(row.values()))):
                finished.add_row(_key(position, layer), row)
            yield position, layer, row
            said()

    def mean(self, rows: Mapping[tuple[int, str], Row], layer: str) -> Array:
        """Over samples, at each width."""
        counts = [sample_count(batch) for batch in self.batches]
        total = np.zeros(len(self.layers[layer]))
        for position, count in enumerate(counts):
            total += count * np.array([rows[position, layer][width] for width in self.layers[layer]])
        mean: Array = total / sum(counts)
        return mean

    def _found(self, missing: Mapping[int, Sequence[str]], executor: Executor | None) -> Iterator[tuple[int, str, Row]]:
        if executor is None or (not isinstance(executor, ProcessPoolExecutor) and missing and self._draws):
            # Threads, of which dask's workers may have several, draw from each other's numbers.
            runs = _Runs(self.model, self.kind, self.output, self.seed)
            checked: set[str] = set()
            for position, layers in missing.items():
                for layer, row in runs.rows(self.changes, layers, self.batches[position], {*layers} - checked):
                    yield position, layer, row
                checked.update(layers)
            return
        first, later = _in_turn(missing)
        replays = True
        for position, rows, still in self._handed_out(first, executor, True, True):
            replays &= still
            for layer, row in rows.items():
                yield position, layer, row
        for position, rows, _ in self._handed_out(later, executor, False, replays):
            for layer, row in rows.items():
                yield position, layer, row

    def _handed_out(
        self, units: Sequence[tuple[int, Sequence[str]]], executor: Executor, check: bool, replays: bool
    ) -> Iterator[tuple[int, Rows, bool]]:
        """Of each unit the position of its batch, and what unit_rows gives."""
        needs = {"model": self.model, "output function": self.output, "changes": self.changes}
        work = Work(unit_rows, needs, f"measuring the {self.kind} of {self.what} of")
        # Threads have one generator between them and whoever has started them, and run models alone that draw nothing.
        seed = self.seed if isinstance(executor, ProcessPoolExecutor) else None
        cut = [
            Unit(str(n), layers[0], (Asked(self.kind, seed, layers, check, replays), self.batches[position]))
            for n, (position, layers) in enumerate(units)
        ]
        for unit, (rows, still) in work.results(cut, executor):
            yield units[int(unit.name)][0], rows, still

    @property
    def _draws(self) -> bool:
        """Whether the model draws random numbers as it runs, on any batch: it may do so for some alone."""
        torch.manual_seed(self.seed)
        before = torch.get_rng_state()
        for batch in self.batches:
            with torch.no_grad():
                COMPARED[self.kind][0](self.model, batch, self.output)
            if not torch.equal(before, torch.get_rng_state()):
                return True
        return False


@dataclass(frozen=True)
class Asked:
    """What a unit does.

    seed: of each run, None for a model that draws nothing; check: whether replaying is held against a full run;
    replays: whether the model may be replayed.
    """

    kind: str
    seed: int | None
    layers: Sequence[str]
    check: bool
    replays: bool


def unit_rows(model: nn.Module, output: Output | None, changes: Changes, asked: Asked, batch: Any) -> tuple[Rows, bool]:
    """What a worker does: the rows of some layers on one batch, by a copy of its own, for threads share the model.

    The second result is whether the model may still be replayed.
    """
    copied = duplicate(model)
    with evaluating(copied), torch.random.fork_rng(devices=[], enabled=asked.seed is not None):
        runs = _Runs(copied, asked.kind, output, asked.seed, asked.replays)
        rows = dict(runs.rows(changes, asked.layers, batch, {*asked.layers} if asked.check else set()))
    return rows, runs.replays


@dataclass
class _Runs:
    """Runs of a model, and whether it can be replayed."""

    model: nn.Module
    kind: str
    output: Output | None
    seed: int | None
    replays: bool = True
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))

    def rows(
        self, changes: Changes, layers: Sequence[str], batch: Any, unchecked: set[str]
    ) -> Iterator[tuple[str, Row]]:
        """Each layer with its row. unchecked: of which layers replaying is held against a full run first."""
        run, compare = COMPARED[self.kind]

        def seeded_run() -> Tensor:
            if self.seed is not None:
                torch.manual_seed(self.seed)
            return run(self.model, batch, self.output)

        replay = Replay(self.model, seeded_run, self.replays)
        for layer in layers:
            users = [self.modules[name] for name in changes.users(layer)]
            row = {}
            for bits, changed in changes.of_layer(self.model, layer):
                with changed:
                    if layer in unchecked:
                        replay.check(users)
                        unchecked.discard(layer)
                    row[str(bits)] = compare(replay.output, replay.again(users))
            self.replays = replay.replays
            yield layer, row


def _in_turn(
    missing: Mapping[int, Sequence[str]],
) -> tuple[list[tuple[int, Sequence[str]]], list[tuple[int, Sequence[str]]]]:
    """Units in which layers come for the first time, and the others: (position of the batch, layers)."""
    seen: set[str] = set()
    first: list[tuple[int, Sequence[str]]] = []
    later: list[tuple[int, Sequence[str]]] = []
    for position, layers in missing.items():
        new = [layer for layer in layers if layer not in seen]
        first += [(position, unit) for unit in _cut(new)]
        later += [(position, unit) for unit in _cut([layer for layer in layers if layer in seen])]
        seen.update(new)
    return first, later


def _cut(layers: Sequence[str]) -> list[Sequence[str]]:
    return [layers[start : start + LAYERS_A_UNIT] for start in range(0, len(layers), LAYERS_A_UNIT)]


def _key(position: int, layer: str) -> str:
    return f"{position} {layer}"
