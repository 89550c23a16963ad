"""Rounding with error feedback where codes cost bits: what they take in an entropy-coded file counts beside the loss.

    minimise over whole-number codes K   tr((T - K) H (T - K)^T) + price bits(K),    T = W / step

As in feedback.py, the loss is sum_j D_j ||(T - K)_j + what is carried over||^2, D_j the variance of column j given
those that come later. So column by column the code of least (t - k)^2 + price / D_j bits(k) is taken, among the one
nearest to t, its neighbours and 0, and then single codes are moved where that lowers the sum: one trade of loss for
bits everywhere, as in water-filling over the columns. Bits are -log2 of shares among the codes there were before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.autocast import own_arithmetic
from ..quantization.kernel import numba_available
from .feedback import BLOCK, Factor, damped

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class CodedMatrix:
    """Rows that share inputs. target: in steps, float64 (rows, d); h: (d, d), not damped; zero: what stays 0."""

    target: Tensor
    h: Tensor
    factor: Factor
    zero: Tensor

    def nearest(self, most: int) -> Tensor:
        """The codes nearest to the target, in +-most, int16."""
        return self.target.round().clamp_(-most, most).masked_fill_(self.zero, 0).to(torch.int16)

    @property
    def variances(self) -> Tensor:
        """D_j of each column, in the weight's order, float64 on the CPU."""
        order, pivots = self.factor.order.cpu(), self.factor.lower.diagonal().flip(0).cpu() ** 2
        return torch.empty_like(pivots).index_copy_(0, order, pivots)

    @own_arithmetic()
    def with_feedback(self, price: float, costs: Doubles) -> Tensor:
        """Codes rounded column by column. price: of a bit, in squared steps times H; costs: bits of -most to most."""
        order = self.factor.order
        wanted = self.target[:, order].float()
        zero = self.zero[:, order]
        prices = price / self.variances[order.cpu()]
        codes, lost = torch.zeros(wanted.shape, dtype=torch.int16, device=wanted.device), torch.zeros_like(wanted)
        for start in range(0, wanted.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            feedback = self.factor.feedback(start, min(start + BLOCK, wanted.shape[1]))
            carried = lost[:, :start] @ feedback[:start]
            here = (wanted[:, block], carried, feedback[start:], zero[:, block], prices[block])
            codes[:, block] = _round_block(*here, costs)
            lost[:, block] = wanted[:, block] - codes[:, block]
        return torch.empty_like(codes).index_copy_(1, order, codes)

    @own_arithmetic()
    def moving(self, codes: Tensor) -> "Moving":
        """The same codes, to be moved one by one; they are copied."""
        h = damped(self.h, self.factor)
        slope = (self.target - codes.double()) @ h
        # Inputs that are always zero have no more in H than its damping, for which no code is worth its bits.
        weights = torch.maximum(h.diagonal().cpu(), self.variances)
        return Moving(codes.clone(), slope, h, self.zero, weights)


@dataclass(frozen=True)
class Moving:
    """Codes that are moved, int16 (rows, d). slope: (target - codes) H; h: damped; weights: (d,), what errors cost."""

    codes: Tensor
    slope: Tensor
    h: Tensor
    zero: Tensor
    weights: Tensor

    def sweep(self, price: float, costs: Doubles) -> int:
        """Each code in turn goes to what is best with all others as they are; how many were moved."""
        if self.codes.device.type != "cpu" or not numba_available():
            return self._sweep_in_torch(price, costs)
        from .kernel_coded_feedback import move_codes

        run = cast(Callable[..., int], move_codes)
        prices = (price / self.weights).numpy()
        return run(self.slope.numpy(), self.h.numpy(), self.zero.numpy(), prices, costs, self.codes.numpy())

    def _sweep_in_torch(self, price: float, costs: Doubles) -> int:
        """The same column by column, for all rows at once, on any device."""
        table = torch.from_numpy(costs).to(self.codes.device)
        moved = 0
        for j in range(self.codes.shape[1]):
            if not float(self.h[j, j]) > 0:
                continue
            now, each = self.codes[:, j].double(), price / float(self.weights[j])
            wanted = now + self.slope[:, j] / self.h[j, j]
            code = torch.where(self.zero[:, j], now, _cheapest(wanted, each, table))
            better = _value(wanted, code, each, table) < _value(wanted, now, each, table)
            code = torch.where(better, code, now)
            self.codes[:, j] = code.to(torch.int16)
            self.slope.sub_((code - now)[:, None] * self.h[j])
            moved += int(better.sum())
        return moved


def _round_block(
    target: Tensor, carried: Tensor, feedback: Tensor, zero: Tensor, prices: Tensor, costs: Doubles
) -> Tensor:
    if target.device.type != "cpu" or not numba_available():
        return _round_in_torch(target, carried, feedback, zero, prices, torch.from_numpy(costs).to(target.device))
    from .kernel_coded_feedback import round_codes

    codes, run = torch.empty(target.shape, dtype=torch.int16), cast(Callable[..., None], round_codes)
    run(*map(_array, (target, carried, feedback, zero, prices)), costs, codes.numpy())
    return codes


def _round_in_torch(
    target: Tensor, carried: Tensor, feedback: Tensor, zero: Tensor, prices: Tensor, costs: Tensor
) -> Tensor:
    """The same column by column, for all rows at once, on any device."""
    lost = torch.zeros_like(target)
    codes = torch.empty(target.shape, dtype=torch.int16, device=target.device)
    for j in range(target.shape[1]):
        wanted = (target[:, j] + carried[:, j]).double() + lost[:, :j].double() @ feedback[:j, j].double()
        code = _cheapest(wanted, float(prices[j]), costs).masked_fill(zero[:, j], 0.0)
        codes[:, j], lost[:, j] = code.to(torch.int16), target[:, j] - code.float()
    return codes


def _cheapest(wanted: Tensor, price: float, costs: Tensor) -> Tensor:
    """The codes of least (wanted - k)^2 + price bits(k), as float64; of two, the first of these candidates."""
    most = len(costs) // 2
    nearest = wanted.clamp(-most, most).round()
    beside = ((nearest - 1).clamp(min=-most), (nearest + 1).clamp(max=most))
    candidates = torch.stack([nearest, *beside, torch.zeros_like(nearest)])
    best = _value(wanted, candidates, price, costs).argmin(0, keepdim=True)
    return candidates.gather(0, best)[0]


def _value(wanted: Tensor, codes: Tensor, price: float, costs: Tensor) -> Tensor:
    return (wanted - codes).square() + price * costs[(codes + len(costs) // 2).long()]


def _array(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().numpy()
