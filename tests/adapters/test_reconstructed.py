"""Learned codes go on into every adapter: they find them in the weights, whatever they fold first."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx

import mpq_plugins as mpq
from mpq_plugins import PTILMPQ, Affine, Plan, SettingError, Uniform, measure
from mpq_plugins.errors import VerifyError
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.simulation.integers import integer_weight
from tests.adapters import nets
from tests.adapters.test_corrected import FILTERS, IMAGES, PER_CHANNEL, SYMMETRIC, UNFOLDED, folded_simulation, fx, pt2e

pytestmark = FILTERS
ALLOCATORS = [Uniform(bits=2), PTILMPQ(other_bits=(4, 1))]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def learned(allocator: Any, scheme: Affine, fold_bn: Any = "auto") -> tuple[nn.Module, nn.Module, Plan]:
    """A net, the same with learned codes, and the plan."""
    model = nets.made(nets.SmallNet)
    plan: Plan = allocator(measure(model, scheme, range(1, 9), fold_bn=fold_bn))
    result = mpq.reconstruct(model, plan, list(IMAGES.split(16)), steps=12, batch_size=8, lr=0.1)
    moved = sum(
        int((integer_weight(quantizable_weights(result)[name], layer).codes
             != integer_weight(quantizable_weights(mpq.apply(model, plan))[name], layer).codes).sum())
        for name, layer in plan.by_name.items()
    )  # fmt: skip
    assert moved > 0
    return model, result, plan


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
@pytest.mark.parametrize("scheme", [PER_CHANNEL, SYMMETRIC, Affine(granularity="per_channel", range="mse")], ids=str)
def test_folding_leaves_the_learned_codes(scheme: Affine, allocator: Any) -> None:
    _, result, plan = learned(allocator, scheme)
    folded = fold_batch_norm(result)
    for name, layer in plan.by_name.items():
        weight = quantizable_weights(folded)[name]
        torch.testing.assert_close(integer_weight(weight, layer).dequantized(), weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
@pytest.mark.parametrize("adapter", UNFOLDED)
@pytest.mark.parametrize("scheme", [PER_CHANNEL, SYMMETRIC, Affine()], ids=str)
def test_adapters_that_fold_nothing_hold_the_result_to_the_bit(adapter: str, scheme: Affine, allocator: Any) -> None:
    convert, verify = UNFOLDED[adapter]
    model, result, plan = learned(allocator, scheme, fold_bn=False)
    quantized = convert(result, plan)
    assert {check.layer for check in verify(quantized, plan, result, batch=IMAGES)} == set(plan.by_name)
    with torch.no_grad():
        assert quantized(IMAGES).equal(result(IMAGES))
    with pytest.raises(VerifyError):
        verify(quantized, plan, model)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
def test_fx_holds_the_learned_codes(allocator: Any) -> None:
    model, result, plan = learned(allocator, PER_CHANNEL)
    plan = plan.with_activation_bits(8)
    made = fx.prepare(result, plan, IMAGES[:1])
    with torch.no_grad():
        made(IMAGES)
    converted = convert_fx(copy.deepcopy(made))
    fx.verify(converted, plan, result)
    with pytest.raises(VerifyError):
        fx.verify(converted, plan, model)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
def test_pt2e_holds_the_learned_codes(allocator: Any) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, result, plan = learned(allocator, PER_CHANNEL)
    made: Any = prepare_pt2e(torch.export.export(result, (IMAGES.clone(),)).module(), pt2e.PlanQuantizer(plan, result))
    made(IMAGES)
    converted = convert_pt2e(made)
    assert {check.layer for check in pt2e.verify(converted, plan, result, batch=IMAGES)} == set(plan.by_name)
    with torch.no_grad():
        assert converted(IMAGES).equal(folded_simulation(result, plan)(IMAGES))
    with pytest.raises(VerifyError):
        pt2e.verify(converted, plan, model)


@pytest.mark.parametrize("adapter", UNFOLDED)
def test_learned_input_ranges_are_refused_with_a_remedy_that_works(adapter: str) -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=4)(measure(model, PER_CHANNEL, (4,))).with_activation_bits(8)
    result = mpq.reconstruct(model, plan, list(IMAGES.split(16)), steps=4)
    assert set(mpq.input_ranges(result)) == set(plan.by_name)
    weights = plan.with_activation_bits(None)
    convert, verify = UNFOLDED[adapter]
    with pytest.raises(SettingError, match=r"in ranges of its own.*without_input_ranges\(model\)"):
        convert(result, weights)
    plain = mpq.without_input_ranges(result)
    verify(convert(plain, weights), weights, plain, batch=IMAGES)


def test_fx_takes_learned_input_ranges() -> None:
    model = nets.made(nets.SmallNet)
    plan = Uniform(bits=4)(measure(model, PER_CHANNEL, (4,))).with_activation_bits(8)
    result = mpq.reconstruct(model, plan, list(IMAGES.split(16)), steps=4)
    made = fx.prepare(result, plan, IMAGES[:1], reduce_range=False)
    with torch.no_grad():
        made(IMAGES)
    converted = convert_fx(made)
    found = {check.layer: check.input_range for check in fx.verify(converted, plan, result, batch=IMAGES)}
    assert found == mpq.input_ranges(result)
