"""Correcting what quantization shifts: BatchNorm's statistics, and the biases of layers without a BatchNorm.

Quantized weights shift and stretch every channel's output, and the statistics that BatchNorm stored no longer fit.
With mean and variance mu, v of each BatchNorm's input over the calibration batches, in the float net (f) and in the
quantized one (q), each BatchNorm normalising by its batch,

    running_mean += mu_q - mu_f        running_var *= (v_q / v_f) / rho^shrinkage

rho being the correlation of the two nets' values. shrinkage 0 restores the variance (DESIGN sec. 4); but part of v_q
is noise, which that takes for signal. The least squared error is at 2, where the scale is the regression of the float
values on the quantized ones; 1 lies between, and was best on the real nets from 2 to 4 bits. Where no BatchNorm
follows, the layer's bias takes the mean output error of each channel (Nagel et al. 2019, arXiv 1906.04721, sec. 4.2),
over outputs of usual length.

What comes back is a float model with the weights as they were (or clipped to fitted ranges, where asked), so that
`apply` and every adapter find their own way with it: per channel, folding the corrected statistics into the weights
changes scales and biases, and no code.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing the package must not import torch
    from torch import nn

    from .plans.plan import Plan

Progress = Callable[[str, int, int], None]


def correct(
    model: "nn.Module",
    plan: "Plan",
    batches: Iterable[Any],
    *,
    shrinkage: float = 1.0,
    fit_ranges: bool = False,
    progress: Progress | None = None,
) -> "nn.Module":
    """A float copy of the model whose BatchNorm statistics and biases suit the plan's quantized weights.

    batches: calibration inputs without labels: tensors, or tuples or mappings of a forward's arguments; a few hundred
    samples do, in batches of 64 or more where there is BatchNorm. shrinkage: 0 to 2, see above. fit_ranges: first
    clip each channel's weights to the range of least squared error weighted by the second moments of the layer's
    inputs, for plans whose ranges are the extremes (affine per_channel minmax). A plan measured with
    BatchNorm folded in gives a folded copy, where only biases are left to correct. Layers that have no bias get one.
    The model itself is unchanged. Warns of layers that no batch reached.

    Raises SettingError (no batches, inputs the model does not run on, a non-finite statistic, naming the layer),
    MismatchError (a plan for another model) and WeightError.
    """
    from .correction import corrected

    return corrected(model, plan, batches, shrinkage, fit_ranges, progress)
