"""Brevitas: weights against our fake quantization, and every silent trap as an error."""

import copy
from pathlib import Path
from typing import Any

import brevitas.config
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import PTILMPQ, Affine, MixQuant, Part, Piecewise, Plan, Uniform, measure
from mpq_plugins import apply as simulated
from mpq_plugins.errors import MismatchError, MPQError, SettingError, VerifyError
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from tests.adapters import nets
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import with_layer

mpq_brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
quantize = pytest.importorskip("brevitas.graph.quantize")
Int8ActPerTensorFloat = pytest.importorskip("brevitas.quant").Int8ActPerTensorFloat
qnn = pytest.importorskip("brevitas.nn")
reading = pytest.importorskip("mpq_plugins.adapters.brevitas.read")


class EveryKind(nn.Module):
    """One layer of each kind; (N, T) tokens -> (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.up1 = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.conv2 = nn.Conv2d(2, 6, 3, padding=1, groups=2, bias=False)
        self.up2 = nn.ConvTranspose2d(6, 4, 2)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 2))
        self.up3 = nn.ConvTranspose3d(4, 2, (1, 2, 2))
        self.fc = nn.Linear(2, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up1(self.conv1(self.embed(tokens).transpose(1, 2)))
        x = self.up2(torch.relu(self.conv2(x.unflatten(1, (2, 2)))))
        x = self.up3(self.conv3(x.unflatten(1, (2, 2)))).mean(dim=(2, 3, 4))
        logits: Tensor = self.fc(x)
        return logits


TOKENS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
INPUTS = {EveryKind: TOKENS, nets.SmallNet: IMAGES}
SCHEMES = [
    *(Affine(symmetric=s, granularity=g) for s in (False, True) for g in ("per_tensor", "per_channel")),
    Affine(granularity="per_channel", range="mse"),
    *(Affine(granularity="per_group", group_size=2, symmetric=s) for s in (False, True)),
]
ALLOCATORS: list[Any] = [
    *(Uniform(bits=b) for b in (8, 6, 4, 3, 2, 1)), MixQuant(qem=3.0), PTILMPQ(), PTILMPQ(other_bits=(4, 1)),
]  # fmt: skip
FEW: list[Any] = [Uniform(bits=8), Uniform(bits=1), PTILMPQ(other_bits=(4, 1))]


def every_kind(empty: bool = False) -> nn.Module:
    """Seeded; on request with channels that are all 0."""
    net = nets.made(EveryKind)
    if empty:
        with torch.no_grad():
            net.conv2.weight[1] = 0  # type: ignore[operator, union-attr]
            net.fc.weight[0] = 0  # type: ignore[operator, union-attr]
            net.conv1.weight[:] = 0.25  # type: ignore[operator, union-attr]
    return net


def planned(model: nn.Module, scheme: Affine | None = None, allocator: Any = None, **settings: Any) -> Plan:
    table = measure(model, scheme or Affine(granularity="per_channel"), range(1, 9), **settings)
    plan: Plan = (allocator or Uniform(bits=4))(table)
    return plan


# Three input channels, and one, do not divide into groups.
CASES = [(net, scheme) for net in INPUTS for scheme in SCHEMES if net is EveryKind or scheme.group_size is None]


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty channels"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_kind_is_our_fake_quantization_to_the_bit(scheme: Affine, empty: bool) -> None:
    model = every_kind(empty)
    skip = ["conv2", "fc", "up1"] if scheme.group_size else []
    table = measure(model, scheme, range(1, 9), skip=skip)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for allocator in FEW if empty else ALLOCATORS:
        plan = allocator(table)
        quantized, ours = mpq_brevitas.to_brevitas(model, plan), simulated(model, plan)
        assert {check.layer for check in mpq_brevitas.verify(quantized, plan, model, batch=TOKENS)} == set(plan.by_name)
        for layer in plan.layers:
            value = reading.weight_codes(quantized.get_submodule(layer.name)).value
            assert value.reshape(layer.shape).equal(quantizable_weights(ours)[layer.name])
        with torch.no_grad():
            assert quantized(TOKENS).equal(ours(TOKENS))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_batch_norm_is_folded_where_the_plan_was_measured_so() -> None:
    model = conv_net()
    plan = planned(model, Affine(), fold_bn=True)
    assert plan.fold_bn
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.verify(quantized, plan, model, batch=IMAGES)
    with torch.no_grad():
        assert quantized(IMAGES).equal(simulated(model, plan)(IMAGES))


@pytest.mark.parametrize("net", INPUTS, ids=lambda net: net.__name__)
def test_the_layer_map_gives_the_same_weights_in_the_users_own_call(net: type[nn.Module]) -> None:
    model = nets.made(net)
    plan = planned(model, allocator=PTILMPQ(other_bits=(4, 1)))
    expected = mpq_brevitas.to_brevitas(model, plan)
    mine = quantize.layerwise_quantize(copy.deepcopy(model), compute_layer_map=mpq_brevitas.layer_map(plan, model))
    mpq_brevitas.verify(mine, plan, model, batch=INPUTS[net])
    with torch.no_grad():
        assert mine(INPUTS[net]).equal(expected(INPUTS[net]))


def test_the_layer_map_leaves_in_float_what_the_plan_does() -> None:
    model = nets.made(nets.SmallNet)
    plan = with_layer(planned(model, skip=["conv1"]), "fc", bits=32)
    mine = quantize.layerwise_quantize(copy.deepcopy(model), compute_layer_map=mpq_brevitas.layer_map(plan, model))
    assert [check.layer for check in mpq_brevitas.verify(mine, plan, model, batch=IMAGES)] == ["conv2"]
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.verify(quantized, plan, model, batch=IMAGES)
    assert type(quantized.conv1) is nn.Conv2d
    assert type(quantized.fc) is nn.Linear


def test_verify_refuses_another_model() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    with pytest.raises(MismatchError, match="made for another model"):
        mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, tied_net())


def test_parts_report_their_widest_channel() -> None:
    model = nets.made(nets.SmallNet)
    plan = with_layer(
        planned(model),
        "fc",
        bits=None,
        parts=(Part(bits=3, channels=(0, 4)), Part(bits=6, channels=(1, 2, 3, *range(5, 10)))),
    )
    quantized = mpq_brevitas.to_brevitas(model, plan)
    (check,) = (check for check in mpq_brevitas.verify(quantized, plan, model, batch=IMAGES) if check.layer == "fc")
    assert check.bits == ((3, 2), (6, 8))
    assert quantized.fc.weight_quant.bit_width() == 6
    assert int(quantized.fc.quant_weight().int().max()) < 2**6


def test_binary_layers_are_brevitas_own_and_ternary_ones_by_name() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, Affine(symmetric=True, granularity="per_channel"), Uniform(bits=2))
    plan = with_layer(plan, "fc", bits=1)
    quantized = mpq_brevitas.to_brevitas(model, plan, ternary=["conv1"])
    kinds = {check.layer: check.stored for check in mpq_brevitas.verify(quantized, plan, model, batch=IMAGES)}
    assert kinds == {"conv1": "ternary", "conv2": "int", "fc": "binary"}
    with torch.no_grad():
        assert quantized(IMAGES).equal(simulated(model, plan)(IMAGES))


@pytest.mark.parametrize(
    ("scheme", "bits", "name", "message"),
    [
        (Affine(), 2, "fc", "2 bits, asymmetric"),
        (Affine(symmetric=True), 3, "fc", "3 bits, symmetric"),
        (Affine(symmetric=True), 2, "fx", "quantizes no layer 'fx'"),
    ],
)
def test_ternary_wants_two_symmetric_bits(scheme: Affine, bits: int, name: str, message: str) -> None:
    model = nets.made(nets.SmallNet)
    with pytest.raises(SettingError, match=message):
        mpq_brevitas.to_brevitas(model, planned(model, scheme, Uniform(bits=bits)), ternary=[name])


def test_a_module_under_two_names_stays_one_and_tied_weights_stay_tied() -> None:
    model = tied_net()
    plan = planned(model)
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.verify(quantized, plan, model, batch=TOKENS)
    assert quantized.block is quantized.again
    assert quantized.lm_head.weight is quantized.embed.weight
    with torch.no_grad():
        assert quantized(TOKENS).equal(simulated(model, plan)(TOKENS))
    with pytest.raises(MismatchError, match="untie and leave in float"):
        mpq_brevitas.layer_map(plan, model)
    untied = copy.deepcopy(quantized)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(VerifyError, match=r"no longer tied"):
        mpq_brevitas.verify(untied, plan, model)


def test_a_subclass_that_computes_as_torch_does_is_converted() -> None:
    model = nets.made(nets.Subclassed)
    plan = planned(model)
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=IMAGES)
    with pytest.raises(MismatchError, match="'fc' is a OwnLinear, and it goes by exact types"):
        mpq_brevitas.layer_map(plan, model)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _scaled(model: Any) -> None:
    model.fc = Scaled(8, 10)


class Standardized(nn.Conv2d):
    """A convolution that takes its weights otherwise."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        image: Tensor = super()._conv_forward(input, weight - weight.mean(), bias)
        return image


