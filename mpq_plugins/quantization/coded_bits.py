"""What whole-number codes take in an entropy-coded file, estimated by their own entropy of order 0."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def coded_bits(codes: NDArray[np.integer[Any]]) -> float:
    """The sum over the codes, of any shape, of -log2 of their own shares: bits, without any table of them."""
    flat = codes.reshape(-1).astype(np.int64)
    return bits_of_counts(np.bincount(flat - flat.min())) if flat.size else 0.0


def bits_of_counts(counts: NDArray[np.integer[Any]]) -> float:
    """The same of codes that are counted already, each different one once."""
    there = counts[counts > 0].astype(np.float64)
    total = there.sum()
    return float((there * np.log2(total / there)).sum())
