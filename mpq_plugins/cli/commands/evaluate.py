"""`mpq evaluate`: what plans do to a model's score, rounded to nearest and on calibration inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import SettingError
from ...report.progress import echo, progress_bar
from ..fitting import Fitting, fitting_options
from ..help import SectionCommand
from ..output import (
    check_output,
    claim,
    json_option,
    print_json,
    run_model_option,
    say_notes,
    say_written,
    weights_option,
)
from ..types import FileOrFactory
from ..workers import chosen_executor, worker_options

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ...common.store import Store
    from ...plans.plan import Plan


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq evaluate mine.py:net plan.json --eval mine.py:score. Two plans, to nearest and compensated: "
    "mpq evaluate mine.py:net a.json b.json --eval mine.py:score --calibrate mine.py:batches -o tried.csv. "
    "A checkpoint: mpq evaluate net.pt plan.json --model mine.py:net --eval mine.py:score",
)
@click.argument("source", type=FileOrFactory())
@click.argument("plan_files", metavar="PLAN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", required=True,
    help="Called with the float model and each quantized one; returns a score, larger is better, or names and numbers.",
)  # fmt: skip
@fitting_options
@run_model_option
@weights_option
@worker_options("evaluate", "1", "Inputs and evaluation")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV to write; an interrupted run resumes.")
@json_option
def evaluate(
    source: str,
    plan_files: tuple[Path, ...],
    evaluation: str,
    fitting: Fitting,
    model_factory: str | None,
    weights: str | None,
    workers: int | None,
    dask: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Evaluate SOURCE in float, under each PLAN to nearest and, with inputs, under each PLAN rounded for these."""
    from ...evaluation.evaluate import evaluate as run
    from ...plans.steps import made_for_file
    from ...report.console import console
    from ...report.evaluate import evaluated_csv, evaluated_json, evaluated_table
    from ...report.tables import CODES_ALONE
    from ..calibration import loaded_module
    from ..functions import named_function
    from ..sources import check_order

    check_output(output, source, evaluation, fitting.calibration, model_factory, *plan_files)
    claim(output, "rows as CSV")
    check_order(plan_files[0], source, "mpq evaluate SOURCE PLAN...")
    loaded = named_plans(plan_files)
    model = loaded_module(source, model_factory, weights)
    plans = {name: _fitting(plan, model, name) for name, plan in loaded.items()}
    score = named_function(evaluation)
    batches = fitting.batches(model)
    with _kept(output) as store, chosen_executor(workers, dask) as executor, progress_bar("evaluating") as progress:
        rows = run(
            model, plans, score, calibrate=batches, rounding=fitting.rounding, executor=executor, store=store,
            progress=progress,
        )  # fmt: skip
        if output is not None:
            evaluated_csv(rows, output)
    if as_json:
        print_json({"source": source, "rows": evaluated_json(rows)})
        return
    count = max(plan.size().numel for plan in plans.values())
    console().print(evaluated_table(rows, count, f"{source}, {count:,} planned weights"))
    echo("bits: a weight, in total; size: of the planned layers, in total; seconds: of one evaluation")
    if any(map(made_for_file, plans.values())):
        echo(CODES_ALONE + ("; on inputs their steps are fitted to it" if batches is not None else ""))
    if batches is None:
        echo("--calibrate MODULE:FUNCTION, which returns batches of inputs, tries every plan compensated too")
    say_written(output, "rows as CSV")


def named_plans(files: tuple[Path, ...]) -> "dict[str, Plan]":
    """The plans, by the names of their files. Raises SettingError for two of one name, FormatError for no plan."""
    from ...plans.plan import Plan

    plans: dict[str, Plan] = {}
    for file in files:
        name = str(file) if file.name in {other.name for other in files if other is not file} else file.name
        if name in plans:
            raise SettingError(f"{file}: is given twice; give each plan once")
        plans[name] = Plan.load(file)
    return plans


def _fitting(plan: "Plan", model: "nn.Module", name: str) -> "Plan":
    """The plan with the layers as the model calls them, other weights said. Raises MismatchError."""
    from ...simulation.match import match

    fit = match(plan, model, weights=True, rewrapped=True)
    fitting = fit.require(name)
    say_notes(fit, loaded_from=name)
    return fitting


@contextmanager
def _kept(output: Path | None) -> "Iterator[Store | None]":
    """The store beside the output, which an interrupted run goes on from."""
    from ..measuring import kept_beside

    with kept_beside(output) as store:
        yield store
