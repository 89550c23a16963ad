"""Adaptive rounding (AdaRound, Nagel et al. 2020, arXiv 2004.10568): learn whether each weight rounds up or down.

A weight between two levels of its grid is low + step h(V), h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1) the
rectified sigmoid (eq. 23), and the regulariser sum 1 - |2 h(V) - 1|^beta (eq. 24) drives h to 0 or 1 as beta falls.
Binary weights have two levels, so for them it is the sign that is learned.

The plan's ranges are the weights' own extremes, or found from them: so one weight at either end of each group's range
stays there, and whoever quantizes the rounded weights finds the same grid again. Weights beyond a clipped range stay at
its end, as AdaRound's clamp has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError, WeightError
from ..plans.affine import Symmetry
from ..plans.layers import LayerChoice
from ..quantization.grid import Grids
from ..quantization.integer_codes import integer_codes
from ..simulation.floats import as_float
from ..simulation.layer import simulate_layer
from ..simulation.parts import weight_parts

ZETA, GAMMA = 1.1, -0.1
HOTTEST, COLDEST = 20.0, 2.0  # beta
WARM_UP = 0.2  # of the steps, without the regulariser
DECIDED = 10.0  # |V| of a weight that has no choice


@dataclass(frozen=True)
class Rounding:
    """One layer's two candidates for every weight, all of the weight's shape, float32.

    low: the level below, or the only one; step: what the level above adds, 0 where there is no choice; nearest: whether
    that one is nearer; v: what is learned.
    """

    low: Tensor
    step: Tensor
    nearest: Tensor
    v: Tensor

    @classmethod
    def of(cls, weight: Tensor, choice: LayerChoice) -> Self:
        """Beginning at the float weight: h(V) is where it lies between its levels.

        Raises SettingError, naming the layer, for a scheme that is not affine or a weight that is not float32, and
        WeightError for NaN or infinity.
        """
        require_affine(weight, choice)
        axis, exact = choice.channel_axis, weight.detach()
        low, step, share = exact.clone(), torch.zeros_like(exact), torch.zeros_like(exact)
        nearest = torch.zeros_like(exact, dtype=torch.bool)
        for part in weight_parts(exact, choice):
            if part.in_float:
                part.put(low, as_float(part.values, part.bits, choice.name))
                continue
            cells = _Cells.of(part.values, part.bits, choice)
            for whole, rows in ((low, cells.low), (step, cells.step), (share, cells.share), (nearest, cells.nearest)):
                values = from_channel_rows(rows.reshape(len(part.channels), -1), part.values.shape, axis)
                part.put(whole, values.to(whole.dtype))
        v = -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)
        return cls(low, step, nearest, torch.where(step > 0, v, -DECIDED).requires_grad_())

    def to(self, device: torch.device) -> "Rounding":
        """The same on a device, before anything is learned."""
        v = self.v.detach().to(device).requires_grad_()
        return Rounding(self.low.to(device), self.step.to(device), self.nearest.to(device), v)

    def h(self) -> Tensor:
        """How far up each weight is, 0 to 1."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def rounded(self) -> Tensor:
        """The weight as learned, every value at a level."""
        return self.low + self.step * (self.v.detach() >= 0)

    def to_nearest(self) -> Tensor:
        """The weight that the plan makes without learning."""
        return self.low + self.step * self.nearest

    def changed(self) -> int:
        """How many weights are learned not to be at the nearest level."""
        return int(((self.v.detach() >= 0) != self.nearest)[self.step > 0].sum())


