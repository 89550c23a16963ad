"""One layer's rounding: its target, its losses, and when it is rounded to nearest instead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import Affine, Codebook, LayerChoice, Piecewise, SettingError
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.reconstruction.call_sums import Given
from mpq_plugins.reconstruction.gram import Gram
from mpq_plugins.reconstruction.round_layer import (
    OUTPUT,
    OWN,
    SUM,
    CannotCompensate,
    LayerRounding,
    Rounded,
    later_gram,
)
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")

PER_CHANNEL = Affine(granularity="per_channel", range="mse")


def choice_of(module: Any, bits: int = 2, scheme: Scheme = PER_CHANNEL) -> LayerChoice:
    kind = (
        "linear" if isinstance(module, nn.Linear) else type(module).__name__.lower().replace("transpose", "_transpose")
    )
    axis = 1 if "transpose" in kind else 0
    shape = tuple(module.weight.shape)
    return LayerChoice(name="fc", kind=kind, shape=shape, channel_axis=axis, numel=module.weight.numel(), bits=bits,
                       scheme=scheme)  # fmt: skip


def rounding_of(module: Any, bits: int = 2, scheme: Scheme = PER_CHANNEL, damping: float = 0.01) -> LayerRounding:
    module.requires_grad_(False)
    choice = choice_of(module, bits, scheme)
    return LayerRounding("fc", module, module.weight.clone(), choice, 1 << 15, damping)


def run(rounding: LayerRounding, *calls: Given, later: Gram | None = None) -> Rounded:
    return rounding.round(calls, later, torch.Generator().manual_seed(0))


def rows(n: int, d: int = 6, seed: int = 0) -> Tensor:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 0.3


def linear(seed: int = 0, out: int = 5, d: int = 6) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d, out).requires_grad_(False)


def mean_loss(u: Tensor, target: Tensor, weight: Tensor) -> float:
    """Squared errors of outputs, summed over channels, a row."""
    return float((u.double() @ (target.double() - weight.double()).T).square().sum(1).mean())


def fitted(u: Tensor, output: Tensor, layer: nn.Linear, damping: float = 0.01) -> Tensor:
    """Ridge regression of what the float weights lack, torch's least squares with rows of damping below."""
    u, n = u.double(), len(u)
    lacking = output.double() - layer.bias.double() - u @ layer.weight.double().T
    share = damping * float((u * u).sum(0).mean())  # of the sum of squares
    below = torch.eye(u.shape[1], dtype=torch.float64) * share**0.5
    inputs = torch.cat([u, below])
    assert n
    more = torch.linalg.lstsq(inputs, torch.cat([lacking, torch.zeros(len(below), lacking.shape[1]).double()])).solution
    target: Tensor = layer.weight.double() + more.T
    return target


def test_the_target_is_the_regression_on_the_quantized_nets_inputs() -> None:
    layer, u = linear(), rows(400)
    exact = layer(u + 0.3 * torch.randn(u.shape, generator=torch.Generator().manual_seed(5)))
    rounding = rounding_of(layer, damping=0.1)
    rounded = run(rounding, Given(u, exact, None))
    target = fitted(u, exact, layer, 0.1)
    assert rounded.target == OUTPUT
    assert rounded.columns == 400
    near = simulate_layer(layer.weight, rounding.choice)
    assert rounded.nearest == pytest.approx(mean_loss(u, target, near), rel=1e-4)
    assert rounded.compensated == pytest.approx(mean_loss(u, target, rounded.weight), rel=1e-4)
    assert rounded.compensated < 0.9 * rounded.nearest


@pytest.mark.parametrize("calls", [1, 3])
def test_without_outputs_the_target_is_the_weights(calls: int) -> None:
    layer, u = linear(), rows(300)
    rounding = rounding_of(layer)
    rounded = run(rounding, *(Given(part, None, None) for part in u.chunk(calls)))
    near = simulate_layer(layer.weight, rounding.choice)
    assert rounded.target == OWN
    assert rounded.nearest == pytest.approx(mean_loss(u, layer.weight, near), rel=1e-4)
    assert rounded.compensated == pytest.approx(mean_loss(u, layer.weight, rounded.weight), rel=1e-4)


def test_the_same_inputs_in_both_nets_have_the_weights_for_a_target() -> None:
    layer, u = linear(), rows(300)
    both = [run(rounding_of(layer), Given(u, exact, None)) for exact in (None, layer(u))]
    assert both[0].weight.equal(both[1].weight)
    assert both[1].compensated == pytest.approx(both[0].compensated, rel=1e-3)


def test_an_output_that_is_lost_elsewhere_is_made_good() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    u = torch.randn(20, 3, 8, 8)
    lost = 0.5 * layer(u.roll(1, 1))
    rounded = run(rounding_of(layer, 8), Given(u, layer(u), lost))
    assert rounded.target == SUM
    plain = run(rounding_of(layer, 8), Given(u, layer(u), None))
    assert plain.target == OUTPUT

    def error(weight: Tensor) -> float:
        made = nn.functional.conv2d(u, weight, layer.bias, padding=1)
        return float((made - layer(u) - lost).square().mean())

    assert error(rounded.weight) < 0.5 * error(plain.weight)


def test_tokens_keep_their_own_weights_and_long_ones_are_left_out() -> None:
    layer, u = linear(), rows(400).reshape(40, 10, 6)
    spoiled = u.clone()
    spoiled[:, 0] *= 1000
    made = run(rounding_of(layer), Given(spoiled, layer(spoiled) + 1, None))
    assert made.target == OWN
    assert made.columns == 360
    assert made.weight.equal(run(rounding_of(layer), Given(u[:, 1:].reshape(36, 10, 6), None, None)).weight)


