"""How far the network's own output moves when one layer alone is quantized: what makes layers comparable.

KL: sum_k p_k log(p_k / q_k) of the logits' softmax, float against quantized, in nats, the mean over samples (and over
positions, of a language model). Distance: 1 - cosine of a user's output, such as an embedding, the mean over samples.
One run for each layer, bit-width and batch, from the changed layer on (alone.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..common.store import Row
from ..models.kinds import quantizable_weights
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from .alone import Alone
from .contract import Curves, Job, unreached


@dataclass(frozen=True)
class KL:
    """Kullback-Leibler divergence of the model's predictions, in nats a sample."""

    name: ClassVar[str] = "kl"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One layer at a time."""
        return _one_at_a_time(job, self.name)


@dataclass(frozen=True)
class Distance:
    """1 - cosine between outputs, dimensionless; for models without logits."""

    name: ClassVar[str] = "distance"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One layer at a time."""
        return _one_at_a_time(job, self.name)


def _one_at_a_time(job: Job, kind: str) -> dict[str, Curves]:
    layers = job.table.layers
    total, done = len(layers) * len(job.batches), 0
    widths = [str(b) for b in job.table.bits]
    alone = Alone(
        job.model, kind, job.output, _Quantized.of(job), {layer.name: widths for layer in layers}, job.batches, job.seed
    )

    def said() -> None:
        nonlocal done
        done += 1
        job.said(done, total)

    job.said(0, total)
    rows: dict[tuple[int, str], Row] = {}
    for position, name, row in alone.rows(job.finished, job.executor, said):
        rows[position, name] = row
    curves = {layer.name: Curves(alone.mean(rows, layer.name)) for layer in layers}
    for layer in layers:
        if not curves[layer.name].layer.any() and not _stays(job, layer):
            raise unreached(layer.name)
    return curves


def _stays(job: Job, layer: LayerStats) -> bool:
    """Whether quantizing changes nothing of the weight."""
    return all(torch.equal(quantized, job.weights[layer.name]) for quantized in job.quantized(layer))


@dataclass(frozen=True)
class _Quantized:
    """A layer's weight quantized. names: the modules that use it; table: without errors; the rest as a job has it."""

    table: LayerTable
    names: Mapping[str, tuple[str, ...]]
    moments: Mapping[str, Tensor] | None
    ranges: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> "_Quantized":
        """What a worker needs of a job."""
        bare = tuple(
            LayerStats(layer.name, layer.kind, layer.shape, layer.channel_axis, layer.importance, np.zeros(0), {})
            for layer in job.table.layers
        )
        paths = {module: path for path, module in job.model.named_modules()}
        names = {layer: tuple(paths[module] for module in users) for layer, users in job.modules.items()}
        return cls(replace(job.table, layers=bare, metrics=()), names, job.moments, job.ranges)

    def users(self, layer: str) -> tuple[str, ...]:
        """The modules that use its weight."""
        return self.names[layer]

    def of_layer(self, model: nn.Module, layer: str) -> Iterator[tuple[int, AbstractContextManager[None]]]:
        """Each bit-width."""
        weight = quantizable_weights(model)[layer].detach()
        stats = next(stats for stats in self.table.layers if stats.name == layer)
        job = Job(
            model, self.table, (), {layer: weight}, {}, None, self.moments, None, None, torch.Generator(), self.ranges
        )
        for b, quantized in zip(self.table.bits, list(job.quantized(stats)), strict=True):
            yield b, _holding(weight, quantized)


@contextmanager
def _holding(weight: Tensor, value: Tensor) -> Iterator[None]:
    """Another value in a weight's place."""
    kept = weight.clone()
    weight.copy_(value)
    try:
        yield
    finally:
        weight.copy_(kept)
