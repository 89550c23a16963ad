"""One layer's weight as its choice in a plan leaves it: quantized and dequantized, part by part."""

import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows
from ..plans.channels import Channels
from ..plans.layers import LayerChoice
from ..quantization.quantize import fake_quantize
from ..weights.dtypes import check_weight
from .floats import as_float
from .parts import WeightPart, weight_parts


def simulate_layer(weight: Tensor, choice: LayerChoice) -> Tensor:
    """The weight the plan promises, in its own dtype and shape.

    Each part is quantized by itself: under per_tensor a part has its own scale. At 32 bits values stay as they are; at
    16 bits they are rounded to float16, where they have more. Raises WeightError for NaN or infinity, and for values
    beyond float16 at 16 bits.
    """
    check_weight(weight, choice.name)
    result = weight.detach().clone()
    for part in weight_parts(weight, choice):
        values = _simulated(part, choice)
        if values is part.values:  # left as it is
            continue
        if choice.bits is not None:
            return values
        part.put(result, values)
    return result


def _simulated(part: WeightPart, choice: LayerChoice) -> Tensor:
    if part.in_float:
        return as_float(part.values, part.bits, choice.name)
    return fake_quantize(part.values, part.bits, choice.scheme, channel_axis=choice.channel_axis, layer=choice.name)


def most_distinct_values(weight: Tensor, choice: LayerChoice, channels: Channels) -> int:
    """The most different values any one group of these channels holds."""
    axis = choice.channel_axis
    rows = channel_rows(weight.detach().index_select(axis, torch.from_numpy(channels.array()).to(weight.device)), axis)
    if rows.numel() == 0:
        return 0
    groups = choice.scheme.group_count(choice.shape, axis, len(channels), choice.name)
    ordered = rows.float().reshape(groups, -1).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1
