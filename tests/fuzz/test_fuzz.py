"""A small run of the fuzzer in the suite, and that it finds what it looks for."""

import functools
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from mpq_plugins.cli import main as cli
from tests.fuzz.case import Case
from tests.fuzz.judge import faults
from tests.fuzz.place import one, workplace

INPUTS = 150
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Path, Path]]:
    """Whole files, and room for inputs."""
    with workplace() as made:
        yield made


@pytest.mark.slow
def test_no_odd_input_is_more_than_one_clear_line(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQ_DEBUG", "1")
    monkeypatch.setattr("mpq_plugins.common.registry.entry_points", functools.cache(entry_points))
    found = {}
    for number in range(INPUTS):
        faulty, case, ran = one(f"suite:{number}", *place)
        if faulty:
            found[number] = (faulty, case.arguments, ran)
    assert found == {}


def says(text: str, code: int = 2) -> Callable[[list[Path]], int]:
    """A run that writes this to stderr."""

    def run(files: list[Path]) -> int:
        sys.stderr.write(text)
        return code

    return run


def writes(name: str) -> Callable[[list[Path]], int]:
    """A run that writes a file and then fails."""

    def run(files: list[Path]) -> int:
        Path(name).write_text("half")
        return says("mpq: error: no\n")(files)

    return run


def fails(files: list[Path]) -> int:
    """A run with a fault of ours."""
    return cli._internal(LookupError("not thought of"))


BROKEN: dict[str, Callable[[list[Path]], int]] = {
    "internal: ": fails,
    "exit 3": says("", 3),
    "raw characters: ": says("mpq: error: \x1b[31m\n"),
    "more than one error line": says("mpq: error: a\nmpq: error: b\n"),
    "a line on stderr that is not ours": says("mpq: error: a\nb\n"),
    "no error line": says("mpq: a remark\n"),
    "memory: ": says("mpq: error: not enough memory (...)\n"),
    "no JSON on stdout": says("", 0),
    "left behind after an error: 'out.json'": writes("out.json"),
    "temporary left behind": writes(".mpq-0123456789abcdef-01234567.tmp"),
    "input changed: plan.json": writes("plan.json"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setenv("MPQ_DEBUG", "1")
    (tmp_path / "plan.json").write_text("{}")
    case = Case(("show", "plan.json", "--json"), ("plan.json",))
    monkeypatch.setattr(cli, "_run", says("mpq: error: whole\n"))
    assert faults(case, tmp_path)[0] == []
    monkeypatch.setattr(cli, "_run", BROKEN[what])
    found, ran = faults(case, tmp_path)
    assert any(one.startswith(what) for one in found), (found, ran)
