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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.checks import shown
from ..common.text import first_sentence
from ..errors import SettingError
from ..models.labels import own_labels_loss
from ..models.running import one_sample, sample_count
from .contract import Curves, Job, unreached


@dataclass(frozen=True)
class Fisher:
    """Empirical Fisher, in nats a sample, per channel; one backward pass a sample."""

    name: ClassVar[str] = "fisher"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One backward pass a sample, for all types that the same layers can have."""
        key = (Fisher, tuple(job.modules))
        if key not in job.shared:
            job.shared[key] = self._diagonals(job)
        diagonals: Mapping[str, Tensor] = job.shared[key]
        return {layer.name: _curves(job.squared_errors(layer, diagonals[layer.name])) for layer in job.table.layers}

    def _diagonals(self, job: Job) -> Mapping[str, Tensor]:
        """Half of the diagonal of each layer's information, in nats a sample."""
        names, weights = _trainable(job)
        squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        total = sum(sample_count(batch) for batch in job.batches)
        reached: set[str] = set()
        for done, sample in enumerate(_samples(job.batches)):
            job.said(done, total)
            gradients = _slopes([_loss(job, sample)], weights)
            for name, square, gradient in zip(names, squares, gradients, strict=True):
                if gradient is not None:
                    reached.add(name)
                    square += gradient.float().square()
        job.said(total, total)
        _check_reached(names, reached)
        return {name: square / (2 * total) for name, square in zip(names, squares, strict=True)}


@dataclass(frozen=True)
class Hessian:
    """Mean diagonal of each layer's Hessian, in nats a sample and squared weight unit; `probes` vectors a batch."""

    name: ClassVar[str] = "hessian"

    probes: int = 4

    def __post_init__(self) -> None:
        if type(self.probes) is not int or self.probes < 1:
            raise SettingError(f"probes: {shown(self.probes)} is not allowed; an integer from 1 up")

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """Two backward passes a probe."""
        names, weights = _trainable(job)
        traces = np.zeros(len(weights))
        total = len(job.batches) * self.probes
        samples = 0
        reached: set[str] = set()
        for position, batch in enumerate(job.batches):
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
                loss = _loss(job, batch)
            gradients = _slopes([loss], weights, create_graph=True)
            pairs = [(k, g) for k, g in enumerate(gradients) if g is not None and g.requires_grad]
            reached |= {names[k] for k, _ in pairs}
            for probe in range(self.probes if pairs else 0):
                job.said(position * self.probes + probe, total)
                vectors = [_signs(weights[k], job.generator) for k, _ in pairs]
                products = _slopes(
                    [g for _, g in pairs], [weights[k] for k, _ in pairs], vectors,
                    retain_graph=probe + 1 < self.probes,
                )  # fmt: skip
                for (k, _), vector, product in zip(pairs, vectors, products, strict=True):
                    traces[k] += 0.0 if product is None else float((vector * product).sum()) / self.probes
            samples += sample_count(batch)
        job.said(total, total)
        _check_reached(names, reached)
        curves = {}
        for layer in job.table.layers:
            # A minimum has no negative curvature; what the estimate puts below zero is noise.
            mean = np.maximum(0.0, traces[names.index(layer.name)] / samples / max(1, layer.numel))
            weight = torch.full(layer.shape, float(mean) / 2, dtype=torch.float64)
            curves[layer.name] = _curves(job.squared_errors(layer, weight))
        return curves


def _curves(channels: Any) -> Curves:
    return Curves(channels.sum(1), channels)


def _slopes(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], vectors: Sequence[Tensor] | None = None, **options: bool
) -> tuple[Tensor | None, ...]:
    """Gradients on the weights, None where there is none. Raises SettingError where torch has no derivative."""
    try:
        return torch.autograd.grad(outputs, weights, vectors, allow_unused=True, **options)
    except RuntimeError as error:
        raise SettingError(
            f"output: torch cannot differentiate the model ({first_sentence(error)}); use kl, distance or output_mse, "
            "which need no derivative"
        ) from error


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
        logits = job.logits(batch)
        if logits.shape[-1] < 2 or not logits.requires_grad:
            raise SettingError("output: has no gradient or no two classes; these need logits. Use distance instead")
        positions = logits.shape[:-1].numel() // max(1, logits.shape[0])
        return own_labels_loss(logits, job.generator) / positions


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 at random, in the weight's shape and dtype."""
    return torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1


def _samples(batches: Sequence[Any]) -> Iterator[Any]:
    """One sample at a time, for gradients of a batch's samples add up before they are squared."""
    for batch in batches:
        for k in range(sample_count(batch)):
            yield one_sample(batch, k)


def _check_reached(names: Sequence[str], reached: set[str]) -> None:
    for name in names:
        if name not in reached:
            raise unreached(name)
