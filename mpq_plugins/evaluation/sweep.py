"""Many plans of one table: what each costs, what it loses, and which of them are worth having."""

import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.objective import PLAN_ERRORS, plan_error, predicted
from ..common.deferred import Deferred
from ..common.progress import Progress
from ..common.public import public
from ..common.store import Finished, Store, opened
from ..errors import SettingError, SourceError
from ..models.copying import duplicate
from ..plans.plan import Plan
from ..plans.table import LayerTable
from .scores import Evaluate, Scores, checked_scores

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

LOG = logging.getLogger(__name__)


FLOAT, JOB = "float", "sweep"


@public
@dataclass(frozen=True)
class SweepRow:
    """One plan. errors: mean over weights by metric, None where the table cannot tell; scores: by name, first first.

    average_bits is weights only, total_average_bits with scales, zero points and part maps. series: what it is called
    in tables and pictures, the allocator where nothing else was said.
    """

    allocator: str
    parameters: Mapping[str, Any]
    average_bits: float
    total_average_bits: float
    weights_only_bytes: int
    total_bytes: int
    errors: Mapping[str, float | None]
    scores: Scores
    pareto: bool = False
    series: str = ""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.series or self.allocator

    @property
    def score(self) -> float | None:
        """The first score, or the first error with its sign turned: larger is better."""
        if self.scores:
            return next(iter(self.scores.values()))
        error = next(iter(self.errors.values()), None)
        return None if error is None else -error

    def beats(self, other: "SweepRow") -> bool:
        """Whether this one is as small and as good, and smaller or better."""
        if self.score is None or other.score is None:
            return False
        at_least = self.total_bytes <= other.total_bytes and self.score >= other.score
        return at_least and (self.total_bytes < other.total_bytes or self.score > other.score)


