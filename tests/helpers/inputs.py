"""Quantized inputs, one value after the other."""

import numpy as np
from torch import Tensor


def slowly(x: Tensor, scale: float, zero_point: int, bits: int) -> list[float]:
    """One value after the other; Python's round goes to even, as torch's does."""
    found = []
    for value in x.flatten().tolist():
        code = round(float(np.float32(value) / np.float32(scale))) + zero_point
        code = min(max(code, 0), 2**bits - 1)
        found.append(float(np.float32(code - zero_point) * np.float32(scale)))
    return found
