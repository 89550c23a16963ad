"""One run of a command among others: what it holds, what stops it, and where it is."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpq_plugins import Plan, Uniform, measure
from mpq_plugins.common import registry
from mpq_plugins.common.files import claimed
from tests.conftest import Ran
from tests.helpers import outsider

Mpq = Callable[..., Ran]
USERS = "tests.fuzz.users"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint, a plan and nothing else."""
    torch.manual_seed(0)
    save_file({"fc.weight": torch.randn(4, 4)}, tmp_path / "net.safetensors")
    Uniform(bits=4)(measure(tmp_path / "net.safetensors")).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITING = {
    "measure": "measure none.safetensors -o out",
    "plan": "plan none.safetensors -o out",
    "plans": "plan none.safetensors --qem 2,3 -o out",
    "check": "check none.json none.safetensors --backend fx -o out",
    "apply": "apply none.safetensors none.json -o out",
    "demo": "demo -o out",
    "compress": "compress none.safetensors none.json -o out.mpq",
    "decompress": "decompress none.mpq -o out.safetensors",
    "inspect": "inspect none.mpq --plan out",
    "tune": "tune no.such:net --eval no.such:score -o out",
    "reconstruct": "reconstruct no.such:net none.json --calibrate no.such:batches -o out.safetensors",
    "sweep": "sweep none.safetensors -o out",
    "pareto": "pareto none.safetensors -o out",
    "picture": "pareto none.safetensors --plot out.png",
}


