"""Sensitivities against loops that know no shortcut: one-hot weights, whole runs, enumerated labels, exact Hessians."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mpq_plugins import Affine, LayerTable, Piecewise, Uniform, apply, correct, measure, sensitivity
from mpq_plugins.errors import MismatchError, MPQError, PluginError, SettingError
from mpq_plugins.measurement.contract import Curves, Job
from mpq_plugins.measurement.curvature import Hessian
from mpq_plugins.measurement.replay import Replay
from mpq_plugins.models.folding import fold_batch_norm
from mpq_plugins.models.kinds import quantizable_weights
from mpq_plugins.plans.stats import LayerStats
from mpq_plugins.quantization.quantize import fake_quantize
from tests.helpers.nets import conv_net, tied_net

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CHANNEL = Affine(granularity="per_channel")
BITS = (1, 2, 4)
KINDS = ("output_mse", "kl", "distance", "fisher", "hessian")
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)) + 0.3
ROWS = torch.randn(12, 8, generator=torch.Generator().manual_seed(3)) + 0.5
TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(4))


def chain() -> nn.Sequential:
    """(N, 8) -> (N, 4)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def table_of(model: nn.Module, scheme: Any = PER_CHANNEL, bits: tuple[int, ...] = BITS, **options: Any) -> LayerTable:
    return measure(model, scheme, bits, **options)


def rows_of(table: LayerTable, kind: str) -> dict[str, list[float]]:
    return {layer.name: layer.sensitivities[kind].tolist() for layer in table.layers}


def changes(model: nn.Module, layer: LayerStats, table: LayerTable) -> list[Tensor]:
    """w' - w at each bit-width, in float64."""
    weight = quantizable_weights(model)[layer.name].detach()
    axis = layer.channel_axis
    return [(fake_quantize(weight, b, table.scheme, channel_axis=axis).double() - weight.double()) for b in table.bits]


# ---- output_mse


def one_hot_moments(module: Any, x: Tensor) -> Tensor:
    """The mean square of all that a weight is multiplied with: the layer's output with that weight 1, all others 0."""
    shape = module.weight.shape
    found = torch.zeros(module.weight.numel(), dtype=torch.float64)
    for k in range(found.numel()):
        weight = torch.zeros(found.numel())
        weight[k] = 1
        state = {"weight": weight.reshape(shape)}
        if getattr(module, "bias", None) is not None:
            state["bias"] = torch.zeros_like(module.bias)
        found[k] = functional_call(module, state, (x,)).double().square().sum() / len(x)
    return found.reshape(shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 4, bias=False), (7, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False), (5, 4, 7, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="circular"), (5, 2, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (5, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 2, 4, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (5, 4, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 4, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (3, 2, 3, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", [PER_CHANNEL, Affine(symmetric=True)], ids=str)
def test_output_mse_is_the_weighted_error_of_one_hot_weights(name: str, scheme: Affine) -> None:
    torch.manual_seed(0)
    made, shape = LAYERS[name]
    model = nn.Sequential(made(), nn.Identity()).eval()
    given = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 0.4
    found = sensitivity(model, table_of(model, scheme), "output_mse", given.split(2))
    moments = one_hot_moments(model[0], given)
    (layer,) = found.layers
    for position, change in enumerate(changes(model, layer, found)):
        weighted = (change.square() * moments).movedim(layer.channel_axis, 0).flatten(1).sum(1)
        np.testing.assert_allclose(layer.channel_sensitivities["output_mse"][position], weighted, rtol=1e-4)
        np.testing.assert_allclose(layer.sensitivities["output_mse"][position], float(weighted.sum()), rtol=1e-4)


def test_the_output_mse_of_a_layer_with_one_input_is_its_squared_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4)).eval()  # one weight a channel: no errors to add up
    scheme = Affine()
    given = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    found = sensitivity(model, table_of(model, scheme), "output_mse", [given])
    for position, b in enumerate(BITS):
        quantized = apply(model, Uniform(bits=b)(table_of(model, scheme)))
        with torch.no_grad():
            error = (quantized(given) - model(given)).double().square().sum(dim=(0, 2, 3)) / len(given)
        np.testing.assert_allclose(
            found.layers[0].channel_sensitivities["output_mse"][position], error, rtol=1e-4, atol=1e-10
        )


def test_the_output_mse_of_an_embedding_counts_its_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=0)).eval()
    found = sensitivity(model, table_of(model), "output_mse", TOKENS.split(4))
    (layer,) = found.layers
    for position, b in enumerate(BITS):
        quantized = fake_quantize(model[0].weight.detach(), b, PER_CHANNEL)  # type: ignore[operator]
        error = (quantized - model[0].weight.detach()).double()[TOKENS].square().sum() / len(TOKENS)  # type: ignore[operator]
        np.testing.assert_allclose(layer.sensitivities["output_mse"][position], float(error), rtol=1e-5)
    absent = [token for token in range(20) if token not in TOKENS]
    assert absent
    assert not layer.channel_sensitivities["output_mse"][:, absent].any()


