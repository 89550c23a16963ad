"""Quantization as the formulas say it, one weight at a time in Python floats: slow and obvious."""

import math
from collections.abc import Sequence

import numpy as np

from mpq_plugins.plans.affine import Symmetry


def levels(weights: Sequence[float], bits: int, symmetric: Symmetry) -> tuple[float, int, int, int]:
    """(scale, zero_point, qmin, qmax) of min-max quantization, bits >= 2."""
    low, high = min(weights), max(weights)
    if symmetric == "full":
        extreme = low if low <= 0 and -low >= high else high  # whose code is -2^(b-1)
        return float(np.float32(extreme / -(2 ** (bits - 1)))) or 1.0, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if low == high:
        if symmetric:
            top = 2 ** (bits - 1) - 1
            return (abs(low) or 1.0), 0, -top, top
        return (abs(low) or 1.0), int(low < 0), 0, 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        return float(np.float32(max(-low, high) / top)), 0, -top, top
    scale = float(np.float32((high - low) / (2**bits - 1)))
    return scale, round(-low / scale), 0, 2**bits - 1


def fake(weights: Sequence[float], bits: int, symmetric: Symmetry) -> list[float]:
    """The dequantized weights."""
    if bits == 1:
        alpha = float(np.float32(math.fsum(map(abs, weights)) / len(weights)))
        return [-alpha if w < 0 else alpha for w in weights]
    scale, zero, least, greatest = levels(weights, bits, symmetric)
    return [(min(max(round(w / scale) + zero, least), greatest) - zero) * scale for w in weights]


def error(weights: Sequence[float], quantized: Sequence[float], metric: str) -> float:
    """One metric over one group, in plain sums."""
    pairs = list(zip(weights, quantized, strict=True))
    squared = math.fsum((w - q) ** 2 for w, q in pairs)
    if metric == "relative":
        return math.fsum(abs(w - q) / abs(w) for w, q in pairs if w != 0) / len(pairs)
    if metric == "mse":
        return squared / len(pairs)
    if metric == "rmse":
        return math.sqrt(squared / len(pairs))
    if metric == "max_abs":
        return max(abs(w - q) for w, q in pairs)
    signal = math.fsum(w * w for w in weights)
    return math.inf if squared == 0 else 10 * math.log10(signal / squared)
