"""What of a layer's inputs decides its rounding: H = U^T U / n and G = E^T U / n, summed batch by batch.

U are the layer's columns in the quantized net; E, (n, rows), is what its output lacks there with float weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.autocast import own_arithmetic

Product = tuple[int, Tensor, Tensor | None]
PIECE = 2048  # columns that are summed in float32 before they are added in float64


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Gram:
    """Sums over columns: h, float64 (groups, d, d); g, float64 (groups, rows, d), empty where nothing is lacking."""

    count: int = 0
    h: Tensor = field(default_factory=_nothing)
    g: Tensor = field(default_factory=_nothing)

    def add(self, columns: Tensor, lacking: Tensor | None) -> None:
        """Take in columns (n, groups, d) and what is lacking there (n, groups, rows), None for nothing."""
        for count, h, g in products(columns, lacking):
            self.take(count, h, g)

    def take(self, count: int, h: Tensor, g: Tensor | None) -> None:
        """Take in what `products` makes of so many columns."""
        self.count += count
        self.h = _plus(self.h, h)
        if g is not None:
            self.g = _plus(self.g, g)

    @property
    def finite(self) -> bool:
        """Whether all inputs were."""
        return bool(self.h.isfinite().all() and self.g.isfinite().all())


def products(columns: Tensor, lacking: Tensor | None) -> Iterator[Product]:
    """What is summed, a few columns at a time, in order: how many, U^T U and E^T U, float32."""
    for start in range(0, len(columns), PIECE):
        piece = columns[start : start + PIECE].transpose(0, 1)
        with own_arithmetic():
            g = None if lacking is None else lacking[start : start + PIECE].permute(1, 2, 0) @ piece
            h = piece.transpose(1, 2) @ piece
        yield piece.shape[1], h, g


def _plus(total: Tensor, piece: Tensor) -> Tensor:
    return total.add_(piece) if total.numel() else piece.double()