def test_the_output_mse_of_a_tied_weight_is_that_of_all_its_uses() -> None:
    model = tied_net()
    found = sensitivity(model, table_of(model), "output_mse", [TOKENS])
    with torch.no_grad():
        embedded = model.embed(TOKENS)
        first = model.block(embedded)
        hidden = model.block(first)
    counts = torch.bincount(TOKENS.flatten(), minlength=20).double()[:, None].expand(20, 8) / len(TOKENS)
    uses = {
        "embed": counts + hidden.double().square().sum(dim=(0, 1)) / len(TOKENS),
        "block": (embedded.double().square() + first.double().square()).sum(dim=(0, 1)) / len(TOKENS),
    }
    assert [layer.name for layer in found.layers] == list(uses)
    for layer in found.layers:
        for position, change in enumerate(changes(model, layer, found)):
            weighted = (change.square() * uses[layer.name]).sum(1)
            np.testing.assert_allclose(layer.channel_sensitivities["output_mse"][position], weighted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["output_mse", "fisher"])
def test_sums_over_many_inputs_do_not_saturate_in_half_precision(kind: str) -> None:
    half = chain().to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    batches = [ROWS.bfloat16()] * 60
    ours = rows_of(sensitivity(half, table_of(half, bits=(2,)), kind, batches), kind)
    exact = rows_of(sensitivity(full, table_of(full, bits=(2,)), kind, [b.float() for b in batches]), kind)
    for name, row in exact.items():
        np.testing.assert_allclose(ours[name], row, rtol=0.12)


# ---- kl and distance


def divergence(exact: Tensor, rough: Tensor) -> float:
    """In nats, by the definition, the mean over all rows."""
    total, rows = 0.0, 0
    for f, q in zip(exact.flatten(0, -2).tolist(), rough.flatten(0, -2).tolist(), strict=True):
        zf, zq = (math.log(math.fsum(math.exp(x) for x in row)) for row in (f, q))
        total += math.fsum(math.exp(a - zf) * ((a - zf) - (b - zq)) for a, b in zip(f, q, strict=True))
        rows += 1
    return total / rows


def cosine_distance(exact: Tensor, rough: Tensor) -> float:
    pairs = list(zip(exact.flatten(1).tolist(), rough.flatten(1).tolist(), strict=True))
    return math.fsum(
        1 - math.fsum(a * b for a, b in zip(f, q, strict=True)) / (math.hypot(*f) * math.hypot(*q)) for f, q in pairs
    ) / len(pairs)


def one_by_one(
    model: nn.Module, table: LayerTable, given: Tensor, compare: Callable[[Tensor, Tensor], float]
) -> dict[str, list[float]]:
    """Quantize one layer in a copy, run all of it, compare."""
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        exact = model(given)
        for layer, b in itertools.product(table.layers, table.bits):
            copied = copy.deepcopy(model)
            weight = quantizable_weights(copied)[layer.name]
            weight.copy_(fake_quantize(weight, b, table.scheme, channel_axis=layer.channel_axis))
            found.setdefault(layer.name, []).append(compare(exact, copied(given)))
    return found


COMPARED: dict[str, Callable[[Tensor, Tensor], float]] = {"kl": divergence, "distance": cosine_distance}


