"""Ranges of layers' inputs, as they are learned along with the rounding.

The scale is learned through the rounding as in LSQ (Esser et al. 2020, arXiv 1902.08153, sec. 2.1), as BRECQ does
(arXiv 2102.05426, sec. 3.4); the zero point stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.input_ranges import InputQuantizer


@dataclass(frozen=True)
class ActivationRange:
    """One layer's: the scale it began at, its zero point, and what is learned, the logarithm of the scale's change."""

    first: Tensor
    zero_point: Tensor
    change: Tensor

    @classmethod
    def of(cls, quantizer: InputQuantizer) -> "ActivationRange":
        """To begin with."""
        first = quantizer.scale.clone()
        return cls(first, quantizer.zero_point.clone(), torch.zeros_like(first).requires_grad_())

    def scale(self) -> Tensor:
        """As learned so far; a logarithm, for scales are small, and must stay above 0."""
        return self.first * self.change.exp()
