"""Progress where stderr is no terminal, remarks that can be silenced, and what is logged."""

import logging

import pytest

from mpq_plugins.report import progress
from mpq_plugins.report.progress import EVERY, alert, logged, progress_bar, quiet, say


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_line_every_ten_seconds_or_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measuring") as said:
        assert said is not None
        for second in range(60):
            clock.now = 100.0 + second
            said(f"layer{second}", second, 60)
        said("", 60, 60)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"mpq: measuring: {t / 60:.0%}, layer{t}, {t} s" for t in range(10, 60, 10)]


def test_nothing_of_what_is_done_before(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("measuring") as said:
        assert said is not None
        said("layer", 0, 3)
        clock.now += EVERY - 0.1
        said("layer", 1, 3)
        clock.now += 1
        said("", 3, 3)  # the end is no progress
    assert capsys.readouterr().err == ""


def test_quiet_silences_remarks_and_progress_but_not_alerts(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet():
        say("a remark")
        alert("a warning")
        with progress_bar("measuring") as said:
            assert said is None
    say("another remark")
    assert capsys.readouterr().err == "mpq: a warning\nmpq: another remark\n"


def test_what_is_logged_is_a_printable_line_while_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("mpq_plugins.measurement")
    with logged(logging.INFO):
        with logged(logging.INFO):  # asked for twice, it is said once
            logger.info("%s measured", "\x1b[31mconv1")
        logger.debug("layer by layer")
    logger.info("to nobody")
    assert capsys.readouterr().err == "mpq: measurement: \\x1b[31mconv1 measured\n"
    assert logging.getLogger("mpq_plugins").handlers == []
