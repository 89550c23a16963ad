"""What reaches a terminal, and what becomes of a command whose terminal is closed, full, narrow or ASCII."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpq_plugins import Plan, Uniform, measure
from tests.conftest import Ran

Mpq = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
HERE = "tests.cli.test_terminal"
COMMAND = [sys.executable, "-m", "mpq_plugins"]

# One name for every way to be obeyed, or to be taken for what it is not.
HOSTILE = (
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\r\x08\x7f", "a\nmpq: error: false", "\u202egpj", "\u2066\u200b",
    "\u2028", "[red]", "[/]", "[/b]", ":smile:", "{0}", "%s", "$x", "\U000e0001", "é",
)  # fmt: skip
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # the colours of rich, on a terminal


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint whose layers have such names, a plan, a table and a container of it."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(4, 4) for name in HOSTILE}
    save_file({**tensors, "\x1b[2Jleft": torch.ones(3, 3)}, folder / "\x1b[31mnet.safetensors")
    save_file({f"{name}.weight": torch.randn(4, 5) for name in HOSTILE}, folder / "other.safetensors")
    table = measure(folder / "\x1b[31mnet.safetensors")
    table.save(folder / "net.mpqt")
    Uniform(bits=4)(table).save(folder / "\x1b[31mplan.json")
    Uniform(bits=3)(table).save(folder / "plan3.json")
    return folder


def hostile_net() -> nn.Module:
    """A module with a hostile name in it."""
    net = nn.Module()
    for name in HOSTILE[:3]:
        net.add_module(name, nn.Linear(4, 4))
    return net


def hostile_failure(*_: Any) -> nn.Module:
    """A factory that fails with a message a terminal would obey."""
    raise ValueError("\x1b[2Jgone\r")


def hostile_score(_: nn.Module) -> dict[str, float]:
    """Scores whose names are hostile."""
    return {"\x1b[31mscore$x": 0.5}


def commands(folder: Path) -> Iterator[list[str]]:
    """Every command on them, to its end and to an error."""
    net, plan = str(folder / "\x1b[31mnet.safetensors"), str(folder / "\x1b[31mplan.json")
    for more in ([], ["--json"]):
        yield ["measure", net, *more]
        yield ["plan", net, "-o", str(folder / "\x1b[31mout.json"), *more]
        yield ["check", plan, net, "--backend", "torchao", *more]
        yield ["check", plan, str(folder / "other.safetensors"), *more]
        yield ["show", plan, *more]
        yield ["diff", plan, str(folder / "plan3.json"), *more]
        yield ["apply", net, plan, "-o", str(folder / "\x1b[31mout.safetensors"), *more]
        yield ["compress", net, plan, "-o", str(folder / "\x1b[31mout.mpq"), *more]
        yield ["inspect", str(folder / "\x1b[31mout.mpq"), "--plan", str(folder / "\x1b[31mgot.json"), *more]
        yield ["decompress", str(folder / "\x1b[31mout.mpq"), "-o", str(folder / "\x1b[31mback.safetensors"), *more]
        yield ["sweep", net, "--qem", "2,3", "-o", str(folder / "\x1b[31mout.csv"), *more]
        yield ["pareto", f"{HERE}:hostile_net", "--eval", f"{HERE}:hostile_score", "--budgets", "3", *more]
        yield ["plugins", *more]
        yield ["measure", f"{HERE}:hostile_failure", *more]
    yield ["show", str(folder / "net.mpqt")]
    yield ["show", str(folder / "\x1b[31mnone.json")]
    yield ["plan", net, "--skip", "\x1b[31mnothing"]
    yield ["plan", net, "-a", "\x1b[31mmine"]
    yield ["plan", net, "--\x1b[31m", "x"]
    yield ["\x1b[31mcommand"]
    yield ["plan", net, "--table", str(folder / "\x1b[31mplan.json")]
    yield ["pareto", net, "--plot", str(folder / "\x1b[31mout.gif")]


@pytest.mark.slow
def test_nothing_that_a_terminal_would_obey_is_printed_by_any_command(mpq: Mpq, files: Path) -> None:
    for arguments in commands(files):
        ran = mpq(*arguments)
        assert ran.code in (0, 2), (arguments, ran.err)
        for text in (ran.out, ran.err):
            raw = {one for one in text if one != "\n" and not one.isprintable()}
            assert not raw, (arguments, raw)
        assert all(line.startswith("mpq: ") for line in ran.err.splitlines()), (arguments, ran.err)
        errors = [line for line in ran.err.splitlines() if line.startswith("mpq: error: ")]
        assert len(errors) == (ran.code == 2 and not ran.out), (arguments, ran.err)  # `check --json` prints why


def test_json_is_ascii_and_says_each_name_exactly(mpq: Mpq, files: Path) -> None:
    ran = mpq("show", files / "\x1b[31mplan.json", "--json")
    assert ran.out.isascii()
    assert sorted(json.loads(ran.out)["layers"]) == sorted(HOSTILE)
    assert json.loads(mpq("measure", files / "\x1b[31mnet.safetensors", "--json").out)["layers"].keys() == {*HOSTILE}


def test_names_that_are_markup_or_patterns_to_others_are_shown_as_they_are(mpq: Mpq, files: Path) -> None:
    shown = mpq("show", files / "\x1b[31mplan.json").out
    for name in ("[red]", "[/]", "[/b]", ":smile:", "{0}", "%s", "$x", "é", r"\x1b[31mred", r"\x9b2J", r"\u202egpj"):
        assert f" {name} " in shown, name


def test_pictures_take_any_name(mpq: Mpq, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for ending in ("svg", "png"):
        ran = mpq("pareto", f"{HERE}:hostile_net", "--eval", f"{HERE}:hostile_score", "--budgets", "3,4", "--plot",
                  tmp_path / f"out.{ending}")  # fmt: skip
        assert ran.code == 0, ran.err
    assert "\x1b" not in (tmp_path / "out.svg").read_text()


def on_a_terminal(arguments: list[str], **environment: str) -> tuple[int, str]:
    """The exit code of a command and all that it writes to its terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(environment)
        os.execv(sys.executable, [*COMMAND, *arguments])
    written = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        written += piece
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def test_a_terminal_gets_colours_and_nothing_else_to_obey(files: Path) -> None:
    code, written = on_a_terminal(["show", str(files / "\x1b[31mplan.json")], COLUMNS="100", TERM="xterm")
    assert code == 0
    assert STYLE.search(written)
    plain = STYLE.sub("", written).replace("\r\n", "\n")
    assert {one for one in plain if one != "\n" and not one.isprintable()} == set()
    assert r"\x1b[31mred" in plain


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "term"), [("1", "xterm"), ("0", "dumb"), ("²", ""), ("-5", "unknown")])
def test_a_terminal_may_be_of_any_size_and_kind(files: Path, columns: str, term: str) -> None:
    code, written = on_a_terminal(["show", str(files / "plan3.json")], COLUMNS=columns, LINES=columns, TERM=term)
    assert code == 0, written
    assert "Traceback" not in written


