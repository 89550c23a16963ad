"""Accuracy-aware choice among plans: the smallest is tried first, and the first within the criterion is kept.

A backend's own tuner runs the trials; here is what every such run shares: their order, their record, and what is said
when none is good enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..common.checks import number
from ..common.deferred import Deferred
from ..errors import SettingError, TuningError
from ..plans.plan import Plan
from .scores import Evaluate, checked_scores

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

NUMBERS, OF_FILES = ("qem", "alpha", "bits"), ("file_bits", "file_size")


@dataclass(frozen=True)
class Criterion:
    """How much worse than the float model a plan may be.

    tolerable_loss: a share of the float model's score, or with `absolute` in the score's own units.
    """

    tolerable_loss: float = 0.01
    absolute: bool = False
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        loss = number("tolerable_loss", self.tolerable_loss, "a number, 0.01 for 1 %")
        if not self.absolute and not -1 < loss < 1:
            raise SettingError(f"tolerable_loss: {loss:g} is not allowed; a share of the float score, 0.01 for 1 %")

    def bound(self, baseline: float) -> float:
        """The worst score that meets it. Raises SettingError where a share of the baseline means nothing."""
        if not self.absolute and not (math.isfinite(baseline) and baseline > 0):
            raise SettingError(
                f"evaluation: the float model scores {baseline:g}, and a tolerable loss is a share of that; return a "
                "score above 0, such as the accuracy"
            )
        worse = -self.tolerable_loss if self.higher_is_better else self.tolerable_loss
        return baseline + worse if self.absolute else baseline * (1 + worse)

    def met(self, score: float, baseline: float) -> bool:
        """Whether a score is within it."""
        bound = self.bound(baseline)
        return score >= bound if self.higher_is_better else score <= bound

    def text(self, baseline: float) -> str:
        """`at least 90.81 (float 91.73, tolerable loss 1%)`."""
        loss = f"{self.tolerable_loss:g}" if self.absolute else f"{100 * self.tolerable_loss:g}%"
        side = "at least" if self.higher_is_better else "at most"
        return f"{side} {self.bound(baseline):.6g} (float {baseline:.6g}, tolerable loss {loss})"


@dataclass(frozen=True)
class Trial:
    """One plan that was quantized by and evaluated."""

    plan: Plan
    score: float
    met: bool

    @property
    def label(self) -> str:
        """`mixquant qem=4.0`."""
        return plan_label(self.plan)

    @property
    def text(self) -> str:
        """`mixquant qem=4.0, 5.192 bits a weight: 90.2`."""
        return f"{plan_text(self.plan)}: {self.score:.6g}"


@dataclass(frozen=True)
class Tuning:
    """A run: the float model's score, the criterion and the trials in their order."""

    baseline: float
    criterion: Criterion
    trials: tuple[Trial, ...] = ()

    def with_trial(self, plan: Plan, score: float) -> "Tuning":
        """The run with one more trial."""
        trial = Trial(plan, score, self.criterion.met(score, self.baseline))
        return replace(self, trials=(*self.trials, trial))

    @property
    def met(self) -> bool:
        """Whether any trial meets the criterion."""
        return any(trial.met for trial in self.trials)

    @property
    def chosen(self) -> Trial:
        """The smallest plan that meets the criterion. Raises TuningError where none does."""
        if not self.met:
            raise self.unmet()
        return min((trial for trial in self.trials if trial.met), key=lambda trial: trial.plan.size().total_bits)

    def unmet(self) -> TuningError:
        """What to say where no trial is good enough: the criterion, and the best trial."""
        wanted = self.criterion.text(self.baseline)
        if not self.trials:
            return TuningError(f"no trial was run, and the criterion is {wanted}; allow one or more")
        sign = 1 if self.criterion.higher_is_better else -1
        best = max(self.trials, key=lambda trial: sign * trial.score)
        count = f"{len(self.trials)} trial{'s' if len(self.trials) > 1 else ''}"
        return TuningError(
            f"none of {count} meets the criterion, {wanted}; the best is {best.text}. Tolerate a greater loss, or try "
            "plans of more bits (a smaller qem, a larger alpha)",
            self,
        )


def plan_label(plan: Plan) -> str:
    """Who made the plan, by which numbers: `mixquant qem=4.0`."""
    asked = plan.allocator.parameters
    # What a file is found to take is a size, and not what sets one plan apart from another.
    parameters = {**asked, **plan.allocator.found, **{name: asked.get(name) for name in OF_FILES}}
    numbers = [name for name in (*NUMBERS, *OF_FILES) if isinstance(parameters.get(name), int | float)]
    pairs = [name for name in ("important_bits", "other_bits") if name in parameters]
    said = [f"{name}={parameters[name]}" for name in numbers]
    said += [f"{name}={','.join(map(str, parameters[name]))}" for name in pairs]
    return " ".join([plan.allocator.name, *said])


def plan_text(plan: Plan) -> str:
    """The same with its size."""
    return f"{plan_label(plan)}, {plan.size().total_average_bits:.3f} bits a weight"


def smallest_first(plans: Sequence[Plan]) -> list[Plan]:
    """The plans by their size in total; of those that say the same, the first. Raises SettingError for none."""
    if not plans:
        raise SettingError("plans: none given to try; one or more")
    distinct: dict[str, Plan] = {}
    for plan in plans:
        same = plan.model_copy(update={"allocator": plans[0].allocator, "made_with": {}})
        distinct.setdefault(same.to_json(), plan)
    return sorted(distinct.values(), key=lambda plan: plan.size().total_bits)


def checked_score(evaluate: Evaluate, model: "nn.Module", what: str) -> float:
    """The first number that an evaluation returns. Raises SourceError naming what was evaluated."""
    return next(iter(checked_scores(evaluate, model, what).values()))
