import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples import train_demo
from mpq_plugins import LayerTable, Plan, verify
from mpq_plugins.cli.demo import run
from mpq_plugins.cli.demo.net import DIGITS, WEIGHTS, accuracy, calibration_digits, digit_net, unseen_digits
from mpq_plugins.cli.demo.run import SIZES, DemoResult
from tests.conftest import Ran


@pytest.fixture(scope="module")
def result() -> DemoResult:
    return run.run_demo()


def test_the_shipped_files_are_small_and_the_network_reads_digits() -> None:
    folder = Path(train_demo.__file__).parent.parent / "mpq_plugins" / "cli" / "demo"
    assert sum((folder / name).stat().st_size for name in (WEIGHTS, DIGITS)) < 400_000
    images, labels = unseen_digits()
    assert images.shape == (797, 1, 8, 8)
    assert (digit_net()(images).argmax(1) == labels).float().mean() > 0.98


def test_the_demo_tries_every_plan_and_keeps_a_good_one(result: DemoResult) -> None:
    exact, *trials = result.trials
    assert [trial.name for trial in trials] == [
        f"{name} {bits}" for bits in SIZES for name in ("Budget", "PTILMPQ", "MixQuant", "uniform")
    ]
    for trial in trials:
        assert trial.plan is not None
        assert trial.plan.size().average_bits <= int(trial.name.split()[-1])
    assert accuracy(digit_net()) == exact.scores
    good = [trial for trial in trials if trial.scores["accuracy"] >= exact.scores["accuracy"] - 0.005]
    kept = next(trial for trial in trials if trial.name == result.kept)
    assert kept in good
    assert kept.plan is result.plan
    smallest = min(trial.name.split()[-1] for trial in good)
    assert result.kept.endswith(smallest)
    others = [trial for trial in good if trial.name.endswith(smallest)]
    assert kept.scores["cross_entropy"] == min(trial.scores["cross_entropy"] for trial in others)


def test_the_plans_are_compensated_on_digits_that_the_scores_are_not_of(result: DemoResult) -> None:
    trial = result.trials[-1]
    assert trial.plan is not None
    from mpq_plugins import apply

    made = apply(digit_net(), trial.plan, calibrate=calibration_digits(), rounding="compensated")
    assert accuracy(made) == trial.scores
    seen = {image.numpy().tobytes() for batch in calibration_digits() for image in batch}
    assert len(seen) == 200
    assert not seen & {image.numpy().tobytes() for image in unseen_digits()[0]}


def test_the_command_writes_the_plan_it_reports(
    mpq: Callable[..., Ran], tmp_path: Path, result: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = mpq("demo", "-o", tmp_path / "plan.json")
    assert ran.code == 0
    assert "797 handwritten digits" in ran.out
    assert f"mpq show {tmp_path / 'plan.json'}" in ran.out
    plan = Plan.load(tmp_path / "plan.json")
    from mpq_plugins import apply

    net = digit_net()
    verify(apply(net, plan), plan, original=net)
    monkeypatch.setattr(run, "run_demo", lambda progress: result)  # another run's; the first was the command's own
    again = json.loads(mpq("demo", "-o", tmp_path / "again.json", "--json").out)
    assert again["kept"] in ran.out
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@pytest.mark.slow
def test_the_training_script_makes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from safetensors.torch import load_file

    monkeypatch.setattr(sys, "argv", ["train_demo", "--epochs", "1", "--output", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # two would wait for another worker's
    train_demo.main()
    assert "on 797 test digits" in capsys.readouterr().out
    assert load_file(tmp_path / WEIGHTS).keys() == digit_net().state_dict().keys()
    assert (tmp_path / DIGITS).stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch says of its own quantization
def test_the_readmes_figures_are_what_comes_out() -> None:
    from mpq_plugins import Affine, Budget, apply, measure, round_weights
    from mpq_plugins.adapters import fx
    from mpq_plugins.report.tables import bytes_text

    net, batches = digit_net(), calibration_digits()
    table = measure(net, Affine(granularity="per_channel", range="mse"), range(1, 9), per_channel=True)
    plan = Budget(average_bits=3)(table)
    in_fx = plan.with_activation_bits(8)
    rounded = round_weights(net, plan, batches)
    size = bytes_text(plan.size().total_bytes)
    rows = {
        "float": (bytes_text(4 * table_weights(table)), net),
        "3 bits, rounded to nearest": (size, apply(net, plan)),
        "3 bits, to nearest and corrected (`--rounding nearest`)": (
            size,
            apply(net, plan, calibrate=batches, rounding="nearest"),
        ),
        "3 bits, compensated": (size, apply(net, plan, calibrate=batches)),
        "3 bits, compensated, in FX with 8-bit activations": ("43.09 kB (int8)", fx.apply(rounded, in_fx, batches)),
    }
    readme = Path(train_demo.__file__).parents[1].joinpath("README.md").read_text()
    for name, (taken, model) in rows.items():
        scores = accuracy(model)
        assert f"| {name} | {taken} | {100 * scores['accuracy']:.2f} % | {scores['cross_entropy']:.3f} |" in readme


def table_weights(table: LayerTable) -> int:
    return sum(layer.numel for layer in table.layers)
