"""Neural Compressor's accuracy-aware tuning with our configurations, from the smallest plan up, and an honest end."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import nn

from mpq_plugins.common.progress import Progress, check_callbacks
from mpq_plugins.errors import SettingError
from mpq_plugins.evaluation.tuning import Criterion, Tuning, checked_score, plan_text, smallest_first
from mpq_plugins.models.arguments import check_module
from mpq_plugins.models.copying import duplicate
from mpq_plugins.plans.plan import Plan
from mpq_plugins.reconstruction.rounding import Rounding

from ..shared.compressor_plans import check_evaluation, check_max_trials, check_plans
from ..shared.compressor_quiet import quiet, quiet_import
from ..shared.fitting import rounding_on
from .config import PlanConfig, PlanningConfig
from .joint import joint_plan
from .marks import plan_of

with quiet_import():
    from neural_compressor.common.base_tuning import ConfigSet, TuningConfig
    from neural_compressor.torch.quantization import autotune as incs_autotune


def autotune(  # noqa: PLR0913  # as Neural Compressor's
    model: nn.Module,
    tune_config: TuningConfig,
    eval_fn: Callable[..., Any],
    eval_args: tuple[Any, ...] | None = None,
    run_fn: Callable[..., Any] | None = None,
    run_args: Any = None,
    example_inputs: Any = None,
    *,
    progress: Progress | None = None,
) -> nn.Module:
    """Run Neural Compressor's `autotune`: trials go up from the smallest plan for this model, and failure is an error.

    Takes what `neural_compressor.torch.quantization.autotune` takes, with configurations of ours; configurations that
    make the same plan are one trial. Where no trial is within the tolerable loss, Neural Compressor returns the best of
    them or None; here that is an error.

    Args:
        model: The float model; it is not changed.
        tune_config: Neural Compressor's: the configurations to try, and the tolerable loss.
        eval_fn: Called with a model; returns a number above 0, larger is better, or a mapping of names to numbers of
            which the first counts.
        eval_args: What eval_fn gets beside the model.
        run_fn: Neural Compressor's calibration.
        run_args: What run_fn gets beside the model.
        example_inputs: Neural Compressor's.
        progress: Called with (what, trials done, trials).

    Returns:
        The quantized copy, which carries its plan (`plan_of`) and the trials (`tuning_of`).

    Raises:
        TuningError: No trial is within the tolerable loss. The error has the best.
        SourceError: eval_fn fails. The message names the trial.
        SettingError: Configurations are of others.
    """
    check_module(model)
    check_callbacks(progress=progress)
    criterion = _criterion(tune_config)
    check_evaluation(model, eval_fn, "eval_fn")
    with quiet():
        configs = _smallest_first(model, tune_config)
        record = _Record(eval_fn, eval_args or (), criterion, len(configs), progress)
        ours = TuningConfig(configs, tune_config.sampler, tune_config.tolerable_loss, tune_config.max_trials)
        tuned = incs_autotune(model, ours, record, None, run_fn, run_args, example_inputs)
    tuning = record.tuning
    if tuned is None or not tuning.met:
        raise tuning.unmet()
    if progress is not None:
        progress("", len(configs), len(configs))
    vars(tuned)["mpq_tuning"] = tuning  # a module may forbid attributes
    return cast(nn.Module, tuned)


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
    """Run `autotune` over plans made before; what `mpq tune` runs.

    Args:
        model: The float model; it is not changed.
        plans: The plans to try.
        evaluate: As `eval_fn` of `autotune`.
        tolerable_loss: How much of the float model's score may be lost, as a share of it.
        calibrate: Batches of inputs on which every trial is rounded and corrected, as in `mpq_plugins.apply`.
        rounding: As in `mpq_plugins.apply`: `nearest`, `compensated` or `learned`.
        progress: Called with (what, trials done, trials).

    Returns:
        The baseline, the criterion and the trials.

    Raises:
        TuningError: As `autotune`.
        SourceError: As `autotune`.
        SettingError: As `autotune`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> from mpq_plugins.adapters import inc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> table = mpq.measure(net)
        >>> tuning = inc.tune(net, [mpq.Uniform(bits=b)(table) for b in (4, 8)], lambda tried: 1.0)
        >>> len(tuning.trials)
        1
    """
    check_plans(plans)
    config = TuningConfig(PlanConfig(list(plans)), tolerable_loss=tolerable_loss, max_trials=max(1, len(plans)))
    with rounding_on(calibrate, rounding):
        return tuning_of(autotune(model, config, evaluate, progress=progress))


def tuning_of(tuned: nn.Module) -> Tuning:
    """Give the baseline, the criterion and the trials of the run that made a model.

    Args:
        tuned: What `autotune` returned.

    Returns:
        The run's record.

    Raises:
        SettingError: The model was made otherwise.
    """
    tuning = getattr(tuned, "mpq_tuning", None)
    if not isinstance(tuning, Tuning):
        raise SettingError(f"{type(tuned).__name__}: was not made by mpq_plugins.adapters.inc.autotune")
    return tuning


class _Record:
    """The evaluation as Neural Compressor calls it: of the float model first, then of each trial's."""

    def __init__(
        self,
        evaluate: Callable[..., Any],
        arguments: tuple[Any, ...],
        criterion: Criterion,
        trials: int,
        progress: Progress | None,
    ) -> None:
        @functools.wraps(evaluate)
        def called(model: nn.Module) -> Any:
            return evaluate(model, *arguments)

        self.evaluate, self.trials, self.progress = called, trials, progress
        self.tuning = Tuning(0.0, criterion)
        self.begun = False

    def __call__(self, model: nn.Module) -> float:
        """The score. Raises SourceError, and SettingError where the float model's makes the criterion meaningless."""
        model = duplicate(model)  # an evaluation may leave its mark on what it is given
        if not self.begun:
            self._say("float")
            score = checked_score(self.evaluate, model, "the float model")
            self.tuning.criterion.bound(score)
            self.tuning, self.begun = Tuning(score, self.tuning.criterion), True
            return score
        plan = plan_of(model)
        self._say(plan.allocator.name)
        score = checked_score(self.evaluate, model, f"trial {len(self.tuning.trials) + 1}, {plan_text(plan)}")
        self.tuning = self.tuning.with_trial(plan, score)
        return score

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, len(self.tuning.trials), self.trials)


