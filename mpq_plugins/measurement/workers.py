"""Work handed to an executor and taken back as it finishes; what a lost worker was at is done again."""

import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..common.text import what_it_said
from ..errors import MeasureWarning, MPQError, SettingError, WorkerError

LOOK = 5.0  # seconds between two looks at whether there is still something to wait for
QUIET = 60.0  # seconds without a result after which that is said; a unit takes one, or ten where ranges are searched


@dataclass(frozen=True)
class Call:
    """A function and arguments that another process can be sent; name: its own in this job; layer: what it is about."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    layer: str = ""


class Workers:
    """The executor that was given, or as many threads of this process; threads also once its processes are gone.

    dask's scheduler gives a lost worker's work to another. A pool of processes that has lost one takes no more work, so
    the rest is done here, with a warning.
    """

    def __init__(self, executor: Executor | None, threads: int) -> None:
        if executor is not None and not isinstance(executor, Executor):
            raise SettingError(
                f"executor: {type(executor).__name__} is no concurrent.futures.Executor; a ThreadPoolExecutor, a "
                "ProcessPoolExecutor, or dask's client.get_executor()"
            )
        self._lock = threading.Lock()
        self._threads = threads
        self._closed = self._said_quiet = False
        self._heard = time.monotonic()
        self._waiting: set[Future[Any]] = set()
        self._own = ThreadPoolExecutor(threads, "mpq-measure") if executor is None else None
        self._executor: Executor = executor or self._own  # type: ignore[assignment]  # one of them is there

    def finished(self, calls: Iterable[Call]) -> Iterator[tuple[Call, Any]]:
        """Each call with its result, as they come. Raises what a call raises, and WorkerError for lost workers."""
        left = list(calls)
        while left:
            if self._closed:  # one layer's error ends the passes over others
                raise WorkerError("executor: the measurement was stopped")
            executor = self._executor
            futures, left = _submitted(executor, left)
            self._waiting.update(futures)
            try:
                for future in self._as_completed(futures):
                    call = futures.pop(future)
                    self._waiting.discard(future)
                    try:
                        result = self._result(future, call, executor)
                    except BrokenExecutor:
                        left.append(call)
                        continue
                    yield call, result
            finally:  # an error in one, or Ctrl-C, must not wait for all the others
                for future in futures:
                    future.cancel()
            if left:
                self._replace(executor, len(left))

    def close(self) -> None:
        """Take no more work, and wait for what own threads are at; an executor that was given stays open."""
        self._closed = True
        for future in list(self._waiting):
            future.cancel()
        if self._own is not None:
            # Not cancel_futures, which would not wake whoever waits for them.
            self._own.shutdown(wait=True)

    def _as_completed(self, futures: dict[Future[Any], Call]) -> Iterator[Future[Any]]:
        """As they complete; in between, whether the measurement was stopped, and a word where nothing comes back."""
        while futures:
            with suppress(TimeoutError):
                for future in as_completed(list(futures), timeout=LOOK):
                    self._heard = time.monotonic()
                    yield future
            if self._closed and futures:
                raise WorkerError("executor: the measurement was stopped")
            if time.monotonic() - self._heard > QUIET and not self._said_quiet:
                self._said_quiet = True
                text = f"executor: nothing has come back for {QUIET:.0f} seconds; are its workers alive?"
                warnings.warn(MeasureWarning(text), stacklevel=2)

    def _result(self, future: Future[Any], call: Call, executor: Executor) -> Any:
        try:
            return future.result()
        except (MPQError, BrokenExecutor):
            raise
        except Exception as error:
            if executor is self._own:
                raise
            stopped = isinstance(error, CancelledError)
            said = (
                "it was cancelled: was the scheduler stopped, or the executor shut down?"
                if stopped
                else what_it_said(error)
            )
            raise WorkerError(
                f"executor: measuring {call.layer!r} failed on a worker ({said}). Workers need this version of "
                "mpq-plugins, the same files and memory for a few chunks; with a store what was finished is kept"
            ) from error

    def _replace(self, broken: Executor, left: int) -> None:
        with self._lock:
            if self._executor is not broken:
                return
            if self._own is not None:
                raise WorkerError("the threads that measure cannot be started; are there too many processes?")
            warnings.warn(
                MeasureWarning(
                    f"executor: its processes are gone (killed, out of memory?); measuring the remaining {left} units "
                    f"on {self._threads} threads of this process"
                ),
                stacklevel=2,
            )
            self._executor = self._own = ThreadPoolExecutor(self._threads, "mpq-measure")


def _submitted(executor: Executor, calls: list[Call]) -> tuple[dict[Future[Any], Call], list[Call]]:
    """What the executor took, and what it did not."""
    futures: dict[Future[Any], Call] = {}
    for position, call in enumerate(calls):
        try:
            futures[executor.submit(call.function, *call.arguments)] = call
        except BrokenExecutor:
            return futures, calls[position:]
        except RuntimeError as error:
            raise WorkerError(f"executor: takes no work ({what_it_said(error)}); give one that is open") from error
    return futures, []
