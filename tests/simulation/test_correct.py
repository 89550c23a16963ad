"""Corrected statistics and biases against the formula in plain loops, and everything that must not change."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Part, Piecewise, Plan, Uniform, apply, correct, measure, verify
from mpq_plugins.errors import MismatchError, SettingError, WeightError
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.simulation.integers import integer_weight
from tests.helpers.nets import conv_net, tied_net
from tests.helpers.odd import CHANNELS, NormAct
from tests.helpers.plans import with_layer
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CHANNEL = Affine(granularity="per_channel")
IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3
ROWS = torch.randn(64, 8, generator=torch.Generator().manual_seed(3)) + 0.5


def planned(model: nn.Module, bits: int = 2, scheme: Any = PER_CHANNEL, **options: Any) -> Plan:
    return Uniform(bits=bits)(measure(model, scheme, (bits,), **options))


def seeded(*layers: nn.Module) -> nn.Sequential:
    """In evaluation mode, with BatchNorm statistics far from 0 and 1."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.2, 3, generator=generator)
    return net


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def norm_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    norm: Any = model.get_submodule(name)
    return norm.running_mean, norm.running_var


def bias_of(model: nn.Module, name: str) -> Tensor:
    bias = model.get_submodule(name).bias
    assert isinstance(bias, Tensor)
    return bias


# ---- BatchNorm's statistics


def statistics(exact: Tensor, rough: Tensor) -> Iterator[tuple[float, float, float, float, float]]:
    """(mean, variance) of each net's values and their correlation, channel by channel, (values, channels)."""
    for channel in range(exact.shape[1]):
        f, q = exact[:, channel].tolist(), rough[:, channel].tolist()
        n = len(f)
        mu_f, mu_q = sum(f) / n, sum(q) / n
        v_f, v_q = sum((x - mu_f) ** 2 for x in f) / n, sum((x - mu_q) ** 2 for x in q) / n
        covariance = sum((a - mu_f) * (b - mu_q) for a, b in zip(f, q, strict=True)) / n
        rho = covariance / (v_f * v_q) ** 0.5
        yield mu_f, mu_q, v_f, v_q, min(1.0, max(0.3, rho))


def expected_statistics(norm: Any, exact: Tensor, rough: Tensor, shrinkage: float) -> tuple[list[float], list[float]]:
    means, variances = [], []
    for channel, (mu_f, mu_q, v_f, v_q, rho) in enumerate(statistics(exact, rough)):
        means.append(float(norm.running_mean[channel]) + mu_q - mu_f)
        variances.append(float(norm.running_var[channel]) * v_q / v_f / rho**shrinkage)
    return means, variances


def by_channel(value: Tensor) -> Tensor:
    return value.movedim(1, -1).reshape(-1, value.shape[1]).double()


@pytest.mark.parametrize("shrinkage", [0, 0.5, 1.0, 2])
@pytest.mark.parametrize("batches", [IMAGES.split(48), IMAGES.split(20)], ids=["one batch", "three"])
def test_the_first_norm_gets_what_the_formula_says(shrinkage: float, batches: tuple[Tensor, ...]) -> None:
    model = conv_net()
    plan = planned(model)
    corrected = correct(model, plan, batches, shrinkage=shrinkage)
    weight = fake_quantize(model.conv1.weight, 2, PER_CHANNEL)
    with torch.no_grad():
        exact = by_channel(model.conv1(IMAGES))
        rough = by_channel(F.conv2d(IMAGES, weight, padding=1))
    means, variances = expected_statistics(model.bn1, exact, rough, shrinkage)
    mean, variance = norm_of(corrected, "bn1")
    torch.testing.assert_close(mean.tolist(), means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance.tolist(), variances, rtol=1e-4, atol=1e-5)


