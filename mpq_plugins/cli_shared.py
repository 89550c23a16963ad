"""What several commands share: the options that describe a measurement, and how results are printed."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import click

from .common.files import claimed
from .report.progress import echo, echo_lines, say

Command = TypeVar("Command", bound=Callable[..., Any])

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


model_option = click.option(
    "--model", "model_factory", metavar="MODULE:FACTORY",
    help="The checkpoint's model: it says what of the file are layers, where the plan does not.",
)  # fmt: skip
weights_option = click.option(
    "--weights", metavar="KEY",
    help="Of a torch checkpoint with several sets of weights, the one that is meant: state_dict_ema, or ema.model.",
)  # fmt: skip


def scheme_options(command: Command) -> Command:
    """The options that say what is measured, and under which scheme."""
    for option in reversed(
        (
            click.option(
                "--scheme",
                "scheme_name",
                help="affine, piecewise (two regions), codebook (shared weights); default: the allocator's, or affine.",
            ),
            click.option(
                "--granularity", help="per_tensor (default: the allocator's, or this), per_channel or per_group."
            ),
            click.option("--group-size", type=int, help="Weights per group along the input axis; implies per_group."),
            click.option("--symmetric/--asymmetric", default=None, help="Zero point at zero, or not (default)."),
            click.option(
                "--range", "range_name", help="minmax (default), or mse: the clipping of least squared error."
            ),
            click.option(
                "--breakpoint",
                "breakpoint_rule",
                help="Of two regions: search (default), gaussian, laplacian, gaussian_root or laplacian_root.",
            ),
            click.option("--storage", help="Of two regions: region_bit (default, b + 1 bits a weight) or shared (b)."),
            click.option("--init", help="Of a codebook: linear (default), optimal, density or forgy."),
            click.option(
                "--skip",
                multiple=True,
                metavar="GLOB",
                help="Leave these layers alone; repeatable. A glob, re:REGEX, or in language models role:embeddings, "
                "role:lm_head or role:routers.",
            ),
            click.option(
                "--only",
                multiple=True,
                metavar="GLOB",
                help="Take only these layers; repeatable. Also those that checkpoints' plans leave alone: role:lora, "
                "role:fragile.",
            ),
            weights_option,
            click.option(
                "--already-quantized",
                is_flag=True,
                default=None,
                help="Of a checkpoint whose layers are packed already, plan what is left in floating point.",
            ),
            click.option(
                "--fold-bn",
                type=click.Choice(["auto", "yes", "no"]),
                help="Measure conv weights with BatchNorm folded in; auto: a module's, per tensor.",
            ),
        )
    ):
        command = option(command)
    return command


SCHEME_NAMES = (
    "scheme_name", "symmetric", "granularity", "group_size", "range_name", "breakpoint_rule", "storage", "init",
    "skip", "only", "fold_bn", "weights", "already_quantized",
)  # fmt: skip


def claim(*outputs: Path | None) -> None:
    """Hold the files that a command writes until it ends. Raises SettingError where another run holds one."""
    context = click.get_current_context()
    for output in outputs:
        if output is not None:
            context.with_resource(claimed(output))
            context.ensure_object(list).append(output)


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


def say_written(file: Path | None, what: str) -> None:
    """Where the result is, or how to keep it."""
    echo(f"wrote {file}" if file else f"not saved; -o FILE writes the {what}")


def say_left_alone(table: Any) -> None:
    """What the plan does not cover, and which weights it was made from where a file holds others, on stderr."""
    from .common.text import first_few
    from .weights.roles import PREFIX

    if table.weights is not None:
        say(f"weights: those under {table.weights!r}")
    by_default = {name for name, reason in table.left_alone if reason.startswith(PREFIX)}
    asked = len(table.skipped) - len(by_default)
    if asked:
        say(f"skipped on request: {asked} layers")
    reasons = dict.fromkeys(reason for _, reason in table.left_alone)
    for reason in reasons:
        names = [name for name, own in table.left_alone if own == reason]
        head = "left alone by default" if reason.startswith(PREFIX) else "left alone, no quantizable layer"
        say(f"{head}: {first_few(names, ', ')} ({reason})")
