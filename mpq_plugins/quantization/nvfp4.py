"""NVFP4: 4-bit floating-point codes times an FP8 scale for each block times a float32 scale for the layer.

Every step is computed in the order in which torchao and NVIDIA's kernels compute it, so that codes and weights are
theirs to the bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plans.minifloat import ELEMENTS, Minifloat
from .contract import Each
from .grid import GroupStats
from .minifloat import MinifloatQuantizer
from .row_quantizer import RowGrids

SCALE = ELEMENTS["fp8_e4m3"]
LEAST_BLOCK_SCALE = float(torch.finfo(torch.float8_e4m3fn).tiny)  # the least normal one, 2^-6
LEAST_LAYER_SCALE = 2.0**-120  # below it float32 has no reciprocal of both scales, and torchao makes NaN


class NVFP4Quantizer(MinifloatQuantizer):
    """Quantizes under `Minifloat(format="nvfp4")`; see contract.py. A table is a block's scale and the layer's.

    Args:
        scheme: The scheme.
        largest: The greatest magnitude of the layer; None where the rows are all of it.
    """

    def __init__(self, scheme: Minifloat, largest: float | None = None) -> None:
        super().__init__(scheme)
        self.largest = largest

    def grids(self, each: Each, stats: GroupStats, bits: Sequence[int]) -> RowGrids:
        """Fit the tables of some groups of a layer, whose greatest magnitude the stats say."""
        of_layer = NVFP4Quantizer(self.scheme, stats.largest)
        return super(NVFP4Quantizer, of_layer).grids(each, stats, bits)

    def fit(self, rows: Tensor, bits: int) -> Tensor:
        """Scales, float32 (groups, 2)."""
        largest = rows.abs().amax(1, keepdim=True)
        whole = largest.amax() if self.largest is None else largest.new_tensor(self.largest)
        layer = layer_scale(whole, self.scheme.element.largest)
        block = (largest / self.scheme.element.largest / layer).clamp(LEAST_BLOCK_SCALE, SCALE.largest)
        return torch.cat([block.to(torch.float8_e4m3fn).float(), layer.expand_as(block)], dim=1)

    def encode_rows(self, rows: Tensor, tables: Tensor, bits: int) -> Tensor:
        """Bit patterns; what lies beyond the greatest value is at it."""
        block, layer = tables.split(1, dim=1)
        return super().encode_rows(rows * ((1 / layer) / block), torch.ones_like(block), bits)

    def decode_rows(self, codes: Tensor, tables: Tensor, bits: int) -> Tensor:
        """The weights, float32."""
        block, layer = tables.split(1, dim=1)
        return super().decode_rows(codes, layer * block, bits)


def layer_scale(largest: Tensor, most: float) -> Tensor:
    """The scale of a layer whose greatest magnitude this is, float32; of zeros, of which any scale will do, 1."""
    scale = (largest / (SCALE.largest * most)).clamp(min=LEAST_LAYER_SCALE)
    return torch.where(largest == 0, torch.ones_like(scale), scale)