def _standardized(model: Any) -> None:
    model.conv1 = Standardized(3, 8, 3, padding=1, bias=False)


def _patched(model: Any) -> None:
    own = model.fc.forward
    model.fc.forward = lambda x: 2 * own(x)


class Buffered(nn.Linear):
    """A linear layer with something of its own."""

    def __init__(self) -> None:
        super().__init__(8, 10)
        self.register_buffer("temperature", torch.ones(1))


class Helpful(nn.Linear):
    """A linear layer that its parent asks for more than its output."""

    def helper(self) -> Tensor:
        return self.weight.sum()


def _buffered(model: Any) -> None:
    model.fc = Buffered()


def _helpful(model: Any) -> None:
    model.fc = Helpful(8, 10)


def _listed(model: Any) -> None:
    model.kept = [model.fc]


def _mapped(model: Any) -> None:
    model.kept = {"head": model.fc}


def _hooked(model: Any) -> None:
    model.fc.register_forward_hook(lambda *_: None)


def _half(model: Any) -> None:
    model.fc.half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_scaled, "'fc' is a Scaled, which computes in its own way .forward.*skip it"),
        (_standardized, "'conv1' is a Standardized, which computes in its own way ._conv_forward"),
        (_patched, "'fc' is a Linear, which computes in its own way .forward"),
        (_buffered, "'fc' is a Buffered with state of its own"),
        (_helpful, "'fc' is a Helpful whose helper its Brevitas twin would lack"),
        (_listed, "'fc' is held in a list or attribute besides its name"),
        (_mapped, "'fc' is held in a list or attribute besides its name"),
        (_hooked, "'fc' has forward hooks"),
        (_half, r"'fc' is torch.float16.*model.float\(\)"),
    ],
)
def test_a_layer_that_its_twin_would_not_replace_is_refused(change: Any, message: str) -> None:
    model = nets.made(nets.SmallNet)
    change(model)
    with pytest.raises(MismatchError, match=message):
        mpq_brevitas.to_brevitas(model, planned(model))


