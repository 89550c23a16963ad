"""Output MSE: the squared error that a layer's quantized weights put on its output, from one pass over the inputs.

    S_c(b) = 1/N sum_np (sum_j (w_cj - w'_cj) x_npj)^2  ~  sum_j (w_cj - w'_cj)^2 h_j,    h_j = 1/N sum_np x_npj^2

over samples n and output positions p, taking errors of different weights to be independent of each other: the diagonal
of the second moments that GPTQ and its kin use in full. A layer that is not torch's own is run with its quantized
weights instead, and its error measured (own_output.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..models.plain import is_plain
from ..plans.stats import LayerStats
from .contract import Array, Curves, Job
from .moments import second_moments
from .own_output import output_errors


@dataclass(frozen=True)
class OutputMSE:
    """sum_j (w - w')_cj^2 h_j for every output channel, in the squared unit of the layer's output, per sample."""

    name: ClassVar[str] = "output_mse"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One forward pass a batch."""
        moments = job.moments or _moments(job)
        curves = {}
        for layer in job.table.layers:
            channels = job.squared_errors(layer, moments[layer.name])
            if not all(is_plain(module) for module in job.modules[layer.name]):
                channels = _scaled(
                    channels, _at_own_output(job, layer), job.squared_errors(layer, torch.ones((), dtype=torch.float32))
                )
            curves[layer.name] = Curves(channels.sum(1), channels)
        return curves


def _moments(job: Job) -> Mapping[str, Tensor]:
    """The second moments of the layers' inputs, from one pass for all types that the same layers can have."""
    key = (second_moments, tuple(job.modules))
    if key not in job.shared:
        job.shared[key] = second_moments(job.model, job.modules, job.batches, job.said)
    moments: Mapping[str, Tensor] = job.shared[key]
    return moments


def _at_own_output(job: Job, layer: LayerStats) -> Array:
    """The squared error at the layer's own output at each bit-width, (bits,), by running it."""
    users = job.modules[layer.name]
    return np.array(output_errors(job.model, users, lambda: job.quantized(layer), job.batches))


def _scaled(channels: Array, totals: Array, errors: Array) -> Array:
    """Channels' shares (bits, channels) that add up to what was measured, (bits,); by their errors where they are 0."""
    shares = np.where(channels.sum(1, keepdims=True) > 0, channels, errors)
    sums = shares.sum(1, keepdims=True)
    scaled: Array = np.divide(shares * totals[:, None], sums, out=np.zeros_like(shares), where=sums > 0)
    return scaled
