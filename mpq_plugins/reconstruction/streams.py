"""Forward runs that stop at a module and go on later, so that many batches pass a network side by side.

Each run has a thread of its own, and one of them, or the caller, works at a time. So a run is an ordinary call of the
model, under the caller's autocast, whatever its code does between its modules, and its prefix runs once.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import SettingError
from ..models.autocast import autocast_now, under_autocast

_OWN = threading.local()
JOIN = "join them into fewer, larger batches"


class _Over(BaseException):
    """Ends a run that is not to go on; no model catches it, for it is no Exception."""


class Stream:
    """One run. It begins at `start`, stops at each `stop` in it, and goes on when it is told to.

    at: where it stands, None when it has ended; value: what it brought there; notes: what hooks keep for later.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.at: Any = None
        self.value: Any = None
        self.notes: dict[Any, Any] = {}
        self._answer: Any = None
        self._error: BaseException | None = None
        self._closing = False
        self._autocast = autocast_now()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)

    def start(self) -> None:
        """Let it run to where it stops first, or ends. Raises what its model raises, or SettingError for no thread."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise SettingError(
                f"batches: each is run in two threads, and there are no more ({error}); {JOIN}"
            ) from error
        self._wait()

    def go_on(self, answer: Any = None) -> None:
        """Let it run to where it stops next, or ends. Raises what its model raises."""
        self._answer, self.at, self.value = answer, None, None
        self._turn.release()
        self._wait()

    def close(self) -> None:
        """End it where it stands."""
        self._closing = True
        while self._thread.is_alive():
            self._turn.release()
            self._thread.join(0.1)

    def stop(self, at: Any, value: Any) -> Any:
        """Within the run: wait at a place, and give what `go_on` is told."""
        self.at, self.value = at, value
        self._back.release()
        self._turn.acquire()
        if self._closing:
            raise _Over
        answer, self._answer = self._answer, None
        return answer

    def _wait(self) -> None:
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, run: Callable[[], Any]) -> None:
        _OWN.stream = self
        try:
            with torch.no_grad(), under_autocast(self._autocast):
                run()
        except _Over:
            pass
        except BaseException as error:  # noqa: BLE001  # the caller's to see
            self._error = error
        finally:
            self.at = self.value = None
            self.notes.clear()
            self._back.release()


def current() -> Stream | None:
    """The stream whose run this code is part of."""
    return getattr(_OWN, "stream", None)
