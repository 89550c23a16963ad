"""`mpq inspect`: what is in a container, layer by layer."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...report.progress import echo
from ..help import SectionCommand
from ..output import claim, json_option, print_head, print_json

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from ...compression.container import Container
    from ...compression.stages import Stages


@click.command(
    cls=SectionCommand,
    epilog="Examples: mpq inspect model.mpq. The plan inside: mpq inspect model.mpq --plan plan.json",
)
@click.argument("container_file", metavar="CONTAINER", type=click.Path(path_type=Path))
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Write the plan inside to this file.")
@json_option
def inspect(container_file: Path, plan_file: Path | None, as_json: bool) -> None:
    """Show what a container holds, layer by layer: bits, zeros, entropy, and bytes after each stage.

    Stages: sparse (float weights that are not 0, and the gaps between them), packed and Huffman (codes and gaps, scales
    and centroids, as Deep Compression has them), stored (the layer in this file). Every tensor is read and its checksum
    compared.
    """
    from ...compression.container import Container
    from ..output import check_output

    check_output(plan_file, container_file)
    claim(plan_file, "a plan")
    container = Container.open(container_file)
    container.check()
    if plan_file is not None:
        container.plan.save(plan_file)
    print_container(container, as_json, layers=True)
    if plan_file is not None and not as_json:
        echo(f"wrote {plan_file}")


def print_container(container: "Container", as_json: bool, layers: bool) -> None:
    """Print a container as a table or as JSON, by layers where that is asked for."""
    from ...compression.stages import layer_stages, planned
    from ...report.console import console
    from ...report.container import container_json, layers_table, summary_lines, totals_table

    stages: dict[str, Stages] = {name: layer_stages(container, name) for name in planned(container)}
    if as_json:
        print_json(container_json(container, stages))
        return
    out = console()
    print_head(out, container.plan)
    if "pruning" in container.header.made_with:
        out.sentence(f"pruned by {container.header.made_with['pruning']}")
    out.print(layers_table(container, stages) if layers else totals_table(stages))
    for line in summary_lines(container, stages):
        out.sentence(line)
