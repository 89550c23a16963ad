"""One part of a layer as integers and tables, whatever its scheme: what a container stores, and back to weights.

A symbol is a weight's code, put so that 0 stands for the weight 0 where the scheme has one, as its quantizer does: so
pruned weights are zeros in every scheme.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..quantization.contract import PartCodes, PartShape
from ..quantization.quantize import quantizer


def encode(weight: Tensor, part: PartShape) -> PartCodes:
    """Quantize a part's weights. Raises SettingError and WeightError, naming the layer, as the scheme's quantizer."""
    if not part.weights:
        return PartCodes(np.zeros(0, part.dtype), np.zeros(0, np.float32), np.zeros(0, np.uint8))
    return quantizer(part.scheme).encode(weight, part)


def decode(codes: PartCodes, part: PartShape, dtype: torch.dtype) -> Tensor:
    """The weights again, in their own shape: those that `simulate_layer` makes."""
    if not part.weights:
        return torch.zeros(part.shape, dtype=dtype)
    return quantizer(part.scheme).decode(codes, part, dtype)


def are_zero(codes: PartCodes, part: PartShape) -> NDArray[np.bool_]:
    """Which weights are 0, (weights,)."""
    if not part.weights or not part.scheme.has_zero(part.bits):
        return np.zeros(part.weights, np.bool_)
    return quantizer(part.scheme).zeros(codes, part)
