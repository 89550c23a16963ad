"""Many plans from one measurement: what each costs, what it loses, and which of them are worth having."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .allocate.base import Allocator
from .errors import SourceError
from .plan import Plan
from .plan_error import METRICS, plan_error
from .table import LayerTable

if TYPE_CHECKING:
    from torch import nn

    from .journal import Journal

Scores = Mapping[str, float]
Evaluate = Callable[["nn.Module"], "float | Scores"]
"""What a user's function makes of a quantized model: a score to be as large as can be, or several, that one first."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SweepRow:
    """One plan. errors: mean over weights by metric, None where the table cannot tell; scores: by name, first first.

    average_bits is weights only, total_average_bits with scales, zero points and part maps.
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

    @property
    def score(self) -> float | None:
        """The first score, or the first error with its sign turned: larger is better."""
        if self.scores:
            return next(iter(self.scores.values()))
        error = next(iter(self.errors.values()), None)
        return None if error is None else -error


def sweep(
    table: LayerTable,
    allocators: Sequence[Allocator],
    model: "nn.Module | None" = None,
    evaluate: Evaluate | None = None,
    *,
    journal: "Journal | None" = None,
    progress: Progress | None = None,
) -> tuple[SweepRow, ...]:
    """A row for every allocator's plan, in their order, those on the Pareto front marked.

    With `model` and `evaluate` every plan is applied to a copy of the model, verified and evaluated, and the first
    row is the float model. Evaluations that the journal holds are taken from there, new ones are added to it. Raises
    SourceError where `evaluate` fails or returns no number, and what `apply` and `verify` raise.
    """
    plans = [allocator(table) for allocator in allocators]
    scored = _Scored(model, evaluate, journal)
    float_row = (_float_row(table, scored("float", None)),) if scored.possible else ()
    rows = []
    for position, plan in enumerate(plans):
        if progress is not None:
            progress(plan.allocator.name, position, len(plans))
        key = json.dumps([plan.allocator.name, plan.allocator.parameters], sort_keys=True, default=str)
        rows.append(_row(table, plan, scored(key, plan)))
    if progress is not None:
        progress("", len(plans), len(plans))
    return (*float_row, *mark_pareto(rows))


@dataclass(frozen=True)
class _Scored:
    """The scores of a plan, or of the float model, from the journal or from an evaluation."""

    model: "nn.Module | None"
    evaluate: Evaluate | None
    journal: "Journal | None"

    @property
    def possible(self) -> bool:
        return self.model is not None and self.evaluate is not None

    def __call__(self, key: str, plan: Plan | None) -> Scores:
        if self.model is None or self.evaluate is None:
            return {}
        if self.journal is not None and key in self.journal.rows:
            found: Scores = self.journal.rows[key]
            return found
        scores = checked_scores(self.evaluate, self.model if plan is None else quantized_copy(self.model, plan))
        if self.journal is not None:
            self.journal.add(key, scores)
        return scores


def quantized_copy(model: "nn.Module", plan: Plan) -> "nn.Module":
    """The model under the plan, verified."""
    from .apply import apply, verify

    quantized = apply(model, plan)
    verify(quantized, plan)
    return quantized


def checked_scores(evaluate: Evaluate, model: "nn.Module") -> dict[str, float]:
    """What the function returns for the model, as named numbers. Raises SourceError."""
    name = getattr(evaluate, "__qualname__", repr(evaluate))
    try:
        returned = evaluate(model)
    except Exception as error:  # a user's function may raise anything
        raise SourceError(f"{name}: the evaluation failed ({type(error).__name__}: {error})") from error
    scores = returned if isinstance(returned, Mapping) else {"score": returned}
    try:
        numbers = {str(key): float(value) for key, value in scores.items()}
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name}: returned {returned!r}; a number, or a mapping of names to numbers") from error
    if not numbers or any(math.isnan(value) for value in numbers.values()):
        raise SourceError(f"{name}: returned {returned!r}; a number, or a mapping of names to numbers, none NaN")
    return numbers


def mark_pareto(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """Mark the rows that no other row beats in size or score without losing in the other; none without a score."""

    def beaten(row: SweepRow) -> bool:
        return row.score is None or any(
            other.score is not None
            and other.total_bytes <= row.total_bytes
            and other.score >= row.score
            and (other.total_bytes < row.total_bytes or other.score > row.score)
            for other in rows
        )

    return tuple(replace(row, pareto=not beaten(row)) for row in rows)


def _row(table: LayerTable, plan: Plan, scores: Scores) -> SweepRow:
    size = plan.size()
    errors = {metric: plan_error(table, plan, metric) for metric in METRICS if metric in table.metrics}
    return SweepRow(
        plan.allocator.name, plan.allocator.parameters, size.average_bits, size.total_average_bits,
        size.weights_only_bytes, size.total_bytes, errors, scores,
    )  # fmt: skip


def _float_row(table: LayerTable, scores: Scores) -> SweepRow:
    size = 4 * sum(layer.numel for layer in table.layers)
    errors: dict[str, float | None] = {metric: 0.0 for metric in METRICS if metric in table.metrics}
    return SweepRow("float", {}, 32.0, 32.0, size, size, errors, scores)
