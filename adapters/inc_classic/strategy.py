"""MixQuant, PTILMPQ and saved plans as tuning strategies of the classic API: trials from the smallest plan up."""

import copy
import functools
import glob
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from mpq_plugins.allocation.mixquant import MixQuant
from mpq_plugins.allocation.ptilmpq import PTILMPQ
from mpq_plugins.common.text import first_few, what_it_said
from mpq_plugins.errors import MismatchError, MPQError, SettingError, SourceError, TuningError
from mpq_plugins.evaluation.tuning import Criterion, Tuning, checked_score, plan_text, smallest_first
from mpq_plugins.models.copying import duplicate
from mpq_plugins.models.input_ranges import refuse_input_ranges
from mpq_plugins.models.kinds import layer_kind
from mpq_plugins.plans.legalise import require_legal
from mpq_plugins.plans.plan import Plan
from mpq_plugins.simulation.match import match

from ..shared.compressor_plans import (
    CAPABILITIES,
    as_globs,
    as_plan,
    as_scheme,
    check_evaluation,
    combinations,
    measured_plan,
    several,
)
from ..shared.compressor_quiet import quiet_import
from ..shared.folded import planned_layers
from .adaptor import PLAN, PlanAdaptor, carried_plan
from .checks import STATIC, check_conf
from .criterion import TuningCriterion
from .operators import int8_or_fp32, matches, weight_items
from .verification import verify_static

with quiet_import():
    from neural_compressor.strategy import STRATEGIES
    from neural_compressor.strategy.strategy import TuneStrategy, strategy_registry
    from neural_compressor.strategy.utils.tuning_structs import OpTuningConfig

QUANTIZED = ("weight_only", "static")
DEFAULT_INT8_BELOW = 8