@pytest.mark.parametrize("command", list(WRITING))
def test_a_second_run_on_one_output_is_refused_before_anything_else(mpq: Mpq, folder: Path, command: str) -> None:
    words = WRITING[command].split()
    output = words[-1]
    before = names(folder)
    with claimed(Path(output)):
        ran = mpq(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(f"{output}: another run is writing it; wait for that, or name another output\n")
    assert ran.err.count("\n") == 1
    if command != "demo":  # which needs nothing
        assert mpq(*words).code == 2  # for there is no such source
    assert names(folder) == before


@pytest.mark.parametrize("place", ["/", ".", "..", "gone/..", ""])
@pytest.mark.parametrize("command", ["measure", "plan", "sweep", "pareto"])
def test_a_place_that_has_no_name_is_no_output(mpq: Mpq, folder: Path, command: str, place: str) -> None:
    before = names(folder)
    ran = mpq(command, "net.safetensors", "-o", place)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert names(folder) == before


RUN = "import mpq_plugins.common.interrupts; print('up', flush=True); from mpq_plugins.__main__ import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.03, 0.15, 0.4, 0.8, 1.4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_said_in_one_line_at_any_moment(folder: Path, number: signal.Signals, delay: float) -> None:
    command = [sys.executable, "-c", RUN, "plan", "net.safetensors", "-o", "out.json", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, cwd=folder, env=environment()) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    by = "" if number == signal.SIGINT else " by SIGTERM"
    if process.returncode:
        assert process.returncode == 128 + number, err
        assert err == f"mpq: interrupted{by}; nothing half written\n"
        assert out == ""
    else:  # it was finished
        assert err == ""
    assert names(folder) in (["net.safetensors", "plan.json"], ["net.safetensors", "out.json", "plan.json"])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_an_interrupt_that_careless_code_swallows_is_said_at_the_end(
    mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless() -> torch.nn.Module:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException:  # noqa: BLE001
            pass
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(outsider, "careless", careless, raising=False)
    ran = mpq("measure", "tests.helpers.outsider:careless", "--json")
    assert ran.code == 130
    assert ran.err == "mpq: interrupted; nothing half written\n"


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("raises", r"ValueError: \x1b[2J"), ("leaves", "SystemExit: 0"), ("weird", "Weird"),
        ("deep", "RecursionError: "), ("score", "returned a float"), ("batches", "returned a list"),
    ],
)  # fmt: skip
def test_what_a_factory_does_is_named_and_is_one_line(mpq: Mpq, folder: Path, factory: str, said: str) -> None:
    before = names(folder)
    ran = mpq("plan", f"{USERS}:{factory}", "-o", "out.json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"mpq: error: {USERS}:{factory}: ")
    assert ran.err.count("\n") == 1
    assert said in ran.err
    assert names(folder) == before


def test_a_factory_that_prints_and_leaves_the_directory_changes_no_result(mpq: Mpq, folder: Path) -> None:
    ran = mpq("plan", f"{USERS}:moves", "-a", "uniform", "--bits", 4, "-o", "out.json", "--json")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("{")
    assert len(Plan.load(folder / "out.json").layers) == 2
    assert Path.cwd() == folder


class Prints(torch.nn.Linear):
    """A layer that prints when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("in forward")
        return super().forward(x)


def printing() -> torch.nn.Module:
    """A module that prints when it runs."""
    return torch.nn.Sequential(torch.nn.Linear(6, 4), Prints(4, 3))


@pytest.mark.parametrize(
    "command",
    [
        "measure HERE:printing --input-shape 1,6",
        "measure HERE:printing --sensitivity output_mse --calibrate USERS:batches",
        "pareto HERE:printing --eval USERS:score --calibrate USERS:batches --budgets 3",
        "sweep HERE:printing --eval USERS:runs --qem 2",
    ],
)
@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_json_is_all_that_is_on_stdout(mpq: Mpq, folder: Path, command: str) -> None:
    ran = mpq(*command.replace("HERE", "tests.cli.test_runs").replace("USERS", USERS).split(), "--json")
    assert ran.code == 0, ran.err
    json.loads(ran.out)
    assert "in forward" in ran.err


def cyclic() -> torch.nn.Module:
    """A module that contains itself."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net.add_module("again", net)
    return net


def test_a_module_that_contains_itself_is_named(mpq: Mpq, folder: Path) -> None:
    ran = mpq("plan", "tests.cli.test_runs:cyclic")
    assert (ran.code, ran.out) == (2, "")
    assert "returned a module that cannot be looked into (RecursionError: " in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("command", ["plan net.safetensors -o out.json", "show plan.json", "demo"])
def test_a_working_directory_that_is_gone_is_one_line(mpq: Mpq, folder: Path, command: str) -> None:
    gone = folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    ran = mpq(*command.split())
    os.chdir(folder)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("mpq: error: the working directory cannot be found")
    assert ran.err.count("\n") == 1


def test_several_plans_are_written_together_or_not_at_all(mpq: Mpq, folder: Path) -> None:
    before = names(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (620, limits[1]))  # bytes: enough for the plan with fewer parameters
    try:
        ran = mpq("plan", "net.safetensors", "--qem", "2,3.12345678901234567890", "-o", "plans")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.code in (0, 2)
    assert names(folder) == (before if ran.code else sorted([*before, "plans"]))


def test_an_input_that_no_memory_holds_is_one_line(mpq: Mpq, folder: Path) -> None:
    ran = mpq("measure", "tests.fuzz.users:net", "--input-shape", "65536,65536,65536,65536", "-o", "out.mpqt")
    assert ran.code == 2
    assert "input-shape: [65536, 65536, 65536, 65536] has 18,446,744,073,709,551,616 values" in ran.err
    ran = mpq("measure", "tests.fuzz.users:net", "--input-shape", ",".join(["65536"] * 5000), "-o", "out.mpqt")
    assert ran.code == 2
    assert "has more than 2^127 values" in ran.err


class Failing(outsider.FirstLast):
    """An allocator that fails."""

    def __call__(self, table: Any) -> Any:
        raise KeyError("\x1b[31mwhy")


class Odd(outsider.FirstLast):
    """An allocator that returns what is no plan."""

    def __call__(self, table: Any) -> Any:
        return table


class Unnamed:
    """No allocator at all."""


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Failing, "'firstlast' failed (KeyError: "), (Odd, "'firstlast' returned a LayerTable and no plan"),
        (Unnamed, "is no dataclass"), (None, "is no dataclass"),
    ],
)  # fmt: skip
def test_an_outsiders_allocator_that_fails_is_named(
    mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any, said: str
) -> None:
    monkeypatch.setattr(registry, "load", lambda group, name: plugin)
    ran = mpq("plan", "net.safetensors", "-a", "firstlast", *(["--edge", 4] if plugin in (Failing, Odd) else []))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("mpq: error: allocators: ")
    assert said in ran.err


@pytest.mark.parametrize("capabilities", [{}, {"CAPABILITIES": None}, {"CAPABILITIES": {"bits": (4,)}}])
def test_an_adapter_without_capabilities_is_named(
    mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any]
) -> None:
    monkeypatch.setattr(registry, "load", lambda group, name: SimpleNamespace(**capabilities))
    ran = mpq("check", "plan.json", "net.safetensors", "--backend", "mine", "-o", "out.json")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "mpq: error: adapters: 'mine' states no CAPABILITIES, so that no plan can be checked for it\n"


def test_a_fault_of_our_own_is_one_line_too(mpq: Mpq, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Plan:
        raise LookupError("\x1b[31mnot thought of")

    monkeypatch.setattr(Plan, "load", broken)
    ran = mpq("show", "plan.json")
    assert (ran.code, ran.out) == (70, "")
    assert ran.err.startswith(r"mpq: internal error: LookupError: \x1b[31mnot thought of; please report this")
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("MPQ_DEBUG", "1")
    assert "in broken" in mpq("show", "plan.json").err
