"""Signals as one exception, and where it is lost."""

import os
import signal
import sys
import time
import weakref

import pytest

from mpq_plugins.common.interrupts import Interrupted, Interrupts


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