def sweep(  # noqa: PLR0913  # each option is a user's word
    table: LayerTable,
    plans: Sequence[Plan],
    model: "nn.Module | None" = None,
    evaluate: Evaluate | None = None,
    *,
    series: Sequence[str] = (),
    sensitivity: str | None = None,
    calibrate: "Sequence[Any] | None" = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> tuple[SweepRow, ...]:
    """A row for each of the table's plans, in their order, those on the Pareto front marked.

    With `model` and `evaluate` every plan is applied to a copy of the model, verified and evaluated, and the first
    row is the float model. series: a name for each plan's row. sensitivity: what the rows' error is, summed over the
    network; without it, the mean errors of the weights. calibrate: batches of inputs on which every quantized copy is
    corrected (`correct`). store: where evaluations are kept, so that an interrupted sweep goes on, as in `measure`.
    Raises SettingError for no plans; SourceError where `evaluate` fails, or does not return the same names with
    numbers every time; and what `apply`, `correct` and `verify` raise.
    """
    if not plans:
        raise SettingError("plans: none given; one or more")
    with opened(store) as kept:
        finished = (
            kept.job(JOB, sweep_facts(model, evaluate, calibrate)) if kept is not None and model is not None else None
        )
        return _rows(table, plans, _Scored(model, evaluate, calibrate, finished), series, sensitivity, progress)


def sweep_facts(
    model: "nn.Module", evaluate: Evaluate | None, calibrate: "Sequence[Any] | None" = None
) -> dict[str, str]:
    """What decides the scores of a plan: the model, the function's code, and what is corrected on."""
    from ..models.fingerprint import batches_digest, model_digest, source_digest

    code = evaluate if hasattr(evaluate, "__qualname__") else type(evaluate)
    return {
        "model": model_digest(model), "evaluation": f"{_name(code)} {source_digest(code)}",
        "calibration": "" if calibrate is None else batches_digest(calibrate),
    }  # fmt: skip


def _name(function: object) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"


def _rows(
    table: LayerTable,
    plans: Sequence[Plan],
    scored: "_Scored",
    series: Sequence[str],
    sensitivity: str | None,
    progress: Progress | None,
) -> tuple[SweepRow, ...]:
    measured = (
        (sensitivity,) if sensitivity is not None else tuple(name for name in PLAN_ERRORS if name in table.metrics)
    )
    float_row = (_float_row(table, scored(None), measured),) if scored.possible else ()
    rows = []
    for position, plan in enumerate(plans):
        if progress is not None:
            progress(plan.allocator.name, position, len(plans))
        rows.append(_row(table, plan, scored(plan), _errors(table, plan, sensitivity)))
        if series:
            rows[-1] = replace(rows[-1], series=series[position])
        if float_row and rows[-1].scores.keys() != float_row[0].scores.keys():
            names = [", ".join(scores) for scores in (float_row[0].scores, rows[-1].scores)]
            raise SourceError(f"the evaluation returned {names[0]} for one model and {names[1]} for another")
    if progress is not None:
        progress("", len(plans), len(plans))
    return (*float_row, *mark_pareto(rows))


@dataclass(frozen=True)
class _Scored:
    """The scores of a plan, or of the float model, from the store or from an evaluation."""

    model: "nn.Module | None"
    evaluate: Evaluate | None
    calibrate: "Sequence[Any] | None"
    finished: Finished | None

    @property
    def possible(self) -> bool:
        return self.model is not None and self.evaluate is not None

    def __call__(self, plan: Plan | None) -> Scores:
        if self.model is None or self.evaluate is None:
            return {}
        key = FLOAT if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()
        known = self.finished.row(key) if self.finished is not None else None
        if known is not None:
            return known
        # A copy for the float model too: an evaluation may leave its mark on what it is given.
        given = duplicate(self.model) if plan is None else quantized_copy(self.model, plan, self.calibrate)
        what = FLOAT if plan is None else f"{plan.allocator.name} {plan.allocator.parameters}"
        scores = checked_scores(self.evaluate, given, what)
        LOG.info("%s: %s", what, scores)
        if self.finished is not None:
            self.finished.add_row(key, scores)
        return scores


def quantized_copy(model: "nn.Module", plan: Plan, calibrate: "Sequence[Any] | None" = None) -> "nn.Module":
    """The model under the plan, verified; corrected on the batches, where there are any."""
    from ..simulation.apply import apply, verify

    quantized = apply(model, plan, calibrate=calibrate)
    verify(quantized, plan)
    return quantized


def mark_pareto(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """Mark the rows that no other row beats, smaller or better; none without a score."""
    front: set[int] = set()
    best = -math.inf
    known = sorted((row.total_bytes, -row.score, i) for i, row in enumerate(rows) if row.score is not None)
    for _, same_size in itertools.groupby(known, key=lambda entry: entry[0]):
        (_, least, first), *others = same_size
        if -least > best:
            front |= {first, *(i for _, negated, i in others if negated == least)}
            best = -least
    return tuple(replace(row, pareto=i in front) for i, row in enumerate(rows))


def _errors(table: LayerTable, plan: Plan, sensitivity: str | None) -> dict[str, float | None]:
    if sensitivity is not None:
        return {sensitivity: predicted(table, plan, sensitivity)}
    return {metric: plan_error(table, plan, metric) for metric in PLAN_ERRORS if metric in table.metrics}


def _row(table: LayerTable, plan: Plan, scores: Scores, errors: Mapping[str, float | None]) -> SweepRow:
    size = plan.size()
    return SweepRow(
        plan.allocator.name, plan.allocator.parameters, size.average_bits, size.total_average_bits,
        size.weights_only_bytes, size.total_bytes, errors, scores,
    )  # fmt: skip


def _float_row(table: LayerTable, scores: Scores, names: Sequence[str]) -> SweepRow:
    size = 4 * sum(layer.numel for layer in table.layers)
    errors: dict[str, float | None] = dict.fromkeys(names, 0.0)
    return SweepRow(FLOAT, {}, 32.0, 32.0, size, size, errors, scores)
