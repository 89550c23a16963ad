"""Ranges of layers' inputs: where they begin, and how they are learned along with the rounding.

The scale is learned through the rounding as in LSQ (Esser et al. 2020, arXiv 1902.08153, sec. 2.1), as BRECQ does
(arXiv 2102.05426, sec. 3.4); the zero point stays.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..models.input_ranges import InputQuantizer, fake_quantize_input
from ..models.running import first_input

MOST_VALUES = 1 << 14  # of a layer's input, a call, that a range is searched on
RATIOS = torch.linspace(1.0, 0.2, 41)


@dataclass(frozen=True)
class ActivationRange:
    """One layer's: the scale it began at, its zero point, and what is learned, the logarithm of the scale's change."""

    first: Tensor
    zero_point: Tensor
    change: Tensor

    @classmethod
    def of(cls, quantizer: InputQuantizer) -> "ActivationRange":
        """To begin with."""
        first = quantizer.scale.clone()
        return cls(first, quantizer.zero_point.clone(), torch.zeros_like(first).requires_grad_())

    def scale(self) -> Tensor:
        """As learned so far; a logarithm, for scales are small, and must stay above 0."""
        return self.first * self.change.exp()


class InputValues:
    """A sample of the values that a layer's input takes, and their extremes."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.values: list[Tensor] = []

    def watch(self, layer: nn.Module) -> Any:
        """Look at every input of the layer, until the handle is removed."""
        return layer.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs).detach().float()
        if not x.numel():
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        flat = x.reshape(-1)
        self.values.append(flat[:: max(1, flat.numel() // MOST_VALUES)].cpu())

    def fit(self, quantizer: InputQuantizer, layer: str) -> None:
        """Set the range of least squared error among shrunk extremes. Raises SettingError, naming the layer."""
        if not self.values:
            raise SettingError(
                f"layer {layer!r}: no batch reaches it, or it is used without being called, so its inputs cannot be "
                "quantized: leave it out of the plan, or plan float activations"
            )
        if self.low == self.high:
            raise SettingError(
                f"layer {layer!r}: its inputs are all zero, so they have no range; give other batches, or skip it"
            )
        x = torch.cat(self.values)
        best = float("inf")
        for low, high in self._candidates():
            scale, zero_point = _grid(low, high, quantizer.bits)
            error = float((fake_quantize_input(x, scale, zero_point, quantizer.bits) - x).square().sum())
            if error < best:
                best = error
                quantizer.scale.copy_(scale)
                quantizer.zero_point.copy_(zero_point)

    def _candidates(self) -> Iterable[tuple[float, float]]:
        for ratio in RATIOS.tolist():
            yield self.low * ratio, self.high * ratio
        if self.low < 0:
            for ratio in RATIOS.tolist():
                yield self.low, self.high * ratio
                yield self.low * ratio, self.high


def _grid(low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    scale = torch.tensor((high - low) / top)
    return scale, torch.round(-torch.tensor(low) / scale).clamp(0, top)
