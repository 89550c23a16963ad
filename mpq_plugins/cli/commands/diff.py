"""`mpq diff`: what differs between two plans."""

from pathlib import Path

import click

from ..help import SectionCommand
from ..output import json_option, print_json


@click.command(cls=SectionCommand, epilog="Example: mpq diff uniform4.json mixed.json")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
def diff(before: Path, after: Path, as_json: bool) -> None:
    """Show the layers in which two plans differ, and what that costs."""
    from ...plans.plan import Plan
    from ...report.console import console
    from ...report.tables import bytes_text, diff_table, layer_json, size_json

    first, second = Plan.load(before), Plan.load(after)
    differences = first.diff(second)
    if as_json:
        changes = {d.name: {"before": layer_json(d.before), "after": layer_json(d.after)} for d in differences}
        print_json({"layers": changes, "size": [size_json(first.size()), size_json(second.size())]})
        return
    out = console()
    if differences:
        out.print(diff_table(differences))
    out.sentence(f"{len(differences)} of {len(set(first.by_name) | set(second.by_name))} layers differ")
    for name, size in ((before, first.size()), (after, second.size())):
        out.sentence(
            f"{name}: {bytes_text(size.total_bytes)} in total, {size.total_average_bits:.3f} bits a weight "
            f"({size.average_bits:.3f} weights only)"
        )
