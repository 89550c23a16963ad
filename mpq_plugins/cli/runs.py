"""What `mpq sweep` and `mpq pareto` share: where files go, the model to evaluate, resuming, and how rows are shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SettingError
from ..reconstruction.rounding import Rounding
from ..report.progress import echo, say
from .fitting import Fitting, fitting_options
from .output import claim, judge_option, plot_option, print_json, run_model_option, say_left_alone, say_written
from .scheme_options import Command
from .sources import Source, source_name
from .verbosity import verbose
from .workers import worker_options

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ..common.store import Store
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
            plot_option,
            click.option(
                "--eval",
                "evaluation",
                metavar="MODULE:FUNCTION",
                help="Gives each model's score (larger is better), or names and numbers.",
            ),
            run_model_option,
            fitting_options,
            judge_option,
            worker_options("evaluate", "1", "Inputs and evaluation"),
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
    for path in (files.measurement, files.output, files.plot, files.store):
        check_output(path, *taken)
        if path is not None and exists(path) and not path.is_file():
            raise SettingError(f"{path}: is no file; name another output")
        taken.append(path)
    claim(files.output, "rows as CSV")
    claim(files.plot, "a picture")
    return files


@dataclass(frozen=True)
class RunFiles:
    """Where things go, as absolute paths: an evaluation may change directory.

    measurement is the table the user named, or one beside the output that lives as long as the store.
    """

    output: Path | None
    plot: Path | None
    measurement: Path | None
    store: Path | None
    temporary_measurement: bool

    @classmethod
    def beside(cls, output: Path | None, plot: Path | None, cache: Path | None) -> "RunFiles":
        """The store, and a measurement of its own, beside the output. Raises SettingError as Store.beside."""
        from ..common.store import Store

        output, plot, cache = (path.absolute() if path is not None else None for path in (output, plot, cache))
        if output is None:
            return cls(None, plot, cache, None, False)
        measurement = cache or output.with_name(f"{output.name}.partial.mpqt")
        return cls(output, plot, measurement, Store.beside(output).path, cache is None)


def write_rows(rows: "Sequence[SweepRow]", files: RunFiles, title: str) -> None:
    """The CSV and the picture, where they were asked for."""
    from ..report.sweep import sweep_csv
    from ..report.sweep_plot import sweep_plot

    if files.output is not None:
        sweep_csv(rows, files.output)
    if files.plot is not None:
        sweep_plot(rows, files.plot, title)


def run_title(source: str, table: "LayerTable", more: str = "") -> str:
    """`resnet20: affine, per channel, clipped`: what was planned, and the quantizer in words."""
    from ..report.details import scheme_words

    return f"{source_name(source)}: {scheme_words(table.scheme)}{more}"


def print_rows(
    rows: "Sequence[SweepRow]", table: "LayerTable", title: str, as_json: bool, output: Path | None, plot: Path | None
) -> None:
    """On stdout: a table with its notes, or JSON."""
    from ..report.console import console
    from ..report.details import sweep_details
    from ..report.sweep import sweep_json, sweep_notes, sweep_table

    if as_json:
        print_json(sweep_json(rows, table))
        return
    out = console()
    out.print(sweep_table(rows, title))
    for note in [*sweep_notes(rows), *(sweep_details(rows) if verbose() else [])]:
        out.sentence(note)
    say_written(output, "rows as CSV")
    if plot is not None:
        echo(f"wrote {plot}")
    say_left_alone(table)


def model_to_evaluate(given: Source, evaluation: str | None, factory: str | None) -> "nn.Module | None":
    """The module that --eval scores; None without --eval. Raises SettingError where there is none to score."""
    from .sources import make_module

    if evaluation is None:
        if factory is not None:
            raise SettingError("model: is only used with --eval package.module:function; leave it out, or add that")
        return None
    if factory is not None:
        return make_module(factory)
    if given.module is None:
        raise SettingError(
            f"eval: {given.text} is a file, and only a module can be evaluated; name its model with --model "
            "package.module:factory"
        )
    return given.module


def batches_to_fit_on(fitting: Fitting, model: "nn.Module | None") -> "list[Any] | None":
    """The batches that every quantized model is fitted to. Raises SettingError where nothing is evaluated."""
    if model is not None:
        return fitting.batches(model)
    if fitting.calibrated or fitting.asked is not None:
        option = "rounding" if fitting.asked else "synthetic" if fitting.synthetic else "calibrate"
        raise SettingError(f"{option}: is for models that are evaluated; add --eval package.module:function")
    return None


def check_workers(model: "nn.Module | None", workers: int | None, dask: str | None) -> None:
    """Raise SettingError for workers where nothing is evaluated."""
    if model is None and (workers is not None or dask is not None):
        option = "workers" if workers is not None else "dask"
        raise SettingError(f"{option}: evaluate models; add --eval package.module:function, or leave it out")


def check_fit(plan: "Plan", model: "nn.Module", where: str) -> None:
    """Refuse another model before the first evaluation, and say where its weights are not those measured."""
    from ..simulation.match import match

    fit = match(plan, model, weights=True)
    fit.require(where)
    for note in fit.notes:
        say(f"note: {where}: {note}")


@contextmanager
def resumable(
    files: RunFiles,
    model: "nn.Module | None",
    evaluate: Callable[..., Any] | None,
    calibrate: "Sequence[Any] | None",
    rounding: Rounding,
    written: bool = False,
) -> "Iterator[Store | None]":
    """Give the store of a sweep with evaluations and an output; what takes no time needs none.

    Interrupted, rows and measurement stay for the next run, if there are rows; otherwise nothing stays behind.

    written: whether each model is written to a file too.
    """
    if model is None or files.store is None:
        if model is not None:
            say("note: without -o an interrupted sweep starts over")
        with _measurement_until_the_end(files, None):
            yield None
        return
    from ..common.store import Store
    from ..evaluation.scored import evaluation_facts
    from ..evaluation.sweep import JOB

    with Store(files.store) as store:
        rows = store.job(JOB, evaluation_facts(model, evaluate, calibrate, rounding, written))
        if len(rows):
            say(f"going on: rows already in {store.path}: {len(rows)}")
        with _measurement_until_the_end(files, store):
            yield store


@contextmanager
def _measurement_until_the_end(files: RunFiles, store: "Store | None") -> Iterator[None]:
    """A measurement of the run's own goes with it, unless the run is interrupted and there are rows to go on from."""
    from ..plans.table_file import is_table

    finished = False
    try:
        yield
        finished = True
    finally:
        if store is not None and len(store) and not finished:
            say(f"rows finished and kept: {len(store)}, in {store.path}; the same command goes on there")
        elif files.temporary_measurement and files.measurement is not None and is_table(files.measurement):
            files.measurement.unlink()
