"""`mpq pareto`: plans across budgets, every allocator at the same sizes, as a table, CSV and picture."""

from pathlib import Path
from typing import Any

import click

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
from ..scheme_options import SchemeCommand, request_values, scheme_options
from ..types import FileOrFactory, IntegerList, NumberList
from ..workers import chosen_executor

BUDGETS = "2,2.5,3,4"


@click.command(
    cls=SchemeCommand,
    epilog="Examples: mpq pareto net.safetensors -o pareto.csv --plot pareto.png. mpq pareto package.module:factory "
    "--eval package.module:accuracy --calibrate package.module:batches -o pareto.csv --plot pareto.png. Files of "
    "entropy-coded steps beside them: --file-bits 1,1.5,2",
)
@click.argument("source", type=FileOrFactory())
@click.option(
    "--budgets", type=NumberList(click.FLOAT), default=BUDGETS, show_default=True,
    help="Bits a weight, codes alone: a list, or first:last:step.",
)  # fmt: skip
@click.option(
    "--file-bits", type=NumberList(click.FLOAT), metavar="BITS", default=(),
    help="Also entropy-coded steps, at so many bits a weight in the file; rows are then compared by their files. Needs "
    "--eval.",
)  # fmt: skip
@click.option("--bits", type=IntegerList(), default="1-8", show_default=True, help="Candidate bit-widths.")
@click.option(
    "--sensitivity", default="mse", show_default=True,
    help="What Budget keeps low: an error, or a sensitivity that `mpq measure` put into the table SOURCE, or kl*mse.",
)  # fmt: skip
@run_options
@scheme_options
@json_option
def pareto(
    source: str,
    budgets: tuple[float, ...],
    file_bits: tuple[float, ...],
    bits: tuple[int, ...],
    sensitivity: str,
    output: Path | None,
    plot: Path | None,
    evaluation: str | None,
    fitting: Fitting,
    model_factory: str | None,
    judge: str | None,
    workers: int | None,
    dask: str | None,
    cache: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan SOURCE at several sizes with every allocator, and show which plans are worth having.

    Uniform widths, MixQuant, PTILMPQ, SQNR, and Budget per layer and per channel, all under one scheme (asymmetric per
    channel, clipped by squared error, unless told otherwise) and one accounting. Without --eval the rows have predicted
    errors alone. Rows that no other row beats in both size and score are marked. With --file-bits every model is also
    written to a file for a moment, and sizes are those of the files.
    """
    from ...allocation.budget import Budget
    from ...allocation.contract import Needs
    from ...allocation.objective import parts_of
    from ...evaluation.pareto import pareto as plans_within
    from ...evaluation.sweep import sweep as run
    from ...plans.stats import METRICS
    from ...report.progress import progress_bar
    from ..file_budget import check_written, table_of_steps
    from ..functions import named_function
    from ..measuring import measured
    from ..request import Request
    from ..sources import resolve_source

    if file_bits:
        check_written(evaluation, fitting)
    files = run_files(source, output, plot, cache, evaluation, model_factory, fitting.calibration)
    request = Request(**request_values(options))
    evaluate = named_function(evaluation) if evaluation is not None else None
    given = resolve_source(source)
    model = model_to_evaluate(given, evaluation, model_factory)
    check_workers(model, workers, dask)
    scheme = Budget(average_bits=max(budgets)).needs.scheme
    metrics = tuple(dict.fromkeys(["mse", "relative", *(n for n in parts_of(sensitivity) if n in METRICS)]))
    granular = request.scheme(scheme).granularity != "per_tensor"
    needs = Needs(bits, metrics, granular, scheme)
    batches = batches_to_fit_on(fitting, model)
    with resumable(files, model, evaluate, batches, fitting.rounding, bool(file_bits)) as store:
        table = measured(given, needs, request, cache if given.is_table else files.measurement)
        coded = None
        if file_bits and model is not None:
            coded = table_of_steps(given, table, model, request, sensitivity)
        labelled = plans_within(table, budgets, sensitivity, bits, coded=coded, file_bits=file_bits)
        plans, series = [one.plan for one in labelled], [one.series for one in labelled]
        if model is not None:
            check_fit(plans[0], model, model_factory or source)
        with chosen_executor(workers, dask) as executor, progress_bar("evaluating") as progress:
            rows = run(
                table,
                plans,
                model,
                evaluate,
                series=series,
                judge=judge,
                calibrate=batches,
                rounding=fitting.rounding,
                files=bool(file_bits),
                executor=executor,
                store=store,
                progress=progress,
            )
        write_rows(rows, files, title := run_title(source, table, f", {fitting.label}" if model is not None else ""))
    print_rows(rows, table, title, as_json, output, plot)