def test_a_later_norm_sees_both_nets_normalised_by_their_batches() -> None:
    model: Any = seeded(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))
    first, norm, last = model[0], model[1], model[3]
    corrected = correct(model, planned(model, 3), [IMAGES], shrinkage=1)

    def second_input(quantized: bool) -> Tensor:
        inner, outer = (fake_quantize(m.weight, 3, PER_CHANNEL) if quantized else m.weight for m in (first, last))
        y = F.conv2d(IMAGES, inner, first.bias)
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False)
        y = (y - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + norm.eps).sqrt()
        y = y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        return by_channel(F.conv2d(y.relu(), outer, last.bias))

    with torch.no_grad():
        means, variances = expected_statistics(model[4], second_input(False), second_input(True), 1)
    mean, variance = norm_of(corrected, "4")
    torch.testing.assert_close(mean.tolist(), means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance.tolist(), variances, rtol=1e-4, atol=1e-5)


def test_the_scale_at_shrinkage_1_is_the_geometric_mean_of_those_at_0_and_2() -> None:
    model = conv_net()
    plan = planned(model)
    made = [correct(model, plan, [IMAGES], shrinkage=s) for s in (0, 1, 2)]
    for name in ("bn1", "bn2"):
        (mean0, at0), (mean1, at1), (mean2, at2) = (norm_of(net, name) for net in made)
        torch.testing.assert_close(at1**2, at0 * at2)
        assert mean0.equal(mean1)
        assert mean1.equal(mean2)
        assert (at2 >= at1 * (1 - 1e-6)).all()
        assert (at1 >= at0 * (1 - 1e-6)).all()


def with_true_statistics() -> nn.Module:
    """A convolution and a BatchNorm that holds the statistics of our images."""
    model: Any = seeded(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    with torch.no_grad():
        values = by_channel(model[0](IMAGES)).float()
        model[1].running_mean.copy_(values.mean(0))
        model[1].running_var.copy_(values.var(0))
    return model  # type: ignore[no-any-return]


def test_without_shrinkage_mean_and_variance_of_the_quantized_net_are_the_float_ones() -> None:
    model = with_true_statistics()
    plan = planned(model)
    quantized = apply(correct(model, plan, [IMAGES], shrinkage=0), plan)
    with torch.no_grad():
        exact, reached = model(IMAGES), quantized(IMAGES)
    torch.testing.assert_close(reached.mean(dim=(0, 2, 3)), exact.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reached.var(dim=(0, 2, 3)), exact.var(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_shrinkage_2_is_the_regression_and_has_the_least_error() -> None:
    model = with_true_statistics()
    plan = planned(model)
    with torch.no_grad():
        exact = model(IMAGES)
        errors = {
            s: float((apply(correct(model, plan, [IMAGES], shrinkage=s), plan)(IMAGES) - exact).square().mean())
            for s in (0.0, 1.0, 1.8, 2.0)
        }
        plain = float((apply(model, plan)(IMAGES) - exact).square().mean())
    assert errors[2.0] == min(errors.values())
    assert errors[2.0] < plain


def test_a_correlation_of_next_to_nothing_counts_as_a_little() -> None:
    model: Any = seeded(nn.Linear(21, 2), nn.BatchNorm1d(2))
    given = torch.randn(4000, 21, generator=torch.Generator().manual_seed(4))
    given[:, 0] = 1
    with torch.no_grad():  # at 2 bits 1.4 becomes 8/3, and what is less becomes 0
        model[0].weight.copy_(torch.tensor([[8, 1.4, *[1.3] * 19], [8, 1.4, *[1.3] * 4, *[0.0] * 15]]))
        exact, rough = (
            F.linear(given, weight, model[0].bias).double()
            for weight in (model[0].weight, fake_quantize(model[0].weight, 2, PER_CHANNEL))
        )
    found = [rho for *_, rho in statistics(exact, rough)]
    assert found[0] == 0.3
    assert 0.4 < found[1] < 0.6
    _, variances = expected_statistics(model[1], exact, rough, 2)
    _, variance = norm_of(correct(model, planned(model), given.split(1000), shrinkage=2), "1")
    torch.testing.assert_close(variance.tolist(), variances, rtol=1e-3, atol=0)


def test_a_layer_that_feeds_a_norm_leaves_the_correction_to_it() -> None:
    model = conv_net()
    corrected = correct(model, planned(model), [IMAGES])
    assert bias_of(corrected, "conv2").equal(bias_of(model, "conv2"))
    assert corrected.get_submodule("conv1").bias is None
    assert not bias_of(corrected, "up").equal(bias_of(model, "up"))


def test_dead_channels_keep_their_statistics_and_give_no_nan() -> None:
    model = conv_net()
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.conv1.weight[5] = 0
    corrected = correct(model, planned(model), [IMAGES])
    assert all(value.isfinite().all() for value in corrected.state_dict().values())
    for before, after in zip(norm_of(model, "bn1"), norm_of(corrected, "bn1"), strict=True):
        assert after[[2, 5]].equal(before[[2, 5]])
        assert not after[[0, 1, 3]].equal(before[[0, 1, 3]])


def test_a_channel_that_quantizing_makes_constant_keeps_its_scale() -> None:
    model = conv_net()
    with torch.no_grad():
        model.conv1.weight[2] *= 1e-3  # less than half a step of the whole tensor's scale
    plan = planned(model, 2, Affine(symmetric=True), fold_bn=False)
    assert not quantizable_weights(apply(model, plan))["conv1"][2].any()
    corrected = correct(model, plan, [IMAGES])
    assert norm_of(corrected, "bn1")[1][2] == norm_of(model, "bn1")[1][2]


def test_a_norm_with_a_forward_of_its_own_counts_no_batches() -> None:
    model: Any = seeded(nn.Conv2d(3, CHANNELS, 3), NormAct(CHANNELS))
    model[1].num_batches_tracked += 5
    corrected: Any = correct(model, planned(model), IMAGES.split(16))
    assert not norm_of(corrected, "1")[0].equal(norm_of(model, "1")[0])
    assert int(corrected[1].num_batches_tracked) == 5


def test_inputs_that_are_all_zero_give_no_nan() -> None:
    model = conv_net()
    corrected = correct(model, planned(model), [torch.zeros(4, 3, 8, 8)])
    assert all(value.isfinite().all() for value in corrected.state_dict().values())
    assert norm_of(corrected, "bn1")[1].equal(norm_of(model, "bn1")[1])


# ---- biases


class OneDimension(nn.Module):
    """All that works on (N, 4, 12)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1, bias=bias)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2, groups=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.conv(x).relu())
        return y


class ThreeDimensions(nn.Module):
    """All that works on (N, 2, 4, 4, 4)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 5, 2, bias=bias)
        self.up = nn.ConvTranspose3d(5, 3, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.conv(x).relu())
        return y


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)) + 1


