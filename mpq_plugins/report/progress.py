"""What reaches a terminal: results on stdout, remarks on stderr, progress where stderr is a terminal; all printable."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.text import printable, printable_lines


def echo(text: str) -> None:
    """One line of a result."""
    sys.stdout.write(f"{printable(text)}\n")


def echo_lines(text: str) -> None:
    """Several lines of a result."""
    sys.stdout.write(f"{printable_lines(text)}\n")


def say(text: str) -> None:
    """A remark for the person at the terminal; stdout stays for results."""
    sys.stderr.write(f"mpq: {printable(text)}\n")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give a callback (name, done, total) that draws a bar, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from .console import console

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(description), total=None, name="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, name=printable(name))