@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize(
    ("made", "given"), [(conv_net, IMAGES), (chain, ROWS), (tied_net, TOKENS)], ids=["conv", "chain", "tied"]
)
def test_one_layer_at_a_time_in_the_whole_net(kind: str, made: Callable[[], nn.Module], given: Tensor) -> None:
    model = made()
    table = table_of(model)
    expected = one_by_one(model, table, given, COMPARED[kind])
    for batches in ([given], given.split(len(given) // 2 + 1)):  # batches of different sizes count by their samples
        found = sensitivity(model, table, kind, batches)
        for name, row in rows_of(found, kind).items():
            np.testing.assert_allclose(row, expected[name], rtol=1e-4, atol=1e-7)
            assert min(row) >= 0
        assert not any(layer.channel_sensitivities for layer in found.layers)


def test_a_folded_table_is_about_the_folded_net() -> None:
    model = conv_net()
    table = table_of(model, Affine())
    assert table.fold_bn
    expected = one_by_one(fold_batch_norm(model), table, IMAGES, divergence)
    for name, row in rows_of(sensitivity(model, table, "kl", [IMAGES]), "kl").items():
        np.testing.assert_allclose(row, expected[name], rtol=1e-4, atol=1e-7)


def test_two_regions_have_sensitivities_too() -> None:
    model = chain()
    table = table_of(model, Piecewise(granularity="per_channel"), (2, 4))
    expected = one_by_one(model, table, ROWS, divergence)
    for name, row in rows_of(sensitivity(model, table, "kl", [ROWS]), "kl").items():
        np.testing.assert_allclose(row, expected[name], rtol=1e-4, atol=1e-7)


class Embeds(nn.Module):
    """A model whose forward gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = chain()

    def forward(self, x: Tensor, scale: float = 1.0) -> Mapping[str, Tensor]:
        return {"embedding": self.body(x) * scale}


def embedding(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(**batch)["embedding"] if isinstance(batch, dict) else model(batch)["embedding"]
    return found


def test_an_output_function_stands_for_the_models_own() -> None:
    model = Embeds().eval()
    table = table_of(model)
    found = rows_of(sensitivity(model, table, "distance", [ROWS], output=embedding), "distance")
    named = rows_of(sensitivity(model, table, "distance", [{"x": ROWS, "scale": 3.0}], output=embedding), "distance")
    plain = rows_of(sensitivity(model.body, table_of(model.body), "distance", [ROWS]), "distance")
    for name, row in plain.items():
        assert found[f"body.{name}"] == row
        np.testing.assert_allclose(named[f"body.{name}"], row, rtol=1e-5, atol=1e-9)


class Logits(nn.Module):
    """What transformers give."""

    @dataclass
    class Output:
        """Logits and more."""

        logits: Tensor
        loss: None = None

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> "Logits.Output":
        return self.Output(self.body(x))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_with_logits_is_its_logits(kind: str) -> None:
    model = Logits().eval()
    found = rows_of(sensitivity(model, table_of(model), kind, [ROWS]), kind)
    plain = rows_of(sensitivity(model.body, table_of(model.body), kind, [ROWS]), kind)
    assert found == {f"body.{name}": row for name, row in plain.items()}


# ---- re-runs


class Residual(nn.Module):
    """Two blocks with norms and a sum each, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace),
                nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
            )
            for _ in range(2)
        )  # fmt: skip
        self.relu, self.inplace, self.fc = nn.ReLU(inplace), inplace, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for block in self.blocks:
            y = block(x)
            if self.inplace:
                y += x
            else:
                y = y + x
            x = self.relu(y)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class Twice(nn.Module):
    """A layer that works twice, with others between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.between, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(self.first(x)).relu()
        logits: Tensor = self.last(self.both(self.between(x)).relu())
        return logits


class Heads(nn.Module):
    """Gives several tensors at once."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"left": self.left(x), "right": self.right(x)}


class Rewriting(nn.Module):
    """Writes into the mapping that one of its modules returned, or into the tensors in it."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.heads, self.last, self.inplace = Heads(), nn.Linear(8, 4), inplace

    def forward(self, x: Tensor) -> Tensor:
        found = self.heads(x)
        if self.inplace:
            found["left"] *= 2
        else:
            found["left"] = found["left"] * 2
        logits: Tensor = self.last((found["left"] + found["right"]).relu())
        return logits


class Patched(nn.Module):
    """A module whose forward was replaced, as quantizers and tracers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        own = self.first.forward
        self.first.forward = lambda x: 2 * own(x)  # type: ignore[assignment, method-assign]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).relu())
        return logits


