"""Work handed to an executor and taken back as it finishes; what a lost worker was at is done again."""

import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import MeasureWarning, MPQError, SettingError, WorkerError
from .text import what_it_said

LOOK = 5.0  # seconds between two looks at whether there is still something to wait for
QUIET = 60.0  # seconds without a result after which that is said; a unit takes one, or ten where ranges are searched
IN_FLIGHT = 1024  # calls that an executor has at most at a time, unless there is a reason for fewer
THREADS = "mpq-measure"


@dataclass(frozen=True)
class Call:
    """A function and arguments that another process can be sent.

    name: its own in this job; layer: what it is about, and doing: what is done to that, as errors say it.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    layer: str = ""
    doing: str = "measuring"

    @property
    def said(self) -> str:
        """`measuring 'fc'`."""
        return f"{self.doing} {self.layer!r}"


def check_executor(executor: object) -> None:
    """Raise SettingError for what is no executor, where one may be given."""
    if executor is not None and not isinstance(executor, Executor):
        raise SettingError(
            f"executor: {type(executor).__name__} is no concurrent.futures.Executor; a ThreadPoolExecutor, a "
            "ProcessPoolExecutor, or dask's client.get_executor()"
        )


class Workers:
    """The executor that was given, or as many threads of this process; something else once its processes are gone.

    dask's scheduler gives a lost worker's work to another. A pool of processes that has lost one takes no more work, so
    the rest is done elsewhere, with a warning: on threads of this process, or, where units run a user's code that may
    be what ended the process (apart), one after another in a new process, which is not replaced once more.

    in_flight: how many calls the executor has at a time.
    """

    def __init__(
        self, executor: Executor | None, threads: int, *, in_flight: int = IN_FLIGHT, apart: bool = False
    ) -> None:
        check_executor(executor)
        self._lock = threading.Lock()
        self._threads, self._in_flight, self._apart = threads, in_flight, apart
        self._closed = self._said_quiet = False
        self._heard = time.monotonic()
        self._waiting: set[Future[Any]] = set()
        self._own: Executor | None = ThreadPoolExecutor(threads, THREADS) if executor is None else None
        self._executor: Executor = executor or self._own  # type: ignore[assignment]  # one of them is there

    def finished(self, calls: Iterable[Call]) -> Iterator[tuple[Call, Any]]:
        """Each call with its result, as they come. Raises what a call raises, and WorkerError for lost workers."""
        left = iter(calls)
        while True:
            executor = self._executor
            lost: list[Call] = []
            for call, future in self._handed_out(executor, left, lost):
                try:
                    result = self._result(future, call, executor)
                except BrokenExecutor:
                    lost.append(call)
                    continue
                yield call, result
            if not lost:
                return
            left = chain(lost, left)
            self._replace(executor, lost)

    def close(self) -> None:
        """Take no more work, and wait for what own threads are at; an executor that was given stays open."""
        self._closed = True
        for future in list(self._waiting):
            future.cancel()
        if self._own is not None:
            # Not cancel_futures, which would not wake whoever waits for them.
            self._own.shutdown(wait=True)

    def _handed_out(
        self, executor: Executor, calls: Iterator[Call], lost: list[Call]
    ) -> Iterator[tuple[Call, Future[Any]]]:
        """Calls with their futures, once these are done. lost: gets what a broken executor did not take."""
        done: SimpleQueue[Future[Any]] = SimpleQueue()
        futures: dict[Future[Any], Call] = {}
        try:
            while True:
                if self._closed:  # one layer's error ends the passes over others
                    raise WorkerError("executor: the measurement was stopped")
                for call in islice(calls, max(0, self._in_flight - len(futures)) if not lost else 0):
                    future = _submitted(executor, call)
                    if future is None:
                        lost.append(call)
                        break
                    futures[future] = call
                    self._waiting.add(future)
                    future.add_done_callback(done.put)
                if not futures:
                    return
                future = self._next(done)
                self._waiting.discard(future)
                yield futures.pop(future), future
        finally:  # an error in one, or Ctrl-C, must not wait for all the others
            for future in futures:
                future.cancel()

    def _next(self, done: "SimpleQueue[Future[Any]]") -> Future[Any]:
        """The next that is done; in between, whether the measurement was stopped, and a word where nothing comes."""
        while True:
            try:
                future = done.get(timeout=LOOK)
            except Empty:
                pass
            else:
                self._heard = time.monotonic()
                return future
            if self._closed:
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
            if self._closed:
                raise WorkerError("executor: the measurement was stopped") from error
            if executor is self._own and isinstance(executor, ThreadPoolExecutor):
                raise
            stopped = isinstance(error, CancelledError)
            said = (
                "it was cancelled: was the scheduler stopped, or the executor shut down?"
                if stopped
                else what_it_said(error)
            )
            raise WorkerError(
                f"executor: {call.said} failed on a worker ({said}). Workers need this version of "
                "mpq-plugins, the same files and memory for a few chunks; with a store what was finished is kept"
            ) from error

    def _replace(self, broken: Executor, lost: list[Call]) -> None:
        with self._lock:
            if self._executor is not broken:
                return
            if isinstance(self._own, ProcessPoolExecutor):
                raise WorkerError(
                    f"executor: {lost[0].said} ended its process (killed, out of memory?), and is not tried again; "
                    "with a store what was finished is kept"
                )
            if self._own is not None or (self._apart and isinstance(broken, ThreadPoolExecutor)):
                raise WorkerError("executor: its threads cannot be started; are there too many processes?")
            where = "in one new process" if self._apart else f"on {self._threads} threads of this process"
            warnings.warn(
                MeasureWarning(
                    f"executor: its processes are gone (killed, out of memory?); {lost[0].doing} what is left {where}"
                ),
                stacklevel=2,
            )
            self._executor = self._own = self._substitute()

    def _substitute(self) -> Executor:
        if not self._apart:
            return ThreadPoolExecutor(self._threads, THREADS)
        # One at a time: of several that run out of memory together each may have enough, and who is lost is known.
        self._in_flight = 1
        # A fork of a process with threads may hang.
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def is_here(executor: Executor | None) -> bool:
    """Whether work is done in this process, so that what it needs does not have to travel."""
    return executor is None or isinstance(executor, ThreadPoolExecutor)


def _submitted(executor: Executor, call: Call) -> Future[Any] | None:
    """What the executor makes of a call; None where it is broken."""
    try:
        return executor.submit(call.function, *call.arguments)
    except BrokenExecutor:
        return None
    except Exception as error:  # an executor of any kind
        raise WorkerError(f"executor: takes no work ({what_it_said(error)}); give one that is open") from error
