"""What a layer's input is like over many batches, and the ranges that follow from it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..models.input_ranges import InputQuantizer, InputRange, range_grid
from ..models.running import first_input
from ..plans.activations import Activations
from .range_ends import Ends, kl_ends, mse_ends, percentile_ends
from .value_sample import ValueSample

AVERAGING = (
    0.01  # what a batch's extremes weigh in the moving average, as torch.ao's MovingAverageMinMaxObserver has it
)
LEAST_SCALE = torch.finfo(torch.float32).smallest_normal


class InputValues:
    """The values of one layer's input: a sample, the extremes, and the moving average of the batches' extremes.

    low, high: the extremes so far; batches: how many had values.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.batches = 0
        self.low, self.high = math.inf, -math.inf
        self._average: Ends = (0.0, 0.0)
        self._sample = ValueSample()

    def watch(self, module: nn.Module) -> Any:
        """Look at every input of the layer, until the handle is removed."""
        return module.register_forward_pre_hook(self._look, with_kwargs=True)

    def look(self, x: Tensor) -> None:
        """Take in a batch. Raises SettingError, naming the layer and the batch, for NaN or infinity."""
        x = x.detach().float()
        if not x.numel():
            return
        low, high = (float(end) for end in x.aminmax())
        self.batches += 1
        if not math.isfinite(low) or not math.isfinite(high):
            raise SettingError(
                f"layer {self.layer!r}: activations hold NaN or infinity in batch {self.batches}; look at the batches, "
                "or leave the layer out"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.batches == 1:
            self._average = low, high
        else:
            a, b = self._average
            self._average = a + AVERAGING * (low - a), b + AVERAGING * (high - b)
        self._sample.add(x)

    def ends(self, activations: Activations) -> Ends:
        """Where the static range begins and ends, 0 included.

        Raises SettingError, naming the layer, where no batch reached it, its inputs are all 0, or the range holds only
        zeros. An input of one constant has the range from 0 to it, or from it to 0.
        """
        self._check()
        low, high = self._ends(activations)
        if low >= 0 and high <= 0:
            raise SettingError(
                f"layer {self.layer!r}: the {activations.range} range of its inputs holds nothing but 0, as most of "
                "them are; take a larger share, or another range"
            )
        return min(0.0, low), max(0.0, high)

    def range(self, activations: Activations) -> InputRange:
        """The range that these values suggest. Raises SettingError, naming the layer, as `ends` does.

        A dynamic range needs no values.
        """
        bits, symmetric = activations.bits, activations.symmetric
        if activations.dynamic is not None:
            return InputRange(bits, dynamic=activations.dynamic, symmetric=symmetric)
        low, high = self.ends(activations)
        first, last = torch.tensor((low, high), dtype=torch.float32)
        scale, zero_point = range_grid(first, last, bits, symmetric=symmetric)
        step = (max(-low, high) * 2 if symmetric else high - low) / 2**bits
        if step < LEAST_SCALE or not math.isfinite(float(scale)):
            raise SettingError(
                f"layer {self.layer!r}: its inputs reach from {low:.4g} to {high:.4g}, and the scale of {bits} bits is "
                "no float32; look at the batches, or leave the layer out"
            )
        return InputRange(bits, float(scale), int(zero_point))

    def fit(self, quantizer: InputQuantizer, activations: Activations) -> None:
        """Set a quantizer's static range. Raises SettingError, naming the layer, as `range` does."""
        found = self.range(activations)
        quantizer.scale.fill_(found.scale)
        quantizer.zero_point.fill_(found.zero_point)

    def mean_squared_error(self, input_range: InputRange) -> float:
        """Of the values in a static range; all of them, or the sample where they are more. Raises as `ends` does."""
        self._check()
        error = self._sample.values().squared_error(input_range.scale, input_range.zero_point, input_range.bits)
        return error / self._sample.count

    def _ends(self, activations: Activations) -> Ends:
        symmetric = activations.symmetric
        if activations.range == "minmax":
            return self.low, self.high
        if activations.range == "moving_average":
            return self._average
        values = self._sample.values()
        if activations.range == "percentile":
            assert activations.share is not None
            return percentile_ends(values, activations.share, symmetric=symmetric)
        if activations.range == "kl":
            return kl_ends(values, activations.bits, symmetric=symmetric)
        return mse_ends(values, activations.bits, symmetric=symmetric)

    def require_reached(self) -> None:
        """Raise SettingError, naming the layer, where no batch reached it."""
        if not self.batches:
            raise SettingError(
                f"layer {self.layer!r}: no batch reaches it, or it is used without being called, so its inputs cannot "
                "be quantized: leave it out of the plan, or plan float activations"
            )

    def _check(self) -> None:
        self.require_reached()
        if self.low == self.high == 0:
            raise SettingError(
                f"layer {self.layer!r}: its inputs are all zero, so they have no range; give other batches, or skip it"
            )

    def _look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.look(first_input(args, kwargs))