class Attending(nn.Module):
    """An output layer that is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        logits: Tensor = self.fc(self.attention(x, x, x)[0].squeeze(1))
        return logits


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))),
        nn.Sequential(nn.Dropout(), nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, 4),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (lambda: Residual(False), IMAGES),
    "in place": (lambda: Residual(True), IMAGES),
    "twice": (Twice, ROWS),
    "nested": (nested, ROWS),
    "rewriting": (lambda: Rewriting(False), ROWS),
    "rewriting in place": (lambda: Rewriting(True), ROWS),
    "patched": (Patched, ROWS),
    "attention": (Attending, ROWS),
    "one layer": (lambda: nn.Linear(8, 4), ROWS),
    "tied": (tied_net, TOKENS),
    "conv": (conv_net, IMAGES),
}


@pytest.mark.parametrize("name", NETS)
def test_a_re_run_is_a_whole_run_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    made, given = NETS[name]
    model = made().eval()
    with torch.no_grad():
        exact = model(given)
        replay = Replay(model, lambda: model(given))
        assert replay.output.equal(exact)
        for weight in list(quantizable_weights(model).values()) * 2:  # twice: a re-run must leave nothing behind
            users = [module for module in model.modules() if getattr(module, "weight", None) is weight]
            kept = weight.clone()
            weight.copy_(fake_quantize(weight, 2, Affine()))
            expected = model(given)
            assert not expected.equal(exact)
            assert replay.again(users).equal(expected)
            assert replay.again(users).equal(expected)
            weight.copy_(kept)
            assert replay.again(users).equal(exact)
        assert model(given).equal(exact)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert name == "patched" or not any("forward" in vars(module) for module in model.modules())


class Cached(nn.Module):
    """A layer that leaves its output where others find it, and returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.layer(x)
        return x


class ByAttribute(nn.Module):
    """Modules that pass something on other than by what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cached, self.last = nn.Linear(8, 8), Cached(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cached(self.first(x))
        logits: Tensor = self.last(x + self.cached.kept)
        return logits


class Borrowing(nn.Module):
    """A module that reads the weight of a later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 8)
        self.early = Early(self.last)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.early(x).relu())
        return logits


