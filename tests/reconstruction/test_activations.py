"""Quantized inputs of layers: against a slow loop, and LSQ's gradients."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, SettingError
from mpq_plugins.models.input_ranges import (
    InputQuantizer,
    InputRange,
    fake_quantize_input,
    input_ranges,
    quantize_input,
)
from mpq_plugins.reconstruction.activations import ActivationRange
from tests.helpers.inputs import slowly

VALUES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


@given(VALUES, st.floats(2**-6, 8, width=32), st.integers(1, 8), st.data())
def test_levels_are_those_of_a_slow_loop(values: list[float], scale: float, bits: int, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, 2**bits - 1))
    x = torch.tensor(values)
    found = fake_quantize_input(x, torch.tensor(scale), torch.tensor(float(zero_point)), bits)
    assert found.tolist() == slowly(x, scale, zero_point, bits)


@given(st.integers(1, 8), st.floats(2**-6, 8, width=32), st.integers(0, 99))
def test_the_gradients_are_lsqs(bits: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    zero_point = int(torch.randint(0, top + 1, (), generator=generator))
    x = (torch.randn(50, generator=generator) * scale * 2**bits).requires_grad_()
    learned = torch.tensor(scale, requires_grad=True)
    weights = torch.randn(50, generator=generator)
    (fake_quantize_input(x, learned, torch.tensor(float(zero_point)), bits) * weights).sum().backward()
    position = x.detach() / scale
    code = position.round() + zero_point
    inside = (code >= 0) & (code <= top)
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.where(inside, weights, 0.0), rtol=1e-5, atol=0)
    assert (x.grad[~inside] == 0).all()
    ends = torch.where(code < 0, -float(zero_point), float(top - zero_point))
    expected = (weights * torch.where(inside, position.round() - position, ends)).sum()
    assert learned.grad is not None
    assert torch.allclose(learned.grad, expected, rtol=1e-3, atol=1e-3)


def test_a_range_is_learned_from_where_it_begins() -> None:
    quantizer = InputQuantizer(4)
    quantizer.scale.fill_(0.25)
    quantizer.zero_point.fill_(3)
    own = ActivationRange.of(quantizer)
    assert float(own.scale().detach()) == 0.25
    assert float(own.zero_point) == 3
    with torch.no_grad():
        own.change.fill_(-50)
    assert 0 < float(own.scale().detach()) < 1e-20  # never below zero
    assert float(quantizer.scale) == 0.25
    own.scale().backward()
    assert own.change.grad is not None
    assert float(own.change.grad) == pytest.approx(float(own.scale().detach()))


X = torch.randn(9, 4, generator=torch.Generator().manual_seed(6))


def quantized_layer(bits: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    quantizer = quantize_input(layer, bits)
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(1)
    return layer


def expected_of(layer: nn.Linear, scale: float = 0.5, zero_point: int = 1, bits: int = 2) -> Tensor:
    x = torch.tensor(slowly(X, scale, zero_point, bits)).reshape(X.shape)
    return nn.functional.linear(x, layer.weight, layer.bias)


def test_a_layers_input_is_quantized_by_position_and_by_name() -> None:
    layer = quantized_layer()
    assert layer(X).equal(expected_of(layer))
    assert layer(input=X).equal(expected_of(layer))
    assert not layer(X).equal(nn.functional.linear(X, layer.weight, layer.bias))


def test_a_scale_of_zero_lets_everything_pass() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    before = layer(X)
    quantize_input(layer, 1)
    assert layer(X).equal(before)


def test_a_copy_quantizes_by_its_own_range() -> None:
    layer = quantized_layer()
    copied = copy.deepcopy(layer)
    assert copied(X).equal(expected_of(layer))
    quantize_input(copied, 2).scale.fill_(0.25)
    assert copied(X).equal(expected_of(layer, scale=0.25))
    assert layer(X).equal(expected_of(layer))


def test_ranges_go_with_the_state() -> None:
    layer, other = quantized_layer(), nn.Linear(4, 3)
    quantize_input(other, 2)
    state = layer.state_dict()
    kept = {"input_quantizer.scale", "input_quantizer.zero_point", "input_quantizer.levels"}
    assert set(state) == {"weight", "bias", *kept}
    other.load_state_dict(state)
    assert other(X).equal(expected_of(layer))


def test_quantizing_twice_is_quantizing_once() -> None:
    layer = quantized_layer()
    assert quantize_input(layer, 2) is layer.input_quantizer
    assert float(quantize_input(layer, 2).scale) == 0.5
    assert layer(X).equal(expected_of(layer))
    assert len(layer._forward_pre_hooks) == 1


def test_ranges_are_found_by_their_layers() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(quantized_layer()))
    assert input_ranges(net) == {"1.0": InputRange(bits=2, scale=0.5, zero_point=1)}
    assert "bits=2" in repr(net)


def test_something_of_the_layers_own_is_not_replaced() -> None:
    layer = nn.Linear(4, 4)
    layer.input_quantizer = nn.Identity()
    with pytest.raises(SettingError, match="Linear: has another input_quantizer"):
        quantize_input(layer, 4)
    assert isinstance(layer.input_quantizer, nn.Identity)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def plan_of(bits: int | None) -> mpq.Plan:
    plan = mpq.Uniform(bits=4)(mpq.measure(net(), Affine(granularity="per_channel"), (4,)))
    return plan if bits is None else plan.with_activation_bits(bits)


def test_a_net_with_ranges_is_in_evaluation_mode_as_it_was() -> None:
    learned = mpq.reconstruct(net(), plan_of(3), [X], steps=3)
    assert [name for name, module in learned.named_modules() if module.training] == []


def test_a_net_that_quantizes_inputs_already_is_refused() -> None:
    first = mpq.reconstruct(net(), plan_of(3), [X], steps=3).eval()
    assert [own.bits for own in input_ranges(first).values()] == [3, 3]
    with pytest.raises(SettingError, match="in ranges of its own"):
        mpq.reconstruct(first, plan_of(8), [X], steps=3)
    assert [own.bits for own in input_ranges(first).values()] == [3, 3]


def test_inputs_of_positive_values_only_begin_at_zero_in_a_net() -> None:
    learned = mpq.reconstruct(net(), plan_of(3), [X], steps=3)
    found = input_ranges(learned)
    assert found["2"].zero_point == 0
    assert found["0"].zero_point > 0


def test_a_layer_that_is_not_called_as_a_module_is_named_for_what_it_is() -> None:
    """MultiheadAttention uses its output layer's weight, and never calls it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    plan = mpq.Uniform(bits=4)(mpq.measure(encoder, Affine(granularity="per_channel"), (4,))).with_activation_bits(4)
    with pytest.raises(SettingError, match=r"layers\.0\.self_attn\.out_proj") as said:
        mpq.reconstruct(encoder, plan, [torch.randn(4, 5, 8)], steps=2)
    assert "all zero" not in str(said.value)
