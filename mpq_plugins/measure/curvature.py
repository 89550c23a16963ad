"""Second-order sensitivities: a quadratic around the float weights, 1/2 sum_j C_j (w - w')_j^2.

Fisher: C the diagonal of the Fisher information, E (dL/dw)^2 over samples with labels drawn from the model's own
predictions (Kunstner et al. 2019, arXiv 1905.12558, on why not the true ones). Hessian: C the mean diagonal of a
layer's Hessian, its trace by Hutchinson's estimator (HAWQ-V2, arXiv 1911.03852, eq. 6 and 7).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import sample_count
from ..errors import SettingError
from .sensitivities import Curves, Job


@dataclass(frozen=True)
class Fisher:
    """Empirical Fisher, in nats a sample, per channel; one backward pass a sample."""

    name: ClassVar[str] = "fisher"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One backward pass a sample."""
        names, weights = _trainable(job)
        squares = [torch.zeros_like(weight) for weight in weights]
        total = sum(sample_count(batch) for batch in job.batches)
        for done, sample in enumerate(_samples(job.batches)):
            job.said(done, total)
            gradients = torch.autograd.grad(_loss(job, sample), weights, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square += gradient.square()
        job.said(total, total)
        return {
            name: _curves(job.squared_errors(layer, squares[names.index(name)] / (2 * total)))
            for name, layer in ((layer.name, layer) for layer in job.table.layers)
        }


@dataclass(frozen=True)
class Hessian:
    """Mean diagonal of each layer's Hessian, in nats a sample and squared weight unit; `probes` vectors a batch."""

    name: ClassVar[str] = "hessian"

    probes: int = 4

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """Two backward passes a probe."""
        names, weights = _trainable(job)
        traces = np.zeros(len(weights))
        total = len(job.batches) * self.probes
        samples = 0
        for position, batch in enumerate(job.batches):
            gradients = torch.autograd.grad(_loss(job, batch), weights, create_graph=True, allow_unused=True)
            pairs = [(k, g) for k, g in enumerate(gradients) if g is not None and g.requires_grad]
            for probe in range(self.probes):
                job.said(position * self.probes + probe, total)
                vectors = [torch.randint_like(weights[k], 2) * 2 - 1 for k, _ in pairs]
                products = torch.autograd.grad(
                    [g for _, g in pairs], [weights[k] for k, _ in pairs], vectors,
                    retain_graph=probe + 1 < self.probes, allow_unused=True,
                )  # fmt: skip
                for (k, _), vector, product in zip(pairs, vectors, products, strict=True):
                    traces[k] += 0.0 if product is None else float((vector * product).sum()) / self.probes
            samples += sample_count(batch)
        job.said(total, total)
        found = {}
        for layer in job.table.layers:
            # A minimum has no negative curvature; what the estimate puts below zero is noise.
            mean = max(0.0, traces[names.index(layer.name)] / samples / max(1, layer.numel))
            weight = torch.full(layer.shape, mean / 2, dtype=torch.float64)
            found[layer.name] = _curves(job.squared_errors(layer, weight))
        return found


def _curves(channels: Any) -> Curves:
    return Curves(channels.sum(1), channels)


def _trainable(job: Job) -> tuple[list[str], list[Tensor]]:
    """The layers' own parameters, and nothing else, take gradients."""
    for parameter in job.model.parameters():
        parameter.requires_grad_(False)
    names = [layer.name for layer in job.table.layers]
    weights = []
    for name in names:
        weight = job.modules[name][0].weight
        assert isinstance(weight, Tensor)
        weights.append(weight.requires_grad_(True))
    return names, weights


def _loss(job: Job, batch: Any) -> Tensor:
    """Sum over samples of the cross-entropy of labels drawn from the model's own predictions."""
    with torch.enable_grad():
        logits = job.run(batch)
        if logits.shape[-1] < 2 or not logits.requires_grad:
            raise SettingError("output: has no gradient or no two classes; these need logits. Use distance instead")
        flat = logits.reshape(-1, logits.shape[-1])
        labels = torch.multinomial(flat.detach().double().softmax(1), 1).squeeze(1)
        positions = flat.shape[0] // max(1, logits.shape[0])
        return F.cross_entropy(flat, labels, reduction="sum") / positions


def _samples(batches: Sequence[Any]) -> Iterator[Any]:
    """One sample at a time, for gradients of a batch's samples add up before they are squared."""
    for batch in batches:
        count = sample_count(batch)
        for k in range(count):
            yield _slice(batch, k, count)


def _slice(batch: Any, k: int, count: int) -> Any:
    def cut(value: Any) -> Any:
        return value[k : k + 1] if isinstance(value, Tensor) and value.dim() and len(value) == count else value

    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(cut(value) for value in batch) if isinstance(batch, tuple | list) else cut(batch)
