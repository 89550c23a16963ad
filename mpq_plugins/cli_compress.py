"""`mpq compress`, `mpq decompress` and `mpq inspect`: a model in one small file, back again, and what is in it."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_shared import claim, json_option, model_option, print_json, weights_option
from .errors import SettingError
from .report.progress import echo, progress_bar, say

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from .compression.container import Container
    from .compression.prune import Pruning
    from .compression.stages import Stages


@click.command(
    epilog="Examples: mpq compress model.safetensors plan.json -o model.mpq. Pruned first: --prune 0.9, or by layer: "
    "--prune 'conv*=0.6' --prune 'fc*=0.9'"
)
@click.argument("source")
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
    from .cli_sources import check_output, make_module, resolve_source
    from .compression.write import write  # which leaves it to its caller to say what was left out
    from .plans.plan import Plan

    check_output(output, plan_file, source)
    if output.suffix != ".mpq":  # another file may be a checkpoint, and would be gone
        raise click.UsageError(f"-o {output}: the result is a container; name a file that ends in .mpq")
    claim(output)
    pruning = _pruning(amounts, prune_by)
    plan = Plan.load(plan_file)
    resolved = resolve_source(source)
    if not isinstance(resolved, Path) and (model_factory, weights) != (None, None):
        raise click.UsageError("--model and --weights say what a checkpoint holds, and SOURCE is a module itself")
    model = make_module(model_factory) if model_factory is not None else None
    with progress_bar("compressing") as progress:
        container = write(
            resolved, plan, output, prune=pruning, coding=coding, progress=progress, model=model, weights=weights
        )
    if container.header.left_out:
        say(f"left out, no tensors of the model: {', '.join(container.header.left_out)}")
    if plan.activation_bits is not None:
        say(f"note: the plan's {plan.activation_bits}-bit activations are not in a container; weights only")
    _print(container, as_json, layers=False)
    if not as_json:
        echo(f"wrote {output}")


@click.command(epilog="Example: mpq decompress model.mpq -o model.safetensors")
@click.argument("container_file", metavar="CONTAINER", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Checkpoint to write (.safetensors)."
)
@json_option
def decompress(container_file: Path, output: Path, as_json: bool) -> None:
    """Write CONTAINER's tensors, dequantized, as a checkpoint."""
    from .cli_sources import check_output
    from .compression.container import decompress as read
    from .compression.write import save_tensors

    if output.suffix != ".safetensors":
        raise click.UsageError(f"-o {output}: the result is written as safetensors; name a file that ends in that")
    check_output(output, container_file)
    claim(output)
    with progress_bar("decompressing") as progress:
        tensors = read(container_file, progress=progress)
    save_tensors(tensors, output)
    if as_json:
        print_json({"checkpoint": str(output), "tensors": len(tensors)})
    else:
        echo(f"wrote {output}: {len(tensors)} tensors")


@click.command(epilog="Examples: mpq inspect model.mpq. The plan inside: mpq inspect model.mpq --plan plan.json")
@click.argument("container_file", metavar="CONTAINER", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Write the plan inside to this file.")
@json_option
def inspect(container_file: Path, plan_file: Path | None, as_json: bool) -> None:
    """Show what a container holds, layer by layer: bits, zeros, entropy, and bytes after each stage.

    Stages: sparse (float weights that are not 0, and the gaps between them), packed and Huffman (codes and gaps, scales
    and centroids, as Deep Compression has them), stored (the layer in this file). Every tensor is read and its checksum
    compared.
    """
    from .cli_sources import check_output
    from .compression.container import Container

    check_output(plan_file, container_file)
    claim(plan_file)
    container = Container.open(container_file)
    container.check()
    if plan_file is not None:
        container.plan.save(plan_file)
    _print(container, as_json, layers=True)
    if plan_file is not None and not as_json:
        echo(f"wrote {plan_file}")


def _print(container: "Container", as_json: bool, layers: bool) -> None:
    from .compression.stages import layer_stages, planned
    from .report.console import console
    from .report.container import container_json, layers_table, summary_lines, totals_table
    from .report.tables import plan_head

    stages: dict[str, Stages] = {name: layer_stages(container, name) for name in planned(container)}
    if as_json:
        print_json(container_json(container, stages))
        return
    out = console()
    out.print(plan_head(container.plan), soft_wrap=True)
    if "pruning" in container.header.made_with:
        out.print(f"pruned by {container.header.made_with['pruning']}", soft_wrap=True)
    out.print(layers_table(container, stages) if layers else totals_table(stages))
    for line in summary_lines(container, stages):
        out.print(line, soft_wrap=True)


def _pruning(amounts: tuple[str, ...], by: str) -> "Pruning | None":
    """The pruning that was asked for. Raises SettingError."""
    from .compression.prune import Deviations, GlobalSparsity, Sparsity

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