class PlanningTuneStrategy(TuneStrategy):  # type: ignore[misc]  # Neural Compressor has no types
    """What our strategies share. A subclass says which plans there are; this tries them from the smallest up.

    Neural Compressor prints an exception and returns None; here it is raised, and so is TuningError, with the best
    trial, where no plan meets the criterion.
    """

    parameters: ClassVar[tuple[str, ...]] = ()
    model: Any

    def __init__(self, model: Any, conf: Any, **arguments: Any) -> None:
        self.criterion = conf.quantization.tuning_criterion
        if isinstance(self.criterion, TuningCriterion):
            self.criterion.taken = True
        try:
            check_conf(conf.quantization, arguments)
            self.trial: Plan | None = None
            self.failure: Exception | KeyboardInterrupt | None = None
            accuracy = conf.quantization.accuracy_criterion
            self.wanted = Criterion(
                accuracy.tolerable_loss, accuracy.criterion == "absolute", bool(accuracy.higher_is_better)
            )
            self.tuning: Tuning | None = None
            if arguments.get("eval_func") is not None:
                check_evaluation(model.model, arguments["eval_func"], "eval_func")
                arguments["eval_func"] = self._checked(arguments["eval_func"])
            super().__init__(model=model, conf=conf, **arguments)
            if self._not_tuning:  # the compressor would work on the user's own model
                network = self.model.model
                self.model = copy.deepcopy(self.model, {id(network): duplicate(network)})
        except BaseException:
            self._release()
            raise

    def plans(self, parameters: dict[str, Any], skip: Sequence[str]) -> list[Plan]:
        """All plans that the parameters describe for `self.model.model`."""
        raise NotImplementedError

    def traverse(self) -> None:
        """Run the trials, and keep what goes wrong for `get_best_qmodel`, which `fit` does not catch."""
        start = time.monotonic()
        try:
            super().traverse()
        except KeyboardInterrupt as stop:
            timeout = self.config.tuning_criterion.timeout
            if not timeout or time.monotonic() - start < timeout:  # the compressor's timer interrupts in the same way
                self.failure = stop
        except Exception as error:  # noqa: BLE001  # raised again where the compressor does not catch it
            self.failure = error

    def get_best_qmodel(self) -> Any:
        """The model of the plan that was kept. Raises what went wrong, or TuningError."""
        self._release()
        if isinstance(self.failure, MPQError | KeyboardInterrupt):
            raise self.failure
        if self.failure is not None:
            where = "before the first trial" if self.trial is None else f"with {plan_text(self.trial)}"
            raise MismatchError(
                f"{type(self.model.model).__name__}: Neural Compressor cannot quantize it {where} "
                f"({what_it_said(self.failure)})"
            ) from self.failure
        best = super().get_best_qmodel()
        if best is None and self.tuning is None:
            raise TuningError("timeout: the time ran out before the float model was evaluated; allow more")
        if best is None:
            assert self.tuning is not None
            raise self.tuning.unmet()
        plan = carried_plan(best.q_config if PLAN in best.q_config else self.best_tuning_cfg)
        if self._static:
            verify_static(best.model, plan)  # what it cannot convert the compressor leaves in float, without a word
        best.mpq_plan = plan
        best.mpq_tuning = self.tuning
        return best

    def next_tune_cfg(self) -> Iterator[dict[Any, Any]]:
        """One configuration of every operator for each plan, the smallest first."""
        initial = self.initial_tuning_cfg()[2]
        layers = {name for name, module in self.model.model.named_modules() if layer_kind(module)}
        kept = [name for (name, _), operator in initial.items() if operator.op_quant_mode not in QUANTIZED]
        left_in_float = [glob.escape(name) for name in kept if name in layers]
        self._check_names(initial)
        parameters, skip, int8_below = self._parameters(left_in_float)
        plans = self.plans(parameters, skip)
        plans = [int8_or_fp32(plan, int8_below) if self._static else plan for plan in plans]
        for plan in plans:
            if not self._static:
                require_legal(plan, CAPABILITIES)
        plans = smallest_first(plans)
        if self._not_tuning and len(plans) > 1:
            raise SettingError(
                f"eval_func: none given, and there are {len(plans)} plans to choose from; give one, or name one plan"
            )
        sampling = self.tuning_space.root_item.get_option_by_name("calib_sampling_size").options[0]
        for plan in plans:
            self.trial = plan
            configured = self._configured(plan, copy.deepcopy(initial))
            yield {**configured, PLAN: plan.to_json(), "calib_sampling_size": sampling}
            if self.tuning is not None and self.tuning.trials[-1].met:
                return  # given a timeout, the compressor would go on, and might keep a larger plan that runs faster

    @property
    def _static(self) -> bool:
        return bool(self.config.approach == STATIC)

    def _initial_adaptor(self) -> None:
        super()._initial_adaptor()
        if not self._static:
            _, info = self._set_framework_info(self.calib_dataloader, self.q_func)
            self.adaptor = PlanAdaptor(info)

    def _checked(self, evaluate: Callable[[nn.Module], Any]) -> Callable[[nn.Module], float]:
        """The user's evaluation of a copy, on which it may leave its mark, as a number, or SourceError."""

        @functools.wraps(evaluate)
        def checked(model: nn.Module) -> float:
            return checked_score(evaluate, duplicate(model), self._what)

        return checked

    @property
    def _what(self) -> str:
        if self.trial is None:
            return "the float model"
        return f"trial {len(self.tuning.trials) + 1 if self.tuning else 1}, {plan_text(self.trial)}"

    def _evaluate(self, model: Any) -> Any:
        """(score, measures) as the compressor wants them; the score goes into the record."""
        try:
            value = super()._evaluate(model)
            score = float(value[0])
        except MPQError:
            raise
        except Exception as error:  # of eval_dataloader and eval_metric
            raise SourceError(f"eval_metric of {self._what}: the evaluation failed ({what_it_said(error)})") from error
        if self.trial is None:
            self.wanted.bound(score)
            self.tuning = Tuning(score, self.wanted)
        elif self.tuning is not None:
            self.tuning = self.tuning.with_trial(self.trial, score)
        return value

    def _parameters(self, left_in_float: Sequence[str]) -> tuple[dict[str, Any], list[str], int]:
        """The strategy's arguments; layers that stay in float, by request or by configuration; int8_below."""
        given = dict(self.config.tuning_criterion.strategy_kwargs or {})
        allowed = {*self.parameters, "skip", *(("int8_below",) if self._static else ())}
        unknown = given.keys() - allowed
        if unknown:
            raise SettingError(
                f"strategy_kwargs: has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(allowed))}"
            )
        below = given.pop("int8_below", DEFAULT_INT8_BELOW)
        if type(below) is not int or below not in range(1, 10):
            raise SettingError(f"int8_below: {below!r} is not allowed; 1 to 9")
        return given, [*as_globs(given.pop("skip", ())), *left_in_float], below

    def _check_names(self, operators: dict[Any, Any]) -> None:
        """Raise MismatchError for the user's constraints that are of no operator, by the compressor's own matching."""
        for option, position in (("op_name_dict", 0), ("op_type_dict", 1)):
            names_or_types = [str(operator[position]) for operator in operators]
            for key in getattr(self.config, option) or {}:
                if key != "default_qconfig" and not any(re.fullmatch(key, name) for name in names_or_types):
                    names = ", ".join(map(repr, names_or_types[:3]))
                    raise MismatchError(
                        f"{option}[{key!r}]: is a regular expression that matches none whole; there are {names}"
                    )

    def _configured(self, plan: Plan, configs: dict[Any, Any]) -> dict[Any, Any]:
        """The operators' configurations under a plan. Raises MismatchError for a layer that is no operator."""
        lost = {layer.name for layer in planned_layers(plan)}
        for (name, kind), config in configs.items():
            layer = plan.by_any_name.get(name)
            if layer is not None:
                lost.discard(layer.name)
            if layer is None and self._static:
                continue  # not a layer: an addition, a pooling
            if layer is None or layer.in_float:
                configs[name, kind] = OpTuningConfig(name, kind, "fp32", self.tuning_space)
            elif not self._static:
                config.kwargs = {**config.kwargs, **weight_items(layer)}
        if lost:
            names = first_few([repr(name) for name in sorted(lost)], ", ")
            raise MismatchError(
                f"{names}: Neural Compressor's {self.config.approach} does not quantize them; skip them, or use "
                "approach='weight_only'"
            )
        return configs

    def _release(self) -> None:
        if isinstance(self.criterion, TuningCriterion):
            self.criterion.taken = False


