"""`mpq tune` as its user meets it: quiet, nothing left behind, one clear line for anything refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Plan, Uniform, apply, measure, synthetic_batches
from tests.conftest import Ran
from tests.helpers.nets import conv_net

pytest.importorskip("mpq_plugins.adapters.inc")
Mpq = Callable[..., Ran]
NET, SCORE = "tests.cli.test_tune:net", "tests.cli.test_tune:score"


def net() -> nn.Module:
    return conv_net()


def score(model: nn.Module) -> dict[str, float]:
    """The more different weights, the better; it prints, as evaluations do."""
    print("evaluating")
    return {"weights": float(model.get_submodule("conv2").weight.unique().numel()), "other": -1.0}  # type: ignore[operator]


def failing(model: nn.Module) -> float:
    raise ValueError("no data")


def negative(model: nn.Module) -> float:
    return -1.0


def test_the_first_plan_that_is_good_is_written(mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = mpq("tune", NET, "--eval", SCORE, "--qem", "1.5,3,20", "--tolerable-loss", 0.7, "-o", "plan.json")
    assert ran.code == 0
    assert ran.err == ""
    assert "mixquant qem=3.0" in ran.out
    assert "wanted: at least" in ran.out
    assert "INFO" not in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load("plan.json").allocator.name == "mixquant"


def test_json_holds_the_trials_and_nothing_else_is_printed(mpq: Mpq, tmp_path: Path) -> None:
    arguments = ("tune", NET, "--eval", SCORE, "--qem", "1.5,20", "--tolerable-loss", 0.7, "--json")
    ran = mpq(*arguments, "-o", tmp_path / "plan.json")
    document = json.loads(ran.out)
    sizes = [trial["total_bytes"] for trial in document["trials"]]
    assert sizes == sorted(sizes)
    assert document["kept"] == next(trial for trial in document["trials"] if trial["met"])
    assert document["kept"]["allocator"] == Plan.load(tmp_path / "plan.json").allocator.model_dump()
    assert "evaluating" in ran.err


def batches() -> list[Tensor]:
    return list(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(4)).split(8))


def output(model: nn.Module) -> float:
    """About 1 for the float model, and another number for each quantized one."""
    with torch.no_grad():
        return float(model(batches()[0]).norm() / net()(batches()[0]).norm())


CALIBRATED = ("--calibrate", "tests.cli.test_tune:batches")


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ((), "nearest"),
        (CALIBRATED, "compensated"),
        ((*CALIBRATED, "--rounding", "nearest"), "nearest, corrected"),
        (("--synthetic", "8,3,8,8"), "compensated"),
    ],
)
def test_trials_are_rounded_as_the_options_say(mpq: Mpq, words: tuple[str, ...], label: str) -> None:
    tuned = ("tune", NET, "--eval", "tests.cli.test_tune:output", "-a", "uniform", "--bits", 3, "--tolerable-loss", 0.9)
    ran = mpq(*tuned, *words, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["rounding"] == label
    given = {"": None, "--calibrate": batches(), "--synthetic": synthetic_batches(net(), (8, 3, 8, 8))}
    rounding = "nearest" if label.startswith("nearest") else "compensated"
    plan = Uniform(bits=3)(measure(net(), bits=(3,)))
    expected = apply(net(), plan, calibrate=given[words[0] if words else ""], rounding=rounding)  # type: ignore[arg-type]
    assert document["trials"][0]["score"] == output(expected)
    assert f"{NET}, {label}" in mpq(*tuned, *words).out.splitlines()[0]


def test_where_none_is_good_enough_the_trials_are_shown(mpq: Mpq, tmp_path: Path) -> None:
    arguments = ("tune", NET, "--eval", SCORE, "--qem", "20,30", "-o", tmp_path / "plan.json")
    ran = mpq(*arguments)
    assert ran.code == 2
    assert "mixquant qem=20.0" in ran.out
    assert "none of" in ran.err
    document = json.loads(mpq(*arguments, "--json").out)
    assert document["kept"] is None
    assert document["trials"]
    assert not (tmp_path / "plan.json").exists()


def test_settings_of_the_same_plan_are_one_trial_and_that_is_said(mpq: Mpq) -> None:
    ran = mpq("tune", NET, "--eval", SCORE, "--qem", "0.001,0.002", "--tolerable-loss", 0.9)
    assert "the 2 settings make 1 different plans" in ran.err


def test_without_values_the_allocators_own_grid_is_tried(mpq: Mpq) -> None:
    ran = mpq("tune", NET, "--eval", SCORE, "-a", "ptilmpq", "--scheme", "affine", "--tolerable-loss", 0.9, "--json")
    assert json.loads(ran.out)["trials"][0]["allocator"]["parameters"]["alpha"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((NET, "--eval", SCORE, "--qem", "20"), "none of 1 trial meets the criterion"),
        ((NET, "--eval", "tests.cli.test_tune:failing", "--qem", "2"), "of the float model: the evaluation failed"),
        ((NET, "--eval", "tests.cli.test_tune:negative", "--qem", "2"), "score above 0"),
        ((NET, "--eval", SCORE, "--tolerable-loss", "nan"), "tolerable_loss: nan is not allowed"),
        ((NET, "--eval", SCORE, "--rounding", "learned"), "rounding: 'learned' needs calibration inputs"),
        ((NET, "--eval", SCORE, *CALIBRATED, "--synthetic", "4,3,8,8"), "give one"),
        ((NET, "--eval", SCORE, "--backend", "torchao"), "torchao has no tuner"),
        ((NET, "--eval", SCORE, "--backend", "inc_classic"), "inc-classic"),
        ((NET, "--eval", SCORE, "--backend", "absent"), "'absent' is not installed"),
        ((NET,), "Missing option '--eval'"),
        (("net.safetensors", "--eval", SCORE), "package.module:function"),
        ((NET, "--eval", SCORE, "--qem", "-1"), "qem: -1"),
        ((NET, "--eval", SCORE, "-o", "nowhere/plan.json"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = mpq("tune", *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
