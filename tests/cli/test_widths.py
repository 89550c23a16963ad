"""Every table at every width: no number is broken or cut, and no line is wider than what there is."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from torch import nn

from mpq_plugins import Affine, Budget, compress, measure
from mpq_plugins.cli.demo import run as demo
from tests.cli.test_terminal import STYLE, on_a_terminal
from tests.conftest import Ran

Mpq = Callable[..., Ran]
HERE = "tests.cli.test_widths"
WIDTHS = (60, 80, 100, 160)
WIDE = "400"
NUMBER = re.compile(r"[0-9][0-9.,]*(?:e[-+]?[0-9]+)?")
RUN_DEMO = demo.run_demo
PATHS = ("wrote ", "not saved", "  mpq ")  # a path and a command are not wrapped, so that they can be copied

pytestmark = pytest.mark.usefixtures("one_thread")


def encoder() -> nn.Module:
    """A module with the long names of transformers."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"attention_output_dense": nn.Linear(8, 8), "query": nn.Linear(8, 8)}) for _ in range(11)]
    return nn.ModuleDict({"encoder_of_sentences": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})


def score(_: nn.Module) -> dict[str, float]:
    """Two scores of many digits."""
    return {"accuracy %": 91.72576, "cross-entropy": 0.123456789}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("widths")
    scheme = Affine(granularity="per_channel", range="mse")
    table = measure(encoder(), scheme=scheme, bits=range(1, 9), metrics=("relative", "mse"), per_channel=True)
    table.save(folder / "net.mpqt")
    plan = Budget(average_bits=3.3)(table)
    plan.save(folder / "plan.json")
    compress(encoder(), plan, folder / "net.mpq")
    return folder


COMMANDS = {
    "plan": ("plan", "net.mpqt", "-a", "budget", "--average-bits", "3.3", "-v"),
    "show": ("show", "plan.json", "-v"),
    "show table": ("show", "net.mpqt", "-v"),
    "inspect": ("inspect", "net.mpq"),
    "measure": ("measure", f"{HERE}:encoder", "--bits", "1-8", "--metrics", "mse"),
    "sweep": ("sweep", "net.mpqt", "-a", "ptilmpq", "--alpha", "0.25,0.5", "--beta-other", "0.1,0.2"),
    "sweep, scored": ("sweep", "net.mpqt", "-a", "uniform", "--bits", "3,4", "--model", f"{HERE}:encoder", "--eval",
                      f"{HERE}:score"),
    "pareto": ("pareto", "net.mpqt", "--budgets", "2,3.5"),
    "plugins": ("plugins",),
    "demo": ("demo", "-o", "demo.json"),
}  # fmt: skip


@functools.cache
def run_demo_once() -> demo.DemoResult:
    return RUN_DEMO()


@pytest.fixture
def at_width(mpq: Mpq, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], str]:
    """What a command prints at a width, into a pipe."""
    monkeypatch.setattr(demo, "run_demo", lambda _: run_demo_once())

    def run(name: str, width: object) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        first, *others = COMMANDS[name]
        given = [files / word if (files / word).is_file() else word for word in others]
        ran = mpq(first, *(tmp_path / word if word == "demo.json" else word for word in given))
        assert ran.code == 0, ran.err
        return ran.out.replace(str(files), "").replace(str(tmp_path), "")

    return run


@functools.cache
def numbers(text: str) -> frozenset[str]:
    return frozenset(number.rstrip(".,") for number in NUMBER.findall(text))


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_are_whole_and_lines_fit(at_width: Callable[[str, object], str], name: str) -> None:
    known = numbers(at_width(name, WIDE))
    for width in WIDTHS:
        printed = at_width(name, width)
        lines = [line for line in printed.splitlines() if not line.startswith(PATHS)]
        assert max(map(cell_len, lines)) <= width, (width, max(lines, key=cell_len))
        assert numbers(printed) - known == set(), width
        rows = [line for line in lines if line.startswith("│")]
        assert len(rows) > 0 or name == "plugins"


def test_a_broken_number_is_found() -> None:
    """What the test above looks for would be there if cells were folded."""
    whole = "│ conv1 │ 0.01373 │"
    assert numbers("│ conv1 │ 0.0137 │\n│       │      3 │") - numbers(whole) == {"0.0137", "3"}


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_left_out_is_said(at_width: Callable[[str, object], str], width: int) -> None:
    headings = [f"{bits} bit" for bits in range(1, 9)]
    printed = at_width("show table", width)
    above, _, note = printed.partition("└")
    shown = [heading for heading in headings if f" {heading} " in above]
    assert [heading for heading in headings if f" {heading}" in " ".join(note.split())] == [
        heading for heading in headings if heading not in shown
    ]
    assert ("columns left out at this width:" in note) == (len(shown) < len(headings))


def test_a_pipe_is_as_wide_as_said_and_120_columns_where_nothing_is_said(
    at_width: Callable[[str, object], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at_width("show table", "no number") == at_width("show table", 120) == at_width("show table", "")
    assert at_width("show table", 80) != at_width("show table", 120)


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 100])
def test_a_terminal_gets_the_same_as_a_pipe_of_its_width(
    at_width: Callable[[str, object], str], files: Path, width: int
) -> None:
    code, written = on_a_terminal(["show", str(files / "plan.json"), "-v"], COLUMNS=str(width), TERM="xterm")
    assert code == 0
    assert STYLE.sub("", written).replace("\r\n", "\n") == at_width("show", width)
