"""FX graph mode: integer codes against the plan's, and every silent failure as an error."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule

from mpq_plugins import PTILMPQ, Affine, MixQuant, Piecewise, Plan, Uniform, apply, measure
from mpq_plugins.adapters import fx
from mpq_plugins.errors import MismatchError, MPQError, SettingError, SourceError, VerifyError
from mpq_plugins.fold import fold_batch_norm
from mpq_plugins.legalise import legalise
from mpq_plugins.weights import quantizable_weights
from tests.adapters import nets
from tests.conftest import Ran
from tests.plans import with_layer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.ao.quantization"),
]

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SCHEMES = [
    Affine(symmetric=symmetric, granularity=grain, range=rule)
    for symmetric in (False, True) for grain in ("per_tensor", "per_channel") for rule in ("minmax", "mse")
]  # fmt: skip
PER_CHANNEL = Affine(granularity="per_channel")
CONVERTERS: list[Callable[..., nn.Module]] = [convert_fx, convert_to_reference_fx]


def planned(model: nn.Module, scheme: Affine = PER_CHANNEL, allocator: Any = None) -> Plan:
    """A plan with 8-bit activations."""
    table = measure(model, scheme, range(1, 9))
    plan: Plan = (allocator or Uniform(bits=4))(table)
    return plan.with_activation_bits(8)


def prepared(model: nn.Module, plan: Plan, **options: Any) -> GraphModule:
    """Prepared and calibrated."""
    made = fx.prepare(model, plan, IMAGES[:1], **options)
    with torch.no_grad():
        made(IMAGES)
    return made


def stored_weight(converted: nn.Module, name: str) -> Tensor:
    module: Any = converted.get_submodule(name)
    module = module[0] if isinstance(module, nn.Sequential) else module
    read = getattr(module, "get_quantized_weight", None) or module.weight
    weight: Tensor = read().dequantize()
    return weight


ALLOCATORS = [*(Uniform(bits=b) for b in (8, 6, 4, 3, 2, 1)), MixQuant(qem=3.0), PTILMPQ(), PTILMPQ(other_bits=(4, 1))]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
def test_both_conversions_hold_our_fake_quantization_of_the_folded_weights(scheme: Affine, allocator: Any) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, scheme, allocator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrated = prepared(model, plan)
    folded = fold_batch_norm(model)
    ours = quantizable_weights(apply(folded, plan.model_copy(update={"activation_bits": None, "fold_bn": False})))
    for convert in CONVERTERS:
        converted = convert(copy.deepcopy(calibrated))
        checks = fx.verify(converted, plan, model)
        assert [check.layer for check in checks] == ["conv1", "conv2", "fc"]
        for name, weight in ours.items():
            torch.testing.assert_close(stored_weight(converted, name), weight, rtol=1e-6, atol=0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
def test_activations_come_close_to_those_in_float(observer: str) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, allocator=Uniform(bits=8))
    with torch.no_grad():
        converted = convert_fx(prepared(model, plan, activation_observer=observer))
        exact, reached = model(IMAGES), converted(IMAGES)
    assert (reached - exact).abs().max() < 0.15 * exact.abs().max()
    assert not reached.equal(exact)


def test_the_percentile_leaves_out_what_is_rare() -> None:
    values = torch.cat(
        [torch.randn(100_000, generator=torch.Generator().manual_seed(2)), torch.tensor([500.0, -500.0])]
    )
    observer = fx.PercentileObserver(dtype=torch.quint8)
    observer(values)
    low, high = observer._non_linear_param_search()
    assert -10 < low < -2
    assert 2 < high < 10


def test_reduced_range_is_7_bits() -> None:
    model = nets.made(nets.SmallNet)
    for reduce, most in ((True, 127), (False, 255)):
        qconfig = fx.qconfig_mapping(planned(model), model, reduce_range=reduce).module_name_qconfigs["conv1"]
        assert qconfig is not None
        assert qconfig.activation().quant_max == most


def test_the_mapping_works_with_torchs_own_prepare_on_a_baked_copy() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, allocator=Uniform(bits=3))
    made = prepare_fx(fx.bake(model, plan), fx.qconfig_mapping(plan, model), (IMAGES,))
    made(IMAGES)
    fx.verify(convert_fx(made), plan, model)


def test_weights_of_something_else_are_refused_while_converting() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    baked = fx.bake(model, plan)
    with torch.no_grad():
        baked.fc.weight.mul_(-1)  # type: ignore[operator, union-attr]
    made = prepare_fx(baked, fx.qconfig_mapping(plan, model), (IMAGES,))
    made(IMAGES)
    with pytest.raises(MismatchError, match="layer 'fc': its weights do not become the plan's codes"):
        convert_fx(made)


def test_qat_trains_and_its_integers_arrive() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, allocator=PTILMPQ(other_bits=(4, 2)))
    made = fx.prepare(model, plan, IMAGES[:1], qat=True, activation_observer="moving_average")
    target = torch.randint(0, 10, (8,), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(made(IMAGES), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    integers = fx.finish_qat(made)
    assert set(integers) == {"conv1", "conv2", "fc"}
    assert not integers["fc"].codes.equal(fx.folded_integers(plan, model)["fc"].codes)
    for convert in CONVERTERS:
        fx.verify(convert(copy.deepcopy(made)), plan, model, integers)
    with pytest.raises(VerifyError, match="codes that are not the plan's"):
        fx.verify(convert_fx(made), plan, model)


def test_a_functional_convolution_beside_the_plan_stays_in_float_and_converts() -> None:
    model = nets.made(nets.OwnWeight)
    plan = planned(model)
    with torch.no_grad():
        converted = convert_fx(prepared(model, plan))
        assert len(fx.verify(converted, plan, model)) == 3
        weights_only = apply(fold_batch_norm(model), plan.with_activation_bits(None))
        assert (converted(IMAGES) - weights_only(IMAGES)).abs().max() < 0.2 * weights_only(IMAGES).abs().max()


def test_layers_planned_in_float_stay_in_float() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    plan = with_layer(plan, "fc", bits=32)
    converted = convert_fx(prepared(model, plan))
    assert [check.layer for check in fx.verify(converted, plan, model)] == ["conv1", "conv2"]
    assert type(converted.get_submodule("fc")) is nn.Linear


REFUSED: list[tuple[type[nn.Module], type[MPQError], str]] = [
    (nets.Reused, MismatchError, "'conv2' is called 2 times, and FX keeps one output scale"),
    (nets.TwoNorms, MismatchError, r"'conv1' feeds the BatchNorm 'bn2' but is no pair with it.*FX would fold"),
    (nets.NormAndMore, MismatchError, "'conv1' feeds the BatchNorm 'bn1' but is no pair with it"),
    (nets.LinearNorm, MismatchError, "'first' feeds the BatchNorm 'norm' but is no pair with it"),
    (nets.Circular, MismatchError, "'conv2' has padding=.*padding_mode='circular', which FX gets wrong"),
    (nets.Lending, MismatchError, "'fc' lends its weight to a functional call"),
    (nets.Functional, MismatchError, "'fc' is never called as a module"),
    (nets.Attention, MismatchError, "'attention.out_proj' is never called as a module"),
    (nets.Subclassed, MismatchError, "'fc' is never called as a module"),
    (nets.Tied, MismatchError, "'first' shares its weight with 'second'"),
    (nets.Branching, SourceError, "torch.fx cannot trace it"),
    (nets.Transposed, SettingError, "fx does not quantize conv_transpose2d layers"),
]


@pytest.mark.parametrize(("net", "error", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_fx_gets_wrong_in_silence_is_refused_by_name(
    net: type[nn.Module], error: type[MPQError], message: str
) -> None:
    model = nets.made(net)
    plan = planned(model)
    with pytest.raises(error, match=message):
        fx.prepare(model, plan, IMAGES)
    with pytest.raises(error, match=message):
        fx.qconfig_mapping(plan, model)


@pytest.mark.parametrize("net", [nets.TwoNorms, nets.NormAndMore])
def test_a_float_layer_that_fx_would_corrupt_is_refused_too(net: type[nn.Module]) -> None:
    model = nets.made(net)
    plan = Uniform(bits=8)(measure(model, PER_CHANNEL, (8,), skip=["conv1"])).with_activation_bits(8)
    with pytest.raises(MismatchError, match="'conv1' feeds the BatchNorm"):
        fx.prepare(model, plan, IMAGES)


def test_half_precision_and_parts_in_training_mode_are_refused() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    half = nets.made(nets.SmallNet).to(torch.bfloat16)
    with pytest.raises(SettingError, match=r"not 'conv1' \(torch.bfloat16\).*call model\.float"):
        fx.prepare(half, planned(half), IMAGES)
    model.bn1.train()  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="in training mode, or a part of it"):
        fx.prepare(model, plan, IMAGES)


def test_plans_that_fx_cannot_run_are_refused_with_the_remedy() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    with pytest.raises(SettingError, match=r"leave its convolutions and linear .*apply, the torchao"):
        fx.prepare(model, plan.with_activation_bits(None), IMAGES)
    with pytest.raises(SettingError, match="'activations': 3 bits, but fx has activations at 8"):
        fx.prepare(model, plan.with_activation_bits(3), IMAGES)
    two = Uniform(bits=3)(measure(model, Piecewise(granularity="per_channel"), (3,))).with_activation_bits(8)
    with pytest.raises(SettingError, match="fx has no piecewise scheme"):
        fx.prepare(model, two, IMAGES)
    legal, _ = legalise(two, fx.CAPABILITIES)
    fx.verify(convert_fx(prepared(model, legal)), legal, model)
    with pytest.raises(MismatchError, match=r"Missing here: 'conv1'.*Here but not in the plan: 'up'"):
        fx.prepare(nets.made(nets.Transposed), plan, IMAGES)
    unfolded = Uniform(bits=4)(measure(model, Affine(), (4,), fold_bn=False)).with_activation_bits(8)
    with pytest.raises(MismatchError, match="'conv1', 'conv2': measured unfolded, and FX folds BatchNorm"):
        fx.prepare(model, unfolded, IMAGES)
    with pytest.raises(SettingError, match=r"training mode, or a part of it; call model\.eval"):
        fx.prepare(model.train(), plan, IMAGES)
    with pytest.raises(SettingError, match="activation_observer: 'kl' is not allowed; minmax, moving_average"):
        fx.prepare(model.eval(), plan, IMAGES, activation_observer="kl")


def test_verify_finds_what_was_planted() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    wider = with_layer(plan, "conv2", bits=5)
    less = plan.model_copy(update={"layers": plan.layers[:2], "skipped": ("fc",)})
    converted = convert_fx(prepared(model, plan))
    with pytest.raises(VerifyError, match=r"'conv2' has \d+ of 144 codes that are not the plan's"):
        fx.verify(converted, wider, model)
    with pytest.raises(VerifyError, match="'fc' is quantized and the plan leaves it in float"):
        fx.verify(converted, less, model)
    with pytest.raises(VerifyError, match="'fc' was left in float"):
        fx.verify(convert_fx(prepared(model, less)), plan, model)
    other = nets.made(nets.SmallNet)
    with torch.no_grad():
        other.fc.weight.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(VerifyError, match="'fc' has other scales or zero points"):
        fx.verify(converted, plan, other)
    with pytest.raises(VerifyError, match="'conv1' was left in float"):
        fx.verify(fx.bake(model, plan), plan, model)
    shifted = nets.made(nets.SmallNet)
    with torch.no_grad():
        shifted.fc.bias.add_(1)  # type: ignore[operator, union-attr]
    for convert in CONVERTERS:
        with pytest.raises(VerifyError, match="'fc' has a bias that is not the folded model's"):
            fx.verify(convert(prepared(model, plan)), plan, shifted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that the observers saw nothing
        uncalibrated = convert_fx(fx.prepare(model, plan, IMAGES))
    with pytest.raises(VerifyError, match="'conv1' was not calibrated"):
        fx.verify(uncalibrated, plan, model)
    with pytest.raises(SourceError, match="no GraphModule"):
        fx.verify(model, plan, model)


def test_mpq_check_lists_what_a_backend_changes(mpq: Callable[..., Ran], tmp_path: Path) -> None:
    source = "tests.adapters.test_fx:small_net"
    model = small_net()
    plan_file, legal_file = tmp_path / "plan.json", tmp_path / "legal.json"
    Uniform(bits=3)(measure(model, Piecewise(granularity="per_channel"), (3,))).save(plan_file)
    ran = mpq("check", plan_file, source, "--backend", "fx", "-o", legal_file)
    assert ran.code == 0
    assert "fx has no piecewise scheme" in ran.out
    assert "activations" in ran.out
    assert "4 changes" in ran.out
    legal = Plan.load(legal_file)
    assert {layer.bits for layer in legal.layers} == {4}
    assert "fx runs it as it is" in mpq("check", legal_file, source, "--backend", "fx").out
    fx.verify(convert_fx(prepared(model, legal)), legal, model)
    assert mpq("check", plan_file, source, "--backend", "nothing").code == 2
    assert mpq("check", plan_file, source, "--backend", "fx", "--policy", "error").code == 2
    assert "add --backend" in mpq("check", plan_file, source, "-o", legal_file).err


def small_net() -> nn.Module:
    return nets.made(nets.SmallNet)
