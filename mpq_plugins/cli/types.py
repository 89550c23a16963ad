"""Lists of numbers on the command line."""

import re
from decimal import Decimal
from typing import Any

import click

from ..common.checks import as_integer

DECIMAL = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,2})?")
LARGEST = 1 << 16  # in a list of integers; shapes of images and lists of widths end well before


class IntegerList(click.ParamType[tuple[int, ...]]):
    """`2-8`, `4,8` or `2-4,8` as a tuple of integers."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse, or fail naming the option."""
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for run in str(value).split(","):
            first, dash, last = run.strip().partition("-")
            start, stop = as_integer(first), as_integer(last if dash else first)
            if start is None or stop is None:
                self.fail(f"{value!r:.60} is no list of integers; write 2-8 or 4,8", param, ctx)
            if stop > LARGEST or len(numbers) > LARGEST:
                self.fail(f"{value!r:.60} goes beyond {LARGEST}", param, ctx)
            numbers.extend(range(start, stop + 1))
        return tuple(numbers)


class NumberList(click.ParamType[tuple[Any, ...]]):
    """A number, or several: `0.1,0.5`, or `0.1:0.9:0.1` from first to last by steps, both ends included."""

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind = kind
        self.name = kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parse, or fail naming the option."""
        if isinstance(value, tuple):
            return value
        words = [word for item in str(value).split(",") for word in self._expand(item, param, ctx)]
        for word in words:
            if not word.isascii():  # Python reads digits of other scripts too
                self.fail(f"{word!r:.60} is no number", param, ctx)
        return tuple(self.kind.convert(word, param, ctx) for word in words)

    def _expand(self, item: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if ":" not in item:
            return [item]
        ends = [word.strip() for word in item.split(":")]
        if len(ends) != 3 or not all(DECIMAL.fullmatch(word) for word in ends):
            self.fail(f"{item!r:.60} is no range; write first:last:step, as in 0.1:0.9:0.1", param, ctx)
        first, last, step = map(Decimal, ends)  # decimals, for 0.1 + 0.2 should be the 0.3 that was meant
        count = int((last - first) / step) if step else -1
        if not 0 <= count < LARGEST:
            self.fail(f"{item!r:.60} has no end; a positive step goes up, from first to last", param, ctx)
        return [str(first + step * position) for position in range(count + 1)]
