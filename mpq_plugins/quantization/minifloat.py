"""Small floating-point codes: casts of torch (8 bits) and ml_dtypes (4 and 6 bits), times a scale for each group."""

from functools import cache

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..plans.minifloat import Element, Minifloat
from .row_quantizer import RowQuantizer

LEAST_EXPONENT, LARGEST_EXPONENT = -127, 127  # of an E8M0 scale, 2^-127 to 2^127; OCP MX 1.0, section 5.4.1


class MinifloatQuantizer(RowQuantizer):
    """Quantizes under `Minifloat`; see contract.py. A code is the format's bit pattern, and -0 is 0."""

    scheme: Minifloat

    def fit(self, rows: Tensor, bits: int) -> Tensor:
        """Scales, float32 (groups, 1): powers of two, or the greatest magnitude over the format's own."""
        largest = rows.abs().amax(1, keepdim=True)
        element = self.scheme.element
        if not self.scheme.microscaled:
            return torch.where(largest == 0, torch.ones_like(largest), largest / element.largest)
        # frexp gives m in [1/2, 1), so floor(log2) is one less; of 0 there is no logarithm, and any scale will do.
        floor = torch.frexp(largest).exponent - 1
        exponent = (floor - _exponent(element.largest)).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
        return torch.where(largest == 0, torch.ones_like(largest), torch.ldexp(torch.ones_like(largest), exponent))

    def encode_rows(self, rows: Tensor, tables: Tensor, bits: int) -> Tensor:
        """Bit patterns; what lies beyond the greatest value is at it."""
        element = self.scheme.element
        scaled = (rows / tables).clamp(-element.largest, element.largest)
        patterns = _cast(scaled, element).to(torch.int16)
        return torch.where(patterns == 2 ** (element.bits - 1), 0, patterns)

    def decode_rows(self, codes: Tensor, tables: Tensor, bits: int) -> Tensor:
        """The weights, float32."""
        values: Tensor = _values(self.scheme.element).to(codes.device)[codes.long()]
        return values * tables


def _exponent(largest: float) -> int:
    return int(np.floor(np.log2(largest)))


def _cast(scaled: Tensor, element: Element) -> Tensor:
    """Bit patterns, uint8, of values within the format's range, to nearest, ties to even."""
    if element.bits == 8:
        return scaled.to(getattr(torch, element.name)).view(torch.uint8)
    small = scaled.cpu().numpy().astype(getattr(ml_dtypes, element.name))
    return torch.from_numpy(small.view(np.uint8)).to(scaled.device)


@cache
def _values(element: Element) -> Tensor:
    """What each bit pattern means, float32; patterns that no code has mean 0."""
    patterns = np.arange(2**element.bits, dtype=np.uint8)
    values = patterns.view(getattr(ml_dtypes, element.name)).astype(np.float32)
    return torch.from_numpy(np.where(np.isfinite(values), values, np.float32(0)))
