"""What a range makes of an input."""

import torch
from torch import Tensor

from ..models.input_ranges import InputRange, dynamic_range, fake_quantize_input


def quantized_input(x: Tensor, input_range: InputRange) -> Tensor:
    """x at the levels of its range, in its own type; worked out in float32 at least, for 65,535 levels."""
    exact = x if x.dtype == torch.float64 else x.float()
    if input_range.dynamic is not None:
        grid = dynamic_range(exact, input_range.bits, input_range.dynamic, symmetric=input_range.symmetric)
    else:
        grid = torch.tensor(input_range.scale), torch.tensor(float(input_range.zero_point))
    return fake_quantize_input(exact, *grid, input_range.bits).to(x.dtype)
