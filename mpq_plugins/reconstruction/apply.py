"""Simulated quantization of a model by a plan, with the rounding that is chosen."""

import logging
import warnings
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

from torch import nn

from ..common.progress import Progress, check_callbacks
from ..common.workers import check_executor
from ..models.arguments import check_module
from ..models.running import checked_batches
from ..models.tracing import Traced
from ..plans.arguments import check_plan
from ..plans.plan import Plan
from ..simulation.calibrate import has_ranges, with_ranges
from ..simulation.correct import correct
from ..simulation.match import match
from ..simulation.model import simulate_model
from .brecq import reconstruct
from .compensate import compensate
from .rounding import COMPENSATED, LEARNED, Rounding, checked_rounding

LOG = logging.getLogger(__name__)


def apply(
    model: nn.Module, plan: Plan, *, calibrate: Iterable[Any] | None = None, rounding: Rounding | None = None
) -> nn.Module:
    """Make a copy of the model whose weights are quantized and dequantized as the plan says.

    Weights keep their dtype. At 16 bits float32 weights are rounded to float16's values; float16 and bfloat16 weights,
    which have 16 bits already, stay as they are, and so does everything at 32 bits. A plan measured with BatchNorm
    folded in gives a folded copy. Norms and skipped layers keep their weights. Inputs that the plan quantizes are, in
    ranges that are dynamic, that the model carries (`reconstruct` learns such), or that the calibration inputs give
    (`calibrate_inputs`); without any of these a warning says that they stay in floating point.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        calibrate: Batches of inputs without labels, a few hundred samples. Rounding makes the best of them,
            BatchNorm statistics and biases are corrected for what quantization shifts, and inputs get their ranges.
        rounding: `nearest`, `compensated` or `learned`, as `round_weights` describes them. By default compensated where
            there are inputs, and nearest where there are none.

    Returns:
        The copy.

    Raises:
        MismatchError: The plan has other layers or shapes than the model.
        WeightError: A weight holds NaN or infinity, or lies beyond float16 at 16 bits.
        SettingError: The rounding is no such word, or needs inputs; or as `round_weights`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> quantized = mpq.apply(net, mpq.Uniform(bits=2)(mpq.measure(net)))
        >>> quantized[0].weight.unique().numel()
        4
    """
    check_module(model)
    check_plan(plan)
    rounding = checked_rounding(rounding, calibrated=calibrate is not None)
    traced = Traced(model)
    plan = match(plan, model, rewrapped=True, traced=traced).require(type(model).__name__)
    if calibrate is not None:
        batches = checked_batches(calibrate, "calibrate")
        if rounding != LEARNED:  # which finds ranges of its own
            model = with_ranges(model, plan, batches)
        traced = Traced(model := _rounded(model, plan, batches, rounding, None, None))
    elif has_ranges(model, plan):
        ranged = with_ranges(model, plan, ())
        traced = traced if ranged is model else Traced(ranged)
    elif plan.quantizes_inputs:
        warnings.warn(
            f"the plan's activations ({plan.activations_text}) are not simulated, for nothing tells their ranges: give "
            "calibrate=batches, or plan.with_activation_bits(None)",
            stacklevel=2,
        )
    LOG.info("%d layers quantized%s", len(plan.layers), ", BatchNorm folded in" if plan.fold_bn else "")
    return simulate_model(traced, plan)


def round_weights(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    rounding: Rounding = COMPENSATED,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Make a float copy of the model that whoever quantizes it by the plan rounds in the way that is chosen.

    It is what `apply` quantizes, and what to give an adapter. `compensated` and `learned` weights lie on the plan's
    grids, so that rounding them to nearest, as every backend does, changes nothing; embeddings alone are left to that.

    - `nearest`: the weights stay as they are, and `correct` fits statistics and biases to them. Seconds.
    - `compensated`: what rounding one weight costs, those of the layer that are not yet rounded make up for, and
      statistics and biases are corrected as it goes (`compensate`). Seconds to minutes.
    - `learned`: block by block, by gradient descent (`reconstruct`, with its defaults). Minutes to hours.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Inputs without labels, as for `correct`: a few hundred samples, for `learned` about a thousand.
        rounding: `nearest`, `compensated` or `learned`.
        executor: Whose workers do a part of it where the rounding is `compensated`, as in `compensate`.
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The copy.

    Raises:
        MismatchError: The plan is for another model.
        WeightError: A weight cannot be quantized.
        SettingError: The rounding is no such word; or as `correct`, `compensate` or `reconstruct`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=2)(mpq.measure(net))
        >>> rounded = mpq.round_weights(net, plan, [torch.randn(64, 8)])
        >>> torch.equal(mpq.apply(rounded, plan)[0].weight, rounded[0].weight)
        True
    """
    check_module(model)
    check_plan(plan)
    check_callbacks(progress=progress)
    check_executor(executor)
    rounding = checked_rounding(rounding, calibrated=True)
    plan = match(plan, model, rewrapped=True).require(type(model).__name__)
    return _rounded(model, plan, batches, rounding, executor, progress)


def _rounded(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    rounding: Rounding,
    executor: Executor | None,
    progress: Progress | None,
) -> nn.Module:
    """The float copy; the plan has the model's own names."""
    if rounding == LEARNED:
        return reconstruct(model, plan, batches, progress=progress)
    if rounding == COMPENSATED:
        return compensate(model, plan, batches, executor=executor, progress=progress)
    return correct(model, plan, batches, progress=progress)
