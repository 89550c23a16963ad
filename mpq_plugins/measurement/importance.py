"""Importances of layers and channels (PTILMPQ, arXiv 2404.02947): F_l = sum |w|, F_c = ||w_c||_2."""

import numpy as np
from numpy.typing import NDArray


def layer_importance(magnitudes: NDArray[np.float64]) -> float:
    """F_l from the sums of |w| and w^2 of each output channel, (channels, 2)."""
    return float(magnitudes[:, 0].sum())


def channel_importance(magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """F_c, (channels,), from the same sums."""
    return np.sqrt(magnitudes[:, 1])
