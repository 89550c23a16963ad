"""Brevitas's layers for a plan's weights: as they are, but that they compute on plain tensors.

Brevitas's own would work out the accumulator's scale, width and zero point, which nobody asks for here; it warns that
it cannot where there are zero points, and has no embedding with a scale per channel.
"""

from typing import Any

import brevitas.nn as qnn
import torch.nn.functional as F
from brevitas.quant_tensor import _unpack_quant_tensor
from torch import Tensor, nn


class _OnPlainTensors:
    def inner_forward_impl(self, x: Any, quant_weight: Any, quant_bias: Any) -> Any:
        plain = (_unpack_quant_tensor(value) for value in (x, quant_weight, quant_bias))
        return super().inner_forward_impl(*plain)  # type: ignore[misc]


class PlanLinear(_OnPlainTensors, qnn.QuantLinear):  # type: ignore[misc]
    """A linear layer."""


class PlanConv1d(_OnPlainTensors, qnn.QuantConv1d):  # type: ignore[misc]
    """A convolution over one dimension."""


class PlanConv2d(_OnPlainTensors, qnn.QuantConv2d):  # type: ignore[misc]
    """A convolution over two dimensions."""


class PlanConv3d(_OnPlainTensors, qnn.QuantConv3d):  # type: ignore[misc]
    """A convolution over three dimensions."""


class PlanConvTranspose1d(_OnPlainTensors, qnn.QuantConvTranspose1d):  # type: ignore[misc]
    """A transposed convolution over one dimension."""


class PlanConvTranspose2d(_OnPlainTensors, qnn.QuantConvTranspose2d):  # type: ignore[misc]
    """A transposed convolution over two dimensions."""


class PlanConvTranspose3d(_OnPlainTensors, qnn.QuantConvTranspose3d):  # type: ignore[misc]
    """A transposed convolution over three dimensions."""


class PlanEmbedding(qnn.QuantEmbedding):  # type: ignore[misc]
    """An embedding."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) -> (..., features)."""
        weight = _unpack_quant_tensor(self.quant_weight())
        return F.embedding(input, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PlanLinear,
    nn.Conv1d: PlanConv1d,
    nn.Conv2d: PlanConv2d,
    nn.Conv3d: PlanConv3d,
    nn.ConvTranspose1d: PlanConvTranspose1d,
    nn.ConvTranspose2d: PlanConvTranspose2d,
    nn.ConvTranspose3d: PlanConvTranspose3d,
    nn.Embedding: PlanEmbedding,
}
