"""Stochastic rounding: to the level above with the probability that is the way there from the level below.

    round(x) = floor(x) with probability 1 - (x - floor(x)), floor(x) + 1 otherwise        so that E round(x) = x

x is a weight in steps of its grid; Gupta et al. 2015, Deep Learning with Limited Numerical Precision (arXiv 1502.02551,
eq. 1). A weight that is a level stays it, and one beyond the last level has that. Binary levels are -scale and +scale.

What is drawn is no stream, which whoever cuts a layer otherwise would read otherwise. It is SplitMix64's mixing
(Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators) of the seed and of what the weight itself is:
its place in its output channel's row (per group: in the group's), its value, and its group's scale. So chunks, parts of
a layer, workers and backends find the same codes, and no one has to know which channel of which layer a row was.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .grid import Floats, Grids
from .kernel import add_sums

Words = NDArray[np.uint64]

BLOCK = 1 << 17  # weights that are drawn for at a time; each takes some 60 bytes
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)
UNUSED = np.uint64(11)  # of 64 random bits, those that a float64 in [0, 1) cannot hold


@dataclass(frozen=True)
class StochasticGrids:
    """Grids on which weights are rounded stochastically, which measure themselves; seed: as the scheme's."""

    grids: Grids
    seed: int

    @property
    def bits(self) -> NDArray[np.int64]:
        """The bit-widths, (K,)."""
        return self.grids.bits

    def error_sums(self, rows: Tensor, largest: bool) -> Floats:
        """As kernel.error_sums, of the codes that are drawn; rows as for `stochastic_codes`."""
        return np.stack([self._of_width(rows, k, largest) for k in range(len(self.bits))], axis=1)

    def error_totals(self, rows: Tensor, largest: bool) -> Floats:
        """As kernel.error_totals, of rows that are output channels, in which weights have their places."""
        return add_sums(self.error_sums(rows, largest))[None]

    def _of_width(self, rows: Tensor, column: int, largest: bool) -> Floats:
        sums = [
            _errors(values.astype(np.float64), codes - offset, scale.astype(np.float64), largest)
            for values, scale, offset, codes in _blocks(rows, self.grids, column, self.seed)
        ]
        return np.concatenate(sums) if sums else np.zeros((0, 3))


def draws(rows: NDArray[np.float32], scale: NDArray[np.float32], seed: int) -> Floats:
    """What decides each weight's rounding, float64 (R, n), uniform in [0, 1).

    rows: (R, n); scale: (R, 1), or (1, 1) for all of them.
    """
    values = (rows + np.float32(0)).view(np.uint32).astype(np.uint64)  # 0 and -0 are one weight
    places = np.arange(rows.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        start = _mixed(np.array([seed + 1], np.uint64) * GOLDEN)
        keys = _mixed(start + scale.view(np.uint32).astype(np.uint64))
        words = _mixed(_mixed((values << np.uint64(32) | places) ^ keys) + keys)
    drawn: Floats = (words >> UNUSED).astype(np.float64) * 2.0**-53
    return drawn


def stochastic_codes(rows: Tensor, grids: Grids, column: int, seed: int) -> NDArray[np.int16]:
    """Codes of weights (R, n) on one column of the grids of R groups, or of 1 that all rows share.

    Rows are output channels, or groups where channels have several; see above.
    """
    codes = [codes for *_, codes in _blocks(rows, grids, column, seed)]
    return np.concatenate(codes) if codes else np.zeros(rows.shape, np.int16)


def _errors(exact: Floats, steps: NDArray[np.int32], scale: Floats, largest: bool) -> Floats:
    """RELATIVE, SQUARED and LARGEST of each row, (rows, 3). numpy adds in one order, however many threads there are."""
    error, magnitude = np.abs(exact - steps * scale), np.abs(exact)
    relative = np.divide(error, magnitude, out=np.zeros_like(error), where=magnitude > 0)
    most = error.max(axis=1) if largest else np.zeros(len(error))
    return np.stack((relative.sum(axis=1), np.square(error).sum(axis=1), most), axis=1)


def _blocks(
    rows: Tensor, grids: Grids, column: int, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32], NDArray[np.int16]]]:
    """Some rows at a time: weights (rows, n), scales and zero points (rows, 1), and codes."""
    step = max(1, BLOCK // max(1, rows.shape[1]))
    levels = _Levels(int(grids.qmin[column]), int(grids.qmax[column]), 2 if grids.bits[column] == 1 else 1)
    for start in range(0, rows.shape[0], step):
        values = rows[start : start + step].detach().to(torch.float32).cpu().contiguous().numpy()
        own = slice(start, start + len(values)) if len(grids.scale) > 1 else slice(None)
        scale, zero_point = grids.scale[own, column, None], grids.zero_point[own, column, None]
        yield values, scale, zero_point, levels.drawn(values, scale, zero_point, seed)


@dataclass(frozen=True)
class _Levels:
    """The least and the greatest code, and how far one lies from the next: binary ones are -1 and 1."""

    least: int
    greatest: int
    gap: int

    def drawn(
        self, values: NDArray[np.float32], scale: NDArray[np.float32], zero_point: NDArray[np.int32], seed: int
    ) -> NDArray[np.int16]:
        """The codes of some rows, whose scales are finite, and 0 only for a binary group of zeros."""
        steps = values.astype(np.float64) / np.where(scale == 0, 1, scale).astype(np.float64)
        nearest = np.rint(steps)
        # A level is its code times the scale, rounded to float32, which divided by the scale need not be the code.
        with np.errstate(over="ignore"):  # far beyond the last level
            held = nearest.astype(np.float32) * scale == values
        position = (np.where(held, nearest, steps) + zero_point - self.least) / self.gap
        position = np.clip(position, 0, (self.greatest - self.least) // self.gap)
        below = np.floor(position)
        above = draws(values, scale, seed) < position - below
        codes: NDArray[np.int16] = (self.least + self.gap * (below + above)).astype(np.int16)
        return codes


def _mixed(words: Words) -> Words:
    for shift, factor in MIX:
        words = (words ^ (words >> np.uint64(shift))) * factor
    return words ^ (words >> LAST_SHIFT)
