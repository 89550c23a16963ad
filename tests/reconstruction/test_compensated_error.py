"""The sensitivity of compensated rounding against the rounding itself: what its weights do at the layer's output."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpq_plugins import Affine, Budget, Codebook, LayerTable, compare, measure, sensitivity
from mpq_plugins.allocation.choices import layer_choice
from mpq_plugins.errors import SettingError
from mpq_plugins.plans.stats import LayerStats
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.reconstruction import compensated_error
from mpq_plugins.reconstruction.call_sums import Given
from mpq_plugins.reconstruction.compensated_error import CompensatedMSE
from mpq_plugins.reconstruction.round_layer import CannotCompensate, LayerRounding
from tests.helpers.nets import conv_net, tied_net

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CHANNEL = Affine(granularity="per_channel")
BITS = (1, 2, 4)
NAME, OTHER = "compensated_mse", "output_mse"
Made = Callable[[], nn.Module]


def random(*shape: int, seed: int = 1) -> Tensor:
    """Inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) + torch.randn(
        shape[0], *[1] * (len(shape) - 1), generator=generator
    )


def measured(model: nn.Module, batches: Any, kind: Any = NAME, scheme: Any = PER_CHANNEL, **options: Any) -> LayerTable:
    bits = options.pop("bits", BITS)
    return sensitivity(model, measure(model, scheme, bits, per_channel=True), kind, batches, **options)


def channels(table: LayerTable, name: str = NAME, layer: int = 0) -> Any:
    return table.layers[layer].channel_sensitivities[name]


def rounded(module: Any, layer: LayerStats, bits: int, table: LayerTable, calls: list[Given]) -> Tensor:
    """What `compensate` makes of the weight on these inputs, all positions of them."""
    weight, choice = module.weight.detach(), layer_choice(layer, bits, table.scheme)
    rounding = LayerRounding(layer.name, module, weight, choice, columns=1 << 15, damping=0.01)
    try:
        return rounding.round(calls, None, torch.Generator()).weight
    except CannotCompensate:  # rounding to nearest is better
        return fake_quantize(weight, bits, table.scheme, channel_axis=layer.channel_axis)


def output_errors(module: Any, weight: Tensor, given: Tensor, axis: int) -> Tensor:
    """The squared error of each channel of the layer's output, (channels,), a sample."""
    with torch.no_grad():
        rough = functional_call(module, {"weight": weight}, (given,))
        lost = (rough.double() - module(given).double()).movedim(axis, 0)
    summed: Tensor = lost.flatten(1).square().sum(1)
    return summed / len(given)


