"""Layers that compute in their own way are measured at their own output: against runs of copies, and exact slopes."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins import Affine, Budget, LayerTable, Uniform, apply, correct, measure, sensitivity
from mpq_plugins.errors import SettingError
from mpq_plugins.measurement.moments import second_moments
from mpq_plugins.measurement.own_output import PROBES, squared_slopes

PER_CHANNEL = Affine(granularity="per_channel")
BITS = (2, 4, 8)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class Positions(nn.Embedding):
    """Is given the tokens, and looks up where they are, as Whisper's decoder does."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(torch.arange(ids.shape[1]), self.weight).expand(len(ids), -1, -1)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class Pair(nn.Linear):
    """Gives two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.abs()


class Stepped(nn.Linear):
    """Has no slope in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign(), self.bias)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(*x.shape[:-1], self.out_features)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = Scaled(40, 8), Positions(12, 8)
        self.pair, self.stepped, self.noisy = Pair(8, 8), Stepped(8, 8), Noisy(5, 5)
        self.plain, self.head = nn.Linear(8, 8), Cosine(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(ids)
        a, b = self.pair(x)
        x = self.stepped(F.relu(self.plain(a + b)))
        logits: Tensor = self.noisy(self.head(x.mean(1)))
        return logits


IDS = torch.randint(0, 40, (10, 7), generator=torch.Generator().manual_seed(3))


def leaves(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


@cache
def measured_text() -> tuple[Text, LayerTable]:
    model = Text().eval()
    return model, sensitivity(model, measure(model, PER_CHANNEL, BITS, per_channel=True), "output_mse", IDS.split(5))


@pytest.mark.parametrize("name", ["tokens", "positions", "pair", "stepped", "noisy", "head"])
def test_output_mse_is_the_error_at_the_layers_own_output(name: str) -> None:
    model, table = measured_text()
    layer = next(layer for layer in table.layers if layer.name == name)
    for k, bits in enumerate(BITS):
        quantized = apply(model, Uniform(bits=bits)(table)).get_submodule(name)
        total = 0.0

        def see(module: nn.Module, args: tuple[Tensor], output: Tensor, rough: nn.Module = quantized) -> None:
            nonlocal total
            given = []
            for own in (vars(module)["original"], rough):
                torch.manual_seed(0)  # a random layer draws the same for both
                given.append(leaves(own(*args)))
            total += sum(float((a - b).double().square().sum()) for a, b in zip(*given, strict=True))

        watched = Text().eval()
        module = watched.get_submodule(name)
        vars(module)["original"] = Text().eval().get_submodule(name)
        module.register_forward_hook(see)
        with torch.no_grad():
            for part in IDS.split(5):
                watched(part)
        assert layer.sensitivities["output_mse"][k] == pytest.approx(total / len(IDS), rel=1e-4, abs=1e-12)
    np.testing.assert_allclose(
        layer.channel_sensitivities["output_mse"].sum(1), layer.sensitivities["output_mse"], rtol=1e-9
    )


def test_a_plain_layer_is_measured_by_its_inputs_as_ever() -> None:
    model = Text().eval()
    moments = second_moments(model, {"plain": [model.plain]}, [IDS])
    seen: list[Tensor] = []
    model.plain.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    expected = seen[0].square().sum((0, 1)) / len(IDS)
    torch.testing.assert_close(moments["plain"], expected.expand(8, 8))


def test_slopes_are_those_of_the_jacobian() -> None:
    torch.manual_seed(1)
    layer, x = Cosine(6, 4), torch.randn(5, 6)
    jacobian = torch.autograd.functional.jacobian(
        lambda w: 16 * F.linear(F.normalize(x), F.normalize(w)), layer.weight.detach()
    )
    exact = jacobian.square().sum((0, 1))
    estimated = squared_slopes(layer, (x,), {})
    # Each weight is estimated from PROBES draws, whose spread is sqrt(2) of the value; a row from several weights.
    assert (estimated / exact).sub(1).abs().max() < 6 * math.sqrt(2 / PROBES)
    assert float(estimated.sum() / exact.sum()) == pytest.approx(1, abs=0.25)
    assert squared_slopes(layer, (x,), {}).equal(estimated)


def test_a_layer_without_a_slope_counts_every_weight_alike() -> None:
    assert squared_slopes(Stepped(3, 2), (torch.randn(4, 3),), {}).equal(torch.ones(2, 3))


def test_slopes_leave_the_layer_as_it_was() -> None:
    layer = Cosine(6, 4)
    weight = layer.weight
    squared_slopes(layer, (torch.randn(5, 6),), {})
    assert layer.weight is weight
    assert weight.grad is None


@pytest.mark.filterwarnings("ignore:not corrected")
def test_ranges_are_fitted_to_a_layer_of_its_own_kind_by_what_it_does() -> None:
    """Clipping the rare rows of an embedding that the batches never look up costs nothing at its output."""
    model = Text().eval()
    table = sensitivity(model, measure(model, PER_CHANNEL, (2, 3), per_channel=True), "output_mse", [IDS])
    plan = Budget(average_bits=2.5, bits=(2, 3), sensitivity="output_mse")(table)
    fitted = correct(model, plan, [IDS], fit_ranges=True)
    with torch.no_grad():
        exact, plain, better = (
            net.get_submodule("tokens")(IDS) for net in (model, apply(model, plan), apply(fitted, plan))
        )
    assert (better - exact).square().sum() < (plain - exact).square().sum()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


def test_a_weight_that_a_functional_call_uses_too_is_refused_by_name() -> None:
    model = Tied().eval()
    table = measure(model, PER_CHANNEL, [4])
    with pytest.raises(SettingError, match="layer 'encoder': a functional call uses its weight too"):
        sensitivity(model, table, "output_mse", [torch.randn(3, 6)])
    with pytest.raises(SettingError, match="layer 'encoder': a functional call uses its weight too"):
        correct(model, Uniform(bits=4)(table), [torch.randn(3, 6)], fit_ranges=True)


class Remembers(nn.Module):
    """Adds what a hook has kept of an earlier layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Cosine(8, 8), nn.Linear(8, 4)
        self.kept: dict[str, Tensor] = {}
        self.first.register_forward_hook(self.keep)

    def keep(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept["first"] = output

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z: Tensor = self.second(y * self.kept["first"])
        return z


@pytest.mark.filterwarnings("ignore:not corrected")
def test_what_a_hook_keeps_of_a_layer_is_the_float_layers_afterwards() -> None:
    """The next layer's inputs are what they are without measuring, and the model can be copied after."""
    model, batch = Remembers().eval(), torch.randn(16, 8)
    table = sensitivity(model, measure(model, PER_CHANNEL, (2,)), "output_mse", [batch])
    with torch.no_grad():
        inputs = torch.relu(model.first(batch)) * model.first(batch)
        quantized = apply(model, Uniform(bits=2)(table)).get_parameter("second.weight")
        squares = (quantized - model.second.weight).square() @ inputs.square().mean(0)
    assert float(table.layers[1].sensitivities["output_mse"][0]) == pytest.approx(float(squares.sum()), rel=1e-4)
    model.kept.clear()
    correct(model, Uniform(bits=2)(table), [batch], fit_ranges=True)
