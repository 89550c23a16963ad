"""Squared errors of a weight, each counted by how much its input matters."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def squared_errors(exact: Tensor, rounded: Iterable[Tensor], counts: Tensor, channel_axis: int) -> NDArray[np.float64]:
    """sum_j counts_cj (w - w')_cj^2 of each output channel for each of the rounded weights, (rounded, channels).

    counts: of the weight's shape, or what is broadcast to it.
    """

    def summed(weight: Tensor) -> Tensor:
        error = (weight - exact).double().square() * counts.double()
        return error.movedim(channel_axis, 0).flatten(1).sum(1)

    return torch.stack([summed(weight) for weight in rounded]).cpu().numpy()
