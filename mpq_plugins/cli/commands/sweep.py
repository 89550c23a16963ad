"""`mpq sweep`: one measurement, a grid of an allocator's parameters, one row per plan."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..allocator_options import ALLOCATOR_KEY, AllocatorCommand, allocator_option, allocators_from
from ..fitting import Fitting
from ..output import json_option
from ..runs import (
    batches_to_fit_on,
    check_fit,
    check_workers,
    model_to_evaluate,
    print_rows,
    resumable,
    run_files,
    run_options,
    run_title,
    write_rows,
)
from ..scheme_options import request_values, scheme_options
from ..types import FileOrFactory
from ..workers import chosen_executor

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...allocation.contract import Allocator, Needs
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ..request import Request

UNIFORM_BITS = range(2, 9)


@click.command(
    cls=AllocatorCommand,
    epilog="Example: mpq sweep mine.py:net --average-bits 2:4:0.5 --eval mine.py:score --plot sweep.png",
)
@click.argument("source", type=FileOrFactory())
@allocator_option
@run_options
@click.option("--uniform/--no-uniform", default=True, help="Uniform plans of about the same sizes too (default).")
@scheme_options
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    source: str,
    allocator: str | None,
    output: Path | None,
    plot: Path | None,
    evaluation: str | None,
    fitting: Fitting,
    model_factory: str | None,
    uniform: bool,
    judge: str | None,
    workers: int | None,
    dask: str | None,
    cache: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan SOURCE over a grid of an allocator's parameters: sizes, errors, scores, the best marked. Several
    values of an option make a row each (2,3 or 2:4:0.5); default: the allocator's grid.
    """
    from ...evaluation.sweep import sweep as run
    from ...report.progress import progress_bar
    from ..file_budget import check_written
    from ..functions import named_function
    from ..measuring import measured
    from ..plans import plans_by
    from ..request import Request
    from ..sources import named_files, resolve_source

    request = Request(**request_values(options))
    files = run_files(
        source, output, plot, cache, evaluation, fitting.calibration, model_factory, *named_files(options)
    )
    allocators = allocators_from(ctx, options, scheme=None, grid=getattr(ctx.meta[ALLOCATOR_KEY], "grid", {}))
    evaluate = named_function(evaluation) if evaluation is not None else None
    given = resolve_source(source)
    model = model_to_evaluate(given, evaluation, model_factory)
    check_workers(model, workers, dask)
    needs = _needs(allocators, request, uniform, measure=not given.is_table)
    batches = batches_to_fit_on(fitting, model)
    written = model is not None and _for_files(allocators)
    if written:
        check_written(evaluation, fitting)
    with resumable(files, model, evaluate, batches, fitting.rounding, written) as store:
        table = measured(given, needs, request, cache if given.is_table else files.measurement)
        plans = plans_by(allocators, table)
        plans += _uniform_beside(plans, table) if uniform else []
        if model is not None:
            check_fit(plans[0], model, model_factory or source)
        with chosen_executor(workers, dask) as executor, progress_bar("sweeping") as progress:
            rows = run(
                table,
                _distinct(plans),
                model,
                evaluate,
                judge=judge,
                calibrate=batches,
                rounding=fitting.rounding,
                files=written,
                executor=executor,
                store=store,
                progress=progress,
            )
        write_rows(rows, files, title := run_title(source, table, f", {fitting.label}" if model is not None else ""))
    print_rows(rows, table, title, as_json, output, plot)


def _for_files(allocators: "Sequence[Allocator]") -> bool:
    """Whether plans are for a file's bytes, so that models are compared by what their files take."""
    from ...allocation.budget import FILES, Budget

    return any(isinstance(one, Budget) and any(getattr(one, name) is not None for name in FILES) for one in allocators)


def _needs(allocators: "Sequence[Allocator]", request: "Request", uniform: bool, measure: bool) -> "Needs":
    """What the allocators need; of a measurement also errors of uniform plans and, where channels have scales of
    their own, what parts will cost.
    """
    from ..plans import joint_needs

    needs = joint_needs(allocators)
    if not measure:
        return needs
    bits = sorted({*needs.bits, *(UNIFORM_BITS if uniform else ())})
    granular = request.scheme(needs.scheme).granularity != "per_tensor"
    return replace(needs, bits=tuple(bits), channel_errors=needs.channel_errors or granular)


def _uniform_beside(plans: "Sequence[Plan]", table: "LayerTable") -> "list[Plan]":
    """Uniform plans from just below the smallest plan to just above the largest."""
    from ...allocation.uniform import Uniform

    averages = [plan.size().average_bits for plan in plans]
    uniform = [Uniform(bits=b)(table) for b in UNIFORM_BITS if b in table.bits]
    return [plan for plan in uniform if min(averages) - 1 < plan.size().average_bits < max(averages) + 1]


def _distinct(plans: "Sequence[Plan]") -> "list[Plan]":
    """The same plan by the same allocator is one row."""
    return list({plan.to_json(): plan for plan in plans}.values())
