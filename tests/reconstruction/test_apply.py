from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from mpq_plugins import (
    Affine,
    Codebook,
    EntropyCoded,
    LayerTable,
    Part,
    Piecewise,
    Plan,
    Uniform,
    apply,
    correct,
    measure,
    reconstruct,
    round_weights,
    verify,
)
from mpq_plugins.errors import MismatchError, SettingError, WeightError
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.plans.stats import METRICS
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.reconstruction import apply as apply_module
from mpq_plugins.reconstruction.rounding import Rounding
from tests.helpers.nets import conv_net, tied_net, weight_of
from tests.helpers.plans import SCHEMES, fits, with_layer
from tests.helpers.says import naming

PER_CHANNEL = Affine(granularity="per_channel")
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3
BATCHES = list(IMAGES.split(8))
WORDS: tuple[Rounding, ...] = ("nearest", "compensated", "learned")


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
        return [2, 4, 8, 256][[1, 2, 3, 8].index(bits)] - (scheme.symmetric is True and bits > 1)
    if isinstance(scheme, Codebook):
        return int(2**bits)
    if isinstance(scheme, EntropyCoded):
        return {2: 3, 3: 7, 8: 255}[bits]
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
    with pytest.warns(UserWarning, match=r"activations \(8 bits\) are not simulated"):
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


# ---- the choice of rounding


def two_bits(fold: bool = False) -> Plan:
    return Uniform(bits=2)(measure(conv_net(), PER_CHANNEL, (2,), fold_bn=fold))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(value.equal(others[name]) for name, value in own.items())


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning by 5 steps a block, in place of the 20,000 of the default."""
    monkeypatch.setattr(
        apply_module,
        "reconstruct",
        lambda model, plan, batches, progress: reconstruct(model, plan, batches, steps=5, progress=progress),
    )


def test_to_nearest_on_inputs_is_the_correction() -> None:
    plan = two_bits()
    found = apply(conv_net(), plan, calibrate=BATCHES, rounding="nearest")
    assert same_state(found, apply(correct(conv_net(), plan, BATCHES), plan))
    assert same_state(round_weights(conv_net(), plan, BATCHES, "nearest"), correct(conv_net(), plan, BATCHES))


def test_without_inputs_weights_are_rounded_to_nearest() -> None:
    plan = two_bits()
    plain, asked = apply(conv_net(), plan), apply(conv_net(), plan, rounding="nearest")
    assert same_state(plain, asked)
    assert weight_of(plain, "conv1").equal(fake_quantize(weight_of(conv_net(), "conv1"), 2, PER_CHANNEL))


def test_on_inputs_it_is_compensated_where_nothing_else_is_said() -> None:
    plan = two_bits()
    default = apply(conv_net(), plan, calibrate=BATCHES)
    assert same_state(default, apply(conv_net(), plan, calibrate=BATCHES, rounding="compensated"))
    nearest = weight_of(apply(conv_net(), plan), "conv2")
    assert not weight_of(default, "conv2").equal(nearest)
    # Of the same grids: what other roundings choose are levels that rounding to nearest has, too.
    assert set(weight_of(default, "conv2")[0].unique().tolist()) <= set(nearest[0].unique().tolist())


def test_compensated_outputs_are_nearer_to_the_float_models_than_rounded_ones() -> None:
    plan, exact = two_bits(), conv_net()
    with torch.no_grad():
        apart = {
            word: float((apply(exact, plan, calibrate=BATCHES, rounding=word)(IMAGES) - exact(IMAGES)).norm())
            for word in WORDS[:2]
        }
    assert apart["compensated"] < apart["nearest"]


def test_learned_is_what_reconstruct_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)
    plan = two_bits()
    learned = reconstruct(conv_net(), plan, BATCHES, steps=5)
    assert same_state(round_weights(conv_net(), plan, BATCHES, "learned"), learned)
    assert same_state(apply(conv_net(), plan, calibrate=BATCHES, rounding="learned"), apply(learned, plan))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_quantizing_the_rounded_copy_is_to_apply(word: Rounding, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)
    net, plan = conv_net(), two_bits(fold)
    quantized = apply(net, plan, calibrate=BATCHES, rounding=word)
    rounded = round_weights(net, plan, BATCHES, word)
    assert same_state(apply(rounded, plan), quantized)
    verify(quantized, plan, original=rounded)
    if word != "nearest":
        assert all(
            weight.equal(quantizable_weights(rounded)[name]) for name, weight in quantizable_weights(quantized).items()
        )
    assert same_state(net, conv_net())


@pytest.mark.parametrize("word", WORDS)
def test_a_plan_of_the_wrapped_model_rounds_the_bare_one(word: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)
    wrapped = nn.Module()
    wrapped.module = conv_net()
    plan = Uniform(bits=2)(measure(wrapped.eval(), PER_CHANNEL, (2,), fold_bn=False))
    assert plan.layers[0].name == "module.conv1"
    expected = round_weights(conv_net(), two_bits(), BATCHES, word)
    assert same_state(round_weights(conv_net(), plan, BATCHES, word), expected)


@pytest.mark.parametrize("word", ["nearest", "learned"])
def test_rounding_says_how_far_it_is(word: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)
    said: list[tuple[int, int]] = []
    round_weights(conv_net(), two_bits(), BATCHES, word, progress=lambda _, done, total: said.append((done, total)))
    assert said
    assert said[-1][0] == said[-1][1]
    assert said == sorted(said)


def test_roundings_that_need_inputs_and_other_words_are_refused() -> None:
    net, plan = conv_net(), two_bits()
    for word in ("compensated", "learned"):
        with pytest.raises(SettingError, match=naming(f"rounding: '{word}'", "calibrate=batches", "synthetic_batches")):
            apply(net, plan, rounding=word)
    for bad in ("closest", "compensate", 2):
        given: Any = bad
        with pytest.raises(SettingError, match=naming(f"rounding: {bad!r}", "nearest, compensated, learned")):
            apply(net, plan, rounding=given)
        with pytest.raises(SettingError, match=naming(f"rounding: {bad!r}", "nearest, compensated, learned")):
            round_weights(net, plan, BATCHES, given)
    with pytest.raises(SettingError, match="Did you mean compensated"):
        apply(net, plan, calibrate=BATCHES, rounding=cast(Any, "compensate"))
    assert same_state(net, conv_net())


def test_another_models_plan_is_refused_by_every_rounding() -> None:
    plan = Uniform(bits=4)(measure(tied_net(), bits=(4,)))
    for word in WORDS:
        with pytest.raises(MismatchError, match="'conv1'"):
            round_weights(conv_net(), plan, BATCHES, word)
