"""Corrected statistics and biases are kept by every adapter, and change no code."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx

from mpq_plugins import PTILMPQ, Affine, MixQuant, Plan, Uniform, apply, correct, measure
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.simulation.integers import integer_weight
from tests.adapters import nets
from tests.adapters.compressor import same
from tests.adapters.fx.test_preparation import pytestmark as fx_warnings

brevitas = pytest.importorskip("mpq_plugins.adapters.brevitas")
fx = pytest.importorskip("mpq_plugins.adapters.fx")
inc = pytest.importorskip("mpq_plugins.adapters.inc")
pt2e = pytest.importorskip("mpq_plugins.adapters.pt2e")
torchao = pytest.importorskip("mpq_plugins.adapters.torchao")

FILTERS = [
    *fx_warnings,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore:erase_node:UserWarning"),
]

PER_CHANNEL = Affine(granularity="per_channel")
SYMMETRIC = Affine(granularity="per_channel", symmetric=True)
IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.3
ALLOCATORS = [Uniform(bits=2), Uniform(bits=4), MixQuant(qem=3.0), PTILMPQ(other_bits=(4, 1))]

pytestmark = [*FILTERS, pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def corrected(allocator: Any, scheme: Affine = PER_CHANNEL) -> tuple[nn.Module, nn.Module, Plan]:
    """A net, the same corrected for the plan, and the plan."""
    model = nets.made(nets.SmallNet)
    plan: Plan = allocator(measure(model, scheme, range(1, 9)))
    return model, correct(model, plan, IMAGES.split(16)), plan


def folded_simulation(model: nn.Module, plan: Plan) -> nn.Module:
    return apply(fold_batch_norm(model), plan.with_activation_bits(None).model_copy(update={"fold_bn": False}))


def no_other_codes(model: nn.Module, other: nn.Module, plan: Plan) -> None:
    """The integers that backends store, of both nets as they fold them, but for ties that float32 may move."""
    weights = [quantizable_weights(fold_batch_norm(net)) for net in (model, other)]
    for layer in plan.layers:
        before, after = (integer_weight(own[layer.name], layer) for own in weights)
        assert (before.codes != after.codes).float().mean() < 0.01
        assert before.zero_point.equal(after.zero_point)


def test_the_codes_are_those_without_correction(allocator: Any) -> None:
    for scheme in (PER_CHANNEL, SYMMETRIC):
        model, better, plan = corrected(allocator, scheme)
        no_other_codes(model, better, plan)
        assert not same(model, better)
        for name, weight in quantizable_weights(model).items():
            assert quantizable_weights(better)[name].equal(weight)


def test_fx_holds_the_corrected_net(allocator: Any) -> None:
    model, better, plan = corrected(allocator)
    plan = plan.with_activation_bits(8)
    made = fx.prepare(better, plan, IMAGES[:1])
    with torch.no_grad():
        made(IMAGES)
        converted = convert_fx(copy.deepcopy(made))
        fx.verify(converted, plan, better)
        with pytest.raises(VerifyError, match="that is not the folded model's"):
            fx.verify(converted, plan, model)
        ours, reached = folded_simulation(better, plan)(IMAGES), converted(IMAGES)
    assert (reached - ours).abs().max() < 0.2 * ours.abs().max()
    for name, weight in quantizable_weights(folded_simulation(better, plan)).items():
        module: Any = converted.get_submodule(name)
        module = module[0] if isinstance(module, nn.Sequential) else module
        torch.testing.assert_close(module.weight().dequantize(), weight, rtol=1e-6, atol=0)


def test_pt2e_gives_the_logits_of_the_corrected_net_to_the_bit(allocator: Any) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, better, plan = corrected(allocator)
    exported = torch.export.export(better, (IMAGES.clone(),)).module()
    made: Any = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, better))
    made(IMAGES)
    converted = convert_pt2e(made)
    assert {check.layer for check in pt2e.verify(converted, plan, better, batch=IMAGES)} == set(plan.by_name)
    with torch.no_grad():
        assert converted(IMAGES).equal(folded_simulation(better, plan)(IMAGES))
    with pytest.raises(VerifyError):
        pt2e.verify(converted, plan, model)


UNFOLDED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torchao": (torchao.apply, torchao.verify),
    "brevitas": (brevitas.to_brevitas, brevitas.verify),
    "inc": (inc.apply, inc.verify),
}


@pytest.mark.parametrize("adapter", UNFOLDED)
@pytest.mark.parametrize("scheme", [PER_CHANNEL, SYMMETRIC, Affine()], ids=str)
def test_adapters_that_fold_nothing_give_the_simulation_to_the_bit(
    adapter: str, scheme: Affine, allocator: Any
) -> None:
    convert, verify = UNFOLDED[adapter]
    model = nets.made(nets.SmallNet)
    plan: Plan = allocator(measure(model, scheme, range(1, 9), fold_bn=False))
    better = correct(model, plan, IMAGES.split(16))
    quantized = convert(better, plan)
    assert {check.layer for check in verify(quantized, plan, better, batch=IMAGES)} == set(plan.by_name)
    with torch.no_grad():
        assert quantized(IMAGES).equal(apply(better, plan)(IMAGES))
    with pytest.raises(VerifyError):
        verify(quantized, plan, model)


def test_a_bias_that_correction_made_is_kept(allocator: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False)).eval()
    given: Tensor = torch.randn(32, 8, generator=torch.Generator().manual_seed(2)) + 0.5
    plan: Plan = allocator(measure(model, PER_CHANNEL, range(1, 9)))
    better = correct(model, plan, [given])
    expected = apply(better, plan)
    for convert, verify in UNFOLDED.values():
        quantized = convert(better, plan)
        verify(quantized, plan, better, batch=given)
        with torch.no_grad():
            assert quantized(given).equal(expected(given))
    activations = plan.with_activation_bits(8)
    made = fx.prepare(better, activations, given[:1])
    with torch.no_grad():
        made(given)
    fx.verify(convert_fx(made), activations, better)
