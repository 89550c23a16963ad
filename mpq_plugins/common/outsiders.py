"""Running what others wrote: a user's factory or evaluation, a plugin's module."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import MPQError
from .interrupts import Interrupted
from .text import what_it_said


class _Apart:
    """stdout and the working directory belong to the process, and outsiders may run in several threads at once.

    The first to come in puts them aside, and the last to leave puts them back: threads that put back what each found
    would leave the process with what another had put aside.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(_in_place())
                self._stack.enter_context(redirect_stdout(sys.stderr))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()


_APART = _Apart()


@contextmanager
def outsiders(explain: Callable[[str], MPQError]) -> Iterator[None]:
    """Whatever is raised inside becomes the error that `explain` makes of what it said; ours and interrupts pass.

    Leaving the program is no way out either (`sys.exit`, an exception beside Exception). What is printed goes to
    stderr, for stdout is the result's.
    """
    with _APART:
        try:
            yield
        except (MPQError, KeyboardInterrupt, Interrupted):
            raise
        except BaseException as error:
            raise explain(what_it_said(error)) from error


def contained(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, after which the working directory is what it was: relative paths are of where the user is."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with _in_place():
            return function(*arguments, **named)

    return call


@contextmanager
def _in_place() -> Iterator[None]:
    here = None
    with suppress(OSError):  # deleted, say
        here = Path.cwd()
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(here or os.curdir)
