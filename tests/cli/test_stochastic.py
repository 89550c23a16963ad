"""`--stochastic SEED`: in the plan, in what is shown and applied, and refused where something else rounds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mpq_plugins import Plan, apply
from mpq_plugins.cli.demo.net import digit_net
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("one_thread")

Mpq = Callable[..., Ran]

DEMO = "mpq_plugins.cli.demo.net"
NET, BATCHES = f"{DEMO}:digit_net", f"{DEMO}:calibration_digits"


@pytest.fixture
def plan(mpq: Mpq, tmp_path: Path) -> Path:
    file = tmp_path / "plan.json"
    ran = mpq("plan", NET, "--bits", 3, "--granularity", "per_channel", "--stochastic", 7, "-o", file)
    assert ran.code == 0, ran.err
    return file


def test_the_plan_has_the_seed_and_is_applied_by_it(mpq: Mpq, plan: Path, tmp_path: Path) -> None:
    made = Plan.load(plan)
    assert {getattr(layer.scheme, "stochastic", None) for layer in made.layers} == {7}
    assert "stochastic" in mpq("show", plan, "-v").out
    source, out = tmp_path / "net.mpq", tmp_path / "back.safetensors"
    assert mpq("compress", NET, plan, "-o", source).code == 0
    assert mpq("decompress", source, "-o", out).code == 0
    expected = apply(digit_net(), made).state_dict()
    assert all(expected[name].equal(value) for name, value in load_file(out).items() if name.endswith("weight"))


@pytest.mark.parametrize("rounding", ["compensated", "learned"])
def test_other_roundings_are_refused_in_a_line(mpq: Mpq, plan: Path, rounding: str) -> None:
    words = ("--eval", f"{DEMO}:accuracy", "--calibrate", BATCHES)
    ran = mpq("evaluate", NET, plan, *words, "--rounding", rounding)
    assert ran.code == 2
    assert f"rounded stochastically, and {rounding} rounding" in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert mpq("evaluate", NET, plan, *words, "--rounding", "nearest").code == 0


@pytest.mark.parametrize("seed", ["-1", "1.5", "x"])
def test_what_is_no_seed_is_refused(mpq: Mpq, tmp_path: Path, seed: str) -> None:
    ran = mpq("plan", NET, "--bits", 3, "--stochastic", seed, "-o", tmp_path / "plan.json")
    assert ran.code == 2
    assert "stochastic" in ran.err
    assert not list(tmp_path.iterdir())
