"""Models quantized and tuned by the classic API with plans. Importing this module registers our strategies with it."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mpq_plugins.common.progress import Progress
from mpq_plugins.errors import SettingError
from mpq_plugins.evaluation.tuning import Tuning
from mpq_plugins.plans.plan import Plan

from ..shared.compressor_plans import check_function, check_plans
from ..shared.compressor_quiet import quiet, quiet_import
from ..shared.folded import check_module, check_types
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
    """`neural_compressor.quantization.fit` without its logging, and without the folder that it would leave behind.

    Takes what that takes; eval_func returns a number, or a mapping of names to numbers of which the first counts, and
    sees copies. Raises what the strategies raise: TuningError where no trial meets the criterion, SourceError where
    eval_func fails, SettingError for a strategy that would be ignored. The model is unchanged.
    """
    check_module(model)
    if not isinstance(conf, PostTrainingQuantConfig):
        raise SettingError(f"conf: is a {type(conf).__name__}; a PostTrainingQuantConfig of Neural Compressor's")
    with quiet(), _workspace_elsewhere():
        return quantization.fit(model, conf, calib_dataloader, calib_func, eval_func, eval_dataloader, eval_metric)


def apply(model: nn.Module, plan: Plan, batches: Iterable[Any] = ()) -> Any:
    """The model quantized by the classic API with the plan, weights only; the model itself is unchanged.

    What is returned is the compressor's wrapper, with the network as `.model`. batches: weights alone need none. Raises
    MismatchError (another model) and SettingError (quantized activations), naming layers and remedy.
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
    progress: Progress | None = None,
) -> Tuning:
    """`fit` over plans made before, weights only; what `mpq tune` runs. Raises as fit does.

    evaluate: a number above 0, larger is better, or a mapping of names to numbers of which the first counts.
    progress: called with (what, trials done, trials).
    """
    check_plans(plans)
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
    return tuning_of(fit(model, conf, eval_func=counted))


def plan_of(q_model: Any) -> Plan:
    """The plan that a model was quantized by; of `static`, 8 bits for int8 and 32 for fp32. Raises SettingError."""
    plan = getattr(q_model, "mpq_plan", None)
    if not isinstance(plan, Plan):
        raise SettingError(f"{type(q_model).__name__}: was not quantized by one of our strategies")
    return plan


def tuning_of(q_model: Any) -> Tuning:
    """The baseline, the criterion and the trials of the run that made a model. Raises SettingError."""
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
