"""`mpq show`: a plan or a table, for people."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...report.progress import echo
from ..help import SectionCommand
from ..output import claim, json_option, plot_option, print_head, print_json, print_table

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ...plans.plan import Plan


@click.command(
    cls=SectionCommand, epilog="Examples: mpq show plan.json. A picture of it: mpq show plan.json --plot plan.png"
)
@click.argument("file", type=click.Path(path_type=Path))
@plot_option
@json_option
def show(file: Path, plot: Path | None, as_json: bool) -> None:
    """Show a plan layer by layer with its true size, or a table's errors.

    The picture shows each layer's shares of its weights at each width, or the errors as a heat map.
    """
    from ...plans.plan import Plan
    from ...plans.table import LayerTable
    from ...plans.table_file import is_table
    from ...plans.type_table import TypeTable, is_type_table
    from ...report.layer_plots import bits_plot, errors_plot, plan_title, table_title
    from ...report.plots import check_plot
    from ..output import check_output

    check_plot(plot)
    check_output(plot, file)
    claim(plot, "a picture")
    if is_type_table(file):
        if as_json or plot is not None:
            raise click.UsageError(f"{file} is a table of types: `mpq measure --json` prints its numbers")
        print_table(TypeTable.load(file))
    elif is_table(file):
        if as_json:
            raise click.UsageError(f"{file} is a table: `mpq measure --json` prints its numbers")
        table = LayerTable.load(file)
        if plot is not None:
            errors_plot(table, plot, table_title(table, file.stem))
        print_table(table)
    else:
        loaded = Plan.load(file)
        if plot is not None:
            bits_plot(loaded, plot, plan_title(loaded, file.stem))
        _print_plan(loaded, as_json)
    if plot is not None and not as_json:
        echo(f"wrote {plot}")


def _print_plan(plan: "Plan", as_json: bool) -> None:
    from ...report.console import console
    from ...report.tables import file_lines, layer_json, plan_table, size_json, size_lines

    if as_json:
        layers = {layer.name: layer_json(layer) for layer in plan.layers}
        print_json({"plan": plan.model_dump(mode="json"), "layers": layers, "size": size_json(plan.size())})
        return
    out = console()
    print_head(out, plan)
    out.print(plan_table(plan))
    for line in (*size_lines(plan.size()), *file_lines(plan)):
        out.sentence(line)
