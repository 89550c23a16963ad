"""Models quantized and tuned by the classic API with plans. Importing this module registers our strategies with it."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mpq_plugins.common.progress import Progress, check_callbacks
from mpq_plugins.errors import SettingError
from mpq_plugins.evaluation.tuning import Tuning
from mpq_plugins.models.arguments import check_module
from mpq_plugins.plans.plan import Plan
from mpq_plugins.reconstruction.rounding import Rounding

from ..shared.compressor_plans import check_function, check_plans
from ..shared.compressor_quiet import quiet, quiet_import
from ..shared.fitting import rounding_on
from ..shared.folded import check_types
from .criterion import TuningCriterion
from .strategy import register

with quiet_import():
    from neural_compressor import PostTrainingQuantConfig, quantization
    from neural_compressor.config import AccuracyCriterion, options


def fit(
    model: nn.Module,
    conf: PostTrainingQuantConfig,
    calib_dataloader: Any = None,
    calib_func: Callable[[nn.Module], Any] | None = None,
    eval_func: Callable[[nn.Module], Any] | None = None,
    eval_dataloader: Any = None,
    eval_metric: Any = None,
) -> Any:
    """Run `neural_compressor.quantization.fit` without its logging, and without the folder that it would leave behind.

    Args:
        model: The float model; it is not changed.
        conf: Neural Compressor's configuration, with one of our strategies in its TuningCriterion.
        calib_dataloader: Neural Compressor's.
        calib_func: Neural Compressor's.
        eval_func: Called with copies; returns a number, or a mapping of names to numbers of which the first counts.
        eval_dataloader: Neural Compressor's.
        eval_metric: Neural Compressor's.

    Returns:
        Neural Compressor's wrapper, with the network as `.model`.

    Raises:
        TuningError: No trial meets the criterion.
        SourceError: eval_func fails.
        SettingError: The strategy would be ignored.
    """
    check_module(model)
    if not isinstance(conf, PostTrainingQuantConfig):
        raise SettingError(f"conf: is a {type(conf).__name__}; a PostTrainingQuantConfig of Neural Compressor's")
    with quiet(), _workspace_elsewhere():
        return quantization.fit(model, conf, calib_dataloader, calib_func, eval_func, eval_dataloader, eval_metric)


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> Any:
    """Quantize a copy of the model by the classic API with the plan, weights only.

    Args:
        model: The float model; it is not changed.
        plan: The plan.
        batches: Weights alone need none.

    Returns:
        The compressor's wrapper, with the network as `.model`.

    Raises:
        MismatchError: The plan is another model's. The message names layers and the remedy.
        SettingError: The plan quantizes activations.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc_classic
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=3)(mpq.measure(net))
        >>> inc_classic.verify(inc_classic.apply(net, plan), plan, net)[0].bits
        ((3, 8),)
    """
    check_types(plan, model)
    criterion = TuningCriterion("plan", {"plan": plan})
    return fit(model, PostTrainingQuantConfig(approach="weight_only", quant_level=1, tuning_criterion=criterion))


def tune(
    model: nn.Module,
    plans: Sequence[Plan],
    evaluate: Callable[[nn.Module], Any],
    tolerable_loss: float = 0.01,
    *,
    calibrate: Iterable[Any] | None = None,
    rounding: Rounding | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Run `fit` over plans made before, weights only; what `mpq tune` runs.

    Args:
        model: The float model; it is not changed.
        plans: The plans to try.
        evaluate: Called with a model; returns a number above 0, larger is better, or a mapping of names to numbers of
            which the first counts.
        tolerable_loss: How much of the float model's score may be lost, as a share of it.
        calibrate: Batches of inputs on which every trial is rounded and corrected, as in `mpq_plugins.apply`.
        rounding: As in `mpq_plugins.apply`: `nearest`, `compensated` or `learned`.
        progress: Called with (what, trials done, trials).

    Returns:
        The baseline, the criterion and the trials.

    Raises:
        TuningError: As `fit`.
        SourceError: As `fit`.
        SettingError: As `fit`.
    """
    check_plans(plans)
    check_callbacks(progress=progress)
    check_function(evaluate, "evaluate")
    begun = 0

    @functools.wraps(evaluate)
    def counted(given: nn.Module) -> Any:
        nonlocal begun
        if progress is not None:
            progress("plan" if begun else "float", max(0, begun - 1), len(plans))
        begun += 1
        return evaluate(given)

    criterion = TuningCriterion("plan", {"plan": list(plans)}, max_trials=max(1, len(plans)))
    accuracy = AccuracyCriterion(tolerable_loss=tolerable_loss)
    conf = PostTrainingQuantConfig(
        approach="weight_only", quant_level=1, tuning_criterion=criterion, accuracy_criterion=accuracy
    )
    with rounding_on(calibrate, rounding):
        return tuning_of(fit(model, conf, eval_func=counted))


def plan_of(q_model: Any) -> Plan:
    """Give the plan that a model was quantized by; of `static`, 8 bits for int8 and 32 for fp32.

    Args:
        q_model: What `fit` returned.

    Returns:
        The plan.

    Raises:
        SettingError: The model was not quantized by ours.
    """
    plan = getattr(q_model, "mpq_plan", None)
    if not isinstance(plan, Plan):
        raise SettingError(f"{type(q_model).__name__}: was not quantized by one of our strategies")
    return plan


def tuning_of(q_model: Any) -> Tuning:
    """Give the baseline, the criterion and the trials of the run that made a model.

    Args:
        q_model: What `fit` returned.

    Returns:
        The run's record.

    Raises:
        SettingError: The model was made otherwise.
    """
    tuning = getattr(q_model, "mpq_tuning", None)
    if not isinstance(tuning, Tuning):
        raise SettingError(f"{type(q_model).__name__}: was not tuned by one of our strategies, with an eval_func")
    return tuning


@contextmanager
def _workspace_elsewhere() -> Iterator[None]:
    before = options.workspace
    with tempfile.TemporaryDirectory() as folder:
        options.workspace = folder
        try:
            yield
        finally:
            options.workspace = before


register()
