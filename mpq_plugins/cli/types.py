"""Lists of numbers, and names of closed lists, on the command line."""

import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..common.checks import as_integer, shown
from ..common.text import did_you_mean
from ..errors import SettingError

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
                self.fail(f"{shown(value)} is no list of integers; write 2-8 or 4,8", param, ctx)
            if stop > LARGEST or len(numbers) > LARGEST:
                self.fail(f"{shown(value)} goes beyond {LARGEST}", param, ctx)
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
                self.fail(f"{shown(word)} is no number", param, ctx)
        return tuple(self.kind.convert(word, param, ctx) for word in words)

    def _expand(self, item: str, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if ":" not in item:
            return [item]
        ends = [word.strip() for word in item.split(":")]
        if len(ends) != 3 or not all(DECIMAL.fullmatch(word) for word in ends):
            self.fail(f"{shown(item)} is no range; write first:last:step, as in 0.1:0.9:0.1", param, ctx)
        first, last, step = map(Decimal, ends)  # decimals, for 0.1 + 0.2 should be the 0.3 that was meant
        count = int((last - first) / step) if step else -1
        if not 0 <= count < LARGEST:
            self.fail(f"{shown(item)} has no end; a positive step goes up, from first to last", param, ctx)
        return [str(first + step * position) for position in range(count + 1)]


class FileOrFactory(click.ParamType[str]):
    """A SOURCE: a file or folder, which a shell completes, or package.module:factory."""

    name = "source"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell's own candidates for files."""
        return [CompletionItem(incomplete, type="file")]


class Known(click.ParamType[str]):
    """One of the names that `known` gives, which is asked when it is needed: what is installed takes time to find."""

    name = "name"

    def __init__(self, known: Callable[[], Iterable[str]], *, checked: bool = True) -> None:
        self.known, self.checked = known, checked

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """`[affine|codebook]`."""
        return f"[{'|'.join(self.known())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name. Raises SettingError with all there are, and the one that was perhaps meant."""
        if self.checked and value not in (names := list(self.known())):
            raise _refusal(value, names, param)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so."""
        return [CompletionItem(name) for name in self.known() if name.startswith(incomplete)]


class OneOf(Known):
    """One of a closed list of names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(lambda: names)


class NameList(click.ParamType[tuple[str, ...]]):
    """Names of a closed list: `relative,mse`."""

    name = "list"

    def __init__(self, known: Callable[[], Sequence[str]]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse. Raises SettingError naming what is allowed."""
        if isinstance(value, tuple):
            return value
        given = tuple(word.strip() for word in str(value).split(","))
        names = self.known()
        for word in given:
            if word not in names:
                raise _refusal(word, names, param)
        return given

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that may follow those already there."""
        there, comma, begun = incomplete.rpartition(",")
        said = there.split(",")
        return [
            CompletionItem(f"{there}{comma}{name}")
            for name in self.known()
            if name.startswith(begun) and name not in said
        ]


def installed(group: str) -> Known:
    """The name of a plugin of this group; one that is not installed is refused where it is loaded."""

    def names() -> list[str]:
        from ..common import registry

        return list(registry.names(group))

    return Known(names, checked=False)


def _refusal(value: Any, names: Sequence[str], param: click.Parameter | None) -> SettingError:
    """`scheme: 'afine' is not allowed; affine, codebook. Did you mean affine?`, as the library says it."""
    option = max(param.opts, key=len).lstrip("-") if param is not None else "value"
    return SettingError(f"{option}: {shown(value)} is not allowed; {', '.join(names)}{did_you_mean(str(value), names)}")
