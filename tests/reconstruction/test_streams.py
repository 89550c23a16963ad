"""Runs that stop and go on: what happens in which order, errors, and threads that are gone at the end."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpq_plugins.errors import SettingError
from mpq_plugins.reconstruction.streams import Stream, current


def begun(run: Callable[[], object]) -> Stream:
    """A run that has come to where it stops first."""
    stream = Stream(run)
    stream.start()
    return stream


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def stops(*places: str, said: list[Any]) -> Callable[[], None]:
    """A run that stops at each place, and notes what it is told there."""

    def run() -> None:
        for place in places:
            stream = current()
            assert stream is not None
            said.append((place, stream.stop(place, f"value of {place}")))

    return run


def test_a_run_stops_goes_on_and_ends() -> None:
    said: list[Any] = []
    stream = begun(stops("a", "b", said=said))
    assert (stream.at, stream.value, said) == ("a", "value of a", [])
    stream.go_on(1)
    assert (stream.at, stream.value, said) == ("b", "value of b", [("a", 1)])
    stream.go_on()
    assert (stream.at, stream.value, said) == (None, None, [("a", 1), ("b", None)])
    stream.close()


def test_runs_take_turns_in_the_order_that_the_caller_says() -> None:
    said: list[str] = []

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            for k in range(3):
                said.append(f"{name}{k}")
                current().stop(k, None)  # type: ignore[union-attr]

        return work

    streams = {name: begun(run(name)) for name in "xyz"}
    for name in "zxyyxzzyx":
        streams[name].go_on()
    for stream in streams.values():
        stream.close()
    assert said == ["x0", "y0", "z0", "z1", "x1", "y1", "y2", "x2", "z2"]


def test_only_one_works_at_a_time() -> None:
    working, most = [0], [0]

    def work() -> None:
        for _ in range(20):
            working[0] += 1
            most[0] = max(most[0], working[0])
            for _ in range(200):
                pass
            working[0] -= 1
            current().stop("here", None)  # type: ignore[union-attr]

    streams = [begun(work) for _ in range(5)]
    while any(stream.at is not None for stream in streams):
        for stream in streams:
            if stream.at is not None:
                stream.go_on()
    assert most == [1]
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_what_the_run_raises_later_comes_to_who_let_it_go_on(kind: type[BaseException]) -> None:
    def run() -> None:
        current().stop("here", None)  # type: ignore[union-attr]
        raise kind("inside")

    stream = begun(run)
    with pytest.raises(kind, match="inside"):
        stream.go_on()
    assert stream.at is None
    stream.close()


def test_what_the_run_raises_at_once_comes_to_who_starts_it() -> None:
    def run() -> None:
        raise ValueError("inside")

    stream = Stream(run)
    with pytest.raises(ValueError, match="inside"):
        stream.start()
    assert stream.at is None
    stream.close()


def test_a_run_that_never_started_is_closed_too() -> None:
    Stream(lambda: None).close()


def test_where_there_are_no_threads_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(SettingError, match="larger batches"):
        Stream(lambda: None).start()


def test_closing_ends_a_run_that_waits_through_what_it_has_to_do_at_the_end() -> None:
    said: list[str] = []

    def run() -> None:
        try:
            current().stop("here", None)  # type: ignore[union-attr]
            said.append("went on")
        except Exception:  # noqa: BLE001  # a model that catches everything does not catch this
            said.append("caught")
        finally:
            said.append("cleaned up")

    stream = begun(run)
    stream.close()
    assert said == ["cleaned up"]
    stream.close()  # again does nothing


def test_closing_ends_a_run_that_stops_over_and_over() -> None:
    def run() -> None:
        while True:
            try:
                current().stop("here", None)  # type: ignore[union-attr]
            finally:
                current().stop("and on the way out", None)  # type: ignore[union-attr]

    begun(run).close()


def test_each_run_knows_its_own_stream_and_the_caller_has_none() -> None:
    seen: list[Stream | None] = []

    def run() -> None:
        seen.append(current())
        current().stop("here", None)  # type: ignore[union-attr]
        seen.append(current())

    one, other = begun(run), begun(run)
    for stream in (one, other):
        stream.go_on()
        stream.close()
    assert seen == [one, other, one, other]
    assert current() is None


def test_runs_take_no_gradients_and_leave_the_callers_mode() -> None:
    modes: list[bool] = []
    stream = begun(lambda: modes.append(torch.is_grad_enabled()))
    stream.close()
    assert modes == [False]
    assert torch.is_grad_enabled()


def test_notes_go_when_the_run_ends() -> None:
    def run() -> None:
        current().notes["place"] = torch.ones(3)  # type: ignore[union-attr]
        current().stop("here", None)  # type: ignore[union-attr]

    stream = begun(run)
    assert list(stream.notes) == ["place"]
    stream.go_on()
    assert not stream.notes
    stream.close()
