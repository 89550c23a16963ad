"""Code of others: what it raises, prints and changes."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest

from mpq_plugins.common.interrupts import Interrupted
from mpq_plugins.common.outsiders import contained, outsiders
from mpq_plugins.errors import SettingError, SourceError
from tests.fuzz.users import Weird


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("why"), "ValueError: why"), (SystemExit(0), "SystemExit: 0"), (Weird(), "Weird"),
        (RecursionError("deep"), "RecursionError: deep"), (GeneratorExit(), "GeneratorExit"),
    ],
)  # fmt: skip
def test_whatever_is_raised_is_explained(raised: BaseException, said: str) -> None:
    with pytest.raises(SourceError) as error, outsiders(lambda said: SourceError(f"mine: {said}")):
        raise raised
    assert str(error.value) == f"mine: {said}"
    assert error.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), Interrupted(), SettingError("ours")])
def test_ours_and_interrupts_pass(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as error, outsiders(SourceError):
        raise raised
    assert error.value is raised


def test_the_working_directory_and_stdout_are_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with outsiders(SourceError):
        monkeypatch.chdir(tmp_path / "elsewhere")
        print("aside")
    assert Path.cwd() == tmp_path
    contained(lambda: monkeypatch.chdir(tmp_path / "elsewhere"))()
    assert Path.cwd() == tmp_path
    assert capsys.readouterr() == ("", "aside\n")


def test_a_contained_function_is_still_that_function() -> None:
    assert contained(sys.exit).__name__ == "exit"
    assert contained(lambda a, b: a - b)(5, b=3) == 2


def test_threads_that_overlap_leave_stdout_and_the_folder_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    before, both, first_left = sys.stdout, Barrier(2, timeout=20), Event()

    def work(first: bool) -> None:
        with outsiders(SourceError):
            both.wait()
            os.chdir("inner" if first else tmp_path)
            assert sys.stdout is sys.stderr
            if not first:
                assert first_left.wait(20)
        if first:
            first_left.set()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, True), pool.submit(work, False)]:
            done.result()
    assert sys.stdout is before
    assert Path.cwd() == tmp_path
