"""The values that a tensor takes over many batches, in bounded memory: all of them while they are few, then a sample.

The farthest values on either side are all kept, for percentiles and outliers are theirs. Of the others each is as
likely as any other to be in the sample, whatever its batch, and stands for as many as were left out.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

MOST_VALUES = 1 << 17  # half a megabyte a layer, and more than a hundred values for each code of 10 bits
MOST_EXTREME = 1 << 12  # on either side: all that 0.9999 leaves out of 80 million values
MOST_LEVELS = 1 << 11  # that are looked up one by one


class ValueSample:
    """What is kept of the batches seen so far: a sample, and the lowest and the highest values."""

    def __init__(self) -> None:
        self.count = 0
        self._some = self._lowest = self._highest = torch.zeros(0, dtype=torch.float32)
        self._random = torch.Generator().manual_seed(0)  # the same batches give the same sample

    def add(self, x: Tensor) -> None:
        """Take in a batch's values, finite float32 of any shape on any device."""
        flat = x.reshape(-1)
        self._highest = _farthest(self._highest, flat)
        self._lowest = -_farthest(-self._lowest, -flat)
        total = self.count + flat.numel()
        if total <= MOST_VALUES:
            self._some = torch.cat([self._some, flat.cpu()])
        else:
            # Rounded at random, or no more values of small batches would be taken after many of them.
            more = float(torch.rand((), generator=self._random, dtype=torch.float32))
            fresh = int(MOST_VALUES * flat.numel() / total + more)
            old = self._picked(self._some, min(MOST_VALUES - fresh, self._some.numel()))
            self._some = torch.cat([old, self._picked(flat, fresh)])
        self.count = total

    def values(self) -> "SortedValues":
        """All values, or as many as there is room for, and what each stands for."""
        some = np.sort(self._some.numpy()).astype(np.float64)
        if self.count <= MOST_VALUES:
            return SortedValues.of(some)
        lowest, highest = (np.sort(each.numpy()).astype(np.float64) for each in (self._lowest, self._highest))
        theirs = round(some.size * lowest.size / self.count)  # of the sample, what the farthest values stand for
        some = some[theirs : some.size - theirs].clip(lowest[-1], highest[0])
        weight = (self.count - lowest.size - highest.size) / some.size
        weights = np.concatenate([np.ones(lowest.size), np.full(some.size, weight), np.ones(highest.size)])
        return SortedValues(np.concatenate([lowest, some, highest]), weights)

    def _picked(self, flat: Tensor, number: int) -> Tensor:
        """So many of the values, no place twice."""
        size = flat.numel()
        if size <= 4 * number:
            places = torch.randperm(size, generator=self._random)[:number]
        else:  # one of each of so many stretches: a step of one length would follow the channels
            starts = torch.arange(number + 1) * size // max(1, number)
            lengths = starts.diff()
            inside = (torch.rand(number, generator=self._random, dtype=torch.float64) * lengths).long()
            places = starts[:-1] + torch.minimum(inside, lengths - 1)
        return flat[places.to(flat.device)].cpu()


def _farthest(known: Tensor, flat: Tensor) -> Tensor:
    """The highest of both."""
    if known.numel() == MOST_EXTREME:
        flat = flat[flat > known.min().to(flat.device)]
    if not flat.numel():
        return known
    both = torch.cat([known.to(flat.device), flat])
    return both.topk(min(MOST_EXTREME, both.numel())).values.cpu()


@dataclass(frozen=True)
class SortedValues:
    """Ascending values, float64 (n,), and how many each stands for."""

    values: Floats
    weights: Floats

    @classmethod
    def of(cls, values: Floats) -> "SortedValues":
        """Of ascending values that stand for themselves."""
        return cls(values, np.ones(values.size))

    @property
    def low(self) -> float:
        """The least, or 0."""
        return min(0.0, float(self.values[0]))

    @property
    def high(self) -> float:
        """The greatest, or 0."""
        return max(0.0, float(self.values[-1]))

    def magnitudes(self) -> "SortedValues":
        """|x|."""
        far = np.abs(self.values)
        order = far.argsort(kind="stable")
        return SortedValues(far[order], self.weights[order])

    def quantile(self, share: float) -> float:
        """The value that this share of the values lies below, between two neighbours on the straight line."""
        past = self.weights.cumsum()
        ranks = past - (self.weights + 1) / 2  # of the middle one of those it stands for
        return float(np.interp(share * (past[-1] - 1), ranks, self.values))

    def histogram(self, low: float, high: float, bins: int) -> Floats:
        """How many values lie in each of so many bins of one width from low to high."""
        counts: Floats = np.histogram(self.values, bins, (low, high), weights=self.weights)[0]
        return counts

    def nonzero(self) -> "SortedValues":
        """Those that are not exactly 0."""
        kept = self.values != 0
        return SortedValues(self.values[kept], self.weights[kept])

    def squared_error(self, scale: float, zero_point: float, bits: int) -> float:
        """The sum of (x - x')^2 over all values, x' the nearest of the levels (code - zero_point) scale.

        Where levels are few, it is what the sums of each level's values say, so the time does not go with the values.
        """
        if 2**bits > MOST_LEVELS:
            codes = np.clip(np.rint(self.values / scale) + zero_point, 0, 2**bits - 1)
            return float((self.weights * (self.values - (codes - zero_point) * scale) ** 2).sum())
        levels = (np.arange(2**bits) - zero_point) * scale
        borders = np.searchsorted(self.values, (levels[1:] + levels[:-1]) / 2)
        bounds = np.concatenate([[0], borders, [self.values.size]])
        number, first, second = (np.diff(sums[bounds]) for sums in self._sums)
        return max(0.0, float((second - 2 * levels * first + levels**2 * number).sum()))

    @cached_property
    def _sums(self) -> tuple[Floats, Floats, Floats]:
        powers = (self.weights, self.weights * self.values, self.weights * self.values**2)
        number, first, second = (np.concatenate([[0.0], each.cumsum()]) for each in powers)
        return number, first, second