def _criterion(tune_config: object) -> Criterion:
    """The criterion of a run. Raises SettingError for what is no TuningConfig, or one that makes no run."""
    if not isinstance(tune_config, TuningConfig):
        raise SettingError(
            f"tune_config: is a {type(tune_config).__name__}; Neural Compressor's TuningConfig(config_set=...)"
        )
    check_max_trials(tune_config.max_trials)
    if not callable(tune_config.sampler):
        raise SettingError(f"sampler: is a {type(tune_config.sampler).__name__}; a Sampler class, or leave it out")
    return Criterion(tune_config.tolerable_loss)


def _smallest_first(model: nn.Module, tune_config: TuningConfig) -> list[PlanningConfig]:
    """The configurations of the run, expanded, by the size of the plans that they make for the model."""
    given = tune_config.config_set
    if not isinstance(given, PlanningConfig | list):
        raise SettingError(f"config_set: is a {type(given).__name__}; a configuration of ours, or a list of them")
    for config in given:
        if not isinstance(config, PlanningConfig):
            raise SettingError(
                f"config_set: holds a {type(config).__name__}; this tuning is for MixQuantConfig(...), "
                "PTILMPQConfig(...) and PlanConfig(...), and Neural Compressor's own autotune for the others"
            )
    configs = ConfigSet.generate_config_list(given)
    made = {}
    for config in configs:
        layers = config.to_config_mapping(model_info=config.get_model_info(model))
        made[id(config)] = joint_plan(model, {name: layer_config for (name, _), layer_config in layers.items()})
    order = smallest_first(list(made.values()))
    by_plan = {id(made[id(config)]): config for config in reversed(configs)}
    return [by_plan[id(plan)] for plan in order]
