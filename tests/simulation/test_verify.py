import pytest
import torch
from torch import nn

from mpq_plugins import Affine, Plan, Uniform, apply, measure, verify
from mpq_plugins.errors import VerifyError
from mpq_plugins.quantization.quantize import fake_quantize
from tests.helpers.nets import conv_net, weight_of
from tests.helpers.says import naming

PER_CHANNEL = Affine(granularity="per_channel")


def uniform(bits: int = 3) -> tuple[nn.Module, Plan, nn.Module]:
    net = conv_net()
    plan = Uniform(bits=bits)(measure(net, PER_CHANNEL, (bits,)))
    return net, plan, apply(net, plan)


def test_verify_finds_a_layer_left_in_float() -> None:
    net, plan, quantized = uniform()
    with torch.no_grad():
        weight_of(quantized, "conv2").copy_(weight_of(net, "conv2"))
    with pytest.raises(VerifyError, match="'conv2' has 36 values where 3 bits allow 8"):
        verify(quantized, plan)


def test_verify_finds_one_channel_at_one_bit_too_many() -> None:
    net, plan, quantized = uniform()
    with torch.no_grad():
        weight_of(quantized, "conv1")[5] = fake_quantize(weight_of(net, "conv1")[5], 5, Affine())
    with pytest.raises(VerifyError, match=r"'conv1' has .* values where 3 bits allow 8"):
        verify(quantized, plan)


def test_verify_finds_missing_and_extra_layers() -> None:
    _, plan, quantized = uniform()
    quantized.extra = nn.Linear(2, 2)
    with pytest.raises(VerifyError, match="'extra' is not in the plan"):
        verify(quantized, plan)
    del quantized.extra
    quantized.fc = nn.Identity()
    with pytest.raises(VerifyError, match="'fc' is missing"):
        verify(quantized, plan)


def test_verify_against_the_original_finds_what_counting_cannot() -> None:
    net, plan, quantized = uniform()
    with torch.no_grad():
        weight_of(quantized, "fc").mul_(2)  # as few values as before, all of them wrong
    verify(quantized, plan)
    with pytest.raises(VerifyError, match=naming("'fc'", "differs")):
        verify(quantized, plan, original=net)


def test_verify_against_the_original_finds_a_skipped_layer_that_changed() -> None:
    net = conv_net()
    plan = Uniform(bits=3)(measure(net, bits=(3,), skip=["fc"]))
    quantized = apply(net, plan)
    with torch.no_grad():
        weight_of(quantized, "fc").mul_(1.001)
    with pytest.raises(VerifyError, match="'fc' differs"):
        verify(quantized, plan, original=net)


def test_verify_does_not_take_nan_for_a_value() -> None:
    _, plan, quantized = uniform()
    with torch.no_grad():
        weight_of(quantized, "fc").fill_(float("nan"))
    with pytest.raises(VerifyError, match="'fc' holds NaN"):
        verify(quantized, plan)


def test_verify_counts_by_group() -> None:
    net = nn.Linear(64, 4)
    scheme = Affine(granularity="per_group", group_size=16)
    plan = Uniform(bits=3)(measure(net, scheme, (3,)))
    quantized = apply(net, plan)
    assert verify(quantized, plan)[0].values <= 8
    with pytest.raises(VerifyError):
        verify(apply(net, Uniform(bits=4)(measure(net, scheme, (4,)))), plan)


def test_inputs_that_stay_in_float_are_told() -> None:
    net = conv_net()
    plan = Uniform(bits=8)(measure(net, bits=(8,)))
    with pytest.raises(VerifyError, match=naming("'conv1' has float inputs", "8 bits (static)")):
        verify(apply(net, plan), plan.with_activation_bits(8), original=net)