def chains(bias: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    linear = nn.Sequential(
        nn.Linear(8, 12, bias=bias), nn.ReLU(), nn.Linear(12, 9, bias=bias), nn.Tanh(), nn.Linear(9, 4, bias=bias)
    )
    planes = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=bias), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, bias=bias)
    )
    return {
        "linear": (linear, ROWS),
        "linear on sequences": (copy.deepcopy(linear), drawn(9, 7, 8)),
        "1d": (OneDimension(bias), drawn(10, 4, 12)),
        "1d without a batch": (OneDimension(bias), drawn(4, 12)),
        "2d": (planes, IMAGES),
        "3d": (ThreeDimensions(bias), drawn(6, 2, 4, 4, 4)),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", chains(True))
def test_the_mean_output_error_of_every_layer_is_gone(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq_plugins.simulation.shifts.LONGEST", 1e9)  # every output is of usual length
    model, given = chains(bias)[name]
    plan = planned(model.eval(), 3)
    corrected = correct(model, plan, [given])
    nets = {"float": model, "quantized": apply(model, plan), "corrected": apply(corrected, plan)}
    for layer in plan.by_name:
        outputs = {kind: output_of(net, layer, given) for kind, net in nets.items()}
        scale = float(outputs["float"].abs().mean())
        before, after = (
            float((outputs[kind] - outputs["float"]).mean(dim=0).abs().max()) for kind in ("quantized", "corrected")
        )
        assert after < 1e-5 * scale
        assert before > 1e-2 * scale
        assert bias_of(corrected, layer).shape == (outputs["float"].shape[1],)
        assert isinstance(bias_of(corrected, layer), nn.Parameter)


def output_of(net: nn.Module, layer: str, given: Tensor) -> Tensor:
    """(values, channels) of one layer."""
    seen: list[Tensor] = []
    module = net.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        net(given)
    handle.remove()
    positions = {"Linear": 0, "1d": 1, "2d": 2, "3d": 3}
    trailing = next(n for kind, n in positions.items() if kind in type(module).__name__)
    return seen[0].movedim(seen[0].dim() - 1 - trailing, -1).flatten(0, -2)


def test_rare_long_outputs_are_left_out_of_the_mean() -> None:
    model = seeded(nn.Linear(8, 6))
    plan = planned(model)
    long = torch.full((1, 8), 200.0)
    spoiled = correct(model, plan, [torch.cat([ROWS, long])])
    torch.testing.assert_close(bias_of(spoiled, "0"), bias_of(correct(model, plan, [ROWS]), "0"), rtol=1e-5, atol=1e-5)


def test_layers_that_share_a_bias_get_one_each() -> None:
    model: Any = seeded(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].bias = model[0].bias
    corrected: Any = correct(model, planned(model), [ROWS])
    assert corrected[0].bias is not corrected[2].bias
    assert not corrected[0].bias.equal(corrected[2].bias)
    assert model[2].bias is model[0].bias


def test_in_place_activations_change_nothing() -> None:
    def net(inplace: bool) -> nn.Sequential:
        return seeded(
            nn.Conv2d(3, 6, 3), nn.ReLU(inplace), nn.Conv2d(6, 6, 3), nn.ReLU(inplace), nn.BatchNorm2d(6),
            nn.ReLU(inplace), nn.Flatten(), nn.Linear(96, 4), nn.Hardtanh(inplace=inplace), nn.Linear(4, 3),
        )  # fmt: skip

    plan = planned(net(False))
    made = [correct(net(inplace), plan, [IMAGES]).state_dict() for inplace in (False, True)]
    assert same(made[0], made[1])


class PreActivation(nn.Module):
    """A norm whose input is changed in place once it has been read."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.block, self.fc = (
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4),
        )  # fmt: skip
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(self.norm(x).relu())
        if self.inplace:
            x += y
        else:
            x = x + y
        logits: Tensor = self.fc(x)
        return logits


def test_an_in_place_sum_changes_nothing() -> None:
    torch.manual_seed(0)
    model, inplace = PreActivation(False).eval(), PreActivation(True).eval()
    inplace.load_state_dict(model.state_dict())
    plan = planned(model)
    assert same(correct(model, plan, [ROWS]).state_dict(), correct(inplace, plan, [ROWS]).state_dict())


def test_a_plan_of_one_layer_corrects_no_other_bias() -> None:
    model = seeded(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    corrected = correct(model, planned(model, only=["2"]), [ROWS])
    assert bias_of(corrected, "0").equal(bias_of(model, "0"))
    assert not bias_of(corrected, "2").equal(bias_of(model, "2"))


def test_skipped_and_float_layers_keep_their_bias_where_nothing_before_them_is_quantized() -> None:
    model = seeded(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.half())  # type: ignore[operator, arg-type]  # float16's values already
    for bits in (16, 32):
        plan = with_layer(planned(model, skip=["0"]), "2", bits=bits)
        corrected = correct(model, plan, [ROWS])
        assert bias_of(corrected, "0").equal(bias_of(model, "0"))
        assert bias_of(corrected, "2").equal(bias_of(model, "2"))
        assert not bias_of(corrected, "4").equal(bias_of(model, "4"))
        verify(apply(corrected, plan), plan, original=corrected)


def test_eight_bits_need_next_to_no_correction_and_less_than_two_bits() -> None:
    model = conv_net()
    moved = {}
    for bits in (2, 8):
        corrected = correct(model, planned(model, bits), [IMAGES])
        moved[bits] = float((norm_of(corrected, "bn2")[0] - norm_of(model, "bn2")[0]).abs().max())
    assert moved[8] < 0.01
    assert moved[2] > 10 * moved[8]


# ---- what stays as it was


@pytest.mark.parametrize("shrinkage", [0, 2])
def test_only_statistics_and_biases_change_and_the_model_does_not(shrinkage: float) -> None:
    model = conv_net()
    before = state_of(model)
    corrected = correct(model, planned(model), [IMAGES], shrinkage=shrinkage)
    assert same(model.state_dict(), before)
    changed = {name for name, value in corrected.state_dict().items() if not value.equal(before[name])}
    statistics = {f"{norm}.running_{what}" for norm in ("bn1", "bn2") for what in ("mean", "var")}
    assert changed == statistics | {"up.bias", "fc.bias"}
    assert corrected.state_dict().keys() == before.keys()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_per_channel_do_not_change(bits: int, symmetric: bool) -> None:
    model = conv_net()
    plan = planned(model, bits, Affine(granularity="per_channel", symmetric=symmetric))
    corrected = correct(model, plan, [IMAGES])
    plain, after = (quantizable_weights(fold_batch_norm(net)) for net in (model, corrected))
    for layer in plan.layers:
        mine, theirs = integer_weight(after[layer.name], layer), integer_weight(plain[layer.name], layer)
        assert (mine.codes != theirs.codes).float().mean() < 0.005  # float32 rounding may move a tie
        assert mine.zero_point.equal(theirs.zero_point)
    assert not after["conv1"].equal(plain["conv1"])


def test_parts_of_channels_are_corrected_too() -> None:
    model = conv_net()
    plan = with_layer(
        planned(model, 4), "up", bits=None,
        parts=(Part(bits=2, channels=(0, 3, 5)), Part(bits=6, channels=(1, 2)), Part(bits=16, channels=(4,))),
    )  # fmt: skip
    corrected = correct(model, plan, [IMAGES])
    with torch.no_grad():
        features = {
            kind: output_of(net, "up", IMAGES).mean(0)
            for kind, net in (("float", model), ("corrected", apply(corrected, plan)))
        }
    verify(apply(corrected, plan), plan, original=corrected)
    assert features["corrected"].isfinite().all()


def test_apply_with_calibration_is_apply_of_the_corrected_model() -> None:
    model = conv_net()
    before = state_of(model)
    plan = planned(model)
    quantized = apply(model, plan, calibrate=IMAGES.split(16), rounding="nearest")
    expected = apply(correct(model, plan, IMAGES.split(16)), plan)
    assert same(quantized.state_dict(), expected.state_dict())
    assert same(model.state_dict(), before)
    verify(quantized, plan)
    with torch.no_grad():
        exact = model(IMAGES)
        errors = [float((net(IMAGES) - exact).square().mean()) for net in (quantized, apply(model, plan))]
    assert errors[0] < 0.7 * errors[1]


def test_a_plan_measured_folded_gives_a_folded_copy_with_corrected_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq_plugins.simulation.shifts.LONGEST", 1e9)
    model = conv_net()
    before = state_of(model)
    plan = planned(model, 3, Affine())
    assert plan.fold_bn
    corrected = correct(model, plan, [IMAGES])
    assert isinstance(corrected.bn1, nn.Identity)
    assert same(model.state_dict(), before)
    folded = fold_batch_norm(model)
    for name, weight in quantizable_weights(folded).items():
        assert quantizable_weights(corrected)[name].equal(weight)
    quantized = apply(corrected, plan)
    for name in plan.by_name:
        exact, reached = (output_of(net, name, IMAGES).mean(0) for net in (folded, quantized))
        torch.testing.assert_close(reached, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_part_is_restored(training: bool) -> None:
    model = conv_net().train(training)
    model.bn2.train(not training)
    before = state_of(model)
    corrected = correct(model, planned(model), [IMAGES])
    for net in (model, corrected):
        assert net.training is training
        assert net.get_submodule("bn2").training is (not training)
        assert net.get_submodule("conv1").training is training
    assert same(model.state_dict(), before)
    assert same(corrected.state_dict(), correct(model.eval(), planned(model), [IMAGES]).state_dict())


def test_no_hooks_stay_behind_even_after_an_error() -> None:
    model = conv_net()
    corrected = correct(model, planned(model), [IMAGES])
    with pytest.raises(SettingError):
        correct(model, planned(model), [torch.zeros(1, 5, 8, 8)])
    for net in (model, corrected):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.backends.mha.get_fastpath_enabled()


# ---- the batches


class TwoInputs(nn.Module):
    """Two linear layers, of an argument each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = self.left(x) + self.right(y).relu()
        return total


def test_batches_may_be_tuples_lists_and_mappings_and_come_from_a_generator() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    plan = planned(model)
    pairs = [(ROWS[:32], ROWS[32:]), (ROWS[16:48], ROWS[:32])]
    expected = correct(model, plan, pairs).state_dict()
    mappings = [{"y": y, "x": x} for x, y in pairs]
    for batches in (mappings, [list(pair) for pair in pairs], (pair for pair in pairs), iter(mappings), tuple(pairs)):
        assert same(correct(model, plan, batches).state_dict(), expected)


def test_a_generator_of_tensors_is_a_list_of_them() -> None:
    model = conv_net()
    plan = planned(model)
    given = correct(model, plan, (batch for batch in IMAGES.split(16)))
    assert same(given.state_dict(), correct(model, plan, list(IMAGES.split(16))).state_dict())


def test_batches_of_different_sizes_count_by_their_values() -> None:
    model = seeded(nn.Linear(8, 6))
    plan = planned(model)
    whole, cut = correct(model, plan, [ROWS]), correct(model, plan, [ROWS[:5], ROWS[5:]])
    torch.testing.assert_close(bias_of(cut, "0"), bias_of(whole, "0"), rtol=1e-5, atol=1e-5)


def test_progress_is_told_once_a_batch() -> None:
    calls: list[tuple[str, int, int]] = []
    model = conv_net()
    correct(model, planned(model), IMAGES.split(16), progress=lambda *said: calls.append(said))
    assert calls == [("correcting", 0, 3), ("correcting", 1, 3), ("correcting", 2, 3), ("", 3, 3)]


# ---- models of other shapes


class CalledTwice(nn.Module):
    """One layer that works twice, and a norm that does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.fc = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(self.layer(x).relu()).relu())
        logits: Tensor = self.fc(self.norm(x))
        return logits


def test_a_layer_called_twice_gets_the_mean_of_both_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpq_plugins.simulation.shifts.LONGEST", 1e9)
    torch.manual_seed(0)
    model = CalledTwice().eval()
    plan = planned(model, 3)
    corrected = correct(model, plan, [ROWS])
    weight, bias = fake_quantize(model.layer.weight, 3, PER_CHANNEL), model.layer.bias
    with torch.no_grad():
        exact1 = F.linear(ROWS, model.layer.weight, bias)
        exact2 = F.linear(exact1.relu(), model.layer.weight, bias)
        shift1 = (F.linear(ROWS, weight, bias) - exact1).mean(0)
        shift2 = (F.linear((F.linear(ROWS, weight, bias) - shift1).relu(), weight, bias) - exact2).mean(0)
    torch.testing.assert_close(bias_of(corrected, "layer"), bias - (shift1 + shift2) / 2, rtol=1e-4, atol=1e-5)
    assert all(value.isfinite().all() for value in corrected.state_dict().values())


def test_tied_weights_stay_tied_and_the_head_gets_a_bias() -> None:
    model = tied_net()
    tokens = torch.randint(0, 20, (16, 7), generator=torch.Generator().manual_seed(0))
    plan = planned(model)
    corrected = correct(model, plan, [tokens])
    assert corrected.embed.weight is corrected.lm_head.weight  # type: ignore[union-attr]
    assert corrected.block is corrected.again
    assert bias_of(corrected, "lm_head").shape == (20,)
    assert "lm_head.bias" not in model.state_dict()
    assert measure(corrected, PER_CHANNEL, (2,)).fingerprint == measure(model, PER_CHANNEL, (2,)).fingerprint
    verify(apply(corrected, plan), plan, original=corrected)


class Choosing(nn.Module):
    """Goes another way where its first layer has few values, as a router or an early exit may."""

    def __init__(self, detour: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.detour = detour

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        quantized = self.first.weight.unique().numel() <= 32
        if quantized is self.detour:
            y = self.second(y)
        logits: Tensor = self.third(y)
        return logits


@pytest.mark.parametrize("detour", [True, False])
def test_a_model_that_takes_another_path_when_quantized_is_refused(detour: bool) -> None:
    torch.manual_seed(0)
    model = Choosing(detour).eval()
    with pytest.raises(SettingError, match=naming("'second'", "another path")):
        correct(model, planned(model), [ROWS])


def test_control_flow_that_depends_on_inputs_alone_is_fine() -> None:
    class BySign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus, self.minus = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.plus(x) if x.sum() > 0 else self.minus(x)
            return y

    torch.manual_seed(0)
    model = BySign().eval()
    plan = planned(model)
    both = correct(model, plan, [ROWS, -ROWS])
    assert not bias_of(both, "minus").equal(bias_of(model, "minus"))
    with pytest.warns(UserWarning, match=naming("no calibration batch", "'minus'", "not corrected")) as said:
        one = correct(model, plan, [ROWS])
    assert said[0].filename == __file__
    assert bias_of(one, "minus").equal(bias_of(model, "minus"))
    assert bias_of(one, "plus").equal(bias_of(both, "plus"))


def test_a_transformer_layer_is_corrected_off_its_fused_path() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    plan = planned(model, 3)
    with pytest.warns(UserWarning, match=naming("no calibration batch", "'self_attn.out_proj'")):
        corrected = correct(model, plan, [tokens])
    for name in ("linear1", "linear2"):
        assert not bias_of(corrected, name).equal(bias_of(model, name))
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        exact = model(tokens)
        errors = [float((net(tokens) - exact).square().mean()) for net in (apply(corrected, plan), apply(model, plan))]
    assert errors[0] < errors[1]


def test_half_precision_stays_so() -> None:
    model = conv_net().to(torch.bfloat16)
    corrected = correct(model, planned(model), [IMAGES.bfloat16()])
    assert {value.dtype for value in corrected.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert not norm_of(corrected, "bn1")[0].equal(norm_of(model, "bn1")[0])


def test_a_norm_without_statistics_or_affine_parameters_is_no_trouble() -> None:
    model = seeded(
        nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)
    )
    corrected = correct(model, planned(model), [ROWS])
    assert not norm_of(corrected, "3")[0].equal(norm_of(model, "3")[0])
    assert not bias_of(corrected, "0").equal(bias_of(model, "0"))


# ---- ranges fitted to inputs


def test_fitted_ranges_only_clip_and_make_the_output_better() -> None:
    model = seeded(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    plan = planned(model, 2)
    fitted = correct(model, plan, [ROWS], fit_ranges=True)
    for name, weight in quantizable_weights(model).items():
        own = quantizable_weights(fitted)[name]
        assert (own.abs() <= weight.abs()).all()
        assert ((own == weight).sum(1) > 0).all()
        assert not own.equal(weight)
    with torch.no_grad():
        exact = model(ROWS)
        plain, better = (
            float((apply(net, plan)(ROWS) - exact).square().mean()) for net in (correct(model, plan, [ROWS]), fitted)
        )
    assert better < plain
    verify(apply(fitted, plan), plan, original=fitted)


def test_fitted_ranges_leave_skipped_and_float_layers_alone() -> None:
    model = seeded(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    plan = with_layer(planned(model, skip=["0"]), "2", bits=16)
    fitted = correct(model, plan, [ROWS], fit_ranges=True)
    changed = [
        name for name, weight in quantizable_weights(model).items()
        if not weight.equal(quantizable_weights(fitted)[name])
    ]  # fmt: skip
    assert changed == ["4"]


@pytest.mark.parametrize(
    "scheme", [Affine(), Affine(granularity="per_channel", range="mse"), Piecewise(granularity="per_channel")]
)
def test_ranges_are_fitted_under_one_scheme_only(scheme: Any) -> None:
    model = seeded(nn.Linear(8, 4))
    with pytest.raises(SettingError, match=r"layer '0': .*affine per_channel minmax"):
        correct(model, planned(model, 3, scheme), [ROWS], fit_ranges=True)


# ---- what is refused


BAD_BATCHES: list[tuple[Any, str]] = [
    ([], "batches: none given"),
    (iter(()), "batches: none given"),
    (IMAGES, "batches: a single tensor is one batch; give a list"),
    ({"x": IMAGES}, "batches: dict is no series of inputs"),
    ("images", "batches: str is no series of inputs"),
    (3, "batches: int is no series of inputs"),
    ([torch.zeros(2, 5, 8, 8)], "batches: ConvNet does not run on a batch .*without labels"),
    ([(IMAGES, torch.zeros(48))], "batches: ConvNet does not run on a batch"),
    ([{"images": IMAGES}], "batches: ConvNet does not run on a batch"),
    ([None], "batches: ConvNet does not run on a batch"),
    ([IMAGES, IMAGES * float("nan")], "'bn1': its values on the calibration batches are NaN or infinite"),
    ([IMAGES * float("inf")], "'conv1': its values on the calibration batches are NaN or infinite"),
]


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES, ids=range(len(BAD_BATCHES)))
@pytest.mark.parametrize("through_apply", [False, True])
def test_bad_batches_are_refused_by_name(batches: Any, message: str, through_apply: bool) -> None:
    model = conv_net()
    before = state_of(model)
    plan = planned(model)
    given = iter(()) if hasattr(batches, "__next__") else batches
    if through_apply and "does not run" not in message:  # what is no list of batches is said of the argument
        message = message.replace("batches:", "calibrate:")
    with pytest.raises(SettingError, match=message) as refused:
        apply(model, plan, calibrate=given, rounding="nearest") if through_apply else correct(model, plan, given)
    assert "\n" not in str(refused.value)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_batch_among_good_ones_is_found_without_a_norm_too(bad: float) -> None:
    model: Any = seeded(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.abs_()  # infinity in, infinity out
    spoiled = ROWS.clone()
    spoiled[3] = bad
    for batches in ([ROWS, ROWS * bad], [spoiled], [ROWS, spoiled]):
        with pytest.raises(SettingError, match=naming("'0'", "NaN or infinite")):
            correct(model, planned(model), batches)


@pytest.mark.parametrize("shrinkage", [-0.1, 2.1, True, "1", None, float("nan")])
def test_shrinkage_is_a_number_from_0_to_2(shrinkage: Any) -> None:
    model = conv_net()
    with pytest.raises(SettingError, match=naming("shrinkage", "from 0 to 2")):
        correct(model, planned(model), [IMAGES], shrinkage=shrinkage)


def test_another_models_plan_and_bad_weights_are_refused() -> None:
    model = conv_net()
    with pytest.raises(MismatchError, match=naming("ConvNet", "another model", "'embed'")):
        correct(model, planned(tied_net()), [IMAGES])
    plan = planned(model)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    for fit_ranges in (False, True):
        with pytest.raises(WeightError, match="layer 'fc': 1 of 60 weights are NaN"):
            correct(model, plan, [IMAGES], fit_ranges=fit_ranges)


def test_what_quantized_inputs_shift_is_corrected_and_the_copy_is_float() -> None:
    model = seeded(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6))
    plan = planned(model, 8).with_activation_bits(2)
    assert not mpq.input_ranges(correct(model, plan, [ROWS]))
    ranged = mpq.calibrate_inputs(model, plan, [ROWS])
    shifted, better = apply(ranged, plan), apply(correct(ranged, plan, [ROWS]), plan)
    with torch.no_grad():
        before, after = ((net(ROWS) - model(ROWS)).mean(0).abs().max() for net in (shifted, better))
    assert after < 0.1 * before


def test_a_batch_norm_over_a_single_value_is_refused() -> None:
    model = seeded(nn.Linear(8, 6), nn.BatchNorm1d(6))
    with pytest.raises(SettingError, match=naming("does not run", "more than 1 value per channel")):
        correct(model, planned(model), [ROWS[:1]])
