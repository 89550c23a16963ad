"""What several commands share: where they write, and how results are printed."""

import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.files import claimed, exists, source_files
from ..errors import SettingError, SourceError
from ..report.progress import echo, echo_lines, say
from .functions import function_file
from .help import FORCE_KEY
from .verbosity import verbose
from .written import Kind, check_replaceable

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ..plans.plan import Plan
    from ..plans.table import LayerTable
    from ..plans.type_table import TypeTable
    from ..report.console import PlainConsole
    from ..simulation.match import Match

BAD_INPUT = 2
INTERNAL = 70  # as sysexits.h has it
RESULT_KEY = "mpq_plugins.result"


def _keep_stdout(context: click.Context, _: click.Parameter, as_json: bool) -> bool:
    """Whatever else is printed, by a model's forward or an evaluation, goes to stderr: stdout is one document's."""
    if as_json:
        context.meta[RESULT_KEY] = sys.stdout
        context.with_resource(redirect_stdout(sys.stderr))
    return as_json


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_keep_stdout, help="Print the result as JSON, and nothing else."
)


plot_option = click.option("--plot", type=click.Path(path_type=Path), help="Picture to write: .png, .svg or .pdf.")
model_option = click.option(
    "--model", "model_factory", metavar="MODULE:FACTORY",
    help="The checkpoint's model: it says what of the file are layers, where the plan does not.",
)  # fmt: skip
run_model_option = click.option(
    "--model", "model_factory", metavar="MODULE:FACTORY",
    help="The model to run, where a file is given.",
)  # fmt: skip
weights_option = click.option(
    "--weights", metavar="KEY",
    help="Which set of weights of a checkpoint: state_dict_ema, ema.model.",
)  # fmt: skip


judge_option = click.option(
    "--judge", metavar="NAME",
    help="What plans are compared on, as kl*mse (default: as the guard).",
)  # fmt: skip


def claim(output: Path | None, writes: Kind) -> None:
    """Hold a file that a command writes until it ends. writes: what kind it will be.

    Raises SettingError where another run holds it, and where it is somebody else's or another kind and --force is not
    given.
    """
    if output is not None:
        context = click.get_current_context()
        check_ours(output, writes)
        context.with_resource(claimed(output))
        context.ensure_object(list).append(output)


def check_ours(output: Path | None, writes: Kind) -> None:
    """Refuse, without --force, to write over what is not known to be such a file of ours. Raises SettingError."""
    if output is not None and not click.get_current_context().meta.get(FORCE_KEY):
        check_replaceable(output, writes)


def print_json(document: Any) -> None:
    """One JSON document on stdout, in ASCII: the same bytes in every locale, and nothing a terminal would obey."""
    with redirect_stdout(click.get_current_context().meta[RESULT_KEY]):
        echo_lines(json.dumps(_finite(document), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is the signal-to-noise ratio of an exact layer: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_head(out: "PlainConsole", plan: "Plan") -> None:
    """What a plan is, and its quantizer, a line each; with --verbose the parameters and what was found, too."""
    from ..report.details import plan_details, quantizer_line
    from ..report.tables import plan_head

    out.sentence(plan_head(plan))
    out.sentence(quantizer_line(plan))
    for line in plan_details(plan) if verbose() else []:
        out.sentence(line)


def print_table(table: "LayerTable | TypeTable") -> None:
    """The errors of a measurement, and what its inputs cost; with --verbose what else was measured, too."""
    from ..plans.type_table import TypeTable
    from ..report.console import console
    from ..report.details import table_details
    from ..report.inputs import inputs_line, inputs_table
    from ..report.tables import measurement_table
    from ..report.types import types_table

    out = console()
    if isinstance(table, TypeTable):
        out.print(types_table(table))
        return
    out.print(measurement_table(table))
    if table.activations is not None:
        out.print(inputs_table(table))
        out.sentence(inputs_line(table))
    for line in table_details(table) if verbose() else []:
        out.sentence(line)


def say_notes(fit: "Match", *, loaded_from: Path | str) -> None:
    """What a careful user wants to know of a plan that fits: that its weights were others, say."""
    for note in fit.notes:
        say(f"note: {loaded_from}: {note}")


def say_written(file: Path | None, what: str) -> None:
    """Where the result is, or how to keep it."""
    echo(f"wrote {file}" if file else f"not saved; -o FILE writes the {what}")


def say_left_alone(table: Any) -> None:
    """What the plan does not cover, and which weights it was made from where a file holds others, on stderr."""
    from ..common.text import first_few
    from ..weights.roles import PREFIX

    if table.weights is not None:
        say(f"weights: those under {table.weights!r}")
    by_default = {name for name, reason in table.left_alone if reason.startswith(PREFIX)}
    asked = len(table.skipped) - len(by_default)
    if asked:
        say(f"skipped on request: {asked} layer{'s' * (asked != 1)}")
    reasons = dict.fromkeys(reason for _, reason in table.left_alone)
    for reason in reasons:
        names = [name for name, given in table.left_alone if given == reason]
        head = "left alone by default" if reason.startswith(PREFIX) else "left alone, no quantizable layer"
        say(f"{head}: {first_few(names, ', ')} ({reason})")


def check_output(output: Path | None, *inputs: str | Path | None) -> None:
    """Refuse to write a result over what it is made from or another result of the same run, or where it cannot be.

    inputs: files, directories of weights and what lies in them, and `package.module:function` in a file here. A text
    that is none of these, such as an option's other values, protects nothing.
    """
    if output is None:
        return
    if not output.absolute().parent.is_dir():  # found now, and not after the work
        raise SourceError(f"{output}: there is no folder {output.parent}. Make it, or choose another path.")
    for given in inputs:
        if given is None:
            continue
        if output.absolute() == Path(given).absolute() or _same(output, Path(given)):
            raise SettingError(f"output: {output} is the source itself, or another result; name another file")
        if any(_same(output, path) for path in _files_of(given)):
            raise SettingError(f"output: {output} is part of {given}, which is read; name another file")


def _files_of(given: str | Path) -> list[Path]:
    """What is read where this is given."""
    file = function_file(given) if isinstance(given, str) else None
    return [file] if file is not None else source_files(Path(given))


def _same(output: Path, path: Path) -> bool:
    """Whether both are one file, under whatever names."""
    return exists(output) and exists(path) and output.samefile(path)
