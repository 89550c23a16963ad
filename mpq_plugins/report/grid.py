"""A table that fits the width it is printed at: names give way first, then columns, and numbers never.

A number that is broken over two lines or cut is another number. So a column of numbers is shown whole or left out, and
a note under the table names what was left out.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .console import wrapped

ELLIPSIS = "…"
NAME = 16  # columns that a name keeps while there are other columns to leave out
AT_DOTS = 30  # columns up to which a name rather keeps its words whole
LEAST_NAME = 8  # columns that it keeps at last
WRAPPED = 24  # columns of a text of several words before others are left out for it
SAMPLE = 1000  # names that are looked at to choose a place; of more, as many in equal steps
DIGITS = "0123456789"
UNIT = re.compile(r" (?=[0-9])")  # between numbers, and not between a number and its unit


@dataclass(frozen=True)
class Column:
    """A heading and its cells, printable. number: shown at the right. name: may be shortened in the middle."""

    heading: str
    cells: tuple[str, ...]
    number: bool
    name: bool = False

    @property
    def whole(self) -> int:
        """The width at which nothing is wrapped."""
        return max(cell_len(self.heading), self.longest)

    @property
    def longest(self) -> int:
        """The width of the longest cell."""
        return max(map(cell_len, self.cells), default=0)

    @property
    def least(self) -> int:
        """The width below which a word, or a number with its unit, would be broken."""
        words = [word for cell in self.cells for word in (UNIT.split(cell) if self.number else cell.split())]
        return max(self.wrapped_heading, max(map(cell_len, words), default=1))

    @property
    def wrapped_heading(self) -> int:
        """The width of the longest word of the heading."""
        return max(map(cell_len, self.heading.split()), default=1)

    @property
    def wrapped(self) -> int:
        """A width at which headings and long texts go over several lines, and short texts do not."""
        return max(self.least, min(self.longest, WRAPPED))


@dataclass(frozen=True)
class Grid:
    """A table of columns; leave_out: headings in the order in which they go where the width does not do for all."""

    title: str
    columns: tuple[Column, ...]
    leave_out: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """The title, the table at the console's width, and the note about what is not in it."""
        shown, widths = fitted(self, options.max_width)
        for line in wrapped(self.title, options.max_width) if self.title else []:
            yield Text(line, style="table.title")
        table = Table()
        for column, width in zip(shown, widths, strict=True):
            table.add_column(column.heading, justify="right" if column.number else "left", width=width, overflow="fold")
        for row in zip(*(column.cells for column in shown), strict=True):
            table.add_row(*map(Text, row))
        yield table
        gone = [column.heading for column in self.columns[1:] if not any(column is each for each in shown)]
        if gone:
            note = f"columns left out at this width: {', '.join(gone)}; widen the terminal or use --json"
            yield from map(Text, wrapped(note, options.max_width))


def fitted(grid: Grid, width: int) -> tuple[list[Column], list[int]]:
    """The columns that a width has room for, names shortened, and the width of each."""
    columns = list(grid.columns)
    if _room(columns, width) >= sum(column.whole for column in columns):
        return columns, [column.whole for column in columns]
    for least in (_roomy, _narrow):
        columns = list(grid.columns)
        needed = {column: least(column) for column in columns}
        for left_out in (None, *_order(grid)):
            columns = [column for column in columns if column is not left_out]
            spare = _room(columns, width) - sum(needed[column] for column in columns)
            if spare >= 0 and (len(columns) > 1 or least is _narrow):  # a list of names alone says nothing
                widths = _shared(columns, [needed[column] for column in columns], spare)
                return [_at(column, wide) for column, wide in zip(columns, widths, strict=True)], widths
    return columns, [max(1, _room(columns, width))]  # a single word that is wider than all there is


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Names of at most this width, the middle left out; a number in them is never cut.

    Different names stay different if there is a place for that: at the dots of a name if possible, and then as near to
    the middle as possible.
    """
    sample = names[:: 1 + len(names) // SAMPLE]
    different, head = _best_place(sample, width, at_dots=True)
    if different == len(set(sample)):
        return [_cut(name, head, width, at_dots=True) for name in names]
    more, place = _best_place(sample, width, at_dots=False)
    at_dots = different >= more
    return [_cut(name, head if at_dots else place, width, at_dots) for name in names]


def _best_place(names: Sequence[str], width: int, at_dots: bool) -> tuple[int, int]:
    """How many names can be kept different by cutting all at one place, and that place, the length of their heads."""
    best = (0, 0)
    for head in sorted(range(width), key=lambda head: abs(2 * head + 1 - width)):
        different = len({_cut(name, head, width, at_dots) for name in names})
        if different > best[0]:
            best = (different, head)
        if different == len(set(names)):
            break
    return best


def _cut(name: str, head: int, width: int, at_dots: bool) -> str:
    if cell_len(name) <= width:
        return name
    first, last = _taken(name, head), _taken(name[::-1], width - 1 - head)[::-1]
    before, after = name[len(first)], name[-len(last) - 1]
    if at_dots:
        first = first if before == "." else first.rpartition(".")[0]
        last = last if after == "." else last.partition(".")[2]
    else:  # what is left of a number would be another number
        first = first.rstrip(DIGITS) if before in DIGITS else first
        last = last.lstrip(DIGITS) if after in DIGITS else last
    return f"{first.rstrip('.')}{ELLIPSIS}{last.lstrip('.')}"


def _taken(text: str, width: int) -> str:
    """As much of the beginning as has room."""
    taken = text[:width]
    while cell_len(taken) > width:  # characters that are two columns wide
        taken = taken[:-1]
    return taken


def _order(grid: Grid) -> Iterator[Column]:
    """What is left out, in turn: as the grid says, then from the right; the first column stays."""
    others = grid.columns[1:]
    for heading in grid.leave_out:
        yield from (column for column in others if column.heading == heading)
    yield from (column for column in reversed(others) if column.heading not in grid.leave_out)


def _room(columns: Sequence[Column], width: int) -> int:
    """What is left of a width for the cells: each has a blank at either side, and there are lines between them."""
    return width - 3 * len(columns) - 1


def _shared(columns: Sequence[Column], least: Sequence[int], spare: int) -> list[int]:
    """The least widths, and what is to spare given to columns in turn, until nothing in them is wrapped."""
    given = list(least)
    for names in (False, True):  # names are the first to be made narrow, so they are the last to get room
        for position, column in enumerate(columns):
            if column.name == names:
                more = min(spare, column.whole - given[position])
                given[position] += more
                spare -= more
    return given


def _roomy(column: Column) -> int:
    """The least width of a column while there are others to leave out: different names stay different."""
    if not column.name:
        return column.wrapped
    sample = column.cells[:: 1 + len(column.cells) // SAMPLE]
    for at_dots, most in ((True, min(AT_DOTS, column.longest)), (False, column.longest)):
        for width in range(min(NAME, column.longest), most):
            if _best_place(sample, width, at_dots)[0] == len(set(sample)):
                return max(width, column.wrapped_heading)
    return column.whole


def _narrow(column: Column) -> int:
    """The least width of a column at last."""
    return max(min(LEAST_NAME, column.longest), column.wrapped_heading) if column.name else column.least


def _at(column: Column, width: int) -> Column:
    return replace(column, cells=tuple(shortened(column.cells, width))) if column.name else column
