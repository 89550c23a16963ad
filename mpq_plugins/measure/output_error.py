"""Output MSE: the squared error that a layer's quantized weights put on its output, from one pass over the inputs.

    S_c(b) = 1/N sum_np (sum_j (w_cj - w'_cj) x_npj)^2  ~  sum_j (w_cj - w'_cj)^2 h_j,    h_j = 1/N sum_np x_npj^2

over samples n and output positions p, taking errors of different weights to be independent of each other: the diagonal
of the second moments that GPTQ and its kin use in full.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .moments import second_moments
from .sensitivities import Curves, Job


@dataclass(frozen=True)
class OutputMSE:
    """sum_j (w - w')_cj^2 h_j for every output channel, in the squared unit of the layer's output, per sample."""

    name: ClassVar[str] = "output_mse"

    def measure(self, job: Job) -> Mapping[str, Curves]:
        """One forward pass a batch."""
        moments = job.moments or second_moments(job.model, job.modules, job.batches, job.said)
        found = {}
        for layer in job.table.layers:
            channels = job.squared_errors(layer, moments[layer.name])
            found[layer.name] = Curves(channels.sum(1), channels)
        return found
