"""Standard output and error as `mpq` uses them: whatever becomes of them, the work goes on.

A stream may be closed, its disk full, its reader gone, its encoding ASCII. None of that stops a command, changes a
file or its exit: what cannot be delivered is dropped and remembered, and `mpq` says at the end what was lost.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from .text import printable_lines

STANDARD = (0, 1, 2)


class Lasting:
    """A stream that takes whatever is written; `failure` is what first kept something from being delivered."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop it."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Deliver what was written, or drop it."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            # What is still buffered would fail again when Python exits.
            with suppress(OSError, ValueError):
                _to_nowhere(self._stream.fileno())
                self._stream.flush()


@contextmanager
def lasting_streams() -> Iterator[tuple[Lasting, Lasting]]:
    """sys.stdout and sys.stderr for one command; what other packages log goes out printable, too."""
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    out, err = Lasting(sys.stdout), Lasting(sys.stderr)
    for stream in (out, err):
        stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = out, err  # they pass on all else that is asked of a stream
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


class _Printable(logging.Formatter):
    """Log lines of other packages, which may hold any name."""

    def format(self, record: logging.LogRecord) -> str:
        """As always, and printable."""
        return printable_lines(super().format(record))


def _open_closed_ones() -> None:
    """A closed descriptor would be given to the next file that is opened, and what is printed written into that."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            _to_nowhere(descriptor)
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)


def _stream(descriptor: int) -> TextIO:
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding="utf-8", write_through=True)


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
