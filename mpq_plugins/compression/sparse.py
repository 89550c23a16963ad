"""Matrices that are mostly zero, by the paper's relative index (arXiv 1510.00149, sec. 2).

Every entry is kept with its distance from the one before, in few bits; where the distance is too long for them, an
entry of value 0 is put in between.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bitpack import Codes

CONV_INDEX_BITS, FC_INDEX_BITS = 8, 5  # the paper's


def index_bits(kind: str) -> int:
    """Bits of a gap in a layer of this kind: 8 in convolutions, 5 in others."""
    return CONV_INDEX_BITS if kind.startswith("conv") else FC_INDEX_BITS


@dataclass(frozen=True)
class RelativeIndex:
    """Entries in order. gaps: zeros between the entry before (or the start) and this one, (entries,), uint8; values:
    (entries,), 0 for a filler, of which none is the last."""

    gaps: NDArray[np.uint8]
    values: Codes


def to_relative(codes: Codes, bits: int) -> RelativeIndex:
    """Codes (n,) that are mostly 0, with gaps of up to 2^bits - 1 zeros, bits 1 to 8."""
    span = 2**bits
    places = np.flatnonzero(codes)
    zeros = np.diff(places, prepend=-1) - 1
    fillers = zeros // span  # each stands for `span` zeros, itself one of them
    ends = np.cumsum(fillers + 1) - 1
    count = int(ends[-1]) + 1 if len(ends) else 0
    gaps, values = np.full(count, span - 1, np.uint8), np.zeros(count, codes.dtype)
    gaps[ends], values[ends] = zeros % span, codes[places]
    return RelativeIndex(gaps, values)


def from_relative(index: RelativeIndex, count: int) -> Codes | None:
    """The codes (count,) again; None where entries lie beyond, which only damaged data do."""
    places = np.cumsum(index.gaps.astype(np.int64) + 1) - 1
    if len(places) and places[-1] >= count:
        return None
    codes = np.zeros(count, index.values.dtype)
    codes[places] = index.values
    return codes
