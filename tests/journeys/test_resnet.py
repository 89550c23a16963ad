"""From a pretrained checkpoint to a plan and an accuracy, as a user goes: `mpq plan`, `apply`, `verify`, evaluate."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from examples.cifar_resnet import checkpoint, evaluate, images, resnet
from mpq_plugins import Affine, LayerTable, MixQuant, Plan, Uniform, apply, measure, verify
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("zoo")

# Float accuracy on the 846 test images, and what a plan at QEM 2 must keep.
FLOAT = {20: 91.73, 56: 93.26}
KEPT = {20: 91.0, 56: 92.5}


@cache
def table(depth: int) -> LayerTable:
    return measure(checkpoint(depth), metrics=("relative", "mse"))


@cache
def accuracy(depth: int, plan: str | None = None) -> tuple[float, float]:
    """Top-1 and cross-entropy of the network, or of the network under a plan (as JSON), verified."""
    net = resnet(depth)
    if plan is None:
        return evaluate(net, *images())
    made = Plan.model_validate_json(plan)
    quantized = apply(net, made)
    verify(quantized, made, original=net)
    return evaluate(quantized, *images())


@pytest.mark.parametrize("depth", [20, 56])
def test_mpq_plan_at_qem_2(mpq: Callable[..., Ran], tmp_path: Path, depth: int) -> None:
    files = [tmp_path / "plan.json", tmp_path / "again.json"]
    for file in files:
        ran = mpq("plan", checkpoint(depth), "--allocator", "mixquant", "--qem", 2, "-o", file)
        assert ran.code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    plan = Plan.load(files[0])
    assert len(plan.layers) == depth
    assert {layer.bits for layer in plan.layers} == {5, 6, 7}
    assert not plan.fold_bn
    top1, _ = accuracy(depth)
    assert top1 == pytest.approx(FLOAT[depth], abs=0.005)
    kept, _ = accuracy(depth, files[0].read_text())
    assert kept >= KEPT[depth]


@pytest.mark.parametrize(
    ("depth", "qem", "bits", "mean"),
    [
        (20, 2, {5: 2, 6: 7, 7: 11}, 0.20),
        (20, 3, {4: 2, 5: 7, 6: 8, 7: 3}, 0.29),
        (56, 2, {5: 2, 6: 14, 7: 40}, 0.19),
        (56, 3.5, {2: 1, 3: 1, 4: 6, 5: 26, 6: 22}, 0.34),
    ],
)
def test_relative_gives_the_papers_pattern_and_mse_gives_8_bits(
    depth: int, qem: float, bits: dict[int, int], mean: float
) -> None:
    measured = table(depth)
    plan = MixQuant(qem=qem)(measured)
    assert Counter(layer.bits for layer in plan.layers) == bits
    errors = [measured.error(layer, "relative", plan.by_name[layer.name].bits or 0) for layer in measured.layers]
    assert np.mean(errors) == pytest.approx(mean, abs=0.006)
    by_mse = MixQuant(qem=qem, metric="mse")(measured)
    assert {layer.bits for layer in by_mse.layers} == {8}


def test_a_large_qem_falls_off_a_cliff_where_uniform_does_not() -> None:
    measured = table(20)
    cliff, edge, uniform = MixQuant(qem=4)(measured), MixQuant(qem=3)(measured), Uniform(bits=5)(measured)
    assert cliff.size().average_bits == pytest.approx(5.2, abs=0.05)
    assert accuracy(20, edge.to_json())[0] == pytest.approx(90.9, abs=0.2)
    assert accuracy(20, cliff.to_json())[0] == pytest.approx(61.6, abs=0.2)
    assert accuracy(20, uniform.to_json())[0] == pytest.approx(92.0, abs=0.2)


def test_a_file_rewritten_by_a_plan_is_the_model_applied(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    from mpq_plugins.checkpoints.checkpoint import load_torch
    from mpq_plugins.checkpoints.state_dicts import find_state_dict

    plan = MixQuant(qem=3)(table(20))
    plan.save(tmp_path / "plan.json")
    ran = mpq("apply", checkpoint(20), tmp_path / "plan.json", "-o", tmp_path / "quantized.th")
    assert ran.code == 0
    content = load_torch(tmp_path / "quantized.th")
    assert content["best_prec1"] == load_torch(checkpoint(20))["best_prec1"]
    net = resnet(20)
    state = find_state_dict(content, tmp_path)
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    verify(net, plan, original=resnet(20))


def test_a_plan_for_one_resnet_is_refused_for_the_other(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    MixQuant()(table(20)).save(tmp_path / "plan.json")
    ran = mpq("check", tmp_path / "plan.json", checkpoint(56))
    assert ran.code == 2
    assert "Here but not in the plan: 'layer1.3.conv1'" in ran.err


def test_per_tensor_measured_on_the_module_folds_and_per_channel_does_not() -> None:
    net = resnet(20)
    folded = MixQuant(qem=2)(measure(net))
    assert folded.fold_bn
    top1, loss = accuracy(20, folded.to_json())
    assert (top1, loss) >= (90.0, 0)
    by_channel = Uniform(bits=4)(measure(net, Affine(granularity="per_channel")))
    assert not by_channel.fold_bn
    assert accuracy(20, by_channel.to_json())[0] == pytest.approx(90.43, abs=0.2)


def test_the_example_prints_both_metrics(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from examples import mixquant_resnet

    monkeypatch.setattr(sys, "argv", ["mixquant_resnet", "--depth", "20"])
    monkeypatch.setattr(mixquant_resnet, "UNIFORM", (8,))  # a few of its rows; all are under `make examples`
    monkeypatch.setattr(mixquant_resnet, "QEMS", (2.0, 4.0))
    mixquant_resnet.main()
    out = capsys.readouterr().out
    assert "MixQuant relative 2" in out
    assert "61.58" in out
