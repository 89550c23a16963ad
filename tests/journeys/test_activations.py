"""Weights and inputs planned together on the pretrained ResNet-20, applied, and run by Brevitas: a user's whole way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpq_plugins
from examples.cifar_resnet import checkpoint, evaluate, images, resnet
from mpq_plugins import Plan, calibrate_inputs, verify
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.checkpoints.state_dicts import find_state_dict
from tests.conftest import Ran

pytestmark = [
    pytest.mark.usefixtures("zoo"),
    pytest.mark.filterwarnings("ignore"),  # what backends warn of is theirs
]

NET = "examples.cifar_resnet:resnet20"
HERE = "tests.journeys.test_activations"
BOPS = 1_200_000_000  # W4A8 of 40.6 million multiply-accumulates, and W8A4; W4A4 takes half, W8A8 twice


def few() -> list[Tensor]:
    """Images to calibrate on."""
    return list(images("calib_1024.npz")[0][:32].split(16))


def score(net: nn.Module) -> dict[str, float]:
    """Of 64 test images."""
    inputs, labels = images()
    top1, loss = evaluate(net, inputs[:64], labels[:64])
    return {"top-1 %": top1, "cross-entropy": loss}


def test_measured_planned_applied_and_run_by_a_backend(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    table, file, weights = tmp_path / "net.mpqt", tmp_path / "plan.json", tmp_path / "net.th"
    on_inputs = ("--calibrate", f"{HERE}:few")
    ran = mpq(
        "measure", NET, "--granularity", "per_channel", "--range", "minmax", "--bits", "4,8", "--activations",
        "--input-bits", "4,8", "--sensitivity", "output_mse", "--input-shape", "1,3,32,32", *on_inputs, "-o", table,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ran = mpq("plan", table, "--bits", "4,8", "--input-bits", "4,8", "--bops", BOPS, "--no-parts",
              "--sensitivity", "output_mse", "-o", file)  # fmt: skip
    assert ran.code == 0, ran.err
    plan = Plan.load(file)
    assert {(layer.bits, layer.activation_bits) for layer in plan.layers} > {(4, 4), (8, 8)}  # each layer its own
    assert "inputs of 8 bits" in mpq("check", file, NET, "--backend", "fx").out  # which has no others
    assert mpq("check", file, NET, "--backend", "brevitas", "--policy", "error").code == 0

    ran = mpq("apply", checkpoint(20), file, "-o", weights)
    assert ran.code == 0, ran.err
    net, applied = resnet(20), resnet(20)
    state = find_state_dict(load_torch(weights), weights)
    applied.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    verify(applied, plan.with_activation_bits(None), net)

    from mpq_plugins.adapters import brevitas

    ranged = calibrate_inputs(net, plan, few())
    converted = brevitas.apply(ranged, plan, few())
    checks = brevitas.verify(converted, plan, ranged, batch=few()[0])
    assert [check.activation_bits for check in checks] == [layer.activation_bits for layer in plan.layers]
    simulated = mpq_plugins.apply(ranged, plan)
    verify(simulated, plan)
    with torch.no_grad():
        torch.testing.assert_close(converted(few()[0]), simulated(few()[0]), rtol=0.02, atol=0.02)

    ran = mpq("evaluate", NET, file, "--eval", f"{HERE}:score", *on_inputs, "--rounding", "nearest", "--json")
    assert ran.code == 0, ran.err
    alone, nearest, _ = json.loads(ran.out)["rows"]
    assert nearest["plan"] == "plan.json"
    assert nearest["total_bytes"] == plan.size().total_bytes
    assert nearest["scores"] == pytest.approx(score(simulated), rel=1e-6)
    assert nearest["scores"]["top-1 %"] >= alone["scores"]["top-1 %"] - 5
