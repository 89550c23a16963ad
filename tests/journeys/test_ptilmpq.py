"""PTILMPQ and two-region quantization on the pretrained ResNets, as a user goes."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from examples import ptilmpq_resnet
from examples.cifar_resnet import checkpoint, evaluate, images, resnet
from mpq_plugins import PTILMPQ, Affine, Piecewise, Plan, Uniform, apply, measure, verify
from mpq_plugins.plans.scheme import Scheme
from tests.conftest import Ran

pytestmark = pytest.mark.usefixtures("zoo")

Mpq = Callable[..., Ran]
TWO_REGIONS = Piecewise(granularity="per_channel")
ONE_REGION = Affine(granularity="per_channel")


@cache
def uniform(depth: int, scheme: Scheme, bits: int) -> tuple[float, float]:
    net = resnet(depth)
    plan = Uniform(bits=bits)(measure(net, scheme, (bits,)))
    quantized = apply(net, plan)
    verify(quantized, plan, original=net)
    return evaluate(quantized, *images())


@pytest.mark.parametrize(
    ("depth", "two", "one"), [(20, 90.9, 83.7), pytest.param(56, 92.4, 90.7, marks=pytest.mark.example)]
)
def test_two_regions_of_3_bits_lose_less_than_one_of_3_bits(depth: int, two: float, one: float) -> None:
    assert uniform(depth, TWO_REGIONS, 3)[0] == pytest.approx(two, abs=0.6)
    assert uniform(depth, ONE_REGION, 3)[0] == pytest.approx(one, abs=0.4)
    assert uniform(depth, TWO_REGIONS, 3)[1] < uniform(depth, ONE_REGION, 3)[1]


def test_at_2_bits_in_all_two_regions_keep_what_one_loses() -> None:
    shared = Piecewise(granularity="per_channel", storage="shared")
    assert uniform(20, shared, 2)[0] > uniform(20, ONE_REGION, 2)[0] + 15


def test_mpq_plan_check_apply_show_and_diff_with_parts(mpq: Mpq, tmp_path: Path) -> None:
    plan_file, other_file, quantized = tmp_path / "plan.json", tmp_path / "other.json", tmp_path / "quantized.th"
    ran = mpq("plan", checkpoint(20), "--allocator", "ptilmpq", "--alpha", 0.5, "-o", plan_file, "-v")
    assert ran.code == 0
    assert "piecewise, per channel" in ran.out
    plan = Plan.load(plan_file)
    assert plan.to_json() == PTILMPQ(alpha=0.5)(measure(checkpoint(20), TWO_REGIONS, (3, 4, 5))).to_json()
    assert all(layer.parts for layer in plan.layers)
    assert mpq("plan", checkpoint(20), "-a", "ptilmpq", "--size-bytes", 180_000, "-o", other_file).code == 0
    smaller = Plan.load(other_file)
    assert smaller.size().total_bytes <= 180_000
    assert mpq("check", plan_file, checkpoint(20)).code == 0
    assert mpq("check", plan_file, checkpoint(56)).code == 2
    assert "4x32 5x32" in mpq("show", plan_file).out
    assert "of 20 layers differ" in mpq("diff", plan_file, other_file).out
    assert mpq("apply", checkpoint(20), plan_file, "-o", quantized).code == 0
    net, original = resnet(20), resnet(20)
    from mpq_plugins.checkpoints.checkpoint import load_torch
    from mpq_plugins.checkpoints.state_dicts import find_state_dict

    state = find_state_dict(load_torch(quantized), quantized)
    net.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    checks = verify(net, plan, original=original)
    assert len(checks) == 40
    assert {check.allowed for check in checks} == {13, 29, 61}
    top1, loss = evaluate(net, *images())
    assert top1 >= 91.0
    assert loss <= 0.42


def test_the_example_prints_all_three_experiments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_few_images: Callable[[ModuleType], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptilmpq_resnet", "--depth", "20", "--experiment", "1", "2", "3"])
    with_few_images(ptilmpq_resnet)
    ptilmpq_resnet.main()
    out = capsys.readouterr().out
    packed_and_promised = [word for word in out.split() if word == "186.56"]
    assert len(packed_and_promised) >= 2  # the file takes what the plan said, to the byte
    assert "ptilmpq 0.9" in out


def test_the_example_prints_ternary_and_binary_widths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_few_images: Callable[[ModuleType], None]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ptilmpq_resnet", "--depth", "20", "--experiment", "4"])
    binary = "channels, binary"
    monkeypatch.setattr(ptilmpq_resnet, "FEW_LEVELS", {binary: ptilmpq_resnet.FEW_LEVELS[binary]})
    with_few_images(ptilmpq_resnet)
    ptilmpq_resnet.main()
    out = capsys.readouterr().out
    assert "5,1 and 4,1" in out
    assert "2.95 (" in out  # bits a weight
