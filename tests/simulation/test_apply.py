from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Codebook, LayerTable, Part, Piecewise, Plan, Uniform, apply, measure, verify
from mpq_plugins.errors import MismatchError, VerifyError, WeightError
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.plans.stats import METRICS
from mpq_plugins.quantization.quantize import fake_quantize
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.plans import SCHEMES, fits, with_layer
from tests.helpers.says import naming

PER_CHANNEL = Affine(granularity="per_channel")


def weight_of(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.group_size is None])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_weights_are_the_fake_quantized_ones_and_nothing_else_changes(scheme: Scheme, bits: int) -> None:
    net = conv_net()
    if not fits(net, scheme, bits):
        return
    plan = Uniform(bits=bits)(measure(net, scheme, (bits,), fold_bn=False))
    quantized = apply(net, plan)
    for name, tensor in quantized.state_dict().items():
        layer = plan.by_name.get(name.removesuffix(".weight"))
        before = conv_net().state_dict()[name]
        if layer is None or name.endswith(".bias"):
            assert tensor.equal(before)
        else:
            assert tensor.equal(fake_quantize(before, bits, scheme, channel_axis=layer.channel_axis))
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), conv_net().state_dict().values(), strict=True))
    checks = verify(quantized, plan, original=net)
    assert {check.layer for check in checks} == set(plan.by_name)
    assert all(check.values <= check.allowed == allowed(scheme, bits) for check in checks)


def allowed(scheme: Scheme, bits: int) -> int:
    """Counted by hand: two intervals of b bits share zero and both breakpoints."""
    if isinstance(scheme, Affine):
        return [2, 4, 8, 256][[1, 2, 3, 8].index(bits)] - (scheme.symmetric and bits > 1)
    if isinstance(scheme, Codebook):
        return int(2**bits)
    assert isinstance(scheme, Piecewise)
    return {2: 5, 3: 13, 8: 509}[bits] if scheme.storage == "region_bit" else {2: 4, 3: 8, 8: 256}[bits]


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.group_size is None])
def test_parts_are_quantized_each_at_their_own_bits(scheme: Scheme) -> None:
    net = conv_net()
    if not fits(net, scheme, 4):
        return
    plan = Uniform(bits=4)(measure(net, scheme, (4,), fold_bn=False))
    parts = (Part(bits=2, channels=(0, 3, 5)), Part(bits=6, channels=(1, 2)), Part(bits=16, channels=(4,)))
    plan = with_layer(plan, "up", bits=None, parts=parts)  # a transposed convolution: channels on axis 1
    quantized = apply(net, plan)
    before, after = weight_of(net, "up"), weight_of(quantized, "up")
    for part in parts:
        index = list(part.channels)
        own = (
            before[:, index].half().float()
            if part.bits == 16
            else fake_quantize(before[:, index], part.bits, scheme, channel_axis=1)
        )
        assert after[:, index].equal(own)
    verify(quantized, plan, original=net)


def test_parts_of_a_wide_half_precision_layer_keep_their_channels() -> None:
    net = nn.Linear(4, 1000).to(torch.bfloat16)
    plan = Uniform(bits=8)(measure(net, PER_CHANNEL, (8,)))
    high, low = tuple(range(1, 1000, 2)), tuple(range(0, 1000, 2))
    plan = with_layer(plan, "", bits=None, parts=(Part(bits=1, channels=low), Part(bits=8, channels=high)))
    quantized = apply(net, plan)
    index = list(high)
    assert weight_of(quantized, "")[index].equal(fake_quantize(weight_of(net, "")[index], 8, PER_CHANNEL))
    verify(quantized, plan, original=net)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (4, 1), (2, 3)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_and_tiny_layers_go_all_the_way(scheme: Scheme, shape: tuple[int, int], tmp_path: Path) -> None:
    net = nn.Linear(*shape)
    for bits in [bits for bits in (1, 2, 8) if fits(net, scheme, bits)]:
        table = measure(net, scheme, (bits,), METRICS, per_channel=True)
        table.save(tmp_path / "net.mpqt")
        plan = Uniform(bits=bits)(LayerTable.load(tmp_path / "net.mpqt"))
        verify(apply(net, plan), plan, original=net)


def test_tied_weights_stay_tied() -> None:
    net = tied_net()
    quantized = apply(net, Uniform(bits=2)(measure(net, bits=(2,))))
    embed, head = weight_of(quantized, "embed"), weight_of(quantized, "lm_head")
    assert embed is head
    assert embed.unique().numel() <= 4


def test_skipped_layers_keep_their_values() -> None:
    net = conv_net()
    plan = Uniform(bits=2)(measure(net, bits=(2,), skip=["fc"]))
    quantized = apply(net, plan)
    assert weight_of(quantized, "fc").equal(weight_of(net, "fc"))
    verify(quantized, plan, original=net)


def test_activation_bits_are_not_dropped_in_silence() -> None:
    net = conv_net()
    plan = Uniform(bits=8)(measure(net, bits=(8,))).with_activation_bits(8)
    with pytest.warns(UserWarning, match="8-bit activations are not simulated"):
        apply(net, plan)


def test_a_plan_for_another_model_is_refused_and_lists_what_differs() -> None:
    plan = Uniform(bits=4)(measure(conv_net(), bits=(4,)))
    with pytest.raises(MismatchError, match=naming("'conv1'", "'conv2'", "'up'", "'fc'", "'embed'", "not in the plan")):
        apply(tied_net(), plan)
    wider = conv_net()
    wider.fc = nn.Linear(6, 11)
    with pytest.raises(MismatchError, match=naming("'fc'", "[10, 6]", "[11, 6]")):
        apply(wider, plan)


def test_a_weight_that_went_bad_is_refused() -> None:
    net = conv_net()
    plan = Uniform(bits=4)(measure(net, bits=(4,)))
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match="layer 'fc'"):
        apply(net, plan)


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
