"""From a pretrained network to the best plan for a size, corrected, as a user goes; and the guard on losing plans."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.cifar_resnet import calibration, checkpoint, evaluate, images, resnet
from mpq_plugins import (
    Affine,
    Budget,
    LayerTable,
    MixQuant,
    Plan,
    PlanWarning,
    apply,
    compare,
    correct,
    measure,
    verify,
)
from mpq_plugins.checkpoints.checkpoint import load_torch
from mpq_plugins.checkpoints.state_dicts import find_state_dict
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.simulation.integers import integer_weight
from mpq_plugins.simulation.synthetic import synthetic_batches
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("zoo")

SCHEME = Affine(granularity="per_channel", range="mse")
# Bits a weight -> at least this top-1, at most this cross-entropy, on the 846 test images.
WANTED = {
    20: {3.0: (91.3, 0.39), 2.5: (89.0, 0.42), 2.0: (87.0, 0.46)},
    56: {2.5: (92.6, 0.35)},
}


@cache
def table(depth: int) -> LayerTable:
    return measure(resnet(depth), SCHEME, range(1, 9), per_channel=True)


@cache
def pictures() -> tuple[Tensor, Tensor]:
    return images()


@pytest.mark.parametrize(("depth", "bits"), [(depth, bits) for depth, own in WANTED.items() for bits in own])
def test_a_corrected_plan_keeps_the_accuracy(depth: int, bits: float) -> None:
    plan = Budget(average_bits=bits)(table(depth))
    assert plan.size().average_bits <= bits
    net = resnet(depth)
    quantized = apply(net, plan, calibrate=calibration(), rounding="nearest")
    verify(quantized, plan)
    top1, loss = evaluate(quantized, *pictures())
    least, most = WANTED[depth][bits]
    assert top1 >= least
    assert loss <= most


def test_without_data_too() -> None:
    """Plain noise, which BatchNorm normalises by its batch, is enough where a few points are."""
    net = resnet(20)
    made = synthetic_batches(net, (256, 3, 32, 32), count=1, steps=0)
    for bits, least in ((3.0, 90.2), (2.5, 75.0)):
        plan = Budget(average_bits=bits)(table(20))
        top1, _ = evaluate(apply(net, plan, calibrate=made, rounding="nearest"), *pictures())
        assert top1 >= least


def test_correcting_changes_no_code() -> None:
    plan, net = Budget(average_bits=2.5)(table(20)), resnet(20)
    corrected = correct(net, plan, calibration()[:2])
    before, after = (quantizable_weights(fold_batch_norm(one)) for one in (net, corrected))
    for layer in plan.layers:
        codes = [integer_weight(weights[layer.name], layer).codes for weights in (before, after)]
        # Folding multiplies a row by one float32 number, so a weight halfway between two levels may go the other way.
        assert (codes[0] != codes[1]).sum() <= 2


def test_the_guard_flags_a_mixed_plan_that_loses() -> None:
    folded = measure(resnet(20))
    with pytest.warns(PlanWarning, match="this mixquant plan is predicted to be worse"):
        plan = MixQuant(qem=4.0)(folded)
    found = compare(folded, plan)
    assert found is not None
    assert found.worse


def test_plan_and_apply_on_the_command_line(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "quantized.th"
    ran = mpq("plan", checkpoint(20), "-a", "budget", "--average-bits", 3, "-o", file, "--json")
    assert ran.code == 0
    made = json.loads(ran.out)
    assert made["size"]["average_bits"] <= 3.0
    assert not made["predicted"]["worse"]
    assert made["allocator"]["found"]["binding"] == ["average_bits"]
    names = "--model", "examples.cifar_resnet:resnet20", "--calibrate", "tests.journeys.test_budget:few_images"
    ran = mpq("apply", checkpoint(20), file, "-o", out, *names)
    assert ran.code == 0, ran.err
    assert "39 biases and statistics corrected" in ran.out
    net = resnet(20)
    state = find_state_dict(load_torch(out), out)
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    expected = apply(resnet(20), Plan.load(file), calibrate=few_images())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in expected.state_dict().items())


def few_images() -> list[Tensor]:
    return calibration()[:2]
