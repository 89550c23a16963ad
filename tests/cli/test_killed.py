"""Every kind of run killed in the middle: the same command goes on to the same bytes, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Uniform, measure
from mpq_plugins.measurement import measure as measuring
from mpq_plugins.measurement import units
from mpq_plugins.reconstruction import brecq
from tests.conftest import Ran

pytestmark = pytest.mark.slow

HERE = "tests.cli.test_killed"
ROOT = Path(__file__).parents[2]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def batches() -> list[Tensor]:
    return list(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).split(8))


def counts() -> None:
    """Leave a mark of a call, and kill this process at that which is asked for; what was done is kept by then."""
    with Path(os.environ["CALLS"]).open("ab") as calls:
        calls.write(b".")
        done = calls.tell()
    if done == int(os.environ["KILLED_AT"]):
        time.sleep(0.5)  # others may be writing it yet
        os.kill(os.getpid(), signal.SIGKILL)


def score(model: nn.Module) -> float:
    """How close the model is to the float one."""
    counts()
    inputs = batches()[0]
    with torch.no_grad():
        return -float((model(inputs) - net()(inputs)).abs().sum())


def output(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's own output."""
    counts()
    result: Tensor = model(batch)
    return result


def counted(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Count the units of a measurement, of which there are to be several, or the blocks of a reconstruction."""
    places: dict[str, tuple[Any, str]] = {"reconstruct": (brecq, "learn")}
    module, name = places.get(kind, (measuring, "unit_sums"))
    whole = getattr(module, name)

    def call(*given: Any) -> Any:
        counts()
        return whole(*given)

    if kind in ("measure", "plan", "reconstruct"):
        patch.setattr(units, "SMALLEST", 64)
        patch.setattr(module, name, call)


# The command, and the call at which it is killed.
RUNS = {
    "measure": (f"measure {HERE}:net --granularity per_channel --workers 1 -o OUT.mpqt", 3),
    "plan": (f"plan {HERE}:net --granularity per_channel --table OUT.mpqt", 3),
    "sensitivity": (
        f"measure {HERE}:net --bits 2-3 --sensitivity kl --calibrate {HERE}:batches --output-of {HERE}:output "
        "-o OUT.mpqt", 12,
    ),
    "sweep": (f"sweep {HERE}:net --qem 2,3,4,6,9 --eval {HERE}:score -o OUT.csv", 4),
    "pareto": (f"pareto {HERE}:net --budgets 3 --bits 2-4 --eval {HERE}:score -o OUT.csv", 4),
    "reconstruct": (f"reconstruct {HERE}:net PLAN --calibrate {HERE}:batches --steps 3 -o OUT.safetensors", 2),
}  # fmt: skip
KILLED = f"""
import sys
import pytest
from {HERE} import counted
from mpq_plugins.__main__ import main
counted(sys.argv.pop(1), pytest.MonkeyPatch())
main()
"""


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    kind: str, tmp_path: Path, mpq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, killed_at = RUNS[kind]
    plan, calls = tmp_path / "plan.json", tmp_path / "calls"
    Uniform(bits=3)(measure(net(), bits=(3,))).save(plan)
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("KILLED_AT", "0")

    def command(name: str) -> list[str]:
        calls.write_bytes(b"")
        return words.replace("OUT", str(tmp_path / name)).replace("PLAN", str(plan)).split()

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILLED_AT": str(killed_at), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", KILLED, kind, *command("out")]
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert (killed.returncode, calls.stat().st_size) == (-signal.SIGKILL, killed_at), killed.stderr

    counted(kind, monkeypatch)
    ran = mpq(*command("whole"))
    assert ran.code == 0, ran.err
    every = calls.stat().st_size
    (suffix,) = (path.suffix for path in tmp_path.iterdir() if path.stem == "whole")
    result, store = tmp_path / f"out{suffix}", tmp_path / f"out{suffix}.partial"
    assert store.exists()
    assert not result.exists()
    ran = mpq(*command("out"))
    assert ran.code == 0, ran.err
    assert calls.stat().st_size < every
    assert result.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["calls", "plan.json", f"whole{suffix}", f"out{suffix}"])
