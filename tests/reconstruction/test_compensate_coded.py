"""Compensation under plans for an entropy-coded file, end to end: the codes are found again, and their bytes kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import EntropyCoded, LayerReport, Part
from mpq_plugins.cli.demo.net import calibration_digits, digit_net, unseen_digits
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.quantization.coded_bits import coded_bits
from tests.helpers.nets import conv_net
from tests.helpers.plans import with_layer

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3
MANY = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(4)) + 0.3


def plan_of(net: nn.Module, step: float, offset: float = 0.36, share: float | None = None) -> mpq.Plan:
    """One step for all layers, and a share of what the float weights' codes take as each layer's promise."""
    scheme = EntropyCoded(step=step, rounding_offset=offset)
    plan = mpq.Uniform(bits=8)(mpq.measure(net, mpq.Affine(granularity="per_channel", symmetric=True), (8,)))
    for layer in plan.layers:
        bits = coded_bits(codes_of(net, layer, step, offset))
        promised = None if share is None else int(share * bits / 8) + 1
        plan = with_layer(plan, layer.name, scheme=scheme, coded_bytes=promised)
    return plan


def weight_of(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def codes_of(net: nn.Module, layer: LayerChoice, step: float, offset: float = 0.5) -> "np.ndarray[Any, Any]":
    weight = weight_of(net, layer.name).numpy()
    codes: np.ndarray[Any, Any] = (np.sign(weight) * np.floor(np.abs(weight) / np.float32(step) + offset)).astype(int)
    return codes


def overdrawn(net: nn.Module, plan: mpq.Plan, step: float) -> list[str]:
    """Layers whose codes take more than is promised."""
    return [
        layer.name
        for layer in plan.layers
        if layer.coded_bytes is not None and coded_bits(codes_of(net, layer, step)) > 8 * layer.coded_bytes
    ]


def assert_found_again(rounded: nn.Module, plan: mpq.Plan) -> None:
    quantized = mpq.apply(rounded, plan)
    for layer in plan.layers:
        assert weight_of(quantized, layer.name).equal(weight_of(rounded, layer.name))


@pytest.mark.parametrize("offset", [0.1, 0.36, 0.5])
@pytest.mark.parametrize("share", [None, 0.9, 1.1])
def test_quantizing_the_copy_leaves_its_codes(offset: float, share: float | None) -> None:
    net, reports = conv_net(), list[LayerReport]()
    plan = plan_of(net, 0.07, offset, share)
    rounded = mpq.compensate(net, plan, [IMAGES], finished=reports.append)
    compensated = [report.name for report in reports if report.rounding == "compensated"]
    assert len(compensated) == 4
    assert_found_again(rounded, plan)
    for layer in plan.layers:
        steps = weight_of(rounded, layer.name) / torch.tensor(0.07)
        assert float((steps - steps.round()).abs().max()) < 1e-4
        assert float(steps.abs().max()) < 127.5
    assert overdrawn(rounded, plan, 0.07) == []


@pytest.mark.filterwarnings("ignore:rounded to nearest")
@settings(max_examples=12, deadline=None)
@given(st.floats(0.03, 0.2), st.floats(0.75, 1.3), st.integers(0, 99))
def test_promises_are_kept(step: float, share: float, seed: int) -> None:
    """All that nearest codes keep, and, of steps that are not too fine for so few weights, others."""
    net, share = conv_net(), share if step > 0.1 else max(share, 1.0)
    plan = plan_of(net, step, 0.5, share)
    assert overdrawn(mpq.apply(mpq.compensate(net, plan, [IMAGES], seed=seed), plan), plan, step) == []


def test_pruned_weights_stay_pruned() -> None:
    net = conv_net()
    with torch.no_grad():
        for name in ("conv1", "conv2", "up", "fc"):
            weight = net.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 0.0)
    plan = plan_of(net, 0.05)
    rounded = mpq.compensate(net, plan, [MANY])
    for layer in plan.layers:
        gone = weight_of(net, layer.name) == 0
        assert gone.any()
        assert not weight_of(rounded, layer.name)[gone].any()


def test_the_outputs_are_nearer_than_with_nearest_codes() -> None:
    net, (images, _) = digit_net(), unseen_digits()
    plan = plan_of(net, 0.12, 0.5, 1.0)
    with torch.no_grad():
        exact = net(images)
        corrected = mpq.apply(mpq.correct(net, plan, calibration_digits()), plan)(images)
        rounded = mpq.compensate(net, plan, calibration_digits())
        assert overdrawn(rounded, plan, 0.12) == []
        compensated = mpq.apply(rounded, plan)(images)
    assert float((compensated - exact).square().mean()) < 0.8 * float((corrected - exact).square().mean())


def test_where_compensation_takes_too_much_nearest_codes_stay_if_they_keep_the_promise() -> None:
    """A promise that nearest codes do not keep is kept even where they would lose less."""
    net = conv_net()
    plan, reports = plan_of(net, 0.1, 0.5, 0.5), list[LayerReport]()
    rounded = mpq.compensate(net, plan, [IMAGES], finished=reports.append)
    assert {report.rounding for report in reports} == {"compensated"}
    assert any(report.compensated > report.nearest for report in reports)
    assert overdrawn(rounded, plan, 0.1) == []


@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_parts_of_several_widths_are_on_the_plans_step_too() -> None:
    net, step = conv_net(), 0.05
    parts = (Part(bits=8, channels=range(4)), Part(bits=32, channels=range(4, 6)), Part(bits=4, channels=range(6, 8)))
    with torch.no_grad():
        net.conv1.weight[6:] *= 0.3 / net.conv1.weight[6:].abs().max()
    plan = with_layer(plan_of(net, step), "conv1", bits=None, parts=parts)
    rounded = mpq.compensate(net, plan, [IMAGES])
    assert_found_again(rounded, plan)
    codes = weight_of(rounded, "conv1") / torch.tensor(step)
    assert weight_of(rounded, "conv1")[4:6].equal(net.conv1.weight[4:6])
    assert float((codes[[0, 1, 2, 3, 6, 7]] - codes[[0, 1, 2, 3, 6, 7]].round()).abs().max()) < 1e-4
    assert float(codes[6:].abs().max()) < 7.5


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_run_goes_on_to_the_same_codes(tmp_path: Path, count: int) -> None:
    net, place, done = conv_net(), tmp_path / "out.partial", list[str]()
    plan = plan_of(net, 0.07, 0.5, 0.9)

    def stop(name: str, steps: int, total: int) -> None:
        if len(done) >= count:
            raise KeyboardInterrupt

    whole = mpq.compensate(net, plan, [IMAGES])
    with pytest.raises(KeyboardInterrupt):
        mpq.compensate(
            net, plan, [IMAGES], store=place, progress=stop, finished=lambda report: done.append(report.name)
        )
    reports: list[LayerReport] = []
    resumed = mpq.compensate(net, plan, [IMAGES], store=place, finished=reports.append)
    assert [report.resumed for report in reports] == [True] * count + [False] * (4 - count)
    assert all(value.equal(whole.state_dict()[name]) for name, value in resumed.state_dict().items())