class AllocatingTuneStrategy(PlanningTuneStrategy):
    """A strategy that is an allocator, with values of its parameters to try."""

    allocator: ClassVar[type[Any]]
    sequences = ("bits", "important_bits", "other_bits")
    parameters: ClassVar[tuple[str, ...]]

    def plans(self, parameters: dict[str, Any], skip: Sequence[str]) -> list[Plan]:
        """A plan for each combination of the values."""
        varied = {name: value for name, value in parameters.items() if several(name, value, self.sequences)}
        made = []
        for chosen in combinations(parameters, varied):
            scheme = as_scheme(chosen.pop("scheme", None))
            made.append(measured_plan(self.model.model, self.allocator(**chosen), scheme, skip))
        return made


class MixQuantTuneStrategy(AllocatingTuneStrategy):
    """`mixquant`: MixQuant (arXiv 2309.17341)."""

    allocator = MixQuant
    parameters = tuple(field.name for field in fields(MixQuant))


class PTILMPQTuneStrategy(AllocatingTuneStrategy):
    """`ptilmpq`: PTILMPQ (arXiv 2404.02947)."""

    allocator = PTILMPQ
    parameters = (*(field.name for field in fields(PTILMPQ)), "scheme")


class PlanTuneStrategy(PlanningTuneStrategy):
    """`plan`: plans made before; `plan` is a Plan, the file of one, or a list of them."""

    parameters = ("plan",)

    def plans(self, parameters: dict[str, Any], skip: Sequence[str]) -> list[Plan]:
        """Give the plans, of this model.

        Args:
            parameters: The strategy's: `plan` is a Plan, its file, or a list of them.
            skip: Globs of layers that stay in float.

        Returns:
            The plans.

        Raises:
            SettingError: A plan quantizes a layer that is to stay in float.
            MismatchError: A plan is another model's.
        """
        given = parameters.get("plan", [])
        plans = [as_plan(one) for one in (given if isinstance(given, list | tuple) else [given])]
        for plan in plans:
            refuse_input_ranges(self.model.model)
            match(plan, self.model.model).require(type(self.model.model).__name__)
            clash = [repr(layer.name) for layer in planned_layers(plan) if matches(layer, skip)]
            if clash:
                raise SettingError(
                    f"{first_few(clash, ', ')}: the plan quantizes them, and skip, op_name_dict or op_type_dict keeps "
                    "them in float; change one of the two"
                )
        return plans


def register() -> None:
    """Make the strategies known to Neural Compressor. Importing `inc_classic` has done it; again does no harm."""
    for strategy in (MixQuantTuneStrategy, PTILMPQTuneStrategy, PlanTuneStrategy):
        name = strategy.__name__.removesuffix("TuneStrategy").lower()
        if STRATEGIES.get(name) is not strategy:
            strategy_registry(strategy)
