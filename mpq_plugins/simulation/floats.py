"""What 16 and 32 bits mean of a weight: float16, and left as it is."""

import torch
from torch import Tensor

from ..errors import WeightError
from ..plans.layers import LayerChoice

HALF, SINGLE = torch.float16, torch.float32
LARGEST = torch.finfo(HALF).max


def as_float(weight: Tensor, bits: int, layer: str) -> Tensor:
    """The weight at 16 or 32 bits, in its own dtype: at 16 bits every float32 value is rounded to float16.

    A weight that is float16 or bfloat16 has 16 bits already, and is returned itself, as every weight is at 32 bits.
    Raises WeightError, naming the layer and the value, beyond what float16 holds.
    """
    if bits != 16 or weight.dtype != SINGLE:
        return weight
    extreme = float(weight.abs().max()) if weight.numel() else 0.0
    if extreme > LARGEST:
        raise WeightError(
            f"layer {layer!r}: {extreme:g} is beyond float16, whose largest value is {LARGEST:g}, and the plan has 16 "
            f"bits. Pin the layer to 32 bits (--pin {layer}=32), or skip it."
        )
    return weight.to(HALF).to(SINGLE)


def stored_dtype(choice: LayerChoice, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a file holds a layer's weight: float16 for float32 where all of it has 16 bits; else its own.

    A layer of which some channels alone have 16 bits keeps its dtype, for a tensor has one dtype. Their values are
    float16's all the same.
    """
    return HALF if choice.in_float16 and dtype == SINGLE else dtype
