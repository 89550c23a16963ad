"""`mpq compress`: a model in one small file."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ...common.checks import shown
from ...errors import SettingError
from ...report.progress import alert, echo, progress_bar, say
from ..file_budget import file_options
from ..fitting import Fitting, fitting_options
from ..help import SectionCommand
from ..output import claim, json_option, model_option, say_notes, weights_option
from ..types import FileOrFactory
from ..workers import chosen_executor, worker_options
from .inspect import print_container

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from concurrent.futures import Executor

    from torch import nn

    from ...compression.prune import Pruning
    from ...plans.plan import Plan
    from ..sources import Source


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq compress model.safetensors plan.json -o model.mpq. Pruned first: --prune 0.9, or by layer: "
    "--prune 'conv*=0.6' --prune 'fc*=0.9'. Without a plan, 1.25 bits a weight in the file, rounded on inputs: "
    "mpq compress net.py:make -o net.mpq --file-bits 1.25 --calibrate net.py:batches",
)
@click.argument("source", type=FileOrFactory())
@click.argument("plan_file", metavar="[PLAN]", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Container to write (.mpq).")
@file_options
@fitting_options
@worker_options("round", "1", "Rounding on inputs")
@click.option(
    "--prune", "amounts", multiple=True, metavar="[GLOB=]AMOUNT",
    help="First set weights of least magnitude to 0: this share of each layer (0.9), or of those a glob names; "
    "repeatable.",
)  # fmt: skip
@click.option(
    "--prune-by", type=click.Choice(["layer", "network", "deviations"]), default="layer", show_default=True,
    help="What AMOUNT counts: a share of each layer, a share of the whole network, or standard deviations of each "
    "layer, below which weights go.",
)  # fmt: skip
@click.option(
    "--coding", type=click.Choice(["smallest", "packed"]), default="smallest", show_default=True,
    help="packed: no entropy coding, so that sizes are the plan's (of what is not pruned).",
)  # fmt: skip
@model_option
@weights_option
@json_option
def compress(
    source: str,
    plan_file: Path | None,
    output: Path,
    file_bits: float | None,
    file_size: str | None,
    fitting: Fitting,
    workers: int | None,
    dask: str | None,
    model_factory: str | None,
    weights: str | None,
    amounts: tuple[str, ...],
    prune_by: str,
    coding: Any,
    as_json: bool,
) -> None:
    """Write SOURCE as PLAN has it to one file: codes, scales, centroids, all other tensors, and the plan itself.

    Without PLAN, --file-bits or --file-size say what the file may take: layers get steps, and codes are entropy coded.
    """
    from ..output import check_output
    from ..sources import check_order, make_module, resolve_source

    check_output(output, plan_file, source, fitting.calibration)
    if output.suffix != ".mpq":  # another file may be a checkpoint, and would be gone
        raise click.UsageError(f"-o {output}: the result is a container; name a file that ends in .mpq")
    claim(output, "a container")
    _check_asked(plan_file, file_bits, file_size)
    fitting.check_workers(workers, dask)
    pruning = _pruning(amounts, prune_by)
    if plan_file is not None:
        check_order(plan_file, source, "mpq compress SOURCE PLAN")
    from ...compression.write import broken_promise, write  # which leaves it to its caller to say what was left out

    given = resolve_source(source)
    if given.module is not None and (model_factory, weights) != (None, None):
        raise click.UsageError("--model and --weights say what a checkpoint holds, and SOURCE is a module itself")
    model = make_module(model_factory) if model_factory is not None else None
    with chosen_executor(workers, dask) as executor:
        to_write, plan = _prepared(given, plan_file, _Asked(
            file_bits, file_size, fitting, executor, pruning, weights, model, str(model_factory)
        ))  # fmt: skip
    with progress_bar("compressing") as progress:
        container = write(
            to_write, plan, output, prune=pruning, coding=coding, progress=progress, model=model, weights=weights,
            noted=partial(say_notes, loaded_from=plan_file) if plan_file is not None else None,
        )  # fmt: skip
    broken = broken_promise(container)
    if broken is not None:
        alert(f"warning: {broken}")
    if container.header.left_out:
        say(f"left out, no tensors of the model: {', '.join(container.header.left_out)}")
    if plan.quantizes_inputs:
        say(f"note: the plan's activations ({plan.activations_text}) are not in a container; weights only")
    print_container(container, as_json, layers=False)
    if not as_json:
        echo(f"wrote {output}")


def _check_asked(plan_file: Path | None, file_bits: float | None, file_size: str | None) -> None:
    """Refuse a plan and what the file may take at once, and neither."""
    asked = [name for name, value in (("--file-bits", file_bits), ("--file-size", file_size)) if value is not None]
    if (plan_file is None) == (not asked):
        said = f"PLAN and {asked[0]}" if asked else "no PLAN"
        raise click.UsageError(f"{said}: give a plan, or what the file may take: --file-bits 1.5 or --file-size 60kB")


@dataclass(frozen=True)
class _Asked:
    """What decides the weights that are written."""

    file_bits: float | None
    file_size: str | None
    fitting: Fitting
    executor: "Executor | None"
    pruning: "Pruning | None"
    weights: str | None
    model: "nn.Module | None"
    factory: str


def _prepared(given: "Source", plan_file: Path | None, asked: _Asked) -> "tuple[Any, Plan]":
    """What is written, and the plan it is written by. Raises SettingError."""
    from ...plans.plan import Plan
    from ...plans.steps import steps_of
    from ..file_budget import fitted_to_file, inputs, planned_for_file, that_runs

    if asked.pruning is not None and (plan_file is None or asked.fitting.calibrated):
        raise SettingError(
            "prune: weights that are fitted to a file or to inputs move again; prune the model first (mpq_plugins."
            "prune), whose zeros stay"
        )
    given = that_runs(given, asked.fitting, asked.model, asked.factory, asked.weights)
    if given.module is not None:
        asked = replace(asked, weights=None, model=None)  # which say what a checkpoint holds
    if plan_file is None:
        plan = planned_for_file(given, asked.file_bits, asked.file_size, asked.weights, asked.model)
        return fitted_to_file(given, plan, asked.fitting, asked.weights, asked.model, asked.executor)
    plan = Plan.load(plan_file)
    if not asked.fitting.calibrated:
        return given.weights, plan
    if steps_of(plan):
        return fitted_to_file(given, plan, asked.fitting, asked.weights, asked.model, asked.executor)
    inputs(given, asked.fitting)
    return asked.fitting.fitted(cast("nn.Module", given.weights), plan, asked.executor), plan


def _pruning(amounts: tuple[str, ...], by: str) -> "Pruning | None":
    """The pruning that was asked for. Raises SettingError."""
    from ...compression.prune import Deviations, GlobalSparsity, Sparsity

    if not amounts:
        if by != "layer":
            raise SettingError("prune-by: says what --prune counts; give --prune too")
        return None
    parsed = [_amount(entry) for entry in amounts]
    patterns = [pattern for pattern, _ in parsed]
    plain = patterns == [None]
    if None in patterns and not plain:
        raise SettingError("prune: give one amount for all layers (0.9), or one for each glob ('fc*=0.9'), not both")
    if by == "network":
        if not plain:
            raise SettingError("prune: a share of the whole network is one amount, without globs")
        return GlobalSparsity(parsed[0][1])
    twice = next((pattern for pattern in patterns if patterns.count(pattern) > 1), None)
    if twice is not None:
        raise SettingError(f"prune: {twice!r} is given twice; give one amount for it")
    given = parsed[0][1] if plain else {str(pattern): amount for pattern, amount in parsed}
    return Deviations(given) if by == "deviations" else Sparsity(given)


def _amount(entry: str) -> tuple[str | None, float]:
    """'fc*=0.9' -> ('fc*', 0.9); '0.9' -> (None, 0.9)."""
    pattern, equals, number = entry.rpartition("=")
    named = pattern.strip() if equals else None
    with suppress(ValueError):
        if named != "":
            return named, float(number)
    raise SettingError(
        f"prune: {shown(entry)} is not allowed; an amount such as 0.9, or a layer's name or glob and one, 'fc*=0.9'"
    )
