"""`mpq sweep`: one measurement, a grid of an allocator's parameters, one row per plan."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import ALLOCATOR_KEY, AllocatorCommand, allocators_from
from .cli_shared import SCHEME_NAMES, json_option, print_json, say_left_alone, say_written, scheme_options, silenced
from .errors import SettingError

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from .allocate.base import Allocator, Needs
    from .cli_sources import Request
    from .journal import Journal
    from .plan import Plan
    from .sweep import SweepRow
    from .table import LayerTable

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
    from .cli_sources import Request, measured, named_function, resolve_source
    from .report.progress import progress_bar
    from .sweep import sweep as run
    from .table import is_table

    files = _files(source, output, plot, cache)
    request = Request(**{name: options.pop(name) for name in SCHEME_NAMES})
    allocators = allocators_from(ctx, options, scheme=None, grid=getattr(ctx.meta[ALLOCATOR_KEY], "grid", {}))
    evaluate = named_function(evaluation) if evaluation is not None else None
    if evaluate is not None and as_json:
        evaluate = silenced(evaluate)
    given = source if is_table(Path(source)) else resolve_source(source)
    model = _model_to_evaluate(given, evaluation, model_factory)
    needs = _needs(allocators, request, uniform, measure=not isinstance(given, str))
    with _resumable(files, model, evaluation, evaluate) as journal:
        table = measured(given, needs, request, files.measurement if not isinstance(given, str) else cache)
        plans = [allocator(table) for allocator in allocators]
        plans += _uniform_beside(plans, table) if uniform else []
        if model is not None:
            _check_fit(plans[0], model, model_factory or source)
        with progress_bar("sweeping") as progress:
            rows = run(table, _distinct(plans), model, evaluate, journal=journal, progress=progress)
        _write(rows, files, title := f"{source}, {table.scheme}")
    _print(rows, table, title, as_json, output, plot)


def _files(source: str, output: Path | None, plot: Path | None, cache: Path | None) -> "_Files":
    """Refuse, before the work, what could not be written after it or would be written over something else."""
    from .cli_sources import check_output
    from .files import exists
    from .report.plots import check_plot

    files = _Files.beside(output, plot, cache)
    check_plot(files.plot)
    taken: list[str | Path | None] = [source]
    for path in (files.measurement, files.output, files.plot, files.journal):
        check_output(path, *taken)
        if path is not None and exists(path) and not path.is_file():
            raise SettingError(f"{path}: is no file; name another output")
        taken.append(path)
    return files


@dataclass(frozen=True)
class _Files:
    """Where things go, as absolute paths: an evaluation may change directory.

    measurement is the table the user named, or one beside the output that lives as long as the journal.
    """

    output: Path | None
    plot: Path | None
    measurement: Path | None
    journal: Path | None
    temporary_measurement: bool

    @classmethod
    def beside(cls, output: Path | None, plot: Path | None, cache: Path | None) -> "_Files":
        output, plot, cache = (path.absolute() if path is not None else None for path in (output, plot, cache))
        if output is None:
            return cls(None, plot, cache, None, False)
        measurement = cache or output.with_name(f"{output.name}.partial.mpqt")
        return cls(output, plot, measurement, output.with_name(f"{output.name}.partial"), cache is None)


def _write(rows: "Sequence[SweepRow]", files: _Files, title: str) -> None:
    from .report.plots import sweep_plot
    from .report.sweep import sweep_csv

    if files.output is not None:
        sweep_csv(rows, files.output)
    if files.plot is not None:
        sweep_plot(rows, files.plot, title)


def _print(
    rows: "Sequence[SweepRow]", table: "LayerTable", title: str, as_json: bool, output: Path | None, plot: Path | None
) -> None:
    from .report.sweep import sweep_json, sweep_notes, sweep_table
    from .report.tables import console

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


def _needs(allocators: "Sequence[Allocator]", request: "Request", uniform: bool, measure: bool) -> "Needs":
    """What the allocators need; of a measurement also errors of uniform plans and, where channels have scales of
    their own, what parts will cost.
    """
    from .cli_plans import joint_needs

    needs = joint_needs(allocators)
    if not measure:
        return needs
    bits = sorted({*needs.bits, *(UNIFORM_BITS if uniform else ())})
    granular = request.scheme(needs.scheme).granularity != "per_tensor"
    return replace(needs, bits=tuple(bits), channel_errors=needs.channel_errors or granular)


def _uniform_beside(plans: "Sequence[Plan]", table: "LayerTable") -> "list[Plan]":
    """Uniform plans from just below the smallest plan to just above the largest."""
    from .allocate.uniform import Uniform

    averages = [plan.size().average_bits for plan in plans]
    uniform = [Uniform(bits=b)(table) for b in UNIFORM_BITS if b in table.bits]
    return [plan for plan in uniform if min(averages) - 1 < plan.size().average_bits < max(averages) + 1]


def _distinct(plans: "Sequence[Plan]") -> "list[Plan]":
    """The same plan by the same allocator is one row."""
    return list({plan.to_json(): plan for plan in plans}.values())


def _check_fit(plan: "Plan", model: "nn.Module", where: str) -> None:
    """Refuse another model before the first evaluation, and say where its weights are not those measured."""
    from .match import match
    from .report.progress import say

    found = match(plan, model, weights=True)
    found.require(where)
    for note in found.notes:
        say(f"note: {where}: {note}")


@contextmanager
def _resumable(
    files: _Files, model: "nn.Module | None", evaluation: str | None, evaluate: Callable[..., Any] | None
) -> "Iterator[Journal | None]":
    """Give the journal of a sweep with evaluations and an output; what takes no time needs none.

    Interrupted, rows and measurement stay for the next run, if there are rows; otherwise nothing stays behind.
    """
    from .fingerprint import model_digest, source_digest
    from .journal import Journal
    from .report.progress import say
    from .table import is_table

    journal = None
    if files.journal is not None and model is not None:
        job = {"evaluation": str(evaluation), "source": source_digest(evaluate), "model": model_digest(model)}
        journal = Journal(files.journal, job)
        if journal.rows:
            say(f"going on: rows already in {journal.path}: {len(journal.rows)}")
    elif model is not None:
        say("note: without -o an interrupted sweep starts over")
    finished = False
    try:
        yield journal
        finished = True
    finally:
        if journal is not None and journal.rows and not finished:
            say(f"rows finished and kept: {len(journal.rows)}, in {journal.path}; the same command goes on there")
        else:
            if journal is not None:
                journal.path.unlink(missing_ok=True)
            if files.temporary_measurement and files.measurement is not None and is_table(files.measurement):
                files.measurement.unlink()
