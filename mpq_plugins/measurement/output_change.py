"""How far the network's own output moves when one layer alone is quantized: what makes layers comparable.

KL: sum_k p_k log(p_k / q_k) of the logits' softmax, float against quantized, in nats, the mean over samples (and over
positions, of a language model). Distance: 1 - cosine of a user's output, such as an embedding, the mean over samples.
One run for each layer, bit-width and batch, from the changed layer on (replay.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.running import sample_count
from ..plans.stats import LayerStats
from .contract import Curves, Job, unreached
from .replay import Replay

Compare = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class KL:
    """Kullback-Leibler divergence of the model's predictions, in nats a sample."""

    name: ClassVar[str] = "kl"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One layer at a time."""
        return _one_at_a_time(job, job.logits, divergence)


@dataclass(frozen=True)
class Distance:
    """1 - cosine between outputs, dimensionless; for models without logits."""

    name: ClassVar[str] = "distance"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One layer at a time."""
        return _one_at_a_time(job, job.run, cosine_distance)


def _one_at_a_time(job: Job, run: Callable[[Any], Tensor], compare: Compare) -> dict[str, Curves]:
    layers, samples = job.table.layers, [sample_count(batch) for batch in job.batches]
    sums = {layer.name: np.zeros(len(job.table.bits)) for layer in layers}
    widths = {str(b) for b in job.table.bits}
    checked: set[str] = set()
    replays = True
    done = 0
    for position, batch in enumerate(job.batches):
        replay: Replay | None = None
        for layer in layers:
            job.said(done, len(layers) * len(job.batches))
            done += 1
            key = f"{position} {layer.name}"
            row = job.finished.row(key) if job.finished is not None else None
            if row is None or row.keys() != widths or min(row.values()) < 0:
                if replay is None:
                    replay = Replay(job.model, lambda batch=batch: run(batch), replays)  # type: ignore[misc]
                row = _row(job, layer, replay, compare, check=layer.name not in checked)
                checked.add(layer.name)
                replays = replay.replays
                if job.finished is not None:
                    job.finished.add_row(key, row)
            sums[layer.name] += samples[position] * np.array([row[str(b)] for b in job.table.bits])
    job.said(done, done)
    for layer in layers:
        if not sums[layer.name].any() and not _stays(job, layer):
            raise unreached(layer.name)
    return {name: Curves(total / sum(samples)) for name, total in sums.items()}


def _stays(job: Job, layer: LayerStats) -> bool:
    """Whether quantizing changes nothing of the weight."""
    return all(torch.equal(quantized, job.weights[layer.name]) for quantized in job.quantized(layer))


def _row(job: Job, layer: LayerStats, replay: Replay, compare: Compare, check: bool) -> dict[str, float]:
    """The change of the output at each bit-width; `check`: whether replaying is held against a full run first."""
    weight = job.weights[layer.name]
    kept = weight.clone()
    row = {}
    try:
        for b, quantized in zip(job.table.bits, list(job.quantized(layer)), strict=True):
            weight.copy_(quantized)
            if check:
                replay.check(job.modules[layer.name])
                check = False
            row[str(b)] = compare(replay.output, replay.again(job.modules[layer.name]))
    finally:
        weight.copy_(kept)
    return row


def divergence(exact: Tensor, rough: Tensor) -> float:
    """KL, as above, of two models' logits."""
    p, q = (output.double().log_softmax(-1) for output in (exact, rough))
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    return float(divergence.clamp_min(0))  # NaN stays NaN


def cosine_distance(exact: Tensor, rough: Tensor) -> float:
    """Distance, as above, of two models' outputs."""
    cosine = torch.nn.functional.cosine_similarity(exact.double().flatten(1), rough.double().flatten(1), dim=1)
    return float((1 - cosine.mean()).clamp_min(0))
