"""The compensated rounding of one layer, on its inputs in the float and in the quantized net.

    target    W* = W + G (H + damping)^-1     weights that give the float net's output on the quantized net's inputs
    rounding  minimise tr((W* - Q) H (W* - Q)^T) over Q on the grid     column by column, errors carried over

Targets are as in GPTAQ (arXiv 2504.02692). Where a block adds its input to a convolution's output, the layer should
also give what the shortcut lost, divided by the gain of the BatchNorm in between. A linear layer of tokens keeps its
own weights as the target, and so does a layer that few columns came to. In transformers a few tokens are hundreds of
times as long as the others, and a LayerNorm takes the length away: they would decide what is fitted, and are left out
of H.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..plans.layers import LayerChoice
from ..simulation.layer import simulate_layer
from .adaround import requantized
from .call_sums import CallLook, Given, by_call
from .coded_rounding import CodeGrid, round_coded
from .columns import Columns
from .feedback import Factor, compensated, factorise, solve
from .gram import Gram
from .levels import Levels
from .settings import Outliers

NO_BETTER = "rounding to nearest is better"
ONLY_NEAREST = "compensated, its codes would take more bytes than the plan promises"
OWN, OUTPUT, SUM = "its own weights", "the float output", "the float sum"
FITTING = 4  # columns for each input, at least, where a target is fitted to them: less would not hold beyond them
MOVING = 16  # columns for each input, at least, where single weights are moved on them; on tokens they never are
STRANGE = 0.6  # of a layer's variance is lacking where the nets' rows are of other samples; at one bit up to 0.46 is


@dataclass(frozen=True)
class Rounded:
    """What a layer becomes.

    weight: as it is used, every value at a level; kept: what the plan makes it of; lost: channels that are rounded to
    nearest after all; changed: weights not at the nearest level; target: in words; columns: how many there were, for
    so many inputs; damping: as a share of H's mean diagonal; nearest, compensated: mean squared errors of an output
    position to the target, summed over channels.
    """

    weight: Tensor
    kept: Tensor
    lost: int
    changed: int
    target: str
    columns: int
    inputs: int
    damping: float
    nearest: float
    compensated: float


class CannotCompensate(Exception):  # noqa: N818  # no error: the layer is rounded to nearest, and this is said
    """Why a layer is rounded to nearest."""


@dataclass(frozen=True)
class LayerRounding:
    """A layer with what decides its rounding. columns: most positions that are looked at, unless the layer is wide."""

    name: str
    module: Any
    weight: Tensor
    choice: LayerChoice
    columns: int
    damping: float
    outliers: Outliers = "leave_out"

    def round(
        self,
        calls: Sequence[Given],
        later: Gram | None,
        generator: torch.Generator,
        executor: Executor | None = None,
    ) -> Rounded:
        """Round it. later: H of further calls of the layer; executor: whose workers look at a call each.

        Raises CannotCompensate where it has to be rounded to nearest; SettingError, naming the layer, for NaN.
        """
        geometry = Columns.of(self.module)
        matrices = geometry.matrices(self.weight)
        gram = self._gram(geometry, matrices, calls, generator, executor)
        if later is not None:
            gram = Gram(gram.count + later.count, gram.h + later.h, gram.g)
        if not gram.finite:
            raise SettingError(f"layer {self.name!r}: its inputs hold NaN or infinity; look at the batches")
        if not gram.count:
            raise CannotCompensate("it is not called with a tensor")
        if not bool(gram.h.any()):
            raise CannotCompensate("all of its inputs are zero")
        if gram.count < FITTING * matrices.shape[2]:
            gram = Gram(gram.count, gram.h)
        gram.h.div_(gram.count)  # in place: of wide layers each copy takes gigabytes
        gram.g.div_(gram.count)
        tokens = any(geometry.takes_tokens(call.rough) for call in calls)
        moves = gram.count >= MOVING * matrices.shape[2] and not tokens
        near = geometry.matrices(simulate_layer(self.weight, self.choice))
        parts = [
            _Matrix.of(matrices[g], gram.h[g], gram.g[g] if gram.g.numel() else None, self.damping)
            for g in range(geometry.groups)
        ]
        grid = CodeGrid.of(self.choice)
        rounded = self._on_levels(geometry, parts, moves) if grid is None else _on_codes(grid, parts, moves)
        losses = [sum(part.loss(values[g]) for g, part in enumerate(parts)) for values in (near, rounded)]
        damping = max(part.factor.damping for part in parts)
        if grid is not None:
            _check_promise(grid, near, rounded)
        if losses[1] > losses[0] and (grid is None or _takes_no_more(grid, near, rounded)):
            raise CannotCompensate(NO_BETTER)
        kept, weight, lost = self._settled(geometry.weight(rounded, self.weight.shape))
        how = OWN if not gram.g.numel() else (SUM if any(call.lost is not None for call in calls) else OUTPUT)
        changed = int((near != geometry.matrices(weight)).sum())
        return Rounded(weight, kept, lost, changed, how, gram.count, matrices.shape[2], damping, *losses)

    def _on_levels(self, geometry: Columns, parts: Sequence["_Matrix"], moves: bool) -> Tensor:
        """The layer's matrices, rounded to the levels of any scheme."""
        levels = Levels.of(self.weight.cpu(), self.choice)
        group, held = geometry.matrices(levels.group), geometry.matrices(levels.held)
        rounded = [
            compensated(part.target, part.h, part.factor, Levels(levels.values, levels.first, group[g], held[g]), moves)
            for g, part in enumerate(parts)
        ]
        return torch.stack(rounded)

    def _gram(
        self,
        geometry: Columns,
        matrices: Tensor,
        calls: Sequence[Given],
        generator: torch.Generator,
        executor: Executor | None,
    ) -> Gram:
        """Sums over all calls, a few samples at a time, so that columns fit into memory.

        They are added up in the calls' order, whoever looks at a call.
        """
        gram, lacking, varying = Gram(), 0.0, 0.0
        samples = sum(geometry.samples(call.rough) for call in calls)
        looks = [
            CallLook.of(
                self.name, self.module, self.weight, call,
                list(geometry.drawn(self.module, call.rough, self.columns, samples, generator)), self.outliers,
            )
            for call in calls
        ]  # fmt: skip
        for look in by_call(looks, geometry.groups * matrices.shape[2] ** 2, executor):
            for product in look.products:
                gram.take(*product)
            lacking += look.lacking
            varying += look.varying
        if lacking > STRANGE * varying:
            return Gram(gram.count, gram.h)
        return gram

    def _settled(self, rounded: Tensor) -> tuple[Tensor, Tensor, int]:
        """What the plan is to be applied to, what that gives, `rounded` but for float32's last bits, and lost channels.

        Channels whose levels quantizing does not find again keep their float weights, and are rounded to nearest.
        """
        values, again = requantized(rounded, self.choice)
        limit = 1e-5 * rounded.abs().amax() if rounded.numel() else 0.0
        wrong = ((again - values) != 0) | ((values - rounded).abs() > limit)
        axis = self.choice.channel_axis
        lost = wrong.movedim(axis, 0).flatten(1).any(1) if wrong.dim() > 1 else wrong
        if not bool(lost.any()):
            return values, values, 0
        if self.choice.scheme.granularity == "per_tensor":
            raise CannotCompensate(f"quantizing does not find the levels of {self.choice.scheme} again")
        shape = [-1 if k == axis else 1 for k in range(rounded.dim())]
        kept = torch.where(lost.view(shape), self.weight, values)
        weight = simulate_layer(kept, self.choice)
        if not bool(torch.where(lost.view(shape), True, weight == values).all()) or bool(lost.all()):
            raise CannotCompensate(f"quantizing does not find the levels of {self.choice.scheme} again")
        return kept, weight, int(lost.sum())


