"""PT2E: integer codes against the plan's, logits to the bit, and silent failures as errors."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from mpq_plugins import PTILMPQ, Affine, MixQuant, Plan, Uniform, apply, measure
from mpq_plugins.errors import MismatchError, SettingError, SourceError, VerifyError
from mpq_plugins.models.folding import fold_batch_norm
from tests.adapters import nets
from tests.adapters.torchao.test_tensors import IMAGES, TOKENS, TextNet
from tests.helpers.plans import with_layer

pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore:erase_node:UserWarning"),
]

PER_CHANNEL = Affine(granularity="per_channel")
SYMMETRIC = Affine(granularity="per_channel", symmetric=True)
SCHEMES = [Affine(symmetric=s, granularity=g) for s in (False, True) for g in ("per_tensor", "per_channel")]
ALLOCATORS = [*(Uniform(bits=b) for b in (8, 6, 4, 3, 2, 1)), MixQuant(qem=3.0), PTILMPQ(), PTILMPQ(other_bits=(4, 1))]


class UpNet(nn.Module):
    """A transposed, a depthwise and a linear layer called as a function; (N, 3, 8, 8) -> (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(torch.relu(self.up(x))).mean(dim=(2, 3))
        return nn.functional.linear(y, self.fc.weight, self.fc.bias)


INPUTS: dict[type[nn.Module], Tensor] = {nets.SmallNet: IMAGES, TextNet: TOKENS, UpNet: IMAGES, nets.Reused: IMAGES}


def planned(model: nn.Module, scheme: Affine = PER_CHANNEL, allocator: Any = None) -> Plan:
    plan: Plan = (allocator or Uniform(bits=4))(measure(model, scheme, range(1, 9)))
    return plan


def prepared(model: nn.Module, plan: Plan, given: Tensor) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    exported = torch.export.export(model, (given.clone(),)).module()
    made = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    made(given)
    return cast(GraphModule, made)


def converted(model: nn.Module, plan: Plan, given: Tensor) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    return cast(GraphModule, convert_pt2e(prepared(model, plan, given)))


@pytest.mark.parametrize("net", INPUTS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_alone_give_the_logits_of_apply_to_the_bit(net: type[nn.Module], scheme: Affine) -> None:
    model, given = nets.made(net), INPUTS[net]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for allocator in ALLOCATORS:
        plan = planned(model, scheme, allocator)
        made = converted(model, plan, given)
        assert {check.layer for check in pt2e.verify(made, plan, model, batch=given)} == set(plan.by_name)
        ours = apply(fold_batch_norm(model), plan.model_copy(update={"fold_bn": False}))
        with torch.no_grad():
            assert made(given).equal(ours(given))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_8_bit_activations_are_counted() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, SYMMETRIC, Uniform(bits=8)).with_activation_bits(8)
    made = converted(model, plan, IMAGES)
    checks = pt2e.verify(made, plan, model, batch=IMAGES)
    assert [check.activation_bits for check in checks] == [8, 8, 8]
    with torch.no_grad():
        exact, reached = model(IMAGES), made(IMAGES)
    assert not reached.equal(exact)
    assert (reached - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(VerifyError, match="'conv1' takes its input quantized"):
        pt2e.verify(made, plan.with_activation_bits(None), model)


def test_layers_left_in_float_stay_in_float_with_quantized_activations_too() -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=4)(measure(model, SYMMETRIC, (4,), skip=["fc"])).with_activation_bits(8)
    checks = pt2e.verify(converted(model, plan, IMAGES), plan, model, batch=IMAGES)
    assert [check.layer for check in checks] == ["conv1", "conv2"]


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_it_runs_under_torch_compile(activation_bits: int | None) -> None:
    from torch._inductor import config

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    plan = planned(model, SYMMETRIC, PTILMPQ()).with_activation_bits(activation_bits)
    made = converted(model, plan, IMAGES)
    with torch.no_grad(), config.patch(freezing=True):  # how int8 kernels are reached
        assert torch.allclose(torch.compile(made)(IMAGES), made(IMAGES), atol=1e-4)


def test_tied_weights_are_one_layer() -> None:
    model, given = nets.made(nets.Tied), torch.randn(2, 8, generator=torch.Generator().manual_seed(4))
    plan = planned(model)
    made = converted(model, plan, given)
    pt2e.verify(made, plan, model, batch=given)
    with torch.no_grad():
        assert made(given).equal(apply(model, plan)(given))


@pytest.mark.parametrize("net", [nets.TwoNorms, nets.NormAndMore])
@pytest.mark.parametrize("skip", [(), ("conv1",)])
def test_what_pt2e_would_fold_wrongly_is_refused_planned_or_not(net: type[nn.Module], skip: tuple[str, ...]) -> None:
    model = nets.made(net)
    plan = Uniform(bits=8)(measure(model, PER_CHANNEL, (8,), skip=skip))
    with pytest.raises(MismatchError, match=r"'conv1' feeds the BatchNorm .* but is no pair with it.*PT2E would fold"):
        prepared(model, plan, IMAGES)


def test_a_linear_layers_batch_norm_is_refused() -> None:
    model, given = nets.made(nets.LinearNorm), torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    with pytest.raises(MismatchError, match="'first' feeds the BatchNorm 'norm' but is no pair with it"):
        prepared(model, planned(model), given)


def test_models_that_pt2e_breaks_on_are_refused() -> None:
    half = nets.made(nets.SmallNet).to(torch.bfloat16)
    with pytest.raises(SettingError, match=r"call model\.float"):
        pt2e.PlanQuantizer(planned(half), half)
    with pytest.raises(SettingError, match="in training mode"):
        pt2e.PlanQuantizer(planned(nets.made(nets.SmallNet)), nets.made(nets.SmallNet).train())
    clipped = nn.Sequential(nn.Embedding(20, 8, max_norm=0.5)).eval()
    with pytest.raises(MismatchError, match="'0' has max_norm, which changes its weight as it runs"):
        pt2e.PlanQuantizer(planned(clipped), clipped)


class ByHand(nn.Module):
    """Works with a weight of its own before a norm: (N, 3, 8, 8) -> (N, 3)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm1d(3), how
        self.register_buffer("fixed", torch.randn(3, 3))
        self.plain, self.trained = [torch.randn(3, 3)], nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        weight = {"buffer": self.get_buffer("fixed"), "tensor": self.plain[0], "computed": self.trained.abs()}[self.how]
        z: Tensor = self.norm(nn.functional.linear(y, weight))
        return z


@pytest.mark.parametrize("how", ["buffer", "tensor", "computed"])
def test_weights_that_are_no_parameters_before_a_norm_are_refused(how: str) -> None:
    model = ByHand(how).eval()
    with pytest.raises(MismatchError, match="ByHand: works with a weight that is no parameter, before a norm"):
        pt2e.PlanQuantizer(planned(model), model)
    with pytest.raises(MismatchError, match="'0': works with a weight that is no parameter, before a norm"):
        pt2e.PlanQuantizer(planned(outer := nn.Sequential(model)), outer)


def test_plans_that_pt2e_cannot_run_are_refused() -> None:
    model = nets.made(nets.SmallNet)
    with pytest.raises(MismatchError, match="measured unfolded, and PT2E folds BatchNorm"):
        pt2e.PlanQuantizer(Uniform(bits=4)(measure(model, Affine(), (4,), fold_bn=False)), model)
    with pytest.raises(SettingError, match=r"'conv'.*pt2e quantizes no inputs of conv1d layers"):
        pt2e.PlanQuantizer(planned(nets.made(TextNet), SYMMETRIC).with_activation_bits(8), nets.made(TextNet))
    with pytest.raises(SettingError, match=r"'conv1'.*pt2e has only symmetric scales"):
        pt2e.PlanQuantizer(planned(model).with_activation_bits(8), model)
    with pytest.raises(SettingError, match="activations at floating point, 8"):
        pt2e.PlanQuantizer(planned(model).with_activation_bits(3), model)
    with pytest.raises(MismatchError, match="made for another model"):
        pt2e.PlanQuantizer(planned(nets.made(TextNet)), model)


def test_a_layer_that_the_graph_lacks_is_refused() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    quantizer = pt2e.PlanQuantizer(plan, model)
    exported = torch.export.export(nets.made(TextNet), (TOKENS,)).module()
    with pytest.raises(MismatchError, match="is not in the exported graph: skip it"):
        quantizer.transform_for_annotation(exported)


def test_verify_finds_what_was_planted() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    made = converted(model, plan, IMAGES)

    with pytest.raises(VerifyError, match=r"'conv2' has \d+ of 144 codes that are not the plan's"):
        pt2e.verify(made, with_layer(plan, "conv2", bits=5), model)
    with pytest.raises(VerifyError, match="'fc' is quantized and the plan leaves it in float"):
        pt2e.verify(made, with_layer(plan, "fc", bits=32), model)
    with pytest.raises(VerifyError, match="'fc' was left in float"):
        pt2e.verify(converted(model, with_layer(plan, "fc", bits=32), IMAGES), plan, model)
    scaled = nets.made(nets.SmallNet)
    with torch.no_grad():
        scaled.fc.weight.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(VerifyError, match="'fc' has other scales or zero points"):
        pt2e.verify(made, plan, scaled)
    shifted = nets.made(nets.SmallNet)
    with torch.no_grad():
        shifted.fc.bias.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(VerifyError, match="'fc' has a bias that is not the folded model's"):
        pt2e.verify(made, plan, shifted)
    with pytest.raises(SourceError, match="no GraphModule"):
        pt2e.verify(model, plan, model)


def test_verify_reads_how_activations_are_quantized() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model, SYMMETRIC).with_activation_bits(8)
    made = converted(model, plan, IMAGES)
    pt2e.verify(made, plan, model, batch=IMAGES)
    for node in made.graph.nodes:
        if str(node.target).startswith(
            ("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor")
        ):
            node.args = (*node.args[:4], int(node.args[3]) + 15, *node.args[5:])
    with pytest.raises(VerifyError, match="'conv1' takes an input that is not quantized to 8 bits"):
        pt2e.verify(made, plan, model)


def test_verify_finds_one_call_of_two_left_in_float() -> None:
    model = nets.made(nets.Reused)
    plan = planned(model)
    made = converted(model, plan, IMAGES)
    calls = [node for node in made.graph.nodes if node.meta.get("mpq_plugins_layer") == "conv2"]
    assert len(calls) == 2
    with made.graph.inserting_before(calls[1]):
        calls[1].args = (calls[1].args[0], made.graph.get_attr("conv2.weight"), *calls[1].args[2:])
    with pytest.raises(VerifyError, match="'conv2' is in float in one of its calls"):
        pt2e.verify(made, plan, model)


class Functional(nn.Module):
    """A norm of stored statistics that is no BatchNorm, as detection networks freeze theirs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, channels))
        self.register_buffer("var", torch.linspace(0.3, 2, channels))
        self.register_buffer("gain", torch.linspace(-2, 1.5, channels))  # some channels change their sign
        self.register_buffer("shift", torch.linspace(-1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, gain, shift = map(self.get_buffer, ("mean", "var", "gain", "shift"))
        return nn.functional.batch_norm(x, mean, var, gain, shift)


class Frozen(nets.SmallNet):
    """Functional norms in the place of the BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = Functional(8), Functional(8)  # type: ignore[assignment]


class Asks(nets.SmallNet):
    """Looks at its input's shape, which torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("channels")
        return super().forward(x)


class AsksOfTwoNorms(nets.TwoNorms):
    """The same, with a convolution that PT2E folds wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("channels")
        return super().forward(x)


class FrozenAndMore(Frozen):
    """A convolution that feeds a functional norm and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        logits: Tensor = self.fc(self.conv2(self.bn1(y) + y).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("net", [Frozen, Asks])
@pytest.mark.parametrize("scheme", [PER_CHANNEL, SYMMETRIC], ids=str)
@pytest.mark.parametrize("skip", [(), ("conv1",)])
def test_norms_that_torch_fx_does_not_show_rescale_codes(
    net: type[nn.Module], scheme: Affine, skip: tuple[str, ...]
) -> None:
    model = nets.made(net)
    for allocator in (Uniform(bits=8), Uniform(bits=3), Uniform(bits=1), PTILMPQ(other_bits=(4, 1))):
        plan = allocator(measure(model, scheme, range(1, 9), per_channel=True, skip=skip))
        checks = pt2e.verify(converted(model, plan, IMAGES), plan, model, batch=IMAGES)
        assert {check.layer for check in checks} == set(plan.by_name)


def test_inputs_are_quantized_beside_norms_that_torch_fx_does_not_show() -> None:
    model = nets.made(Frozen)
    plan = planned(model, SYMMETRIC, Uniform(bits=8)).with_activation_bits(8)
    pt2e.verify(converted(model, plan, IMAGES), plan, model, batch=IMAGES)


@pytest.mark.parametrize("net", [AsksOfTwoNorms, FrozenAndMore])
@pytest.mark.parametrize("skip", [(), ("conv1",)])
def test_a_norm_that_pt2e_folds_into_another_function_is_found_in_the_graph(
    net: type[nn.Module], skip: tuple[str, ...]
) -> None:
    model = nets.made(net)
    plan = Uniform(bits=8)(measure(model, PER_CHANNEL, (8,), skip=skip))
    with pytest.raises(MismatchError, match=r"'conv1'.*PT2E has folded a norm where that makes another function"):
        prepared(model, plan, IMAGES)


def test_one_scale_for_a_tensor_does_not_survive_a_norm() -> None:
    model = nets.made(Frozen)
    with pytest.raises(MismatchError, match=r"'conv1' was measured unfolded.*measure per_channel"):
        prepared(model, planned(model, Affine()), IMAGES)


def test_inputs_that_the_quantizer_does_not_take_are_told_while_preparing() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, given = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    plan = planned(model, SYMMETRIC, Uniform(bits=8)).with_activation_bits(8)
    with pytest.raises(MismatchError, match=r"no inputs of 'layers.0.self_attn.out_proj'.*skip it"):
        prepared(model, plan, given)
    skipping = Uniform(bits=8)(measure(model, SYMMETRIC, (8,), skip=["*.out_proj"])).with_activation_bits(8)
    pt2e.verify(converted(model, skipping, given), skipping, model, batch=given)


def test_outputs_that_are_not_the_plans_are_told() -> None:
    model = nets.made(nets.SmallNet)
    plan = planned(model)
    made = converted(model, plan, IMAGES)
    (pooled,) = (node for node in made.graph.nodes if str(node.target).startswith("aten.mean"))
    with made.graph.inserting_after(pooled):
        doubled = made.graph.call_function(torch.ops.aten.mul.Tensor, (pooled, 2))
    pooled.replace_all_uses_with(doubled, delete_user_cb=lambda node: node is not doubled)
    made.recompile()
    pt2e.verify(made, plan, model)
    with pytest.raises(VerifyError, match=r"on the batch, beside mpq_plugins.apply's, its output is off by"):
        pt2e.verify(made, plan, model, batch=IMAGES)


def test_a_bare_layer() -> None:
    torch.manual_seed(0)
    model, given = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    plan = planned(model)
    pt2e.verify(converted(model, plan, given), plan, model, batch=given)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_are_refused() -> None:
    model = nn.ModuleDict({"own": nn.Linear(8, 4), "none": nn.Linear(8, 0), "blind": nn.Linear(0, 4)}).eval()
    with pytest.raises(MismatchError, match=r"'none' \[0, 8\], 'blind' \[4, 0\]: no weights there.*skip it"):
        pt2e.PlanQuantizer(planned(model), model)
    pt2e.PlanQuantizer(Uniform(bits=4)(measure(model, PER_CHANNEL, (4,), skip=["none", "blind"])), model)
