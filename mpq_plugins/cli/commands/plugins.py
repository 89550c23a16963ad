"""`mpq plugins`: what is installed."""

from typing import TYPE_CHECKING

import click

from ..help import SectionCommand
from ..output import json_option, print_json

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from ...common.registry import Plugin


@click.command(cls=SectionCommand)
@json_option
def plugins(as_json: bool) -> None:
    """List what is installed, importing none of it, and why what cannot be used cannot."""
    from ...common.registry import installed
    from ...report.console import console
    from ...report.tables import plugins_table

    listed = installed()
    if as_json:
        print_json([{**vars(plugin), "missing": _missing(plugin)} for plugin in listed])
        return
    out = console()
    out.print(plugins_table(listed))
    for plugin in listed:
        if missing := _missing(plugin):
            out.sentence(f"{plugin.name}: cannot be used here, for {missing}")


def _missing(plugin: "Plugin") -> str:
    """Why a plugin of ours cannot be used here; empty where it can."""
    from ...common.extras import missing_for
    from ...common.registry import BACKENDS, OURS

    return missing_for(plugin.name) if plugin.group in BACKENDS and plugin.distribution == OURS else ""