@pytest.mark.parametrize("net", [nets.Functional, nets.Lending])
def test_a_weight_that_a_functional_call_uses_is_refused(net: type[nn.Module]) -> None:
    model = nets.made(net)
    for convert in (mpq_brevitas.to_brevitas, lambda model, plan: mpq_brevitas.layer_map(plan, model)):
        with pytest.raises(MismatchError, match="'fc' lends its weight to a functional call"):
            convert(model, planned(model))
    plan = planned(model, skip=["fc"])
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=IMAGES)


class Untraceable(nn.Module):
    """A head that lends its weight, in a network that torch.fx cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) if x.max() > 0 else x
        return torch.nn.functional.linear(y, self.head.weight)


def test_borrowing_is_seen_in_the_source_where_nothing_can_be_traced() -> None:
    model = nn.Sequential(nets.made(Untraceable))
    with pytest.raises(MismatchError, match=r"'0.head' lends its weight to a functional call"):
        mpq_brevitas.to_brevitas(model, planned(model))


def test_reading_a_weights_dtype_is_no_use_of_it() -> None:
    class Reads(nets.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.fc.weight.dtype).to(self.conv1.weight.device))

    model = nets.made(Reads)
    plan = planned(model)
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=IMAGES)


def test_a_weight_lent_out_of_torch_fx_sight_is_refused() -> None:
    class Branches(nets.Lending):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = nets.made(Branches)
    with pytest.raises(MismatchError, match="'fc' lends its weight to a functional call"):
        mpq_brevitas.to_brevitas(model, planned(model))


def test_what_others_read_of_a_layer_is_still_there() -> None:
    class Scales(nets.SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc.gain = 2.0  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x) * float(self.fc.gain)  # type: ignore[arg-type]
            return logits

    model = nets.made(Scales)
    plan = planned(model)
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=IMAGES)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0)).eval()
    with pytest.raises(MismatchError, match=r"'1' \[0, 4\]: no weights there, which brevitas cannot quantize: skip it"):
        mpq_brevitas.to_brevitas(model, planned(model))


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nets.made(nets.SmallNet)
    plan = planned(model)
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=IMAGES)


def test_outputs_are_compared_with_the_float_models() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    quantized: Any = mpq_brevitas.to_brevitas(model, plan)
    quantized.relu.forward = lambda x: x
    mpq_brevitas.verify(quantized, plan, model)
    with pytest.raises(VerifyError, match=r"on the batch, beside mpq_plugins.apply's, its output is off by"):
        mpq_brevitas.verify(quantized, plan, model, batch=IMAGES)


def test_a_transformer_runs_without_the_fused_kernel_that_would_take_float_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plan = planned(model, skip=["*.out_proj"], allocator=Uniform(bits=2))
    quantized, inputs = mpq_brevitas.to_brevitas(model, plan), torch.randn(2, 5, 8)
    mpq_brevitas.verify(quantized, plan, model, batch=inputs)
    with torch.no_grad():
        without, floating = quantized(inputs), model(inputs)
    torch.testing.assert_close(without, quantized(inputs).detach())
    assert not torch.allclose(without, floating, atol=0.05)
    with pytest.raises(MismatchError, match="in a fused kernel's reach"):
        mpq_brevitas.layer_map(plan, model)


def test_a_model_may_be_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    plan = planned(model, allocator=Uniform(bits=2))
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.verify(quantized, plan, model, batch=torch.randn(3, 8))
    inputs = torch.randn(3, 8)
    assert quantized(inputs).equal(simulated(model, plan)(inputs))
    with pytest.raises(VerifyError, match="was left in float"):
        mpq_brevitas.verify_tuned(model, plan)
    with pytest.raises(MismatchError, match="the model itself"):
        mpq_brevitas.layer_map(plan, model)


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    with pytest.raises(MismatchError, match="'conv1' is quantized by Brevitas already: give the float model"):
        mpq_brevitas.to_brevitas(mpq_brevitas.to_brevitas(model, plan), plan)


def test_tied_inputs_are_quantized_where_they_are_no_indices() -> None:
    model = tied_net()
    plan = planned(model).with_activation_bits(8)
    ready = mpq_brevitas.calibrate(mpq_brevitas.to_brevitas(model, plan), [TOKENS])
    mpq_brevitas.verify(ready, plan, model, batch=TOKENS)


def test_arguments_of_the_wrong_type_are_told_apart() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    wrong: list[tuple[Any, str]] = [
        (lambda: mpq_brevitas.to_brevitas(model, "plan.json"), "plan: is a str, no Plan; Plan.load it first"),
        (
            lambda: mpq_brevitas.to_brevitas(plan, model),
            "plan: is a SmallNet, no Plan; the model comes before the plan",
        ),
        (lambda: mpq_brevitas.to_brevitas("net.pt", plan), "model: is a str, no module"),
        (lambda: mpq_brevitas.to_brevitas(model.state_dict(), plan), "model: is a OrderedDict, no module"),
        (lambda: mpq_brevitas.layer_map(model), "plan: is a SmallNet"),
        (lambda: mpq_brevitas.verify_tuned(model, "plan.json"), "plan: is a str"),
        (lambda: mpq_brevitas.save(model, "net.safetensors", plan), "plan: is a str"),
        (lambda: mpq_brevitas.load(model, "net.safetensors"), "takes a path and a module, not a SmallNet and a str"),
        (lambda: mpq_brevitas.to_brevitas(model, plan, activation_bits=8.0), "activation_bits: 8.0 is not allowed"),
    ]
    for call, message in wrong:
        with pytest.raises(SettingError, match=message):
            call()


def test_attention_is_refused_by_name() -> None:
    model = nets.made(nets.Attention)
    with pytest.raises(MismatchError, match=r"'attention.out_proj' is MultiheadAttention's own.*skip it"):
        mpq_brevitas.to_brevitas(model, planned(model))
    plan = planned(model, skip=["attention.out_proj"])
    mpq_brevitas.verify(mpq_brevitas.to_brevitas(model, plan), plan, model, batch=torch.randn(2, 5, 8))


def test_tied_weights_per_group_are_refused() -> None:
    model = tied_net()
    with pytest.raises(MismatchError, match="'embed' shares its weight"):
        mpq_brevitas.to_brevitas(model, planned(model, Affine(granularity="per_group", group_size=4)))


def test_another_models_plan_and_two_regions_are_refused() -> None:
    model = nets.made(nets.SmallNet)
    other = planned(conv_net())
    for convert in (mpq_brevitas.to_brevitas, lambda model, plan: mpq_brevitas.layer_map(plan, model)):
        with pytest.raises(MismatchError, match="made for another model"):
            convert(model, other)
        with pytest.raises(SettingError, match="brevitas has no piecewise scheme"):
            convert(model, Uniform(bits=3)(measure(model, Piecewise(granularity="per_channel"), range(2, 9))))


@pytest.mark.parametrize("before", [False, True])
def test_brevitas_settings_are_left_as_they_were(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brevitas.config, "IGNORE_MISSING_KEYS", before)
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    mpq_brevitas.to_brevitas(model, plan)
    assert brevitas.config.IGNORE_MISSING_KEYS is before
    with pytest.raises(MPQError):
        mpq_brevitas.to_brevitas(model, planned(conv_net()))
    assert brevitas.config.IGNORE_MISSING_KEYS is before
    # Brevitas itself sets it for good where a map fails.
    fewer = plan.model_copy(update={"layers": plan.layers[:-1]})
    with pytest.raises(MismatchError, match=r"layer 'fc': is not in the plan.*layer_map\(plan, model\)"):
        quantize.layerwise_quantize(copy.deepcopy(model), compute_layer_map=mpq_brevitas.layer_map(fewer))
    assert brevitas.config.IGNORE_MISSING_KEYS is before


def test_a_plan_on_folded_weights_wants_the_folded_model() -> None:
    model = conv_net()
    plan = planned(model, Affine(), fold_bn=True)
    with pytest.raises(SettingError, match="measured with BatchNorm folded in"):
        mpq_brevitas.layer_map(plan)
    with pytest.raises(MismatchError, match="fold_batch_norm"):
        mpq_brevitas.layer_map(plan, model)
    folded = fold_batch_norm(model)
    mine = quantize.layerwise_quantize(copy.deepcopy(folded), compute_layer_map=mpq_brevitas.layer_map(plan, folded))
    mpq_brevitas.verify(mine, plan, model, batch=IMAGES)


def test_compiled_brevitas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brevitas.config, "JIT_ENABLED", True)
    model = nets.made(nets.SmallNet)
    with pytest.raises(SettingError, match="BREVITAS_JIT"):
        mpq_brevitas.to_brevitas(model, planned(model))


def test_a_checkpoint_of_another_plan_changes_nothing() -> None:
    model = nets.made(nets.SmallNet)
    three, five = (mpq_brevitas.to_brevitas(model, planned(model, allocator=Uniform(bits=b))) for b in (3, 5))
    with torch.no_grad():
        for parameter in five.parameters():
            parameter.add_(1)
    before = {name: value.clone() for name, value in three.state_dict().items()}
    with pytest.raises(MismatchError, match=r"'conv1': the checkpoint holds it as 5 bits, .* this model as 3 bits"):
        three.load_state_dict(five.state_dict())
    assert all(value.equal(before[name]) for name, value in three.state_dict().items())
    copied = copy.deepcopy(five)
    with pytest.raises(MismatchError, match="holds it as 3 bits"):
        copied.load_state_dict(three.state_dict())
    copied.load_state_dict(five.state_dict())


def own_way(model: nn.Module, **settings: Any) -> nn.Module:
    """What a user gets from Brevitas alone, for linear layers."""
    classes = {nn.Conv2d: qnn.QuantConv2d, nn.Linear: qnn.QuantLinear}
    given = {"input_quant": None, "bias_quant": None, "return_quant_tensor": False} | settings
    quantized: nn.Module = quantize.layerwise_quantize(
        copy.deepcopy(model), compute_layer_map={cls: (twin, given) for cls, twin in classes.items()}
    )
    return quantized


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 4}, "'conv1' has 8 bits, the plan 4"),  # a misspelt keyword
        ({"weight_bit_width": 4}, "'conv1' has 1 scales, the plan 8"),  # per tensor by default
        ({"weight_bit_width": 1}, "'conv1' has 1 bits, the plan 4"),
    ],
)
def test_verify_sees_what_brevitas_alone_does_in_silence(settings: dict[str, Any], message: str) -> None:
    model = nets.made(nets.SmallNet)
    with pytest.raises(VerifyError, match=message):
        mpq_brevitas.verify_tuned(own_way(model, **settings), planned(model))


def test_verify_sees_the_nan_of_one_bit_integers() -> None:
    model = nets.made(nets.SmallNet)
    quantized = own_way(model, weight_bit_width=1, weight_scaling_per_output_channel=True)
    with pytest.raises(VerifyError, match="'conv1' has weights that are NaN"):
        mpq_brevitas.verify_tuned(quantized, planned(model, allocator=Uniform(bits=1)))


def test_verify_sees_inputs_quantized_by_default() -> None:
    model = nets.made(nets.SmallNet)
    quantized = quantize.layerwise_quantize(copy.deepcopy(model))
    plan = planned(model, Affine(symmetric=True), Uniform(bits=8))
    with pytest.raises(VerifyError, match="'conv1' takes its input at 8 bits, the plan floating point"):
        mpq_brevitas.verify_tuned(quantized, plan)


def _left_out(model: Any, float_model: Any) -> None:
    model.conv2 = copy.deepcopy(float_model.conv2)


def _switched_off(model: Any, _: Any) -> None:
    model.conv2.weight_quant.disable_quant = True


def _one_bit_more(model: Any, _: Any) -> None:
    model.conv2.weight_quant.tensor_quant.msb_clamp_bit_width_impl.bits += 1


def _other_scales(model: Any, _: Any) -> None:
    model.conv2.weight_quant.tensor_quant.scaling_impl.value.data *= 1.1


def _other_norm(model: Any, _: Any) -> None:
    model.fc.weight.data[0] += 1


def _other_bias(model: Any, _: Any) -> None:
    model.conv2.bias.data += 1


def _other_statistics(model: Any, _: Any) -> None:
    model.bn1.running_mean += 1


def _other_stride(model: Any, _: Any) -> None:
    model.conv2.stride = (2, 2)


def _float_input_quantized(model: Any, _: Any) -> None:
    model.fc = qnn.QuantLinear(8, 10, weight_quant=None, input_quant=Int8ActPerTensorFloat)


def _activation_added(model: Any, _: Any) -> None:
    model.relu = qnn.QuantReLU(bit_width=2)


def _nan_bias(model: Any, _: Any) -> None:
    model.conv2.bias.data[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message", "seen_without_model"),
    [
        (_other_bias, "'conv2.bias' is not the model's own", False),
        (_other_statistics, "'bn1.running_mean' is not the model's own", False),
        (_other_stride, r"'conv2' is \(.*stride=\(2, 2\).*in the model", False),
        (_float_input_quantized, "'fc.input_quant' is quantized, and the plan leaves it in float", True),
        (_activation_added, "'relu.act_quant' is quantized, and the plan leaves it in float", True),
        (_nan_bias, "'conv2' has a bias that is NaN", True),
        (_left_out, "'conv2' was left in float", True),
        (_switched_off, "'conv2' was left in float", True),
        (_one_bit_more, "'conv2' has 5 bits, the plan 4", True),
        (_other_scales, "'conv2' has weights that are not the plan's", False),
        (_other_norm, "'fc.weight' is not the model's own", False),
    ],
)
def test_verify_finds_what_is_planted(change: Any, message: str, seen_without_model: bool) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, skip=["fc"])
    quantized = mpq_brevitas.to_brevitas(model, plan)
    mpq_brevitas.verify(quantized, plan, model, batch=IMAGES)
    change(quantized, model)
    with pytest.raises(VerifyError, match=message):
        mpq_brevitas.verify(quantized, plan, model)
    if seen_without_model:
        with pytest.raises(VerifyError, match=message):
            mpq_brevitas.verify_tuned(quantized, plan)
    else:
        mpq_brevitas.verify_tuned(quantized, plan)


def test_a_plan_may_come_from_numpy_and_json(tmp_path: Path) -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, allocator=Uniform(bits=int(np.int64(3))))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    mine = quantize.layerwise_quantize(copy.deepcopy(model), compute_layer_map=mpq_brevitas.layer_map(loaded))
    mpq_brevitas.verify(mine, plan, model, batch=IMAGES)
