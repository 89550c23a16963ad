"""Which weights can be quantized at all."""

import torch
from torch import Tensor

from ..errors import WeightError

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_weight(weight: Tensor, layer: str) -> None:
    """Raise WeightError, naming `layer`, unless the weight is finite and of a dtype we quantize."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise WeightError(
            f"layer {layer!r}: dtype {weight.dtype} is not allowed; float32, float16 or bfloat16. "
            "Convert the weight, or skip the layer."
        )
    # float32 values cannot overflow a float64 sum, so one reduction answers for every element.
    if not torch.isfinite(weight.detach().sum(dtype=torch.float64)):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(f"layer {layer!r}: {bad} of {weight.numel()} weights are NaN or infinite. Skip the layer.")
