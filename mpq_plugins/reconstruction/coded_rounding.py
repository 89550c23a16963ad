"""The codes of one layer whose plan counts what they take in an entropy-coded file: rounded, moved, and kept small.

Rounding with error feedback (coded_feedback.py), then sweeps of single moves. Where the plan promises the layer's bytes
and codes take more, bits get a price in loss, lambda: it is found from pass to pass and from sweep to sweep, each with
costs by the codes of the one before, until the codes take what is promised.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plans.entropy_coded import EntropyCoded
from ..plans.granular import INTEGER_BITS
from ..plans.layers import LayerChoice
from ..quantization.coded_bits import bits_of_counts
from .code_costs import Counts, code_costs, counts_of
from .code_lambda import Lambda
from .coded_feedback import CodedMatrix
from .feedback import SWEEPS, Factor

# At equal bits 0.02 to 0.04 with a finer step bring a net no closer to the float one, and more less close.
USUAL = 0.0  # lambda where nothing is promised, in squared steps times the columns' mean conditional variance
PASSES = 2  # with error feedback, where lambda is given and not 0
MOST_PASSES = 12  # where it is looked for
MOST_SWEEPS = 40  # where a promise is not kept after the usual ones
SETTLED = 0.002  # of the codes are moved in a sweep, at most, when it is the last one
RENEWED = 3  # passes, and sweeps, before costs stay as they are, so that it is lambda alone that changes bits


@dataclass(frozen=True)
class CodeGrid:
    """The grid of a layer. step: the distance between levels; most: the largest code; promised: bits, if any are."""

    step: float
    most: int
    promised: float | None

    @classmethod
    def of(cls, choice: LayerChoice) -> "CodeGrid | None":
        """None where the layer's weights are not all codes of one width times a step that the plan has."""
        scheme, bits = choice.scheme, choice.bits
        if not isinstance(scheme, EntropyCoded) or scheme.step is None or bits is None or bits not in INTEGER_BITS:
            return None
        promised = None if choice.coded_bytes is None else 8.0 * choice.coded_bytes
        step = float(torch.tensor(scheme.step, dtype=torch.float32))
        return cls(step, 2 ** (bits - 1) - 1, promised)

    def matrix(self, weight: Tensor, target: Tensor, h: Tensor, factor: Factor) -> CodedMatrix:
        """What is to be rounded, of rows of the layer; weights of exactly 0 stay 0, so a pruned layer stays pruned."""
        return CodedMatrix(target / self.step, h, factor, weight == 0)

    def bits(self, weights: Tensor) -> float:
        """What weights at the grid's levels take."""
        return bits_of_counts(counts_of([(weights / self.step).round().to(torch.int16)], self.most))

    def values(self, codes: Tensor) -> Tensor:
        """The weights, as quantizing decodes them."""
        return codes.float() * torch.tensor(self.step, dtype=torch.float32, device=codes.device)

    def keeps(self, bits: float) -> bool:
        """Whether codes of so many bits are what is promised."""
        return self.promised is None or bits <= self.promised


def round_coded(matrices: Sequence[CodedMatrix], grid: CodeGrid, moves: bool) -> list[Tensor]:
    """Codes of each matrix of a layer, int16. moves: whether single codes are moved behind the passes."""
    rounding = _Rounding(matrices, grid)
    rounding.run_passes()
    if moves:
        rounding.run_sweeps()
    return rounding.codes


@dataclass
class _Rounding:
    """Codes on their way. scale: the geometric mean of all columns' conditional variances."""

    matrices: Sequence[CodedMatrix]
    grid: CodeGrid
    codes: list[Tensor] = field(default_factory=list)
    counts: Counts = field(init=False)
    scale: float = field(init=False)
    costs: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self._take([matrix.nearest(self.grid.most) for matrix in self.matrices])
        variances = torch.cat([matrix.variances for matrix in self.matrices])
        self.scale = float(variances.log().mean().exp())
        self.search = None if self.grid.promised is None else Lambda(self.grid.promised)

    def _take(self, codes: list[Tensor]) -> float:
        """Go on with these codes; what they take."""
        self.codes, self.counts = codes, counts_of(codes, self.grid.most)
        return bits_of_counts(self.counts)

    @property
    def _price(self) -> float:
        return self.scale * (USUAL if self.search is None else self.search.value)

    def run_passes(self) -> None:
        """Round with error feedback, once more and once more; of passes for a promise the best one stays."""
        best = _Best(self.search)
        usual = PASSES if USUAL else 1
        for number in range(usual if self.search is None else MOST_PASSES):
            costs = self._costs(number)
            bits = self._take([matrix.with_feedback(self._price, costs) for matrix in self.matrices])
            best.offer(self.codes, bits)
            if self.search is not None:
                if self.search.full(bits) or self.search.exhausted:
                    break
                self.search.look_on(bits)
        self._take(best.codes)

    def run_sweeps(self) -> None:
        """Move single codes until few are moved and the promise is kept."""
        moving = [matrix.moving(codes) for matrix, codes in zip(self.matrices, self.codes, strict=True)]
        best = _Best(self.search)
        best.offer(self.codes, bits_of_counts(self.counts))
        for number in range(MOST_SWEEPS):
            if number >= SWEEPS and best.kept:
                break
            costs = self._costs(number)
            moved = sum(each.sweep(self._price, costs) for each in moving)
            bits = self._take([each.codes for each in moving])
            best.offer(self.codes, bits)
            if moved <= SETTLED * int(self.counts.sum()) and (self.search is None or self.search.full(bits)):
                break
            if self.search is not None and not self.search.full(bits):
                self.search.look_on(bits)
        self._take(best.codes)

    def _costs(self, number: int) -> NDArray[np.float64]:
        """Of codes in a pass: by those of the pass before, in the first passes."""
        if number < RENEWED or self.search is None:
            self.costs = code_costs(self.counts)
            if self.search is not None:
                self.search.forget()
        return self.costs


@dataclass
class _Best:
    """The last codes; of those that are to keep a promise the last that do and use it up, if any do."""

    search: Lambda | None
    codes: list[Tensor] = field(default_factory=list)
    rank: tuple[bool, bool, float] = (False, False, -float("inf"))

    @property
    def kept(self) -> bool:
        """Whether there are any that keep it."""
        return self.rank[0]

    def offer(self, codes: Sequence[Tensor], bits: float) -> None:
        """Codes that take so many bits; they are copied if they are the best."""
        rank = self._rank(bits)
        if rank >= self.rank:
            self.codes, self.rank = [each.clone() for each in codes], rank

    def _rank(self, bits: float) -> tuple[bool, bool, float]:
        if self.search is None or self.search.full(bits):
            return True, True, 0.0
        kept = bits <= self.search.promised
        return kept, False, bits if kept else -bits