def soft_weights(roundings: Mapping[str, Rounding]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights between their levels, and the h of each, by name."""
    h = {name: rounding.h() for name, rounding in roundings.items()}
    return {name: torch.addcmul(learned.low, learned.step, h[name]) for name, learned in roundings.items()}, h


def undecided(h: Mapping[str, Tensor], beta: float) -> Tensor:
    """The regulariser: how many weights are between their levels, the more strictly counted the smaller beta."""
    terms = [(1 - (2 * soft - 1).abs().pow(beta)).sum() for soft in h.values()]
    return torch.stack(terms).sum()


def beta_at(step: int, steps: int) -> float | None:
    """beta after so many steps: none in the warm-up, then from 20 to 2 in a line."""
    start = WARM_UP * steps
    if step < start:
        return None
    return COLDEST + (HOTTEST - COLDEST) * max(0.0, 1 - (step - start) / (steps - start))


def require_affine(weight: Tensor, choice: LayerChoice) -> None:
    """Raise SettingError, naming the layer, where its rounding cannot be learned."""
    if choice.scheme.as_affine is None:
        raise SettingError(
            f"layer {choice.name!r}: rounding is learned between the levels of one grid, which {choice.scheme} has "
            "not; plan it under the affine scheme"
        )
    if weight.dtype != torch.float32:
        raise SettingError(
            f"layer {choice.name!r}: {weight.dtype} cannot hold learned codes exactly; reconstruct model.float()"
        )


def requantized(weight: Tensor, choice: LayerChoice) -> tuple[Tensor, Tensor]:
    """What quantizing over and over comes to, and what quantizing makes of that: the same, if it has settled."""
    weights = simulate_layer(weight, choice)
    for _ in range(4):
        again = simulate_layer(weights, choice)
        if again.equal(weights):
            return weights, again
        weights = again
    return weights, simulate_layer(weights, choice)


def settled(weight: Tensor, choice: LayerChoice) -> Tensor:
    """The weight as quantizing it leaves it, which may differ from it by float32's rounding of the scale, no more.

    Raises WeightError, naming the layer, if the plan finds another grid in it.
    """
    weights, _ = requantized(weight, choice)
    limit = weight.detach().abs().amax() * 1e-5 if weight.numel() else 0.0
    if not bool(((weights - weight).abs() <= limit).all()):
        why = "please report this"
        if getattr(choice.scheme, "scale_dtype", "") == "float16":
            why = "its scales are too small for float16. Measure with scale_dtype bfloat16 or float32, or skip it"
        raise WeightError(f"layer {choice.name!r}: the learned codes do not survive quantizing; {why}")
    return weights


def nearest(weight: Tensor, choice: LayerChoice) -> Tensor:
    """The weight rounded to nearest, so that quantizing it again changes nothing where the scheme is affine."""
    if choice.scheme.as_affine is not None and weight.dtype == torch.float32:
        return settled(Rounding.of(weight, choice).to_nearest(), choice)
    return simulate_layer(weight, choice)


@dataclass(frozen=True)
class _Cells:
    """Rows (groups, elements) of the levels below and what the ones above add; share: where in between, 0 to 1."""

    low: Tensor
    step: Tensor
    share: Tensor
    nearest: Tensor

    @classmethod
    def of(cls, weight: Tensor, bits: int, choice: LayerChoice) -> Self:
        scheme = choice.scheme.as_affine
        assert scheme is not None
        quantized = integer_codes(weight, bits, choice.scheme, channel_axis=choice.channel_axis, layer=choice.name)
        grid = quantized.grid
        groups = max(1, grid.scale.shape[0])
        rows, codes = (
            channel_rows(t, choice.channel_axis).reshape(groups, -1).float() for t in (weight, quantized.codes)
        )
        if not rows.numel():
            return cls(rows, rows, rows, rows.bool())
        scale = torch.from_numpy(grid.scale).to(rows.device)
        zero_point = torch.from_numpy(grid.zero_point).to(rows.device).float()
        # Codes are turned round where the scale is negative, so that they ascend with the weights.
        sign = torch.where(scale < 0, -1.0, 1.0)
        scale, codes = scale.abs(), codes * sign + 0.0
        least, greatest = (torch.where(sign < 0, -other, end) for end, other in _both_ways(grid))
        gap = 2 if bits == 1 else 1  # binary codes are -1 and 1
        position = rows / scale.clamp_min(torch.finfo(torch.float32).smallest_normal) + zero_point
        below = position.floor() if gap == 1 else torch.full_like(position, -1.0)
        free = (below >= least) & (below + gap <= greatest) & (scale > 0)
        if choice.scheme.scales_per_group:  # which are found from the weights again
            free &= (rows.amin(1) < rows.amax(1))[:, None]
            if bits > 1:
                held, codes = group_ends(rows, codes, least, greatest, scheme.symmetric)
                free &= ~held
        low = torch.where(free, below, codes)
        share = ((position - low) / gap).clamp(0, 1)
        return cls((low - zero_point) * scale, free * (gap * scale), share, codes > low)


def _both_ways(grid: Grids) -> tuple[tuple[float, float], tuple[float, float]]:
    """The least code and then the greatest, each with the other one."""
    least, greatest = float(grid.qmin[0]), float(grid.qmax[0])
    return (least, greatest), (greatest, least)


def group_ends(
    rows: Tensor, codes: Tensor, least: Tensor | float, greatest: Tensor | float, symmetric: Symmetry
) -> tuple[Tensor, Tensor]:
    """Which weights hold each group's range, and the codes with theirs at its ends.

    Asymmetric: the extreme on either side of zero, whose nearest code may be one short of the end where it is a tie;
    symmetric: the one farthest from zero, in the full range of two the negative one, which its scale is of.
    """
    held = torch.zeros_like(rows, dtype=torch.bool)
    if symmetric == "full":
        below = -rows.amin(1, keepdim=True) >= rows.amax(1, keepdim=True)
        farthest = torch.where(below, rows.argmin(1, keepdim=True), rows.argmax(1, keepdim=True))
        return held.scatter(1, farthest, True), codes
    if symmetric:
        return held.scatter(1, rows.abs().argmax(1, keepdim=True), True), codes
    for end, extreme, beyond in (
        (least, rows.argmin(1, keepdim=True), rows.amin(1, keepdim=True) < 0),
        (greatest, rows.argmax(1, keepdim=True), rows.amax(1, keepdim=True) > 0),
    ):
        at_end = torch.zeros_like(held).scatter(1, extreme, True) & beyond & (rows.amin(1) < rows.amax(1))[:, None]
        held, codes = held | at_end, torch.where(at_end, end, codes)
    return held, codes
