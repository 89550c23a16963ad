"""The rich console that tables and progress are drawn on: names are text, never markup, colours or emoji."""

import shutil
import sys
from typing import Any

from rich.console import Console

from ..common.text import printable

PIPE_WIDTH = 120  # columns when stdout is a file or pipe, where rich would otherwise cut at 80
LEAST_WIDTH = 20  # columns of a terminal that says it has fewer, or none


class PlainConsole(Console):
    """Prints text as it is, in printable characters; the tables of `tables.grid` hold no others."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, less what a terminal would obey."""
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)


def console(stderr: bool = False) -> Console:
    """The console for results, or for what is said on stderr."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # rich's own reading of COLUMNS and LINES stops at what is no number.
    width, height = shutil.get_terminal_size((PIPE_WIDTH, 25)) if terminal else (PIPE_WIDTH, 25)
    return PlainConsole(
        stderr=stderr, width=max(width, LEAST_WIDTH), height=height, highlight=False, markup=False, emoji=False
    )
