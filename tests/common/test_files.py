"""Files that are whole or not there, and whose they are while they are written."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpq_plugins.common.files import atomic_directory, atomic_path, claimed, write_text
from mpq_plugins.errors import SettingError, SourceError
from tests.helpers.says import naming

# Another process that holds what it writes, and says so, until it is told to go on.
WRITER = """
import sys
from pathlib import Path
from mpq_plugins.common.files import atomic_directory, atomic_path, claimed
with {what}(Path("target")) as temporary:
    if {what} is atomic_path:
        temporary.write_text("half")
    elif {what} is atomic_directory:
        (temporary / "part").write_text("half")
    print("holding", flush=True)
    sys.stdin.read()
"""
WAYS = ("atomic_path", "atomic_directory", "claimed")


@contextmanager
def writer(folder: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Such a process, which holds `target` in the folder."""
    code = WRITER.replace("{what}", what)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "holding\n"
        yield process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gets_its_content_and_an_ordinary_mode(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "new")
    (tmp_path / "b.json").touch()
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_interrupting_a_write_leaves_the_old_file_whole(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise failure

    with pytest.raises(failure):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere/a\.json: cannot write there"):
        write_text(tmp_path / "nowhere" / "a.json", "x")
    with pytest.raises(SourceError, match="is a directory"):
        write_text(tmp_path, "x")


@pytest.mark.parametrize("what", WAYS)
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, what: str) -> None:
    with writer(tmp_path, what) as process:
        process.send_signal(signal.SIGKILL)
    assert [name.startswith(".mpq-") for name in names(tmp_path)] == [True]
    with claimed(tmp_path / "other"):
        pass
    assert len(names(tmp_path)) == 1  # it is another file's
    with claimed(tmp_path / "target"):
        write_text(tmp_path / "target", "whole")
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("what", WAYS)
def test_what_a_living_run_writes_stays(tmp_path: Path, what: str) -> None:
    with writer(tmp_path, what) as process:
        held = names(tmp_path)
        assert len(held) == 1
        write_text(tmp_path / "target", "mine")
        assert names(tmp_path) == sorted([*held, "target"])
        (tmp_path / "target").unlink()
        process.communicate("")
        assert process.returncode == 0
    assert names(tmp_path) == ([] if what == "claimed" else ["target"])


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with writer(tmp_path, "claimed"):
        for target in (tmp_path / "target", tmp_path / "link" / "target"):
            with pytest.raises(SettingError, match="target: another run is writing it"), claimed(target):
                pass
        with claimed(tmp_path / "another"):
            pass
    with claimed(tmp_path / "target"):
        pass
    assert names(tmp_path) == ["link"]


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with atomic_directory(tmp_path / "target") as temporary:
        (temporary / "a").write_text("new")
    assert names(tmp_path / "target") == ["a"]

    def fail() -> None:
        with atomic_directory(tmp_path / "other") as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ["target"]
    with (
        pytest.raises(SourceError, match=naming("target", "Directory not empty")),
        atomic_directory(tmp_path / "target"),
    ):
        pass
    assert names(tmp_path / "target") == ["a"]


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(SourceError, match=r"a\.json: cannot write it \(File too large\)"):
            write_text(tmp_path / "a.json", "x")
        with (
            pytest.raises(SourceError, match=r"b: cannot write it \(File too large\)"),
            atomic_directory(tmp_path / "b") as temporary,
        ):
            (temporary / "part").write_text("x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "x\ud800", "loop/a", "file/a"])
def test_names_that_no_file_can_have_are_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for hold in (claimed, atomic_path, atomic_directory):
        with pytest.raises(SourceError, match="cannot write there"), hold(tmp_path / name):
            pytest.fail("the work has begun")
    assert names(tmp_path) == ["file", "loop"]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "whole")
    assert names(tmp_path) == ["x" * 255]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    with claimed(tmp_path / "target"):
        (lock,) = [name for name in names(tmp_path) if name.endswith(".lock")]
    (tmp_path / lock).symlink_to("precious")
    with pytest.raises(SourceError, match="cannot write there"), claimed(tmp_path / "target"):
        pass
    assert (tmp_path / "precious").read_text() == "old"
    assert os.path.lexists(tmp_path / lock)


def test_halves_of_surrogate_pairs_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"a\.json: cannot hold '\\ud800'"):
        write_text(tmp_path / "a.json", "x\ud800")
    assert names(tmp_path) == []
