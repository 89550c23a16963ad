"""`mpq show`: a plan or a table, for people."""

from pathlib import Path

import click

from ..help import SectionCommand
from ..output import json_option, print_json


@click.command(cls=SectionCommand, epilog="Example: mpq show plan.json")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show a plan layer by layer with its true size, or a table's errors."""
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ...plans.table_file import is_table
    from ...report.console import console
    from ...report.tables import layer_json, measurement_table, plan_head, plan_table, size_json, size_lines

    out = console()
    if is_table(file):
        table = LayerTable.load(file)
        if as_json:
            raise click.UsageError(f"{file} is a table: `mpq measure --json` prints its numbers")
        out.print(measurement_table(table))
        return
    loaded = Plan.load(file)
    if as_json:
        layers = {layer.name: layer_json(layer) for layer in loaded.layers}
        print_json({"plan": loaded.model_dump(mode="json"), "layers": layers, "size": size_json(loaded.size())})
        return
    out.print(plan_head(loaded), soft_wrap=True)
    out.print(plan_table(loaded))
    for line in size_lines(loaded.size()):
        out.print(line, soft_wrap=True)
