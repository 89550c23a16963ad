"""`mpq`: the only place where words become objects, results are printed and the process exits."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TextIO

import click

from ..common.interrupts import Interrupted, Interrupts
from ..common.terminal import lasting_streams
from ..common.text import printable_lines, what_it_said
from ..errors import MeasureWarning, MPQError, PlanWarning, RoundingWarning, SourceError
from ..report.progress import alert, echo_lines
from .commands.apply import apply
from .commands.check import check
from .commands.compress import compress
from .commands.decompress import decompress
from .commands.demo import demo
from .commands.diff import diff
from .commands.evaluate import evaluate
from .commands.explore import explore
from .commands.export import export
from .commands.import_ import import_
from .commands.inspect import inspect
from .commands.measure import measure
from .commands.pareto import pareto
from .commands.plan import plan
from .commands.plugins import plugins
from .commands.reconstruct import reconstruct
from .commands.report import report
from .commands.show import show
from .commands.sweep import sweep
from .commands.tune import tune
from .defaults import KEY, read_defaults
from .help import SectionGroup
from .output import BAD_INPUT, INTERNAL

COMPLETING = "_MPQ_COMPLETE"  # what a shell sets that asks for candidates


def main() -> None:
    """Run `mpq`: exit 0, 2 with one line on stderr for anything refused, or 130 when interrupted.

    What stdout and stderr can take changes neither files nor the exit, but for one case: a result that was to be
    printed, and went into no file, is lost on a full disk; that is an error. A reader that leaves, as `| head` does,
    and a closed stdout have asked for no more.
    """
    warnings.simplefilter("ignore", PlanWarning)  # the commands say it in their own way
    warnings.showwarning = _say_warning
    interrupts = Interrupts()
    files: list[Path] = []
    with lasting_streams() as (out, _):
        try:
            with interrupts.raised():
                code = _run(files)
                out.flush()
        except (KeyboardInterrupt, click.Abort):
            code = _say_interrupted(interrupts.seen or Interrupted())
        except Interrupted as stop:
            code = _say_interrupted(stop)
        else:
            if interrupts.seen is not None:  # by what swallowed it
                code = _say_interrupted(interrupts.seen)
        if isinstance(out.failure, OSError) and not isinstance(out.failure, BrokenPipeError) and not code:
            code = _lost(out.failure, files)
    sys.exit(code)


def _run(files: list[Path]) -> int:
    """The exit code of the command line; `files` gets what it claims to write."""
    try:
        return int(cli.main(standalone_mode=False, obj=files) or 0)
    except MPQError as error:
        return _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        echo_lines(error.format_message())
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, Interrupted, click.Abort):
        raise
    except MemoryError as error:
        return _fail(f"not enough memory ({error or 'MemoryError'}); free some, or give less at once")
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001  # the last net: a fault of ours is one line too
        return _internal(error)
    except BaseException as stop:  # noqa: BLE001
        if COMPLETING in os.environ and isinstance(stop, SystemExit):  # as click leaves once it has printed candidates
            return int(stop.code or 0)
        return _fail(f"code that was called ended the program ({what_it_said(stop)}); it should return instead")


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own in the commands' voice, others' as Python does."""
    if issubclass(category, MeasureWarning | RoundingWarning):
        alert(f"warning: {message}")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(printable_lines(text))


def _fail(message: str) -> int:
    alert(f"error: {' '.join(message.split())}")
    return BAD_INPUT


def _internal(error: Exception) -> int:
    if os.environ.get("MPQ_DEBUG"):
        sys.stderr.write(f"{printable_lines(''.join(traceback.format_exception(error)))}\n")
    alert(f"internal error: {what_it_said(error)}; please report this. MPQ_DEBUG=1 shows where it was")
    return INTERNAL


def _say_interrupted(stop: Interrupted) -> int:
    alert(str(stop))
    return stop.code


def _lost(failure: OSError, files: list[Path]) -> int:
    """What could not be printed is an error where it is nowhere else."""
    if files:
        alert(f"warning: stdout cannot be written ({failure.strerror}); {', '.join(map(str, files))} is whole")
        return 0
    return _fail(f"stdout cannot be written ({failure.strerror}); what was to be printed is lost")


@click.group(
    cls=SectionGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A first run: mpq demo. On your own model: mpq plan mine.py:net --average-bits 3 -o plan.json",
)
@click.version_option(package_name="mpq-plugins")
def cli() -> None:
    """Decide how many bits each layer of a neural network deserves.

    SOURCE is a .safetensors file, a directory of weights, a torch checkpoint, or a function that returns a torch
    module: mine.py:net, or package.module:net.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise SourceError(f"the working directory cannot be found ({error.strerror}); change to another") from error
    ctx = click.get_current_context()
    defaults = ctx.meta[KEY] = read_defaults(Path.cwd(), cli.commands)
    if defaults.path is not None:
        from .known_options import check_known

        check_known(defaults, cli.commands)


for command in (
    measure, import_, plan, show, diff, check, apply, export, reconstruct, compress, decompress, inspect, sweep, pareto,
    evaluate, tune, report, explore, plugins, demo,
):  # fmt: skip
    cli.add_command(command)