LAYERS: dict[str, tuple[Made, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (40, 5)),
    "many inputs": (lambda: nn.Linear(5, 4), (100, 5)),  # enough for single weights to be moved
    "few inputs": (lambda: nn.Linear(12, 4), (7, 12)),
    "sequences": (lambda: nn.Linear(5, 4), (30, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (9, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (9, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False), (9, 4, 7, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), (9, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (5, 2, 4, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (9, 4, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (9, 4, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", [PER_CHANNEL, Affine(symmetric=True, range="mse"), Codebook()], ids=str)
def test_it_is_what_compensated_weights_do_at_the_layers_output(name: str, scheme: Any) -> None:
    torch.manual_seed(0)
    made, shape = LAYERS[name]
    model: Any = nn.Sequential(made()).eval()
    given = random(*shape)
    table = measured(model, given.split(4), scheme=scheme)
    (layer,) = table.layers
    axis = given.dim() - 1 if isinstance(model[0], nn.Linear) else 1
    with torch.no_grad():
        calls = [Given(batch, model(batch) if name == "sequences" else None, None) for batch in given.split(4)]
    for position, bits in enumerate(BITS):
        weight = rounded(model[0], layer, bits, table, calls)
        expected = output_errors(model[0], weight, given, axis)
        if name.startswith("transposed"):  # a channel of its weight is one in each group
            expected = expected.unflatten(0, (model[0].groups, -1)).sum(0)
        np.testing.assert_allclose(channels(table)[position], expected, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(layer.sensitivities[NAME][position], expected.sum(), rtol=1e-4)


def test_inputs_that_have_nothing_to_do_with_each_other_compensate_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    given = torch.diag(torch.arange(1.0, 7.0))  # H is diagonal
    table = measured(model, [given])
    np.testing.assert_allclose(channels(table), channels(measured(model, [given], OTHER), OTHER), rtol=1e-5)


def test_it_is_no_more_than_rounding_to_nearest_does() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3)).eval()
    given = random(20, 4, 7, 7)
    table = measured(model, [given])
    nearest = [fake_quantize(model[0].weight.detach(), bits, PER_CHANNEL) for bits in BITS]
    errors = np.array([float(output_errors(model[0], weight, given, 1).sum()) for weight in nearest])
    assert (table.layers[0].sensitivities[NAME] < [1, 0.6, 0.6] * errors).all()


class Twice(nn.Module):
    """A layer that is called twice, and another that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(torch.relu(self.first(x)))))
        return result


def test_a_weight_that_is_used_several_times_counts_all_its_inputs() -> None:
    model = Twice().eval()
    given = random(50, 6)
    with torch.no_grad():
        second = torch.relu(model.first(given))
        inputs = [given, second, torch.relu(model.first(second))]
    alone = nn.Sequential(model.first).eval()
    found = measured(model, [given])
    assert [layer.name for layer in found.layers] == ["first"]
    expected = channels(measured(alone, [torch.cat(inputs)]))  # of three times as many samples
    np.testing.assert_allclose(channels(found), 3 * expected, rtol=1e-4)


def test_tokens_out_of_proportion_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).eval()
    given = random(40, 4, 6)
    with_odd = torch.cat([1000 * given[:, :1], given], dim=1)
    usual = channels(measured(model, [given]))
    np.testing.assert_allclose(channels(measured(model, [with_odd])), usual * 5 / 4, rtol=1e-5)
    assert not np.allclose(channels(measured(model, [with_odd.flatten(0, 1)])) * 5, usual * 5 / 4, rtol=0.5)


class Doubled(nn.Linear):
    """Not torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Odd(nn.Module):
    """Layers that are rounded to nearest, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.doubled, self.plain = nn.Embedding(9, 6), Doubled(6, 6), nn.Linear(6, 6)
        self.zero = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.plain(self.doubled(self.embed(tokens)))
        result: Tensor = self.zero(0 * hidden) + hidden
        return result


def test_what_is_rounded_to_nearest_is_measured_as_output_mse_measures_it() -> None:
    model = Odd().eval()
    tokens = torch.randint(0, 9, (30, 4), generator=torch.Generator().manual_seed(0))
    found, other = measured(model, [tokens]), measured(model, [tokens], OTHER)
    same = {
        one.name: bool(np.array_equal(one.channel_sensitivities[NAME], two.channel_sensitivities[OTHER]))
        for one, two in zip(found.layers, other.layers, strict=True)
    }
    assert same == {"embed": True, "doubled": True, "plain": False, "zero": True}


def test_a_weight_that_an_embedding_shares_is_rounded_to_nearest() -> None:
    tokens = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(4))
    found, other = measured(tied_net(), [tokens]), measured(tied_net(), [tokens], OTHER)
    np.testing.assert_array_equal(channels(found), channels(other, OTHER))


def test_half_precision_is_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval().bfloat16()
    given = random(40, 6).bfloat16()
    np.testing.assert_array_equal(channels(measured(model, [given])), channels(measured(model, [given], OTHER), OTHER))


class Unused(nn.Module):
    """A layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x)
        return result


class Borrowing(Unused):
    """A layer whose weight a functional call uses too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.never(self.used(x)), self.used.weight)


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        (Unused, torch.ones(3, 4), r"layer 'never': no batch reaches it, .*; give some that do, or skip it"),
        (Borrowing, torch.ones(3, 4), r"layer 'used': a functional call uses its weight too"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), torch.full((3, 4), float("nan")), r"layer '0': its inputs hold NaN"),
    ],
)
def test_what_cannot_be_measured_is_said(made: Made, given: Tensor, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        measured(made().eval(), [given])


@pytest.mark.parametrize("values", [{"columns": 0}, {"damping": -1.0}, {"damping": "much"}])
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"{next(iter(values))}: .* is not allowed"):
        CompensatedMSE(**values)


def test_several_passes_give_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = random(12, 3, 8, 8).split(5)
    once = measured(conv_net(), batches)
    monkeypatch.setattr(compensated_error, "MEMORY", 8 * 30**2)
    said: list[tuple[int, int]] = []
    again = measured(conv_net(), batches, progress=lambda _, done, total: said.append((done, total)))
    for k in range(len(once.layers)):
        np.testing.assert_array_equal(channels(once, layer=k), channels(again, layer=k))
    assert [done for done, _ in said] == list(range(len(said)))
    assert {total for _, total in said} == {said[-1][0]}
    assert len(said) > 4 + 2 * 3  # layers, and more than one pass over the batches


def test_fewer_positions_are_an_estimate_that_the_seed_decides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3)).eval()
    given = random(100, 2, 14, 14)
    whole = channels(measured(model, [given]))
    some = CompensatedMSE(columns=1000)
    found, again, other = (channels(measured(model, [given], some, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(found, again)
    assert not np.array_equal(found, other)
    np.testing.assert_allclose(found.sum(1), whole.sum(1), rtol=0.3)


def test_fitted_ranges_are_those_that_are_rounded_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] *= 8  # type: ignore[index,operator]
    given = torch.diag(torch.tensor([0.01, 1, 2, 3, 4, 5, 6, 7]))  # H is diagonal: it is output_mse, or less
    fitted = channels(measured(model, [given], fit_ranges=True))
    near = channels(measured(model, [given], OTHER, fit_ranges=True), OTHER)
    assert (fitted <= near * (1 + 1e-6)).all()
    np.testing.assert_allclose(fitted[0], near[0], rtol=1e-5)
    assert (fitted[1:].sum(1) < 0.9 * channels(measured(model, [given]))[1:].sum(1)).all()


def test_a_budget_goes_by_it_and_by_its_product() -> None:
    model, batches = conv_net(), [random(16, 3, 8, 8)]
    table = sensitivity(model, measured(model, batches, scheme=PER_CHANNEL), "kl", batches)
    for name in (NAME, f"kl*{NAME}"):
        found = Budget(average_bits=2, bits=BITS, sensitivity=name).solve(table)
        compared = compare(table, found.plan, name)
        assert compared is not None
        assert compared.plan == pytest.approx(found.objective, rel=1e-6)
