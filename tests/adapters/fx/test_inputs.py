"""The ranges of layers' inputs through FX: those that the plan asks for, or that the model carries, to the number."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

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
from mpq_plugins.adapters import fx
from mpq_plugins.adapters.fx import preparation
from tests.adapters import nets
from tests.adapters.fx.test_preparation import pytestmark as warnings_of_torch

pytestmark = warnings_of_torch
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CARRIED = {"conv1": InputRange(8, 0.03125, 120), "conv2": InputRange(8, 0.0625, 3), "fc": InputRange(8, 0.0078125, 0)}


class Branches(nn.Module):
    """Two layers read one value, a third one reads it pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right, self.pooled = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends."""
        x = torch.relu(self.first(x))
        return self.left(x) + self.right(x), self.pooled(self.pool(x))


def planned(model: nn.Module, activations: Any = None) -> Plan:
    plan = Uniform(bits=8)(measure(model, Affine(granularity="per_channel"), (8,)))
    return plan.with_activations(activations or Activations(8))


def calibrated(model: nn.Module, plan: Plan) -> Any:
    """Prepared and run, which sets the ranges of what is no planned layer's input."""
    prepared = fx.prepare(model, plan, IMAGES[:1])
    with torch.no_grad():
        prepared(IMAGES)
    return prepared


def seen_inputs(model: nn.Module, names: Any) -> dict[str, Tensor]:
    """What each layer of the float model is given on the images."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone())
        )
    with torch.no_grad():
        model(IMAGES)
    return seen


@pytest.fixture(autouse=True)
def full_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits on any processor."""
    from mpq_plugins.adapters.fx import conversion

    for module in (preparation, conversion):
        monkeypatch.setattr(module, "needs_reduced_range", lambda: False)


def test_a_planned_minmax_range_is_that_of_the_inputs() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, Activations(8, range="minmax"))
    inputs = seen_inputs(copy.deepcopy(model), plan.by_name)
    checks = fx.verify(fx.apply(model, plan, IMAGES.split(8)), plan, model, batch=IMAGES)
    for check in checks:
        low, high = inputs[check.layer].amin().clamp(max=0), inputs[check.layer].amax().clamp(min=0)
        assert check.input_range is not None
        assert check.input_range.scale == pytest.approx(float(high - low) / 255, rel=1e-5)
        assert check.input_range.zero_point == round(float(-low / (high - low) * 255))


def test_a_symmetric_range_has_its_zero_in_the_middle() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, Activations(8, symmetric=True, range="minmax"))
    inputs = seen_inputs(copy.deepcopy(model), plan.by_name)
    for check in fx.verify(fx.apply(model, plan, [IMAGES]), plan, model):  # whose products overflow on some CPUs
        assert check.input_range is not None
        assert check.input_range.zero_point == 128
        assert check.input_range.scale == pytest.approx(float(inputs[check.layer].abs().max()) / 127, rel=1e-5)


def test_carried_ranges_are_taken_to_the_number_and_inputs_have_the_simulations_codes() -> None:
    model = nets.made(nets.SmallNet)
    plan, carrying = planned(model), with_input_ranges(nets.made(nets.SmallNet), CARRIED)
    prepared = calibrated(carrying, plan)
    for converted in (convert_to_reference_fx(copy.deepcopy(prepared)), convert_fx(copy.deepcopy(prepared))):
        checks = fx.verify(converted, plan, carrying, batch=IMAGES)
        assert {check.layer: check.input_range for check in checks} == CARRIED
    reference = convert_to_reference_fx(prepared)
    theirs = seen_inputs(reference, CARRIED)
    ours = seen_inputs(apply(carrying, plan), CARRIED)
    for name in ("conv1", "conv2"):  # what fc reads is made from conv2's output, which FX keeps in codes of its own
        codes = ((ours[name] - theirs[name]) / CARRIED[name].scale).round()
        assert codes.abs().max() <= 1
        assert (codes != 0).float().mean() < 1e-3


