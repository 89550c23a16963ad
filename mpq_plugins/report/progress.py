"""What reaches a terminal: results on stdout; remarks, progress and what is logged on stderr; all printable."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..common.progress import Progress
from ..common.text import printable, printable_lines

EVERY = 10.0  # seconds between lines about progress where no bar is drawn
ROOT = "mpq_plugins"  # whose loggers are the library's

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def echo(text: str, *, at_once: bool = False) -> None:
    """One line of a result. at_once: for who reads it through a pipe while the command goes on."""
    sys.stdout.write(f"{printable(text)}\n")
    if at_once:
        sys.stdout.flush()


def echo_lines(text: str) -> None:
    """Several lines of a result."""
    sys.stdout.write(f"{printable_lines(text)}\n")


def say(text: str) -> None:
    """A remark for the person at the terminal, unless it is quiet; stdout stays for results."""
    if not _quiet.get():
        alert(text)


def alert(text: str) -> None:
    """What has to be heard, quiet or not: a warning, an error."""
    sys.stderr.write(f"mpq: {printable(text)}\n")


@contextmanager
def quiet() -> Iterator[None]:
    """No remarks and no progress within."""
    before = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(before)


@contextmanager
def logged(level: int) -> Iterator[None]:
    """What the library logs at this level and above, as lines on stderr."""
    logger, handler = logging.getLogger(ROOT), _Lines()
    before = logger.level
    if not any(isinstance(known, _Lines) for known in logger.handlers):
        logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    """A line a record, on what stderr is at that time: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        alert(f"{record.name.removeprefix(f'{ROOT}.')}: {record.getMessage()}")


@contextmanager
def progress_bar(description: str) -> Iterator[Progress | None]:
    """Give a callback (name, done, total) that draws a bar, or where stderr is no terminal writes a line at times.

    None where it is quiet.
    """
    if _quiet.get():
        yield None
    elif not sys.stderr.isatty():
        yield _lines(description)
    else:
        with _bar(description) as draw:
            yield draw


def _lines(description: str) -> Progress:
    """A callback that says how far work is, every ten seconds or so; nothing of what ends before."""
    began = last = time.monotonic()

    def line(name: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY and done < total:
            last = now
            alert(f"{description}: {done / total:.0%}, {name}, {now - began:.0f} s")

    return line


@contextmanager
def _bar(description: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from .console import console

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )  # fmt: skip
    with Bar(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(description), total=None, name="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, name=printable(name))
