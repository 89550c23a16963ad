"""A sensitivity as somebody else's distribution would bring it: public names alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from mpq_plugins import Curves, Job


@dataclass(frozen=True)
class Energy:
    """The squared error of a layer's weights, times the mean square of the model's own output."""

    name: ClassVar[str] = "energy"

    scale: float = 1.0

    def measure(self, job: Job) -> Mapping[str, Curves]:
        with torch.no_grad():
            power = float(np.mean([float(job.run(batch).square().mean()) for batch in job.batches]))
        curves = {}
        for layer in job.table.layers:
            weight = job.weights[layer.name]
            errors = [float((weight - quantized).square().sum()) for quantized in job.quantized(layer)]
            curves[layer.name] = Curves(self.scale * power * np.array(errors))
        return curves
