import json
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import train_demo
from mpq_plugins import Plan, verify
from mpq_plugins.cli.demo.net import DIGITS, WEIGHTS, digit_net, unseen_digits
from mpq_plugins.cli.demo.run import QEMS, UNIFORM_BITS, run_demo
from tests.conftest import Ran


def test_the_shipped_files_are_small_and_the_network_reads_digits() -> None:
    folder = Path(train_demo.__file__).parent.parent / "mpq_plugins" / "cli" / "demo"
    assert sum((folder / name).stat().st_size for name in (WEIGHTS, DIGITS)) < 400_000
    images, labels = unseen_digits()
    assert images.shape == (797, 1, 8, 8)
    assert (digit_net()(images).argmax(1) == labels).float().mean() > 0.98


def test_the_demo_tries_every_plan_and_keeps_a_good_one() -> None:
    result = run_demo()
    by_name = {trial.name: trial for trial in result.trials}
    assert len(by_name) == len(UNIFORM_BITS) + len(QEMS)
    assert abs(by_name["uniform 8"].accuracy - result.accuracy) <= 0.005
    assert by_name["uniform 3"].accuracy < by_name["uniform 6"].accuracy
    sizes = [by_name[f"MixQuant QEM {qem:g}"].plan.size().total_bits for qem in QEMS]
    assert sizes == sorted(sizes, reverse=True)
    kept = by_name[result.chosen]
    assert kept.plan is result.plan
    assert kept.accuracy >= result.accuracy - 0.005
    assert all(
        trial.plan.size().total_bits >= kept.plan.size().total_bits
        for trial in result.trials[len(UNIFORM_BITS) :]
        if trial.accuracy >= result.accuracy - 0.005
    )


def test_the_command_writes_the_plan_it_reports(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    ran = mpq("demo", "-o", tmp_path / "plan.json")
    assert ran.code == 0
    assert "797 handwritten digits" in ran.out
    plan = Plan.load(tmp_path / "plan.json")
    from mpq_plugins import apply

    net = digit_net()
    verify(apply(net, plan), plan, original=net)
    again = json.loads(mpq("demo", "-o", tmp_path / "again.json", "--json").out)
    assert again["kept"] in ran.out
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


@pytest.mark.slow
def test_the_training_script_makes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from safetensors.torch import load_file

    monkeypatch.setattr(sys, "argv", ["train_demo", "--epochs", "2", "--output", str(tmp_path)])
    train_demo.main()
    assert "on 797 test digits" in capsys.readouterr().out
    assert load_file(tmp_path / WEIGHTS).keys() == digit_net().state_dict().keys()
    assert (tmp_path / DIGITS).stat().st_size < 100_000
