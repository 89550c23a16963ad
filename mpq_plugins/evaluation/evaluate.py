"""A few plans of one model, tried: the float model, and each plan to nearest as it is and with another rounding."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.deferred import Deferred
from ..common.progress import Progress, check_callbacks
from ..common.public import public
from ..common.store import Store, opened
from ..errors import SettingError
from ..models.arguments import check_module
from ..plans.arguments import check_plan
from ..plans.plan import Plan
from ..plans.size import PlanSize
from ..reconstruction.rounding import NEAREST, Rounding
from .scored import FLOAT, SECONDS, Scored, check_rounding, checked_calibration, evaluation_facts
from .scores import Evaluate, Scores, check_same_names, check_score
from .tried import Tried
from .tries import Try, results

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

AS_IT_IS, CALIBRATED = "evaluate", "evaluate calibrated"


@public
@dataclass(frozen=True)
class EvaluatedPlan:
    """One model that was tried.

    Attributes:
        name: What the plan is called; `float` for the model itself.
        rounding: `nearest`, `nearest, corrected`, `compensated` or `learned`; empty for the float model.
        size: The plan's size, with the steps that were fitted where it is for a file's bytes; None for the float model.
        scores: What the evaluation returned, by name.
        seconds: How long the evaluation took.
    """

    name: str
    rounding: str
    size: PlanSize | None
    scores: Scores
    seconds: float

    @property
    def corrected(self) -> bool:
        """Whether calibration inputs went into the model; `rounding` says how."""
        return self.rounding not in ("", NEAREST)


def evaluate(  # noqa: PLR0913  # each option is a user's word
    model: "nn.Module",
    plans: Mapping[str, Plan],
    score: Evaluate,
    *,
    calibrate: "Sequence[Any] | None" = None,
    rounding: Rounding | None = None,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> tuple[EvaluatedPlan, ...]:
    """Evaluate the float model, each plan rounded to nearest and, with calibration inputs, each plan fitted to them.

    Args:
        model: The float model; it is not changed. Every plan is applied to a copy, and the copy is verified.
        plans: Plans by the names that their rows get.
        score: Called with each model; returns a number, larger is better, or names and numbers.
        calibrate: Batches of inputs on which a second copy of each plan is rounded and corrected, as in `apply`.
        rounding: Of that copy, as in `apply`: `nearest` (corrected alone), `compensated` (the default) or `learned`.
        executor: A concurrent.futures.Executor, as in `sweep`. The float model, a plan to nearest and a plan rounded
            on inputs are a unit each; what one call of `score` does is not cut up.
        store: Where finished evaluations are kept, so that an interrupted run goes on, as in `measure`.
        progress: Called with (name, done, total).

    Returns:
        The rows: float first, then each plan in its order, as it is and fitted.

    Raises:
        SettingError: No plans are given; or as `apply`.
        MismatchError: A plan is another model's.
        SourceError: The evaluation fails, or does not return names with numbers. The message names the plan.
        WorkerError: An executor's workers fail, or what they need cannot be sent to them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> plan = mpq.Uniform(bits=4)(mpq.measure(net))
        >>> rows = mpq.evaluate(net, {"four": plan}, lambda tried: float(tried(torch.ones(1, 8)).detach().sum()))
        >>> [row.name for row in rows]
        ['float', 'four']
    """
    check_module(model)
    if not isinstance(plans, Mapping):
        raise SettingError(f"plans: is a {type(plans).__name__}; give a mapping of names to plans, as {{'mine': plan}}")
    if not plans:
        raise SettingError("plans: none given; one or more")
    for name, plan in plans.items():
        check_plan(plan, f"plans: {name!r}")
    check_score(score, "score")
    check_callbacks(progress=progress)
    check_rounding(plans.values(), rounding, calibrated=calibrate is not None)
    calibrate = checked_calibration(calibrate)
    with opened(store) as kept:
        ranged = calibrate if any(plan.quantizes_inputs for plan in plans.values()) else None
        plain = None if kept is None else kept.job(AS_IT_IS, evaluation_facts(model, score, ranged))
        runs = [Scored(model, score, None, plain, inputs=ranged, timed=True)]
        if calibrate is not None:
            facts = evaluation_facts(model, score, calibrate, rounding)
            fitted = None if kept is None else kept.job(CALIBRATED, facts)
            runs.append(Scored(model, score, calibrate, fitted, rounding, timed=True))
        return tuple(_rows(plans, runs, executor, progress))


def _rows(
    plans: Mapping[str, Plan], runs: Sequence[Scored], executor: Executor | None, progress: Progress | None
) -> Iterator[EvaluatedPlan]:
    tries = [Try(runs[0], None, FLOAT)]
    tries += [Try(run, plan, f"{name}, {run.label}") for name, plan in plans.items() for run in runs]
    names = [FLOAT, *(name for name in plans for _ in runs)]
    found: dict[int, tuple[Tried, Scores]] = {}
    if progress is not None:
        progress(FLOAT, 0, len(tries))
    for position, tried in results(tries, executor):
        found[position] = tried, {name: score for name, score in tried.scores.items() if name != SECONDS}
        check_same_names(next(iter(found.values()))[1], found[position][1])
        if progress is not None and len(found) < len(tries):
            progress(tries[len(found)].name, len(found), len(tries))
    for position, (one, name) in enumerate(zip(tries, names, strict=True)):
        tried, scores = found[position]
        label, size = ("", None) if tried.plan is None else (one.scored.label, tried.plan.size())
        yield EvaluatedPlan(name, label, size, scores, tried.scores[SECONDS])
    if progress is not None:
        progress("", len(tries), len(tries))
