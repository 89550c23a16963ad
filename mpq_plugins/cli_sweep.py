"""`mpq sweep`: one measurement, a grid of an allocator's parameters, one row per plan."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .allocate.base import Allocator, Needs
from .allocate.uniform import Uniform
from .cli_options import ALLOCATOR_KEY, AllocatorCommand, allocators_from
from .cli_shared import SCHEME_NAMES, json_option, print_json, say_left_alone, say_written, scheme_options
from .errors import SettingError
from .plan import Plan
from .scheme import Scheme
from .table import LayerTable

if TYPE_CHECKING:
    from torch import nn

    from .journal import Journal

UNIFORM_BITS = range(2, 9)


@click.command(
    cls=AllocatorCommand,
    epilog="Examples: mpq sweep net.safetensors --qem 1.5:4:0.5 -o sweep.csv. mpq sweep package.module:factory -a "
    "ptilmpq --alpha 0.1:0.9:0.1 --beta-important 0.3,0.5 --eval package.module:accuracy -o sweep.csv --plot sweep.png",
)
@click.argument("source")
@click.option("-a", "--allocator", default="mixquant", show_default=True, help="`mpq plugins` lists them.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV to write; an interrupted sweep resumes.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg or .pdf.")
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION",
    help="Called with each quantized model; returns a score, larger is better, or a mapping of names to numbers.",
)  # fmt: skip
@click.option(
    "--model", "model_factory", metavar="MODULE:FACTORY", help="The model to evaluate, where SOURCE is not itself one."
)
@click.option("--uniform/--no-uniform", default=True, help="Uniform plans of about the same sizes too (default).")
@click.option("--table", "cache", type=click.Path(path_type=Path), help="Keep the measurement here, and reuse it.")
@scheme_options
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    /,
    source: str,
    allocator: str,
    output: Path | None,
    plot: Path | None,
    evaluation: str | None,
    model_factory: str | None,
    uniform: bool,
    cache: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan SOURCE with an allocator over a grid of its parameters: sizes, errors, scores, and which are worth having.

    Give an option several values (1,2,3 or first:last:step, or repeat it) and every combination is a row; without
    any, the allocator's own grid is swept. Rows that no other row beats in both size and score are marked.
    """
    from .cli_plans import joint_needs
    from .cli_sources import Request, check_output, measured, named_function, resolve_source
    from .report.plots import check_plot, sweep_plot
    from .report.progress import progress_bar
    from .report.sweep import sweep_csv, sweep_json, sweep_notes, sweep_table
    from .report.tables import console
    from .sweep import sweep as run
    from .table import is_table

    for target, others in ((output, (source, cache)), (plot, (source, cache, output)), (cache, (source,))):
        check_output(target, *others)
    check_plot(plot)
    request = Request(**{name: options.pop(name) for name in SCHEME_NAMES})
    allocators = allocators_from(ctx, options, scheme=None, grid=getattr(ctx.meta[ALLOCATOR_KEY], "grid", {}))
    evaluate = named_function(evaluation) if evaluation is not None else None
    given = source if is_table(Path(source)) else resolve_source(source)
    model = _model_to_evaluate(given, evaluation, model_factory)
    needs = joint_needs(allocators)
    if not isinstance(given, str):
        needs = _more_needs(needs, request.scheme(needs.scheme), uniform)
    kept = _kept_measurement(output, cache, given)
    table = measured(given, needs, request, kept)
    swept = [*allocators, *(_uniform_beside(allocators, table) if uniform else ())]
    title = f"{source}, {table.scheme}"
    job = {"evaluation": evaluation, "model": model_factory or source} if evaluation else None
    with _resumable(output, table, job, kept if kept != cache else None) as journal:
        if model is not None:
            _check_fit(swept[0](table), model, model_factory or source)
        with progress_bar("sweeping") as progress:
            rows = run(table, list(dict.fromkeys(swept)), model, evaluate, journal=journal, progress=progress)
        if output is not None:
            sweep_csv(rows, output)
        if plot is not None:
            sweep_plot(rows, plot, title)
    if as_json:
        print_json(sweep_json(rows, table))
        return
    console().print(sweep_table(rows, title))
    for note in sweep_notes(rows):
        click.echo(note)
    say_written(output, "rows as CSV")
    if plot is not None:
        click.echo(f"wrote {plot}")
    say_left_alone(table)


def _model_to_evaluate(
    given: "str | Path | nn.Module", evaluation: str | None, factory: str | None
) -> "nn.Module | None":
    from .cli_sources import make_module

    if evaluation is None:
        if factory is not None:
            raise SettingError("model: is only used with --eval package.module:function; leave it out, or add that")
        return None
    if factory is not None:
        return make_module(factory)
    if isinstance(given, str | Path):
        raise SettingError(
            f"eval: {given} is a file, and only a module can be evaluated; name its model with --model "
            "package.module:factory"
        )
    return given


def _more_needs(needs: Needs, scheme: Scheme, uniform: bool) -> Needs:
    """Errors of uniform plans too, and, where channels have scales of their own, what parts will cost."""
    bits = sorted({*needs.bits, *(UNIFORM_BITS if uniform else ())})
    return replace(needs, bits=tuple(bits), channel_errors=scheme.granularity != "per_tensor")


def _kept_measurement(output: Path | None, cache: Path | None, given: object) -> Path | None:
    """Where the measurement outlives an interruption: where it was asked for, else beside the output."""
    if cache is not None or output is None or isinstance(given, str):
        return cache
    return output.with_name(f"{output.name}.partial.mpqt")


def _uniform_beside(allocators: Sequence[Allocator], table: LayerTable) -> list[Uniform]:
    """Uniform plans from just below the smallest swept plan to just above the largest."""
    averages = [allocator(table).size().average_bits for allocator in allocators]
    plans = [Uniform(bits=b) for b in UNIFORM_BITS if b in table.bits]
    return [u for u in plans if min(averages) - 1 < u(table).size().average_bits < max(averages) + 1]


def _check_fit(plan: Plan, model: "nn.Module", where: str) -> None:
    """Refuse another model before the first evaluation, and say where its weights are not those measured."""
    from .match import match
    from .report.progress import say

    found = match(plan, model, weights=True)
    found.require(where)
    for note in found.notes:
        say(f"note: {where}: {note}")


@contextmanager
def _resumable(
    output: Path | None, table: LayerTable, job: dict[str, str] | None, measurement: Path | None
) -> "Iterator[Journal | None]":
    """Give the journal of a sweep with evaluations and an output; what takes no time needs none.

    Interrupted, rows and `measurement` stay for the next run, if there are rows; otherwise nothing stays behind.
    """
    from .journal import Journal
    from .report.progress import say

    journal = None
    if output is not None and job is not None:
        path = output.with_name(f"{output.name}.partial")
        journal = Journal(path, {"weights": table.fingerprint, "scheme": str(table.scheme), **job})
        if journal.stale:
            say(f"starting anew: {path} is of another sweep")
        elif journal.rows:
            say(f"going on: {len(journal.rows)} rows are in {path} already")
    finished = False
    try:
        yield journal
        finished = True
    finally:
        if journal is not None and journal.rows and not finished:
            say(f"{len(journal.rows)} finished rows are kept in {journal.path}; the same command goes on there")
        else:
            for left in (journal.path if journal is not None else None, measurement):
                if left is not None:
                    left.unlink(missing_ok=True)
