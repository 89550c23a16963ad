"""What `mpq sweep` and `mpq pareto` share: where files go, the model to evaluate, resuming, and how rows are shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SettingError
from ..report.progress import echo, say
from .output import claim, print_json, say_left_alone, say_written
from .scheme_options import Command

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ..common.journal import Journal
    from ..evaluation.sweep import SweepRow
    from ..plans.plan import Plan
    from ..plans.table import LayerTable


def run_options(command: Command) -> Command:
    """The options of a command that makes many plans and may evaluate them."""
    for option in reversed(
        (
            click.option(
                "-o", "--output", type=click.Path(path_type=Path), help="CSV to write; an interrupted run resumes."
            ),
            click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg or .pdf."),
            click.option(
                "--eval",
                "evaluation",
                metavar="MODULE:FUNCTION",
                help="Called with each quantized model; returns a score, larger is better, or names and numbers.",
            ),
            click.option(
                "--model",
                "model_factory",
                metavar="MODULE:FACTORY",
                help="The model to evaluate, where SOURCE is not itself one.",
            ),
            click.option(
                "--table", "cache", type=click.Path(path_type=Path), help="Keep the measurement here, and reuse it."
            ),
        )
    ):
        command = option(command)
    return command


def run_files(
    source: str, output: Path | None, plot: Path | None, cache: Path | None, *inputs: str | None
) -> "RunFiles":
    """Refuse, before the work, what could not be written after it or would be written over something else.

    inputs: what the run reads beside its source.
    """
    from ..common.files import exists
    from ..report.plots import check_plot
    from .output import check_output

    for path in (output, plot, cache):
        if path is not None and exists(path) and path.is_dir():  # some, such as / and ., have not even a name
            raise SettingError(f"{path}: is no file; name another output")
    files = RunFiles.beside(output, plot, cache)
    check_plot(files.plot)
    taken: list[str | Path | None] = [source, *inputs]
    for path in (files.measurement, files.output, files.plot, files.journal):
        check_output(path, *taken)
        if path is not None and exists(path) and not path.is_file():
            raise SettingError(f"{path}: is no file; name another output")
        taken.append(path)
    claim(files.output, files.plot)
    return files


@dataclass(frozen=True)
class RunFiles:
    """Where things go, as absolute paths: an evaluation may change directory.

    measurement is the table the user named, or one beside the output that lives as long as the journal.
    """

    output: Path | None
    plot: Path | None
    measurement: Path | None
    journal: Path | None
    temporary_measurement: bool

    @classmethod
    def beside(cls, output: Path | None, plot: Path | None, cache: Path | None) -> "RunFiles":
        """The journal, and a measurement of its own, beside the output."""
        output, plot, cache = (path.absolute() if path is not None else None for path in (output, plot, cache))
        if output is None:
            return cls(None, plot, cache, None, False)
        measurement = cache or output.with_name(f"{output.name}.partial.mpqt")
        return cls(output, plot, measurement, output.with_name(f"{output.name}.partial"), cache is None)


def write_rows(rows: "Sequence[SweepRow]", files: RunFiles, title: str) -> None:
    """The CSV and the picture, where they were asked for."""
    from ..report.plots import sweep_plot
    from ..report.sweep import sweep_csv

    if files.output is not None:
        sweep_csv(rows, files.output)
    if files.plot is not None:
        sweep_plot(rows, files.plot, title)


def print_rows(
    rows: "Sequence[SweepRow]", table: "LayerTable", title: str, as_json: bool, output: Path | None, plot: Path | None
) -> None:
    """On stdout: a table with its notes, or JSON."""
    from ..report.console import console
    from ..report.sweep import sweep_json, sweep_notes, sweep_table

    if as_json:
        print_json(sweep_json(rows, table))
        return
    console().print(sweep_table(rows, title))
    for note in sweep_notes(rows):
        echo(note)
    say_written(output, "rows as CSV")
    if plot is not None:
        echo(f"wrote {plot}")
    say_left_alone(table)


def model_to_evaluate(
    given: "str | Path | nn.Module", evaluation: str | None, factory: str | None
) -> "nn.Module | None":
    """The module that --eval scores; None without --eval. Raises SettingError where there is none to score."""
    from .sources import make_module

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


def check_fit(plan: "Plan", model: "nn.Module", where: str) -> None:
    """Refuse another model before the first evaluation, and say where its weights are not those measured."""
    from ..simulation.match import match

    found = match(plan, model, weights=True)
    found.require(where)
    for note in found.notes:
        say(f"note: {where}: {note}")


@contextmanager
def resumable(
    files: RunFiles, model: "nn.Module | None", evaluation: str | None, evaluate: Callable[..., Any] | None
) -> "Iterator[Journal | None]":
    """Give the journal of a sweep with evaluations and an output; what takes no time needs none.

    Interrupted, rows and measurement stay for the next run, if there are rows; otherwise nothing stays behind.
    """
    from ..common.journal import Journal
    from ..models.fingerprint import model_digest, source_digest
    from ..plans.table_file import is_table

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