def _on_codes(grid: CodeGrid, parts: Sequence["_Matrix"], moves: bool) -> Tensor:
    """The layer's matrices, rounded to whole-number codes whose bits count."""
    coded = [grid.matrix(part.weight, part.target, part.h, part.factor) for part in parts]
    return torch.stack([grid.values(codes) for codes in round_coded(coded, grid, moves)])


def _check_promise(grid: CodeGrid, near: Tensor, rounded: Tensor) -> None:
    """Raise CannotCompensate where it is only to nearest that the layer takes what the plan promises."""
    if grid.keeps(grid.bits(near)) and not grid.keeps(grid.bits(rounded)):
        raise CannotCompensate(ONLY_NEAREST)


def _takes_no_more(grid: CodeGrid, near: Tensor, rounded: Tensor) -> bool:
    """Whether rounding to nearest takes what is promised, or without a promise no more than the other does."""
    bits = grid.bits(near)
    return grid.keeps(bits) if grid.promised is not None else bits <= grid.bits(rounded)


@dataclass(frozen=True)
class _Matrix:
    """Weights (rows, d), the target of their rounding, float64, H float64 (d, d), and H damped and factorised."""

    weight: Tensor
    target: Tensor
    h: Tensor
    factor: Factor

    @classmethod
    def of(cls, weight: Tensor, h: Tensor, g: Tensor | None, damping: float) -> "_Matrix":
        """g: G, float64 (rows, d), or None, where the weights are the target themselves."""
        factor = factorise(h, damping)
        if factor is None:
            raise CannotCompensate("no damping makes its inputs' second moments invertible")
        return cls(weight, weight.double() if g is None else weight.double() + solve(factor, g), h, factor)

    def loss(self, rounded: Tensor) -> float:
        """tr((W* - Q) H (W* - Q)^T)."""
        lost = self.target - rounded.double()
        return float(((lost @ self.h) * lost).sum())


def later_gram(calls: Sequence[tuple[nn.Module, Tensor]], columns: int, generator: torch.Generator) -> Gram:
    """H of further calls of a layer: the modules that are called, and the inputs that they have in the float net."""
    gram = Gram()
    for module, value in calls:
        geometry = Columns.of(module)
        samples = len(calls) * geometry.samples(value)
        for piece, at in geometry.drawn(module, value, columns, samples, generator):
            gram.add(geometry.columns(module, piece.of(value), at), None)
    return gram
