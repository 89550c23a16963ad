"""The partial file beside a table that is being measured: where it is, what is said of it, when it goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..plans.table import LayerTable
from ..report.progress import say


def partial_file(output: Path | None) -> Path | None:
    """Where finished units are kept beside a table that is to be written."""
    return None if output is None else output.with_name(f"{output.name}.measure.partial")


def save_measured(table: LayerTable, output: Path | None) -> None:
    """Write the table where one is asked for; what was kept to go on from is needed no more."""
    partial = partial_file(output)
    if output is not None and partial is not None:
        table.save(output)
        partial.unlink(missing_ok=True)


@contextmanager
def kept_at(journal: Path | None) -> Iterator[None]:
    """Say where finished units are when a measurement goes on from them, or is interrupted."""
    before = _last_written(journal)
    if before is not None:
        say(f"an earlier run left {journal}: what it finished of this measurement is used")
    try:
        yield
    except BaseException:
        if _last_written(journal) != before:
            say(f"what is finished is kept in {journal}: the same command goes on from there")
        raise


def _last_written(path: Path | None) -> int | None:
    return path.stat().st_mtime_ns if path is not None and path.is_file() else None