class Early(nn.Module):
    """Works with a weight that is another's."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.own, self.lenders = nn.Linear(8, 8), (lender,)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.own(x), self.lenders[0].weight)


@pytest.mark.parametrize("made", [ByAttribute, Borrowing])
def test_what_modules_share_behind_their_calls_is_found_and_run_in_full(made: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = made().eval()
    table = table_of(model)
    expected = one_by_one(model, table, ROWS, divergence)
    for name, row in rows_of(sensitivity(model, table, "kl", ROWS.split(5)), "kl").items():
        np.testing.assert_allclose(row, expected[name], rtol=1e-4, atol=1e-7)


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """How often each linear layer computes."""
    calls: dict[int, int] = {}
    own = nn.Linear.forward

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        calls[id(self)] = calls.get(id(self), 0) + 1
        return own(self, input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        yield calls


def test_a_re_run_computes_nothing_before_the_change() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(6)]
    model = nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:5]), layers[5]).eval()
    replay = Replay(model, lambda: model(ROWS))
    for position, layer in enumerate(layers):
        with counted() as calls:
            replay.again([layer])
        assert calls == {id(own): 1 for own in layers[position:]}
    with counted() as calls:
        replay.again([layers[4], layers[1]])
    assert len(calls) == 5


def test_kl_computes_no_more_than_it_must() -> None:
    model = chain()
    with counted() as calls:
        sensitivity(model, table_of(model), "kl", [ROWS, ROWS])
    # Two batches: three layers in the first run, and then 3, 2 and 1 of them at each of three bit-widths. Once, every
    # layer's re-run is held against a whole run.
    assert sum(calls.values()) == 2 * (3 + 3 * (3 + 2 + 1)) + (3 + 2 + 1) + 3 * 3


# ---- fisher and hessian


def test_fisher_is_the_loop_over_samples_with_the_same_labels() -> None:
    model = chain()
    table = table_of(model)
    found = sensitivity(model, table, "fisher", ROWS.split(5), seed=7)
    weights = quantizable_weights(model)
    squares = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for row in ROWS:
            logits = model(row[None])
            label = torch.multinomial(logits.detach().double().softmax(1), 1)[:, 0]
            loss = -logits.log_softmax(1)[0, label]
            model.zero_grad()
            loss.backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                squares[name] += weight.grad.double().square() / len(ROWS)
    for layer in found.layers:
        for position, change in enumerate(changes(model, layer, found)):
            expected = 0.5 * (squares[layer.name] * change.square()).sum(1)
            np.testing.assert_allclose(layer.channel_sensitivities["fisher"][position], expected, rtol=1e-4)
            np.testing.assert_allclose(layer.sensitivities["fisher"][position], float(expected.sum()), rtol=1e-4)


def test_fisher_is_in_the_mean_that_of_all_labels_by_their_probability() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()  # type: ignore[operator]
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    repeats = 300
    found = sensitivity(model, table_of(model, bits=(2,)), "fisher", [given.repeat(repeats, 1)])
    (layer,) = found.layers
    (change,) = changes(model, layer, found)
    mean, variance = 0.0, 0.0
    for x in given.double():
        p = F.linear(x, weight, bias).softmax(0)
        costs = torch.tensor(
            [
                float((torch.outer(p - F.one_hot(torch.tensor(y), 3), x).square() * change.square()).sum()) / 2
                for y in range(3)
            ]
        ).double()
        mean += float(p @ costs) / len(given)
        variance += float(p @ costs.square() - (p @ costs) ** 2) / len(given)
    spread = math.sqrt(variance / (repeats * len(given)))
    assert abs(layer.sensitivities["fisher"][0] - mean) < 4 * spread
    assert spread < 0.1 * mean


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3)], ids=["one batch", "three"])
def test_hessian_is_the_trace_of_the_exact_one(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    weight, bias = model[0].weight.detach(), model[0].bias.detach()  # type: ignore[operator]
    batches, probes = ROWS[:, :4].split(sizes), 120
    trace, variance = 0.0, 0.0
    for batch in batches:

        def loss(flat: Tensor, batch: Tensor = batch) -> Tensor:  # the label drops out of the second derivative
            labels = torch.zeros(len(batch), dtype=torch.long)
            return F.cross_entropy(F.linear(batch, flat.reshape(3, 4), bias), labels, reduction="sum")

        exact: Any = torch.autograd.functional.hessian(loss, weight.flatten())
        trace += float(exact.trace())
        # of Hutchinson's estimate with signs
        variance += 2 * float(exact.square().sum() - exact.diagonal().square().sum()) / probes
    found = sensitivity(model, table_of(model), Hessian(probes=probes), batches)
    (layer,) = found.layers
    for position, change in enumerate(changes(model, layer, found)):
        per_trace = float(change.square().sum()) / 2 / layer.numel / len(ROWS)
        ours = layer.sensitivities["hessian"][position]
        assert abs(ours - trace * per_trace) < 4 * math.sqrt(variance) * per_trace
        np.testing.assert_allclose(
            layer.channel_sensitivities["hessian"][position],
            ours * (change.square().sum(1) / change.square().sum()).numpy(),
            rtol=1e-5,
        )
    assert 4 * math.sqrt(variance) < 0.5 * trace


def test_positions_of_a_language_model_count_as_one_sample() -> None:
    model = tied_net()
    table = table_of(model, bits=(2,))
    tokens = TOKENS[:, :1]
    for kind in ("kl", "fisher", "hessian"):
        once = rows_of(sensitivity(model, table, kind, [tokens]), kind)
        assert all(row[0] > 0 for row in once.values())
    once, thrice = (rows_of(sensitivity(model, table, "kl", [tokens.repeat(1, n)]), "kl") for n in (1, 3))
    for name, row in once.items():
        np.testing.assert_allclose(thrice[name], row, rtol=1e-5)


# ---- seeds, tables, stores


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_table_and_leaves_the_users_alone(kind: str) -> None:
    model = chain()
    table = table_of(model)
    state = torch.get_rng_state()
    found = [rows_of(sensitivity(model, table, kind, [ROWS], seed=seed), kind) for seed in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (kind in ("fisher", "hessian"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit_ranges", [False, True])
def test_the_model_is_left_as_it_was(kind: str, fit_ranges: bool) -> None:
    model = conv_net().train()
    model.fc.eval()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = IMAGES.clone()
    sensitivity(model, table_of(model), kind, [given], fit_ranges=fit_ranges)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.conv1.training, model.fc.training) == (True, True, False)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert given.equal(IMAGES)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_table_keeps_all_of_them_and_comes_back_from_disk(tmp_path: Path) -> None:
    model = conv_net()
    before = table_of(model)
    table = before
    for kind in KINDS:
        table = sensitivity(model, table, kind, [IMAGES])
    assert table.sensitivities == KINDS
    assert table.channel_sensitivities == ("output_mse", "fisher", "hessian")
    assert before.sensitivities == ()
    table.save(tmp_path / "net.mpqt")
    loaded = LayerTable.load(tmp_path / "net.mpqt")
    assert (loaded.sensitivities, loaded.channel_sensitivities) == (table.sensitivities, table.channel_sensitivities)
    for ours, theirs in zip(table.layers, loaded.layers, strict=True):
        for kind in KINDS:
            assert ours.sensitivities[kind].tolist() == theirs.sensitivities[kind].tolist()
        for kind in table.channel_sensitivities:
            assert theirs.channel_sensitivities[kind].shape == (len(BITS), ours.channels)
            assert ours.channel_sensitivities[kind].tolist() == theirs.channel_sensitivities[kind].tolist()
            np.testing.assert_allclose(
                ours.channel_sensitivities[kind].sum(1), ours.sensitivities[kind], rtol=1e-9, atol=1e-15
            )
        assert ours.errors["mse"].tolist() == theirs.errors["mse"].tolist()


def test_measuring_again_replaces_the_numbers() -> None:
    model = chain()
    once = sensitivity(model, table_of(model), "output_mse", [ROWS])
    again = sensitivity(model, once, "output_mse", [2 * ROWS])
    assert again.sensitivities == ("output_mse",)
    first = "0"  # the only layer that sees the inputs themselves
    np.testing.assert_allclose(rows_of(again, "output_mse")[first], 4 * np.array(rows_of(once, "output_mse")[first]))


@dataclass(frozen=True)
class Constant:
    """A sensitivity of somebody else's, per layer only."""

    name: ClassVar[str] = "constant"
    value: float = 3.0

    def measure(self, job: Job) -> Mapping[str, Curves]:
        assert not job.model.training
        return {layer.name: Curves(np.full(len(job.table.bits), self.value)) for layer in job.table.layers}


