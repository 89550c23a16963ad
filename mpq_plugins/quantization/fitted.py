"""Weights put so that min-max quantization of them has the least error weighted by what their inputs are.

    minimise over [lo, hi]   sum_j h_j (w_j - w'_j)^2      for each output channel, h_j the second moment of input j

What comes back are weights clipped to [lo, hi], whose extremes are the range: so every backend that quantizes by
extremes finds the same codes, and a plan needs no ranges of its own. At 1 bit they are +-a, a the weighted mean of |w|.
"""

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.rows import channel_rows, from_channel_rows
from ..errors import SettingError
from ..plans.affine import Affine
from ..plans.scheme import Scheme
from .grid import affine_grids

COARSE = np.linspace(1.0, 0.1, 46)
FINE = np.linspace(-0.018, 0.018, 9)


def check_fits(scheme: Scheme, layer: str) -> Affine:
    """The scheme, if ranges can be fitted to it. Raises SettingError, naming the layer."""
    affine = scheme.as_affine
    if affine is None or not scheme.scales_per_group or affine.granularity != "per_channel" or affine.range != "minmax":
        raise SettingError(
            f"layer {layer!r}: {scheme}; ranges are fitted to inputs under affine per_channel minmax, whose ranges are "
            "the weights' extremes: measure under that"
        )
    return affine


def fitted(weight: Tensor, bits: int, scheme: Affine, importance: Tensor, channel_axis: int) -> Tensor:
    """The weight, its shape and dtype, clipped per output channel for `bits`; importance: h, in the weight's shape."""
    rows = channel_rows(weight.detach().float(), channel_axis)
    h = channel_rows(importance.detach().float(), channel_axis)
    if not rows.numel():
        return weight.detach().clone()
    clipped = _binary(rows, h) if bits == 1 else _clipped(rows, h, bits, scheme)
    return from_channel_rows(clipped.to(weight.dtype), weight.shape, channel_axis)


def _binary(rows: Tensor, h: Tensor) -> Tensor:
    h = h.double()
    total = h.sum(1, keepdim=True)
    level = torch.where(
        total > 0, (rows.abs() * h).sum(1, keepdim=True) / total, rows.abs().double().mean(1, keepdim=True)
    )
    return torch.where(rows < 0, -level, level)


def _clipped(rows: Tensor, h: Tensor, bits: int, scheme: Affine) -> Tensor:
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    if scheme.symmetric == "full":
        low, high = _signed_ends(rows, h, low, high, bits, scheme)
    else:
        if scheme.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        _, ratio = _best_ratio(rows, h, low, high, bits, scheme)
        low, high = low * ratio, high * ratio
    return torch.minimum(torch.maximum(rows, low), high)


def _signed_ends(
    rows: Tensor, h: Tensor, low: Tensor, high: Tensor, bits: int, scheme: Affine
) -> tuple[Tensor, Tensor]:
    """The ends of the full range: each side in turn has the code without an opposite, and the other one code less."""
    least, ends = _error(rows, h, low, high, bits, scheme), (low, high)
    less = 1 - 2.0 ** (1 - bits)
    for side in ((low, -low * less), (-high * less, high)):
        error, ratio = _best_ratio(rows, h, *side, bits, scheme)
        better = error < least
        least = torch.where(better, error, least)
        ends = (torch.where(better, side[0] * ratio, ends[0]), torch.where(better, side[1] * ratio, ends[1]))
    return ends


def _best_ratio(rows: Tensor, h: Tensor, low: Tensor, high: Tensor, bits: int, scheme: Affine) -> tuple[Tensor, Tensor]:
    """The least error of each row, and the share of [low, high] that has it."""
    best = torch.ones_like(low)
    least = _error(rows, h, low, high, bits, scheme)
    for candidates in (COARSE, FINE):
        around = best.clone() if candidates is FINE else torch.zeros_like(best)
        for step in candidates.tolist():
            ratio = (around + step).clamp(0.0, 1.0)
            error = _error(rows, h, low * ratio, high * ratio, bits, scheme)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, ratio, best)
    return least, best


def _error(rows: Tensor, h: Tensor, low: Tensor, high: Tensor, bits: int, scheme: Affine) -> Tensor:
    """sum_j h_j (w - w')^2 of each row, (rows, 1), its weights clipped to [low, high] as they will be."""
    grid = affine_grids(low.double().cpu().numpy(), high.double().cpu().numpy(), np.array([bits]), scheme)
    scale, zero = (torch.from_numpy(array).to(rows) for array in (grid.scale, grid.zero_point))
    clipped = torch.minimum(torch.maximum(rows, low), high)
    codes = torch.clamp(torch.round(clipped / scale) + zero, int(grid.qmin[0]), int(grid.qmax[0]))
    return ((codes - zero) * scale - rows).square().mul_(h).sum(1, keepdim=True)
