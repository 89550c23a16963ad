"""Many plans of one table: what each costs, what it loses, and which of them are worth having."""

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.file_steps import predicted_cost
from ..allocation.guard import judge_of
from ..common.checks import listed, shown, words
from ..common.deferred import Deferred
from ..common.progress import Progress, check_callbacks
from ..common.public import public
from ..common.store import Store, opened
from ..errors import SettingError
from ..models.arguments import check_module
from ..plans.arguments import check_plan, check_table
from ..plans.plan import Plan
from ..plans.table import LayerTable
from ..reconstruction.rounding import Rounding
from .scored import FLOAT, Scored, check_rounding, checked_calibration, evaluation_facts
from .scores import Evaluate, Scores, check_same_names, check_score
from .tried import Tried
from .tries import Try, results

if TYPE_CHECKING:
    from torch import nn
else:
    nn = Deferred("torch.nn")

LOG = logging.getLogger(__name__)


JOB = "sweep"


@public
@dataclass(frozen=True)
class SweepRow:
    """One plan: what it costs, and what it loses.

    Attributes:
        allocator: The name of the allocator that made it.
        parameters: The allocator's parameters.
        average_bits: Bits a weight, codes alone.
        total_average_bits: Bits a weight, with scales, zero points and part maps.
        weights_only_bytes: Bytes of the codes alone.
        total_bytes: Bytes of the planned layers in total.
        errors: The predicted cost of the network by the judge's name; None where the table cannot tell.
        scores: What the evaluation returned by name, in its order.
        pareto: Whether no other row is smaller or better.
        series: What it is called in tables and pictures, the allocator where nothing else was said.
        found: What the allocator found beside the plan.
        rounding: Of the model that was evaluated: `nearest`, `nearest, corrected`, `compensated` or `learned`. Empty
            for the float model, and where nothing was.
        file_bytes: Bytes of the container of the model that was evaluated, all of it; None where none was written. Of
            the float model, its bytes as they are stored, 4 for each planned weight.
        file_bits: The same less other tensors, in bits for each planned weight.
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
    found: Mapping[str, Any] = field(default_factory=dict)
    rounding: str = ""
    file_bytes: int | None = None
    file_bits: float | None = None

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
        """Tell whether this row is as small and as good, and smaller or better.

        What is small is the file, where both have one, and else the planned layers in total.

        Args:
            other: The row it is set against.

        Returns:
            Whether it is; False where one of them has no score.
        """
        if self.score is None or other.score is None:
            return False
        own, others = _sizes((self, other))
        return own <= others and self.score >= other.score and (own < others or self.score > other.score)


def by_files(rows: Iterable[SweepRow]) -> bool:
    """Tell whether rows are set side by side by what their files take: all of them have one."""
    return all(row.file_bytes is not None for row in rows)


def _sizes(rows: Sequence[SweepRow]) -> list[int]:
    """What the rows are set side by side by, in bytes."""
    files = [row.file_bytes for row in rows if row.file_bytes is not None]
    return files if len(files) == len(rows) else [row.total_bytes for row in rows]


def sweep(  # noqa: PLR0913  # each option is a user's word
    table: LayerTable,
    plans: Sequence[Plan],
    model: "nn.Module | None" = None,
    evaluate: Evaluate | None = None,
    *,
    series: Sequence[str] = (),
    judge: str | None = None,
    calibrate: "Sequence[Any] | None" = None,
    rounding: Rounding | None = None,
    files: bool = False,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> tuple[SweepRow, ...]:
    """Make a row for each of the table's plans, in their order, and mark those on the Pareto front.

    With `model` and `evaluate` every plan is applied to a copy of the model, verified and evaluated, and the first row
    is the float model.

    A plan that was made for a file's bytes (`Budget(file_bits=...)`) goes through `fit_file` where there are
    calibration inputs or `files`, and its row is that of the plan with the steps that were fitted. Only a table under
    its own scheme has an error for it.

    Args:
        table: The measured layers.
        plans: Plans made from it.
        model: The float model; it is not changed.
        evaluate: Called with each quantized copy; returns a number, larger is better, or names and numbers.
        series: A name for each plan's row.
        judge: The sensitivity whose predicted cost, summed over the network, is the rows' error; by default the one
            that the guard chooses for all of them (`judge_of`).
        calibrate: Batches of inputs on which every quantized copy is rounded and corrected, as in `apply`.
        rounding: As in `apply`: `nearest`, `compensated` or `learned`; by default compensated with inputs, and nearest
            without. A plan that was made for a file's bytes is compensated.
        files: Whether each quantized model is written to a container too, for a moment, so that rows are set side by
            side by what their files take.
        executor: A concurrent.futures.Executor whose workers evaluate, a plan at a time: threads, where `evaluate` may
            run in several at once, processes, or dask's `client.get_executor()`. The model, the inputs and `evaluate`
            travel to processes. The rows are the same to the last bit, if `evaluate` depends on the model alone.
        store: Where evaluations are kept, so that an interrupted sweep goes on, as in `measure`.
        progress: Called with the allocator's name, plans done and plans in all.

    Returns:
        The rows, the float model's first where models are evaluated.

    Raises:
        SettingError: No plans are given, files are asked for without models, or as `apply`.
        SourceError: The evaluation fails, or does not return the same names with numbers every time. The message names
            the plan.
        MismatchError: A plan is another model's.
        WeightError: A weight cannot be quantized.
        VerifyError: A quantized copy does not hold its plan.
        WorkerError: An executor's workers fail, or what they need cannot be sent to them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> rows = mpq.sweep(table, [mpq.Uniform(bits=b)(table) for b in (2, 4)])
        >>> [(row.average_bits, row.pareto) for row in rows]
        [(2.0, True), (4.0, True)]
    """
    check_table(table)
    plans = listed("plans", plans, "a list of plans")
    if not plans:
        raise SettingError("plans: none given; one or more")
    for place, plan in enumerate(plans):
        check_plan(plan, f"plans[{place}]")
    if model is not None:
        check_module(model)
    if evaluate is not None:
        check_score(evaluate, "evaluate")
    if not isinstance(judge, str | None):
        raise SettingError(f"judge: {shown(judge)} is not allowed; an error or a sensitivity of the table, as mse")
    check_callbacks(progress=progress)
    series = words("series", series, "a name for each plan")
    if series and len(series) != len(plans):
        raise SettingError(f"series: {len(series)} names for {len(plans)} plans; one for each")
    if files and (model is None or evaluate is None):
        raise SettingError("files: are written of models that are evaluated; give model and evaluate, or leave it out")
    check_rounding(plans, rounding, calibrated=calibrate is not None)
    calibrate = checked_calibration(calibrate)
    with opened(store) as kept:
        finished = (
            kept.job(JOB, evaluation_facts(model, evaluate, calibrate, rounding, files))
            if kept is not None and model is not None
            else None
        )
        scored = Scored(model, evaluate, calibrate, finished, rounding, files)
        return _rows(table, plans, scored, series, judge, executor, progress)


def _rows(
    table: LayerTable,
    plans: Sequence[Plan],
    scored: Scored,
    series: Sequence[str],
    judge: str | None,
    executor: Executor | None,
    progress: Progress | None,
) -> tuple[SweepRow, ...]:
    judge = judge_of(table, plans, judge)
    tried = (
        _tried(plans, scored, executor, progress) if scored.possible else [Tried({}, plan) for plan in (None, *plans)]
    )
    rows = [
        _row(one, _errors(table, one.plan or plan, judge), scored) for one, plan in zip(tried[1:], plans, strict=True)
    ]
    if series:
        rows = [replace(row, series=name) for row, name in zip(rows, series, strict=True)]
    float_row = (_float_row(table, tried[0].scores, judge, scored.files),) if scored.possible else ()
    return (*float_row, *mark_pareto(rows))


def _tried(plans: Sequence[Plan], scored: Scored, executor: Executor | None, progress: Progress | None) -> list[Tried]:
    """What came of the float model, and of each plan."""
    tries = [Try(scored, None, FLOAT)]
    tries += [Try(scored, plan, f"{plan.allocator.name} {plan.allocator.parameters}") for plan in plans]
    found: dict[int, Tried] = {}
    first: Scores = {}
    for position, tried in results(tries, executor):
        found[position] = tried
        first = first or tried.scores
        check_same_names(first, tried.scores)
        done = len(found) - 1  # plans, if the float model is the first
        if progress is not None and done < len(plans):
            progress(plans[done].allocator.name, done, len(plans))
    if progress is not None:
        progress("", len(plans), len(plans))
    return [found[position] for position in range(len(tries))]


def mark_pareto(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """Mark the rows that no other row beats, smaller (by their files, where all have one) or better; none without a
    score."""
    front: set[int] = set()
    best = -math.inf
    sizes = _sizes(rows)
    known = sorted((sizes[i], -row.score, i) for i, row in enumerate(rows) if row.score is not None)
    for _, same_size in itertools.groupby(known, key=lambda entry: entry[0]):
        (_, least, first), *others = same_size
        if -least > best:
            front |= {first, *(i for _, negated, i in others if negated == least)}
            best = -least
    return tuple(replace(row, pareto=i in front) for i, row in enumerate(rows))


def _errors(table: LayerTable, plan: Plan, judge: str | None) -> dict[str, float | None]:
    return {} if judge is None else {judge: predicted_cost(table, plan, judge)}


def _row(tried: Tried, errors: Mapping[str, float | None], scored: Scored) -> SweepRow:
    assert tried.plan is not None, "the float model has a row of its own"
    plan, size = tried.plan, tried.plan.size()
    file = tried.file if scored.files else None  # fitted ones alone would be set against other rows' sizes
    return SweepRow(
        plan.allocator.name, plan.allocator.parameters, size.average_bits, size.total_average_bits,
        size.weights_only_bytes, size.total_bytes, errors, tried.scores, found=plan.allocator.found,
        rounding=scored.label, file_bytes=None if file is None else file.bytes,
        file_bits=None if file is None else file.bits,
    )  # fmt: skip


def _float_row(table: LayerTable, scores: Scores, judge: str | None, files: bool) -> SweepRow:
    size = 4 * sum(layer.numel for layer in table.layers)
    errors: dict[str, float | None] = {} if judge is None else {judge: 0.0}
    row = SweepRow(FLOAT, {}, 32.0, 32.0, size, size, errors, scores)
    # A container of float weights would be a few percent smaller; this is what users have.
    return replace(row, file_bytes=size + (table.rest_bytes or 0), file_bits=32.0) if files else row