def test_a_value_of_a_users_own_class_is_a_kind() -> None:
    model = chain().train()
    found = sensitivity(model, table_of(model), Constant(2.0), [ROWS])
    assert rows_of(found, "constant") == {name: [2.0] * 3 for name in ("0", "2", "4")}
    with pytest.raises(SettingError, match="layer '0': its constant is NaN or infinite"):
        sensitivity(model, table_of(model), Constant(math.nan), [ROWS])


@pytest.mark.parametrize("kind", KINDS)
def test_progress_ends_at_its_total(kind: str) -> None:
    said: list[tuple[str, int, int]] = []
    sensitivity(chain(), table_of(chain()), kind, [ROWS, ROWS], progress=lambda *words: said.append(words))
    assert {total for _, _, total in said} == {said[-1][2]}
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    assert said[-1][1] == said[-1][2] > 1


class CrashError(Exception):
    """Stands for a crash."""


CALLS: list[int] = [0, 0]  # calls so far, and the call that fails (0: none)


def failing(model: nn.Module, batch: Tensor) -> Tensor:
    CALLS[0] += 1
    if CALLS[0] == CALLS[1]:
        raise CrashError("the machine went down")
    found: Tensor = model(batch)
    return found


def evaluations(fails_at: int = 0, **options: Any) -> tuple[LayerTable | None, int]:
    """The table, or None where it failed, and how many calls it took."""
    CALLS[:] = [0, fails_at]
    model = chain()
    try:
        return sensitivity(model, table_of(model), output=failing, batches=ROWS.split(6), **options), CALLS[0]
    except SettingError as error:
        if "the machine went down" not in str(error):
            raise
        return None, CALLS[0]


