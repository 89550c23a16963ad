"""The errors of layers' quantized inputs, and what they do to the layers' own outputs, in one pass over the batches.

mse       mean (x - x')^2                       relative   mean |x - x'| / |x|, zeros counting 0
output_mse = 1/N sum_n ||f(x_n) - f(x'_n)||^2   at the layer's own output f, over samples n
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.input_ranges import InputRange, quantized_input
from ..models.running import call_model, first_input, sample_count
from ..plans.stats import Array
from .own_output import input_output_errors, watching

INPUT_METRICS = ("relative", "mse")

Ranges = Mapping[str, Sequence[InputRange]]


class InputErrors:
    """Sums over some forward passes. modules: those that use a layer's weight, by layer; ranges: one a width."""

    def __init__(self, modules: Mapping[str, Sequence[nn.Module]], ranges: Ranges, at_outputs: bool) -> None:
        self._names = {module: name for name, users in modules.items() for module in users}
        self._ranges, self._at_outputs = ranges, at_outputs
        self._sums = {name: np.zeros((3, len(own))) for name, own in ranges.items()}
        self._numel = dict.fromkeys(ranges, 0)
        self._samples = 0

    def run(self, model: nn.Module, batches: Sequence[Any], said: Callable[[], None]) -> None:
        """Look at a forward pass of each batch."""
        with watching(list(self._names), self._seen):
            for batch in batches:
                said()
                with torch.no_grad():
                    call_model(model, batch)
                self._samples += sample_count(batch)

    def errors(self, layer: str) -> dict[str, Array]:
        """By metric, at each width."""
        relative, mse = self._sums[layer][:2] / self._numel[layer]
        return {"relative": relative, "mse": mse}

    def output_mse(self, layer: str) -> Array:
        """At each width."""
        squared: Array = self._sums[layer][2] / self._samples
        return squared

    def _seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        name, x = self._names[module], first_input(args, kwargs)
        if not x.numel():
            return
        rough = [quantized_input(x, own) for own in self._ranges[name]]
        exact = x if x.dtype == torch.float64 else x.float()
        sizes = torch.where(exact == 0, 1, exact.abs())  # 0 is a level of every range
        self._numel[name] += x.numel()
        self._sums[name][:2] += np.array([_lost((exact - quantized).abs(), sizes) for quantized in rough]).T
        if self._at_outputs:
            self._sums[name][2] += input_output_errors(module, args, kwargs, rough)


def _lost(differences: Tensor, sizes: Tensor) -> tuple[float, float]:
    """Sum |x - x'| / |x|, and sum (x - x')^2."""
    relative = (differences / sizes).sum(dtype=torch.float64)
    return float(relative), float(differences.square().sum(dtype=torch.float64))
