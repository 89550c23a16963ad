"""The rich console that tables and progress are drawn on: names are text, never markup, colours or emoji."""

import os
import re
import shutil
import sys
import textwrap
from typing import Any

from rich.console import Console

from ..common.checks import as_integer
from ..common.text import printable

PIPE_WIDTH = 120  # columns when stdout is a file or pipe, where rich would otherwise cut at 80
LEAST_WIDTH = 20  # columns of a terminal that says it has fewer, or none
UNIT = re.compile(r"(?<=[0-9]) (?=(?:[kMG]?B|bits?)\b)")  # between a number and what it counts
LABEL = re.compile(r"\S+(?: \S+)*  +")  # `in total      `, under whose text the next lines begin
HARD_SPACE = "\xa0"


class PlainConsole(Console):
    """Prints text as it is, in printable characters; the tables of `tables.grid` hold no others."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, less what a terminal would obey."""
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def sentence(self, text: str) -> None:
        """Print a text over as many lines as the width asks for."""
        for line in wrapped(text, self.width) or [""]:
            self.print(line, soft_wrap=True)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text at this width; words stay whole, and numbers with their units."""
    label = LABEL.match(text)
    lines = textwrap.wrap(
        UNIT.sub(HARD_SPACE, printable(text)), width, subsequent_indent=" " * (len(label[0]) if label else 0),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace(HARD_SPACE, " ") for line in lines]


def console(stderr: bool = False) -> PlainConsole:
    """The console for results, or for what is said on stderr."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # rich's own reading of COLUMNS and LINES stops at what is no number.
    width, height = shutil.get_terminal_size((PIPE_WIDTH, 25)) if terminal else (_said_width(), 25)
    return PlainConsole(
        stderr=stderr, width=max(width, LEAST_WIDTH), height=height, highlight=False, markup=False, emoji=False
    )


def _said_width() -> int:
    """COLUMNS where nothing else says how wide a reader is, or a width of our own."""
    said = as_integer(os.environ.get("COLUMNS", ""))
    return said if said is not None and said > 0 else PIPE_WIDTH
