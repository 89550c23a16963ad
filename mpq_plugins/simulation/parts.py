"""A layer's weight part by part, as its choice in a plan cuts it: channels that share a width."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plans.granular import FLOAT_BITS
from ..plans.layers import LayerChoice, Part


@dataclass(frozen=True)
class WeightPart:
    """Some output channels of a weight.

    values: the weight's, of these channels alone; channels: which they are, int64 on the weight's device, ascending.
    """

    part: Part
    values: Tensor
    channels: Tensor
    channel_axis: int

    @property
    def bits(self) -> int:
        """The width."""
        return self.part.bits

    @property
    def in_float(self) -> bool:
        """Whether the channels stay in floating point."""
        return self.part.bits in FLOAT_BITS

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Write values of these channels, of the part's shape, where they belong in a tensor of the weight's shape."""
        whole.index_copy_(self.channel_axis, self.channels, values)


def weight_parts(weight: Tensor, choice: LayerChoice) -> Iterator[WeightPart]:
    """The parts of a layer's weight, ascending; of a layer with one width the weight itself, which is not copied."""
    axis, weight = choice.channel_axis, weight.detach()
    for part in choice.all_parts:
        channels = torch.from_numpy(part.runs.array()).to(weight.device)
        values = weight if choice.bits is not None else weight.index_select(axis, channels)
        yield WeightPart(part, values, channels, axis)