def test_verify_finds_another_range_than_the_carried_one() -> None:
    plan = planned(nets.made(nets.SmallNet))
    carrying = with_input_ranges(nets.made(nets.SmallNet), CARRIED)
    other = with_input_ranges(nets.made(nets.SmallNet), CARRIED | {"conv2": InputRange(8, 0.0625, 4)})
    converted = fx.apply(carrying, plan, [IMAGES])
    fx.verify(converted, plan, carrying)
    with pytest.raises(VerifyError, match="'conv2' has its input in another range than the model carries"):
        fx.verify(converted, plan, other)


def test_a_reduced_range_has_the_same_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "needs_reduced_range", lambda: True)
    carrying = with_input_ranges(nets.made(nets.SmallNet), CARRIED)
    plan = planned(nets.made(nets.SmallNet))
    for check in fx.verify(convert_fx(calibrated(carrying, plan)), plan, carrying):
        assert check.input_range is not None
        assert check.input_range.scale == pytest.approx(CARRIED[check.layer].scale * 255 / 127)
        assert check.input_range.zero_point == round(CARRIED[check.layer].zero_point * 127 / 255)


def test_ranges_that_are_not_the_plans_are_refused_by_name() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    for wrong, said in (
        (CARRIED | {"fc": InputRange(4, 0.1, 3)}, "'fc' carries 4 bits, the plan has 8 bits, asymmetric mse"),
        ({name: CARRIED[name] for name in ("conv1", "fc")}, "'conv2' carries none, the plan has 8 bits"),
    ):
        with pytest.raises(SettingError, match=f"its ranges of inputs are not the plan's: .*{said}"):
            fx.apply(with_input_ranges(model, wrong), plan, [IMAGES])
    carrying = with_input_ranges(model, CARRIED)
    with pytest.raises(SettingError, match="activation_observer: 'minmax' finds ranges in place of those"):
        fx.apply(carrying, plan, [IMAGES], activation_observer="minmax")
    with pytest.raises(SettingError, match=r"in training, ranges are torch's own.*without_input_ranges\(model\)"):
        fx.prepare(carrying, plan, IMAGES[:1], qat=True)


def test_layers_that_read_one_value_have_one_range() -> None:
    model = nets.made(Branches)
    plan = planned(model)
    found = {
        check.layer: check.input_range
        for check in fx.verify(fx.apply(model, plan, [IMAGES]), plan, model, batch=IMAGES)
    }
    assert found["left"] == found["right"] == found["pooled"] != found["first"]
    apart = plan.with_activations({"left": Activations(8, range="minmax")})
    with pytest.raises(MismatchError, match=r"'left' \(8 bits, asymmetric minmax\).*read the same.*plan their inputs"):
        fx.apply(model, apart, [IMAGES])
    own = dict.fromkeys(plan.by_name, InputRange(8, 0.05, 0)) | {"left": InputRange(8, 0.06, 0)}
    with pytest.raises(MismatchError, match=r"'right', 'pooled': read the same.*each has a range of its own"):
        fx.apply(with_input_ranges(model, own), plan, [IMAGES])


def test_torch_observes_what_is_prepared_as_the_plan_says() -> None:
    model = nets.made(nets.SmallNet)
    share = 0.99
    plan = planned(model, Activations(8, range="percentile", share=share))
    made = fx.prepare(model, plan, IMAGES[:1])
    made(IMAGES)
    low, high = torch.quantile(IMAGES.flatten(), torch.tensor([(1 - share) / 2, (1 + share) / 2]))
    scale, _ = made.activation_post_process_0.calculate_qparams()  # type: ignore[operator, union-attr]
    assert float(scale) == pytest.approx(float(high - low) / 255, rel=0.01)
    with pytest.raises(SettingError, match=r"torch has no observer for kl: use fx.apply, which finds ranges as the"):
        fx.prepare(model, planned(model, Activations(8, range="kl")), IMAGES[:1])


def test_a_dynamic_plan_is_refused_with_the_remedy() -> None:
    model = nets.made(nets.SmallNet)
    with pytest.raises(
        SettingError, match=r"'activations': 8 bits, asymmetric dynamic per_tensor, but fx has static .*legalise"
    ):
        fx.apply(model, planned(model, Activations(8, dynamic="per_tensor")), [IMAGES])