@pytest.mark.parametrize("kind", ["kl", "distance"])
@pytest.mark.parametrize("fails_at", [1, 2, 6, 8, 13, 20, 22, 26])
def test_an_interrupted_measurement_goes_on(kind: str, fails_at: int, tmp_path: Path) -> None:
    place = tmp_path / "net.partial"
    expected, whole = evaluations(kind=kind)
    assert expected is not None
    assert whole == 2 * (1 + 3 * len(BITS)) + 3 * 2  # each layer's first re-run is held against a whole run
    assert evaluations(fails_at, kind=kind, store=place) == (None, fails_at)
    finished = [call for call in (6, 11, 16, 20, 23, 26) if call < fails_at]  # the calls that end a layer's row
    assert place.exists() == bool(finished)
    again, rest = evaluations(kind=kind, store=place)
    assert again is not None
    assert rows_of(again, kind) == rows_of(expected, kind)
    assert rest < whole or not finished
    # A batch with nothing left to do costs nothing, and one with something left its first run again.
    left = 6 - len(finished)
    assert rest == len(BITS) * left + math.ceil(left / 3) + 2 * min(left, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_measurement_leaves_no_store_for_kinds_without_one(tmp_path: Path) -> None:
    for kind in ("output_mse", "fisher"):
        sensitivity(chain(), table_of(chain()), kind, [ROWS], store=tmp_path / "net.partial")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"batches": [ROWS]},
        {"batches": [row + 1e-6 for row in ROWS.split(6)]},
        {"output": lambda model, batch: model(batch)},
        {"fit_ranges": True},
        {"table": table_of(chain(), bits=(1, 2))},
        {"table": table_of(chain(), Affine(granularity="per_channel", symmetric=True))},
    ],
)
def test_another_jobs_store_is_refused_and_kept(other: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "net.partial"
    assert evaluations(12, kind="kl", store=place)[0] is None
    before = place.read_bytes()
    CALLS[:] = [0, 0]
    same: dict[str, Any] = {
        "table": table_of(chain()),
        "kind": "kl",
        "batches": ROWS.split(6),
        "output": failing,
        "store": place,
    }
    with pytest.raises(SettingError, match="holds what another job finished"):
        sensitivity(chain(), **(same | other))
    changed = chain()
    with torch.no_grad():
        changed[4].bias.add_(1)  # type: ignore[operator]
    with pytest.raises(SettingError, match="holds what another job finished"):
        sensitivity(changed, **same)
    assert CALLS[0] == 0
    assert place.read_bytes() == before
    place.write_text("my notes\n")
    with pytest.raises(SettingError, match="is in the way, and no store of finished work"):
        sensitivity(chain(), **same)
    assert place.read_text() == "my notes\n"


def test_another_kind_keeps_its_own_in_the_same_store(tmp_path: Path) -> None:
    place = tmp_path / "net.partial"
    expected, _ = evaluations(kind="kl")
    assert evaluations(12, kind="kl", store=place)[0] is None
    assert evaluations(kind="distance", store=place)[0] is not None
    again, rest = evaluations(kind="kl", store=place)
    assert expected is not None
    assert again is not None
    assert rows_of(again, "kl") == rows_of(expected, "kl")
    assert rest < evaluations(kind="kl")[1]
    assert list(tmp_path.iterdir()) == []


# ---- ranges fitted to inputs


@pytest.mark.parametrize("symmetric", [False, True])
def test_fitted_ranges_are_those_that_correct_puts_into_the_model(symmetric: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Flatten(), nn.Linear(6, 5)).eval()
    with torch.no_grad():
        inputs = {"0": ROWS, "2": model[0](ROWS)}
    table = table_of(model, Affine(granularity="per_channel", symmetric=symmetric))
    plain = sensitivity(model, table, "output_mse", ROWS.split(5))
    found = sensitivity(model, table, "output_mse", ROWS.split(5), fit_ranges=True)
    for position, b in enumerate(BITS):
        plan = Uniform(bits=b)(table)
        quantized = quantizable_weights(apply(correct(model, plan, ROWS.split(5), fit_ranges=True), plan))
        for layer, unfitted in zip(found.layers, plain.layers, strict=True):
            own = quantizable_weights(model)[layer.name].detach()
            change = (quantized[layer.name] - own).detach().double()
            expected = float(
                (change.square() * one_hot_moments(model.get_submodule(layer.name), inputs[layer.name])).sum()
            )
            np.testing.assert_allclose(layer.sensitivities["output_mse"][position], expected, rtol=1e-4)
            fitted, extremes = (each.channel_sensitivities["output_mse"][position] for each in (layer, unfitted))
            assert (fitted <= extremes * (1 + 1e-5) + 1e-12).all()
    assert rows_of(found, "output_mse") != rows_of(plain, "output_mse")


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_fitted_under_one_scheme_only(kind: str) -> None:
    model = chain()
    for scheme in (Affine(), Affine(granularity="per_channel", range="mse"), Piecewise(granularity="per_channel")):
        with pytest.raises(SettingError, match=r"layer '0': .*measure under that"):
            sensitivity(model, table_of(model, scheme, (2, 4)), kind, [ROWS], fit_ranges=True)


# ---- what is refused


class Unreached(nn.Module):
    """A layer for another day."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.used(x)
        return logits


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = Unreached().eval()
    for kind, fit_ranges in [*((kind, False) for kind in KINDS), ("kl", True)]:
        with pytest.raises(SettingError, match="layer 'unused': no batch reaches it"):
            sensitivity(model, table_of(model), kind, [ROWS], fit_ranges=fit_ranges)
    table = table_of(model, skip=["unused"])
    assert list(rows_of(sensitivity(model, table, "output_mse", [ROWS]), "output_mse")) == ["used"]


def boom(model: nn.Module, batch: Any) -> Tensor:
    raise ValueError("no such key")


def flat(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = embedding(model, batch).sum(1)
    return found


def plain_number(model: nn.Module, batch: Any) -> Any:
    return 3.0


NEEDS_OUTPUT = ("kl", "distance", "fisher", "hessian")


@pytest.mark.parametrize("kind", NEEDS_OUTPUT)
def test_outputs_that_are_no_tensor_of_samples_and_features_are_refused(kind: str) -> None:
    model = Embeds().eval()
    table = table_of(model)
    with pytest.raises(SettingError, match=r"output: Embeds gives a dict, and a tensor .* pass output="):
        sensitivity(model, table, kind, [ROWS])
    for function, message in (
        (boom, r"output: the function failed \(ValueError: no such key\)"),
        (flat, r"output: .*a tensor \(samples, features\) is needed"),
        (plain_number, "output: Embeds gives a float"),
    ):
        with pytest.raises(SettingError, match=message):
            sensitivity(model, table, kind, [ROWS], output=function)


@pytest.mark.parametrize("kind", ["kl", "fisher", "hessian"])
def test_images_of_classes_are_no_logits_until_the_classes_come_last(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).eval()
    with pytest.raises(SettingError, match=r"output: has the shape .*the last dimension should be the classes"):
        sensitivity(model, table_of(model), kind, [IMAGES])
    found = sensitivity(model, table_of(model), kind, [IMAGES], output=pixels)
    assert found.sensitivities == (kind,)


def pixels(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(batch).flatten(2).movedim(1, -1)
    return found


def without_gradient(model: nn.Module, batch: Any) -> Tensor:
    return embedding(model, batch).detach()


def one_class(model: nn.Module, batch: Any) -> Tensor:
    return embedding(model, batch)[:, :1]


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
@pytest.mark.parametrize("function", [without_gradient, one_class])
def test_curvature_needs_gradients_and_classes(kind: str, function: Callable[..., Tensor]) -> None:
    model = Embeds().eval()
    with pytest.raises(SettingError, match=r"has no gradient or no two classes.*Use distance instead"):
        sensitivity(model, table_of(model), kind, [ROWS], output=function)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_numbers_are_found(kind: str, bad: float) -> None:
    model = chain()
    spoiled = ROWS.clone()
    spoiled[3, 2] = bad
    with pytest.raises(SettingError, match=r"NaN or infinite.*look at the inputs and the model"):
        sensitivity(model, table_of(model), kind, [ROWS, spoiled])


def nets_like_chain() -> nn.Module:
    model = chain()
    with torch.no_grad():
        model[4].weight.mul_(2)  # type: ignore[operator]
    return model


REFUSED: list[tuple[dict[str, Any], type[MPQError], str]] = [
    ({"kind": "hessien"}, PluginError, "sensitivities: 'hessien' is not installed; there are compensated_mse"),
    ({"batches": []}, SettingError, "batches: none given"),
    ({"batches": ROWS}, SettingError, "batches: a single tensor is one batch"),
    ({"batches": [torch.zeros(2, 5)]}, SettingError, "batches: Sequential does not run on a batch"),
    ({"seed": -1}, SettingError, "seed: -1 is not allowed; an integer from 0 up"),
    ({"seed": 1.5}, SettingError, "seed: 1.5 is not allowed"),
    ({"seed": True}, SettingError, "seed: True is not allowed"),
    ({"kind": Hessian}, SettingError, r"kind: .*Hessian.* is no sensitivity; a name, or a value"),
    ({"kind": 3}, SettingError, "kind: 3 is no sensitivity"),
    ({"table": table_of(nets_like_chain())}, MismatchError, "Sequential: has other weights than those"),
    ({"table": table_of(conv_net())}, MismatchError, "Sequential: lacks 'conv1', 'conv2', .*another model"),
    (
        {"table": table_of(nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5)))}, MismatchError,
        "Sequential: has other shapes of '0'; the table was measured on another model",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=range(len(REFUSED)))
@pytest.mark.parametrize("kind", ["output_mse", "kl"])
def test_bad_arguments_are_refused_by_name(
    kind: str, change: dict[str, Any], error: type[MPQError], message: str
) -> None:
    model = chain()
    arguments: dict[str, Any] = {"table": table_of(model), "kind": kind, "batches": [ROWS]} | change
    with pytest.raises(error, match=message):
        sensitivity(model, **arguments)
