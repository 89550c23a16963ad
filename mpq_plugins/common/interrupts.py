"""Ctrl-C and the signals like it: one exception for all, so that what is unfinished is cleaned up, and said."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 0.05  # seconds after which an interrupt that could not be raised is sent again
PATIENCE = 5.0  # seconds that an import may take to end, once interrupted; a model's file may do anything


class Interrupted(BaseException):
    """A signal that asks the process to stop."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def code(self) -> int:
        """What the process exits with, as shells have it: 130 for Ctrl-C, 143 for a termination."""
        return 128 + self.number

    def __str__(self) -> str:
        by = "" if self.number == signal.SIGINT else f" by {signal.Signals(self.number).name}"
        return f"interrupted{by}; nothing half written"


class Interrupts:
    """While they are raised, signals are Interrupted in the main thread; `seen` is one that was sent, or None.

    Code of others may swallow the exception, so whoever runs a command looks at `seen` at its end. Python itself drops
    what is raised in a callback, with a traceback: such a one is sent again instead. So is one that comes while a
    module is imported: compiled modules end the process when Python code they call as they start raises. A signal
    that is ignored, as under nohup, stays so.
    """

    def __init__(self) -> None:
        self.seen: Interrupted | None = None
        self._since = 0.0  # when it was first sent
        self._again: threading.Timer | None = None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """For the length of the context."""
        hook, before = sys.unraisablehook, self.start()
        try:
            yield
        finally:
            if self._again is not None:
                self._again.cancel()
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self) -> dict[int, Any]:
        """From now on; gives what handled each signal before."""
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            return {}
        sys.unraisablehook = self._not_raised
        before = {number: signal.getsignal(number) for number in _numbers()}
        taken = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in taken:
            signal.signal(number, self._handle)
        return taken

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._since = self._since if self.seen else time.monotonic()
        self.seen = Interrupted(number)
        if _importing(frame) and time.monotonic() - self._since < PATIENCE:
            self._send_again(number)
        else:
            raise self.seen

    def _not_raised(self, what: Any) -> None:
        if isinstance(what.exc_value, Interrupted):
            self._send_again(what.exc_value.number)
        else:
            sys.__unraisablehook__(what)

    def _send_again(self, number: int) -> None:
        self._again = threading.Timer(AGAIN, os.kill, [os.getpid(), number])
        self._again.daemon = True
        self._again.start()


def _importing(frame: FrameType | None) -> bool:
    """Whether Python's own import is among the callers of what was interrupted."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def ignore_signals() -> None:
    """From now on nothing interrupts: what there was to do is done, and said."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
