"""One layer's weight as its choice in a plan leaves it: quantized and dequantized, part by part."""

import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows
from ..plans.channels import Channels
from ..plans.layers import LayerChoice
from ..quantization.quantize import fake_quantize
from ..weights.dtypes import check_weight
from .parts import weight_parts


def simulate_layer(weight: Tensor, choice: LayerChoice) -> Tensor:
    """The weight the plan promises, in its own dtype and shape; at 16 or 32 bits the weight itself.

    Each part is quantized by itself: under per_tensor a part has its own scale. Raises WeightError for NaN or
    infinity.
    """
    check_weight(weight, choice.name)
    result = weight.detach().clone()
    for part in weight_parts(weight, choice):
        if not part.in_float:
            axis = choice.channel_axis
            quantized = fake_quantize(part.values, part.bits, choice.scheme, channel_axis=axis, layer=choice.name)
            if choice.bits is not None:
                return quantized
            part.put(result, quantized)
    return result


def most_distinct_values(weight: Tensor, choice: LayerChoice, channels: Channels) -> int:
    """The most different values any one group of these channels holds."""
    axis = choice.channel_axis
    rows = channel_rows(weight.detach().index_select(axis, torch.from_numpy(channels.array()).to(weight.device)), axis)
    if rows.numel() == 0:
        return 0
    groups = choice.scheme.group_count(choice.shape, axis, len(channels), choice.name)
    ordered = rows.float().reshape(groups, -1).sort(dim=1).values
    return int((ordered.diff(dim=1) != 0).sum(dim=1).max()) + 1
