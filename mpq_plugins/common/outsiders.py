"""Running what others wrote: a user's factory or evaluation, a plugin's module."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ..errors import MPQError
from .interrupts import Interrupted
from .text import what_it_said


@contextmanager
def outsiders(explain: Callable[[str], MPQError]) -> Iterator[None]:
    """Whatever is raised inside becomes the error that `explain` makes of what it said; ours and interrupts pass.

    Leaving the program is no way out either (`sys.exit`, an exception beside Exception). What is printed goes to
    stderr, for stdout is the result's.
    """
    with _in_place(), redirect_stdout(sys.stderr):
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
