"""Progress and remarks on stderr: a bar with a total on a terminal, silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give a callback (name, done, total) that draws a bar, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, name="")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, name=name)


def say(text: str) -> None:
    """A remark for the person at the terminal; stdout stays for results."""
    sys.stderr.write(f"mpq: {text}\n")
