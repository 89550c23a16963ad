"""`mpq compress`: a model in one small file."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import SettingError
from ...report.progress import echo, progress_bar, say
from ..help import SectionCommand
from ..output import claim, json_option, model_option, say_notes, weights_option
from ..types import FileOrFactory
from .inspect import print_container

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ...compression.prune import Pruning


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq compress model.safetensors plan.json -o model.mpq. Pruned first: --prune 0.9, or by layer: "
    "--prune 'conv*=0.6' --prune 'fc*=0.9'",
)
@click.argument("source", type=FileOrFactory())
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Container to write (.mpq).")
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
    plan_file: Path,
    output: Path,
    model_factory: str | None,
    weights: str | None,
    amounts: tuple[str, ...],
    prune_by: str,
    coding: Any,
    as_json: bool,
) -> None:
    """Write SOURCE as PLAN has it to one file: codes, scales, centroids, all other tensors, and the plan itself."""
    from ..output import check_output
    from ..sources import check_order, make_module, resolve_source

    check_output(output, plan_file, source)
    if output.suffix != ".mpq":  # another file may be a checkpoint, and would be gone
        raise click.UsageError(f"-o {output}: the result is a container; name a file that ends in .mpq")
    claim(output)
    pruning = _pruning(amounts, prune_by)
    check_order(plan_file, source, "mpq compress SOURCE PLAN")
    from ...compression.write import write  # which leaves it to its caller to say what was left out
    from ...plans.plan import Plan

    plan = Plan.load(plan_file)
    resolved = resolve_source(source).weights
    if not isinstance(resolved, Path) and (model_factory, weights) != (None, None):
        raise click.UsageError("--model and --weights say what a checkpoint holds, and SOURCE is a module itself")
    model = make_module(model_factory) if model_factory is not None else None
    with progress_bar("compressing") as progress:
        container = write(
            resolved, plan, output, prune=pruning, coding=coding, progress=progress, model=model, weights=weights,
            noted=partial(say_notes, loaded_from=plan_file),
        )  # fmt: skip
    if container.header.left_out:
        say(f"left out, no tensors of the model: {', '.join(container.header.left_out)}")
    if plan.activation_bits is not None:
        say(f"note: the plan's {plan.activation_bits}-bit activations are not in a container; weights only")
    print_container(container, as_json, layers=False)
    if not as_json:
        echo(f"wrote {output}")


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
        f"prune: {entry!r} is not allowed; an amount such as 0.9, or a layer's name or glob and one, 'fc*=0.9'"
    )
