"""`mpq plugins`: what is installed."""

import click

from ..help import SectionCommand
from ..output import json_option, print_json


@click.command(cls=SectionCommand)
@json_option
def plugins(as_json: bool) -> None:
    """List what is installed, importing none of it."""
    from ...common.registry import installed
    from ...report.console import console
    from ...report.tables import plugins_table

    listed = installed()
    if as_json:
        print_json([vars(plugin) for plugin in listed])
        return
    console().print(plugins_table(listed))
