"""Rounding with error feedback: what a column loses, the columns after it make good.

    minimise over Q on the grid   tr((W - Q) H (W - Q)^T),    H = U^T U / n

With H = A D A^T, A unit upper triangular, the loss is sum_j D_j ||(W - Q)_j + sum_(i<j) (W - Q)_i A_ij||^2, so column
after column is rounded to nearest with the errors so far carried over. This is OBQ's greedy update for a fixed order
(GPTQ, arXiv 2210.17323, in the form of LDLQ, QuIP, arXiv 2307.13304, sec. 3); columns go by falling diagonal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..models.autocast import own_arithmetic
from ..quantization.kernel import numba_available
from .levels import Levels

BLOCK = 64  # columns at a time
SWEEPS = 10  # of single moves, at most


@dataclass(frozen=True)
class Factor:
    """A damped H factorised: order, int64 (d,), the columns as they are rounded; lower: its flipped Cholesky factor.

    damping: the share of the mean diagonal that was added.
    """

    order: Tensor
    lower: Tensor
    damping: float

    def feedback(self, start: int, stop: int) -> Tensor:
        """A's columns start..stop (in the rounding order), rows 0..stop, float32."""
        d = len(self.order)
        block = self.lower[d - stop :, d - stop : d - start].flip(0, 1)
        diagonal = self.lower.diagonal().flip(0)[start:stop]
        return (block / diagonal).float()


def factorise(h: Tensor, damping: float, most: float = 10.0) -> Factor | None:
    """H, float64 (d, d), damped by a share of its mean diagonal, ten times more each time that it does not factorise.

    An input that is always zero gets the mean on its diagonal. None where H is zero or no damping up to `most` helps.
    """
    diagonal = h.diagonal().clone()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 0.0
    if not mean > 0:
        return None
    order = torch.where(alive, diagonal, mean).argsort(descending=True, stable=True)
    backwards = order.flip(0)
    turned = h[backwards][:, backwards]
    share = damping
    while share <= most:
        turned.diagonal().copy_(torch.where(alive, diagonal + share * mean, mean * (1 + share))[backwards])
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            return Factor(order, lower, share)
        share = max(10 * share, 1e-6)
    return None


def damped(h: Tensor, factor: Factor) -> Tensor:
    """H as it was factorised, but for inputs that are always zero."""
    diagonal, result = h.diagonal(), h.clone()
    result.diagonal().add_(factor.damping * diagonal[diagonal > 0].mean())
    return result


def solve(factor: Factor, right: Tensor) -> Tensor:
    """X with X H = right, both (rows, d), float64."""
    backwards = factor.order.flip(0)
    solved = torch.cholesky_solve(right[:, backwards].T, factor.lower).T
    return torch.empty_like(right).index_copy_(1, backwards, solved)


@own_arithmetic()
def round_with_feedback(target: Tensor, factor: Factor, levels: Levels) -> Tensor:
    """The rounded matrix, float32 (rows, d); target: (rows, d). levels: with group and held of the same shape."""
    order = factor.order
    wanted = target.float()[:, order].contiguous()
    group, held = (tensor.to(target.device)[:, order] for tensor in (levels.group, levels.held))
    rounded, lost = torch.empty_like(wanted), torch.zeros_like(wanted)
    for start in range(0, wanted.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        feedback = factor.feedback(start, min(start + BLOCK, wanted.shape[1]))
        carried = lost[:, :start] @ feedback[:start]
        here = (wanted[:, block], carried, feedback[start:], group[:, block], held[:, block])
        rounded[:, block] = _round_block(*here, levels)
        lost[:, block] = wanted[:, block] - rounded[:, block]
    return torch.empty_like(rounded).index_copy_(1, order, rounded)


@own_arithmetic()
def descend(target: Tensor, h: Tensor, rounded: Tensor, levels: Levels, sweeps: int) -> Tensor:
    """The rounded matrix, (rows, d), with single weights moved to better levels until no move lowers the loss.

    Each weight in turn goes to the level nearest to rounded_j + ((W - Q) H)_j / H_jj, which is best for it with all
    others as they are. h: damped, float64. Where no compiled code runs, the matrix stays as it is.
    """
    if not numba_available():
        return rounded
    from .kernel_feedback import move_singly

    moved = rounded.cpu().contiguous().clone()
    slope = ((target.double() - rounded.double()) @ h).cpu()
    run = cast(Callable[..., None], move_singly)
    run(*map(_array, (slope, h, levels.values, levels.first, levels.group, levels.held, moved)), sweeps)
    return moved.to(rounded.device)


def compensated(target: Tensor, h: Tensor, factor: Factor, levels: Levels, moves: bool) -> Tensor:
    """The rounded matrix: with error feedback, and then, if it `moves`, with single weights moved."""
    rounded = round_with_feedback(target, factor, levels)
    return descend(target, damped(h, factor), rounded, levels, SWEEPS) if moves else rounded


def _array(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().numpy()


def _round_block(
    target: Tensor, carried: Tensor, feedback: Tensor, group: Tensor, held: Tensor, levels: Levels
) -> Tensor:
    if target.device.type != "cpu" or not numba_available():
        return _round_in_torch(target, carried, feedback, group, held, levels)
    from .kernel_feedback import round_columns

    rounded, run = torch.empty(target.shape, dtype=torch.float32), cast(Callable[..., None], round_columns)
    run(*map(_array, (target, carried, feedback, levels.values, levels.first, group, held, rounded)))
    return rounded


def _round_in_torch(
    target: Tensor, carried: Tensor, feedback: Tensor, group: Tensor, held: Tensor, levels: Levels
) -> Tensor:
    """The same column by column, for all rows at once, on any device."""
    values, first, group, held = (t.to(target.device) for t in (levels.values, levels.first, group.long(), held))
    lost, rounded = torch.zeros_like(target), torch.empty_like(target)
    for j in range(target.shape[1]):
        wanted = (target[:, j] + carried[:, j]).double() + lost[:, :j].double() @ feedback[:j, j].double()
        low, high = first[group[:, j]], first[group[:, j] + 1] - 1
        for _ in range(10):  # 2^9 levels, the most that a width has
            middle = (low + high) // 2
            above = 2 * wanted > values[middle].double() + values[(middle + 1).clamp(max=len(values) - 1)].double()
            low, high = (
                torch.where(above & (low < high), middle + 1, low),
                torch.where(above, high, middle).maximum(low),
            )
        level = torch.where(held[:, j].isnan(), values[low], held[:, j])
        rounded[:, j], lost[:, j] = level, target[:, j] - level
    return rounded
