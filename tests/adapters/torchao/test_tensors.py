"""torchao: integer codes against the plan's, what comes back from disk, and every silent failure as an error."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins import (
    PTILMPQ,
    Activations,
    Affine,
    InputRange,
    MixQuant,
    Part,
    Plan,
    Uniform,
    legalise,
    measure,
    with_input_ranges,
)
from mpq_plugins import apply as simulated
from mpq_plugins.errors import MismatchError, MPQError, SettingError, VerifyError
from mpq_plugins.models.kinds import quantizable_weights
from tests.adapters import nets
from tests.helpers.nets import tied_net
from tests.helpers.plans import with_layer

torchao = pytest.importorskip("mpq_plugins.adapters.torchao")
torchao_tensors = pytest.importorskip("mpq_plugins.adapters.torchao.tensors")


class TextNet(nn.Module):
    """An embedding, a convolution along the tokens and two linear layers; (N, T) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).mean(dim=2)
        logits: Tensor = self.fc(torch.relu(self.hidden(x)))
        return logits


TOKENS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
INPUTS = {TextNet: TOKENS, nets.SmallNet: IMAGES}
SCHEMES = [
    *(Affine(symmetric=s, granularity=g) for s in (False, True) for g in ("per_tensor", "per_channel")),
    Affine(granularity="per_channel", range="mse"),
    Affine(granularity="per_group", group_size=2),
]
ALLOCATORS = [*(Uniform(bits=b) for b in (8, 6, 4, 3, 2, 1)), MixQuant(qem=3.0), PTILMPQ(), PTILMPQ(other_bits=(4, 1))]


def planned(model: nn.Module, scheme: Affine = SCHEMES[1], allocator: Any = None) -> Plan:
    plan: Plan = (allocator or Uniform(bits=4))(measure(model, scheme, range(1, 9)))
    return plan


# Three input channels do not divide into groups.
CASES = [(net, scheme) for net in INPUTS for scheme in SCHEMES if net is TextNet or scheme.group_size is None]


@pytest.mark.parametrize(("net", "scheme"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_our_fake_quantization_to_the_bit(net: type[nn.Module], scheme: Affine, dtype: torch.dtype) -> None:
    model = nets.made(net).to(dtype)
    given = INPUTS[net].to(dtype) if INPUTS[net].is_floating_point() else INPUTS[net]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for allocator in ALLOCATORS:
        plan = planned(model, scheme, allocator)
        quantized, ours = torchao.apply(model, plan), simulated(model, plan)
        assert {check.layer for check in torchao.verify(quantized, plan, model, batch=given)} == set(plan.by_name)
        for name, weight in quantizable_weights(quantized).items():
            assert weight.dequantize().equal(quantizable_weights(ours)[name])
        with torch.no_grad():
            assert quantized(given).equal(ours(given))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_tied_weights_stay_tied() -> None:
    model = tied_net()
    plan = planned(model)
    quantized = torchao.apply(model, plan)
    torchao.verify(quantized, plan, model, batch=TOKENS)
    assert quantized.embed.weight is quantized.lm_head.weight
    untied = copy.deepcopy(quantized)
    untied.lm_head.weight = copy.deepcopy(untied.lm_head.weight)
    with pytest.raises(VerifyError, match="'lm_head' is no longer tied to 'embed'"):
        torchao.verify(untied, plan, model)


def test_a_state_dict_comes_back_from_disk(tmp_path: Path) -> None:
    model = nets.made(TextNet)
    plan = planned(model, allocator=PTILMPQ())
    torch.save(torchao.apply(model, plan).state_dict(), tmp_path / "net.pt")
    again = TextNet().eval()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True), assign=True)
    torchao.verify(again, plan, model, batch=TOKENS)