def test_few_columns_fit_no_target_and_move_nothing() -> None:
    layer = linear()
    few = run(rounding_of(layer), Given(rows(23), layer(rows(23)) + 1, None))  # 4 for each of 6 inputs are fitted to
    enough = run(rounding_of(layer), Given(rows(24), layer(rows(24)) + 1, None))
    assert (few.target, enough.target) == (OWN, OUTPUT)


def test_on_tokens_no_weight_is_moved_after_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr("mpq_plugins.reconstruction.feedback.descend", refused)
    layer, u = linear(), rows(240)
    assert run(rounding_of(layer), Given(u.view(40, 6, -1), None, None)).target == OWN
    with pytest.raises(AssertionError, match="moved"):
        run(rounding_of(layer), Given(u, None, None))


def test_later_calls_count_in_the_moments() -> None:
    layer, u, others = linear(), rows(200), rows(200, seed=9)
    later = later_gram([(layer, others)], 1 << 15, torch.Generator())
    torch.testing.assert_close(later.h[0], (others.double().T @ others.double()), rtol=1e-5, atol=1e-5)
    together = run(rounding_of(layer), Given(torch.cat([u, others]), None, None))
    assert run(rounding_of(layer), Given(u, None, None), later=later).weight.equal(together.weight)
    assert run(rounding_of(layer), Given(u, None, None), later=later).columns == 400


def test_an_output_of_another_shape_is_not_a_target() -> None:
    layer, u = linear(), rows(100)
    assert run(rounding_of(layer), Given(u, layer(u)[:50], None)).target == OWN


def test_groups_are_rounded_each_by_itself() -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(4, 6, 3, groups=2).requires_grad_(False)
    u = torch.randn(30, 4, 7, 7)
    made = run(rounding_of(whole), Given(u, None, None))
    for g in range(2):
        half = nn.Conv2d(2, 3, 3).requires_grad_(False)
        half.weight.copy_(whole.weight[3 * g : 3 * g + 3])
        of_group = run(rounding_of(half), Given(u[:, 2 * g : 2 * g + 2], None, None))
        assert made.weight[3 * g : 3 * g + 3].equal(of_group.weight)


def test_a_transposed_convolution_is_the_linear_layer_that_it_is() -> None:
    """With a 1 x 1 kernel it is one for each position."""
    layer = linear(out=4, d=3)
    up = nn.ConvTranspose2d(3, 4, 1).requires_grad_(False)
    up.weight.copy_(layer.weight.T[:, :, None, None])
    u = rows(200, 3)
    made = run(rounding_of(up), Given(u.reshape(200, 3, 1, 1), None, None))
    assert made.weight[:, :, 0, 0].T.equal(run(rounding_of(layer), Given(u, None, None)).weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "output"])
def test_values_that_are_no_numbers_are_refused_by_name(bad: float, where: str) -> None:
    layer, u = linear(), rows(100)
    exact = layer(u)
    (u if where == "input" else exact)[3, 2] = bad
    with pytest.raises(SettingError, match=naming("'fc'", "NaN")):
        run(rounding_of(layer), Given(u, exact, None))


def test_nothing_to_go_by_is_rounded_to_nearest() -> None:
    layer = linear()
    with pytest.raises(CannotCompensate, match="all of its inputs are zero"):
        run(rounding_of(layer), Given(torch.zeros(50, 6), None, None))
    with pytest.raises(CannotCompensate, match="not called with a tensor"):
        run(rounding_of(layer))


def test_a_scheme_that_finds_other_levels_is_rounded_to_nearest() -> None:
    """The breakpoint is found from the weights' deviation, which rounding changes."""
    layer = linear()
    with pytest.raises(CannotCompensate, match="does not find the levels"):
        run(rounding_of(layer, 3, Piecewise(breakpoint="gaussian")), Given(rows(300), None, None))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "scheme",
    [PER_CHANNEL, Affine(symmetric=True), Affine(granularity="per_group", group_size=3), Codebook(),
     Piecewise(granularity="per_channel")], ids=str,
)  # fmt: skip
def test_quantizing_what_is_kept_gives_the_weight(scheme: Scheme, bits: int) -> None:
    bits = min(bits, 4) if isinstance(scheme, Codebook) else bits
    if isinstance(scheme, Piecewise) and bits < 2:
        return
    layer, u = linear(), rows(300)
    try:
        made = run(rounding_of(layer, bits, scheme), Given(u, layer(u), None))
    except CannotCompensate:
        assert isinstance(scheme, Piecewise)
        return
    assert simulate_layer(made.kept, choice_of(layer, bits, scheme)).equal(made.weight)
    assert made.compensated <= made.nearest


def test_wide_and_many_are_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in small pieces are the same columns."""
    torch.manual_seed(0)
    layer, u = nn.Conv2d(3, 4, 3).requires_grad_(False), torch.randn(20, 3, 8, 8)
    whole = run(rounding_of(layer), Given(u, layer(u), None))
    monkeypatch.setattr("mpq_plugins.reconstruction.columns.CHUNK", 300)
    parts = run(rounding_of(layer), Given(u, layer(u), None))
    assert parts.weight.equal(whole.weight)
    assert parts.compensated == pytest.approx(whole.compensated, rel=1e-5)


def test_of_many_positions_as_many_as_asked_are_looked_at() -> None:
    torch.manual_seed(0)
    layer, u = nn.Conv2d(1, 4, 3).requires_grad_(False), torch.randn(10, 1, 30, 30)
    choice = choice_of(layer)
    for columns, expected in ((1000, 1000), (1, 290), (1 << 20, 10 * 28 * 28)):  # 32 for each of 9 inputs at least
        rounding = LayerRounding("fc", layer, layer.weight.clone(), choice, columns, 0.01)
        assert run(rounding, Given(u, None, None)).columns == expected