@pytest.mark.slow
def test_progress_shows_names_that_are_markup(files: Path) -> None:
    code, written = on_a_terminal(["measure", str(files / "\x1b[31mnet.safetensors")], COLUMNS="100", TERM="xterm")
    assert code == 0, written
    assert "\x1b[31mred" not in written
    assert "\x9b" not in written


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line of a shell, in which `mpq` is ours."""
    line = command.replace("mpq ", f"{sys.executable} -m mpq_plugins ", 1)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, capture_output=True, text=True, check=False,
        errors="surrogateescape", env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


LOST = (
    ">&-",
    "2>&-",
    ">&- 2>&- <&-",
    "> /dev/full",
    "2> /dev/full",
    "> /dev/full 2> /dev/full",
    "| true",
    "2>&1 | true",
)


@pytest.mark.slow
@pytest.mark.parametrize("where", LOST)
def test_a_file_is_written_whatever_becomes_of_the_output(files: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "net.mpqt").write_bytes((files / "net.mpqt").read_bytes())
    ran = shell(f"mpq plan net.mpqt -a uniform --bits 4 -o out.json {where}", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.json").read_bytes() == (files / "\x1b[31mplan.json").read_bytes()
    assert "Traceback" not in ran.stderr + ran.stdout
    assert "ignored" not in ran.stderr + ran.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.mpqt", "out.json"]


@pytest.mark.parametrize("where", ["2>&-", ">&- 2> /dev/full", "2>&1 | true"])
def test_an_error_is_the_same_exit_whatever_becomes_of_the_output(tmp_path: Path, where: str) -> None:
    ran = shell(f"mpq show none.json {where}", tmp_path)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr + ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "code"), [(">&-", 0), ("| true", 0), ("| head -c 5", 0), ("> /dev/full", 2), ("> /dev/full 2>&-", 2)]
)
def test_a_printed_result_that_a_full_disk_loses_is_an_error(files: Path, where: str, code: int) -> None:
    ran = shell(f"mpq show plan3.json --json {where}", files)
    assert ran.returncode == code
    said = "mpq: error: stdout cannot be written (No space left on device); what was to be printed is lost\n"
    assert ran.stderr == (said if code and "2>" not in where else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1:strict"},
    ],
)  # fmt: skip
def test_results_do_not_depend_on_the_locale(files: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "nét.mpqt").write_bytes((files / "net.mpqt").read_bytes())
    ran = shell("mpq plan nét.mpqt -a uniform --bits 4 -o é.json", tmp_path, **locale)
    assert ran.returncode == 0, ran.stderr
    assert "wrote " in ran.stdout
    assert (tmp_path / "é.json").read_bytes() == (files / "\x1b[31mplan.json").read_bytes()
    printed = shell("mpq show é.json --json", tmp_path, **locale)
    assert json.loads(printed.stdout)["layers"] == dict.fromkeys(HOSTILE, 4)
    assert len(Plan.load(tmp_path / "é.json").layers) == len(HOSTILE)


PACKAGE = ROOT / "mpq_plugins"
DOORS = {"report/progress.py", "common/terminal.py", "common/text.py", "plans/plan.py"}  # the last prints its schema
ALLOWED = {  # file -> what it does with a stream, and why that is no way around
    "cli/main.py": {"write"},  # warnings and a traceback, printable already
}


def test_the_doors_are_where_they_are_said_to_be() -> None:
    assert [name for name in sorted(DOORS | set(ALLOWED)) if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_all_that_is_printed_goes_through_one_door(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    if name in DOORS:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("print", "click.echo", "click.secho", "click.style"), f"{name}: {called}"
        stream = re.fullmatch(r".*sys\.(?:stdout|stderr)\.(\w+)|.*sys\.__std\w+__\.(\w+)", called)
        if stream is not None and stream[1] not in ("isatty",):
            assert stream[1] in ALLOWED.get(name, set()), f"{name}: {called}"