def test_safetensors_hold_it_too(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

    model = nets.made(TextNet)
    plan = planned(model, allocator=PTILMPQ())
    tensors, metadata = flatten_tensor_state_dict(torchao.apply(model, plan).state_dict())
    save_file(tensors, tmp_path / "net.safetensors", metadata)
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = unflatten_tensor_state_dict(read, file.metadata())
    again = TextNet().eval()
    again.load_state_dict(state[0] if isinstance(state, tuple) else state, assign=True)
    torchao.verify(again, plan, model, batch=TOKENS)


def test_8_bit_activations_are_dynamic_on_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    plan = planned(model, allocator=Uniform(bits=8))
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    per_token = plan.with_activations(Activations(8, dynamic="per_token"))
    dynamic = torchao.apply(model, per_token)
    checks = torchao.verify(dynamic, per_token, model, batch=inputs)
    assert [check.activation_bits for check in checks] == [8, 8]
    only_one = per_token.with_activations({"0": None})
    checks = torchao.verify(torchao.apply(model, only_one), only_one, model, batch=inputs)
    assert [check.activation_bits for check in checks] == [None, 8]
    with pytest.raises(VerifyError, match=r"'0' quantizes its input as"):
        torchao.verify(dynamic, only_one, model)
    with torch.no_grad():
        weights_only, reached = torchao.apply(model, plan)(inputs), dynamic(inputs)
    assert not reached.equal(weights_only)
    assert (reached - weights_only).abs().max() < 0.05 * weights_only.abs().max()
    with pytest.raises(VerifyError, match="quantizes its input as"):
        torchao.verify(dynamic, plan, model)
    with pytest.raises(SettingError, match=r"8 bits, asymmetric mse, but torchao has dynamic per_token .* legalise"):
        torchao.apply(model, plan.with_activation_bits(8))
    legal, (change,) = legalise(plan.with_activation_bits(8), torchao.CAPABILITIES)
    assert (legal, change.layer) == (per_token, "activations")
    with pytest.raises(SettingError, match="torchao quantizes no inputs of conv1d layers"):
        torchao.apply(nets.made(TextNet), planned(nets.made(TextNet)).with_activation_bits(8))


def test_binary_codes_are_of_two_bits_for_one_has_no_plus_one() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    weight = torchao.apply(model, planned(model, allocator=Uniform(bits=1))).get_submodule("0").weight
    assert str(weight.target_dtype) == "torch.int2"


def test_only_linear_layers_quantize_their_inputs() -> None:
    model = nets.made(TextNet)
    legal, _ = legalise(planned(model).with_activation_bits(8), torchao.CAPABILITIES)
    names = {layer.kind: torchao_tensors.dynamic_name(layer) for layer in legal.layers}
    assert {kind for kind, name in names.items() if name is not None} == {"linear"}
    assert not any(layer.in_float for layer in legal.layers)
    assert len(torchao.verify(torchao.apply(model, legal), legal, model, batch=TOKENS)) == 4


def test_tokens_have_the_levels_of_the_simulation() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    plan = planned(model, allocator=Uniform(bits=8))
    per_token = plan.with_activations(Activations(8, dynamic="per_token"))
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 50)[:, None]
    ours = with_input_ranges(simulated(model, plan), dict.fromkeys(("0", "2"), InputRange(8, dynamic="per_token")))
    with torch.no_grad():
        torch.testing.assert_close(torchao.apply(model, per_token)(inputs), ours(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["block_size", "dtype"])
def test_other_blocks_and_dtypes_around_the_plans_codes_are_found(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    plan = planned(model)
    quantized = torchao.apply(model, plan)
    weight = quantized.get_submodule("0").weight
    blocks = (4, 1) if change == "block_size" else tuple(weight.block_size)
    dtype = torch.float16 if change == "dtype" else weight.dtype
    scale = weight.scale.reshape(1, 4) if change == "block_size" else weight.scale
    zero_point = weight.zero_point.reshape(1, 4) if change == "block_size" else weight.zero_point
    quantized.get_submodule("0").weight = nn.Parameter(
        type(weight)(weight.qdata, scale, zero_point, weight.target_dtype, blocks, dtype, None), requires_grad=False
    )
    with pytest.raises(VerifyError, match=r"'0' has blocks of"):
        torchao.verify(quantized, plan, model)


REFUSED: list[tuple[type[nn.Module], type[MPQError], str]] = [
    (nets.Transposed, SettingError, "torchao does not quantize conv_transpose2d layers"),
    (nets.Attention, MismatchError, "'attention.out_proj' is MultiheadAttention's own"),
]


@pytest.mark.parametrize(("net", "error", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_torchao_gets_wrong_is_refused_by_name(net: type[nn.Module], error: type[MPQError], message: str) -> None:
    model = nets.made(net)
    with pytest.raises(error, match=message):
        torchao.apply(model, planned(model))


def test_another_models_plan_and_3_bit_activations_are_refused() -> None:
    plan = planned(nets.made(TextNet))
    with pytest.raises(MismatchError, match=r"Missing here: 'embed', 'conv', .*not in the plan: 'conv1'"):
        torchao.apply(nets.made(nets.SmallNet), plan)
    with pytest.raises(SettingError, match="activations at floating point, 8"):
        torchao.apply(nets.made(TextNet), plan.with_activation_bits(3))


def test_verify_finds_what_was_planted() -> None:
    model = nets.made(TextNet)
    plan = planned(model)
    quantized = torchao.apply(model, plan)

    with pytest.raises(VerifyError, match=r"'hidden' has \d+ of 48 codes that are not the plan's"):
        torchao.verify(quantized, with_layer(plan, "hidden", bits=5), model)
    with pytest.raises(VerifyError, match="'fc' is not the model's own, and the plan leaves it in float"):
        torchao.verify(quantized, with_layer(plan, "fc", bits=32), model)
    with pytest.raises(VerifyError, match="'fc' was left in float"):
        torchao.verify(torchao.apply(model, with_layer(plan, "fc", bits=32)), plan, model)
    scaled = nets.made(TextNet)
    with torch.no_grad():
        scaled.fc.weight.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(VerifyError, match="'fc' has other scales or zero points"):
        torchao.verify(quantized, plan, scaled)


def test_verify_finds_what_else_changed() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    for name in ("fc.bias", "bn1.running_mean"):
        quantized = torchao.apply(model, plan)
        with torch.no_grad():
            quantized.state_dict()[name].add_(1)
        with pytest.raises(VerifyError, match=f"'{name}' is not the model's own"):
            torchao.verify(quantized, plan, model)


class OwnProduct(nn.Linear):
    """A subclass that multiplies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class TiedBack(nn.Module):
    """Goes back by the weight it came by."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(torch.relu(self.encode(x)), self.encode.weight, padding=1)


class Transposed(TiedBack):
    """Multiplies by a layer's weight the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encode(x).mean((2, 3))
        return y @ self.fc.weight.squeeze(1)


class ByName(TiedBack):
    """Gives a bias by name, which torchao's tensors lose."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).mean((2, 3)), self.fc.weight, bias=self.fc.bias)


@pytest.mark.parametrize(("net", "layer"), [(TiedBack, "encode"), (Transposed, "fc"), (ByName, "fc")])
def test_a_weight_that_torchaos_tensors_fail_on_elsewhere_is_refused(net: type[nn.Module], layer: str) -> None:
    model = nets.made(net)
    with pytest.raises(MismatchError, match=rf"'{layer}' lends its weight to a functional call.*skip it"):
        torchao.apply(model, planned(model))
    plan = Uniform(bits=4)(measure(model, SCHEMES[1], (4,), skip=[layer]))
    torchao.verify(torchao.apply(model, plan), plan, model, batch=IMAGES)


class Functions(TextNet):
    """Takes its layers' weights by functions that torchao's tensors know."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed.weight).transpose(1, 2)
        x = F.conv1d(x, self.conv.weight, self.conv.bias).mean(dim=2)
        return F.linear(torch.relu(self.hidden(x)), self.fc.weight)


@pytest.mark.parametrize("net", [nets.Functional, nets.Lending, Functions])
def test_functions_that_take_torchaos_tensors_are_no_reason_to_refuse(net: type[nn.Module]) -> None:
    model, given = nets.made(net), TOKENS if net is Functions else IMAGES
    plan = planned(model)
    torchao.verify(torchao.apply(model, plan), plan, model, batch=given)


class Centred(nn.Conv2d):
    """A subclass whose convolution takes another weight."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = super()._conv_forward(x, weight - weight.mean(), bias)
        return result


def test_methods_below_forward_are_looked_at_and_hooks_stay() -> None:
    model = nn.Sequential(Centred(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(MismatchError, match=r"'0' is a Centred, which computes in its own way \(_conv_forward\)"):
        torchao.apply(model, planned(model))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    plain[0].register_forward_hook(lambda _, __, y: y.relu())
    torchao.verify(torchao.apply(plain, planned(plain)), planned(plain), plain, batch=IMAGES)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0)).eval()
    with pytest.raises(MismatchError, match=r"'1' \[0, 4\]: no weights there, which torchao cannot quantize: skip it"):
        torchao.apply(model, planned(model))


def test_a_quantized_model_is_not_measured_again() -> None:
    model = nets.made(nets.SmallNet)
    quantized = torchao.apply(model, planned(model))
    with pytest.raises(MPQError, match="layer 'conv1': is quantized already"):
        measure(quantized, SCHEMES[1], (4,))
    with pytest.raises(MPQError, match="layer 'conv1': is quantized already"):
        torchao.apply(quantized, planned(model))


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nets.made(TextNet)
    plan = planned(model)
    torchao.verify(torchao.apply(model, plan), plan, model, batch=TOKENS)


def test_layers_that_compute_in_their_own_way_are_refused() -> None:
    model = nn.Sequential(OwnProduct(8, 4)).eval()
    with pytest.raises(MismatchError, match="'0' is a OwnProduct, which computes in its own way"):
        torchao.apply(model, planned(model))
    plain = nn.Sequential(nets.OwnLinear(8, 4)).eval()
    torchao.verify(torchao.apply(plain, planned(plain)), planned(plain), plain, batch=torch.randn(3, 8))


def test_stock_configs_quantize_what_the_plan_says() -> None:
    from torchao.quantization import IntxUnpackedToInt8Tensor, quantize_

    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 4)).eval()
    plan = planned(model, Affine(granularity="per_channel", symmetric=True), MixQuant(qem=3.0))
    config = torchao.to_config(plan, model)
    assert list(config.fqn_to_config) == ["0.weight", "1.weight", "2.weight"]
    stock = copy.deepcopy(model)
    quantize_(stock, config, filter_fn=None)
    for name, layer in plan.by_name.items():
        weight: Any = stock.get_submodule(name).weight
        assert isinstance(weight, IntxUnpackedToInt8Tensor)
        assert weight.target_dtype == getattr(torch, f"int{layer.bits}")
    with pytest.raises(VerifyError):  # torchao's scales are its own
        torchao.verify(stock, plan, model)


def test_what_a_stock_config_cannot_say_is_refused() -> None:
    model = nets.made(TextNet)
    with pytest.raises(SettingError, match=r"'conv': 4 bits.*does not quantize conv1d layers"):
        torchao.to_config(planned(model))
    linear = nn.Sequential(nn.Linear(8, 8))
    plan = planned(linear)
    parts = (Part(bits=2, channels=(0, 1)), Part(bits=4, channels=tuple(range(2, 8))))
    for changes, message in (
        ({"bits": 1}, "has no 1 bits, only 2, 3"),
        ({"bits": None, "parts": parts}, "one width per layer"),
        ({"scheme": Affine()}, "has no per_tensor scales"),
    ):
        layers = (plan.layers[0].model_copy(update=changes),)
        with pytest.raises(SettingError, match=message):
            torchao.to_config(plan.model_copy(update={"layers": layers}))
    with pytest.raises(SettingError, match="shares its weight with 'second', which quantize_ would untie"):
        torchao.to_config(planned(nets.made(nets.Tied)))
    with pytest.raises(MismatchError, match="made for another model"):
        torchao.to_config(plan, nn.Sequential(nn.Linear(8, 9)))
