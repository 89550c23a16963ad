"""The ranges of layers' inputs through PT2E, layer by layer: planned ones found, carried ones taken to the number."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import (
    Activations,
    Affine,
    InputRange,
    MismatchError,
    Plan,
    SettingError,
    Uniform,
    VerifyError,
    apply,
    measure,
    with_input_ranges,
)
from tests.adapters import nets
from tests.adapters.pt2e.test_quantizer import pytestmark as warnings_of_torch

pytestmark = warnings_of_torch
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CARRIED = {
    "conv1": InputRange(8, 0.03125, 120),
    "conv2": InputRange(8, 0.0625, 3),
    "fc": InputRange(8, 0.0078125, 128),
}


def planned(model: nn.Module, activations: Any = None) -> Plan:
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel", symmetric=True), (8,)))
    return plan.with_activations(activations or Activations(8))


@pytest.mark.parametrize("floats", [("conv1",), ("conv2",), ("conv1", "fc")], ids=",".join)
def test_some_layers_inputs_are_quantized_and_others_are_not(floats: tuple[str, ...]) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model).with_activations(dict.fromkeys(floats))
    made = pt2e.apply(model, plan, [IMAGES])
    checks = pt2e.verify(made, plan, model, batch=IMAGES)
    assert {check.layer for check in checks if check.activation_bits is None} == {*floats}
    assert {check.layer for check in checks if check.input_range is None} == {*floats}
    with pytest.raises(VerifyError, match=f"'{floats[0]}' takes its input in float"):
        pt2e.verify(made, planned(model), model)


def test_a_planned_minmax_range_is_that_of_the_inputs() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, Activations(8, range="minmax"))
    seen: dict[str, Tensor] = {}
    watched = copy.deepcopy(model)
    for name in plan.by_name:
        watched.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        watched(IMAGES)
    for check in pt2e.verify(pt2e.apply(model, plan, [IMAGES]), plan, model, batch=IMAGES):
        low, high = seen[check.layer].amin().clamp(max=0), seen[check.layer].amax().clamp(min=0)
        assert check.input_range.scale == pytest.approx(float(high - low) / 255, rel=1e-5)
        assert check.input_range.zero_point == round(float(-low / (high - low) * 255))


def test_carried_ranges_are_taken_and_outputs_are_the_simulations() -> None:
    model = nets.made(nets.SmallNet)
    plan, carrying = planned(model), with_input_ranges(model, CARRIED)
    made = pt2e.apply(carrying, plan, [IMAGES])
    checks = pt2e.verify(made, plan, carrying)
    assert {check.layer: check.input_range for check in checks} == CARRIED
    with torch.no_grad():
        off = (made(IMAGES) - apply(carrying, plan)(IMAGES)).norm() / made(IMAGES).norm()
    assert off < 2e-3  # a value in the middle between two codes may go either way
    other = with_input_ranges(model, CARRIED | {"fc": InputRange(8, 0.0078125, 127)})
    with pytest.raises(VerifyError, match="'fc' has its input in another range than the model carries"):
        pt2e.verify(made, plan, other)
    with pytest.raises(SettingError, match="'fc' carries 8 bits, the plan has floating point"):
        pt2e.apply(carrying, plan.with_activations({"fc": None}), [IMAGES])


def test_weights_that_other_code_computes_with_are_refused_as_by_the_quantizer_alone() -> None:
    model = nets.made(nets.Functional)
    with pytest.raises(MismatchError, match="X86InductorQuantizer quantizes no inputs of 'fc'"):
        pt2e.apply(model, planned(model), [IMAGES])
