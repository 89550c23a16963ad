"""Signals as one exception, and where it is lost."""

import importlib
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import pytest

from mpq_plugins.common.interrupts import AGAIN, Interrupted, Interrupts


class Thing:
    """Something to let go of."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_raised_and_handlers_put_back(number: int) -> None:
    before = signal.getsignal(number)
    interrupts = Interrupts()

    def wait() -> None:
        with interrupts.raised():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(Interrupted) as stop:
        wait()
    assert stop.value.code == 128 + number
    assert interrupts.seen is stop.value
    assert signal.getsignal(number) is before


def test_one_that_is_swallowed_was_seen() -> None:
    interrupts = Interrupts()
    with interrupts.raised():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException:  # noqa: BLE001  # as careless code does
            pass
    assert interrupts.seen is not None


def test_one_that_python_drops_in_a_callback_is_sent_again(capsys: pytest.CaptureFixture[str]) -> None:
    def callback(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def wait() -> None:
        with Interrupts().raised():
            thing = Thing()
            reference = weakref.ref(thing, callback)
            del thing
            assert reference() is None
            time.sleep(5)

    with pytest.raises(Interrupted):
        wait()
    assert capsys.readouterr().err == ""


def module_of(name: str, lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that can be imported, and was not yet."""
    (folder / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_one_that_comes_during_an_import_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import os, signal, time", "os.kill(os.getpid(), signal.SIGINT)", "time.sleep(0.2)", "WHOLE = True"]
    module_of("imported_slowly", lines, tmp_path, monkeypatch)

    def wait() -> None:
        with Interrupts().raised():
            importlib.import_module("imported_slowly")
            time.sleep(5)

    with pytest.raises(Interrupted):
        wait()
    assert sys.modules["imported_slowly"].WHOLE


def test_an_import_that_does_not_end_is_interrupted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["import os, signal, time", "os.kill(os.getpid(), 2)", "time.sleep(60)"]
    module_of("never_imported", lines, tmp_path, monkeypatch)
    monkeypatch.setattr("mpq_plugins.common.interrupts.PATIENCE", 0.3)

    def wait() -> None:
        with Interrupts().raised():
            importlib.import_module("never_imported")

    with pytest.raises(Interrupted):
        wait()


def test_one_that_waits_is_not_sent_once_signals_are_handled_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["import os, signal", "os.kill(os.getpid(), signal.SIGINT)"]
    module_of("imported_last", lines, tmp_path, monkeypatch)
    interrupts = Interrupts()
    with interrupts.raised():
        importlib.import_module("imported_last")
    time.sleep(2 * AGAIN)  # a KeyboardInterrupt here would fail the test
    assert interrupts.seen is not None


def test_what_else_python_cannot_raise_is_reported_as_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def callback(_: object) -> None:
        raise ValueError("in a callback")

    before = sys.unraisablehook
    monkeypatch.setattr(sys, "__unraisablehook__", lambda what: print(what.exc_value))
    with Interrupts().raised():
        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
        assert reference() is None
    assert capsys.readouterr().out == "in a callback\n"
    assert sys.unraisablehook is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().raised():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)
