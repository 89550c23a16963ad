"""Streams that outlive what becomes of them."""

import io
import logging
import sys

import pytest

from mpq_plugins.common.terminal import Lasting, lasting_streams


class Failing(io.StringIO):
    """A stream whose disk is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_dropped_and_remembered() -> None:
    stream = Lasting(Failing())
    assert stream.write("lost") == 4
    stream.flush()
    assert stream.failure is not None
    assert stream.failure.errno == 28
    assert not stream.isatty()


def test_what_can_be_written_is() -> None:
    inside = io.StringIO()
    stream = Lasting(inside)
    print("kept", file=stream)
    assert (inside.getvalue(), stream.failure) == ("kept\n", None)


def test_streams_are_put_back_and_write_any_character(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with lasting_streams():
        sys.stdout.write("\udc80")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "\\udc80"


def test_what_other_packages_log_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("another package's")
    with lasting_streams():
        logger.warning("layer %s", "\x1b[31mred")
    assert capsys.readouterr().err == "layer \\x1b[31mred\n"
