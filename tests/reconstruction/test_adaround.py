"""Adaptive rounding against what it claims: neighbouring levels, the plan's own grid, and the paper's formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, EntropyCoded, LayerChoice, Part, Piecewise, SettingError
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.reconstruction.adaround import Rounding, beta_at, settled, soft_weights, undecided
from mpq_plugins.simulation.integers import integer_weight
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.plans import linear

SCHEMES = [Affine(symmetric=s, granularity=g, range=r) for s in (False, True) for g in ("per_tensor", "per_channel")
           for r in ("minmax", "mse")] + [Affine(granularity="per_group", group_size=2)]  # fmt: skip
SCHEMES += [Affine(symmetric="full", granularity="per_channel", range=r, scale_dtype=d) for r in ("minmax", "mse")
            for d in ("float32", "float16")] + [Affine(granularity="per_channel", scale_dtype="bfloat16")]  # fmt: skip


@st.composite
def roundings(draw: st.DrawFn) -> tuple[torch.Tensor, LayerChoice, Rounding]:
    """A layer of any affine plan, parts included, with every rounding decided at random."""
    every: list[Scheme] = [*SCHEMES, EntropyCoded(), EntropyCoded(step=1.0)]
    scheme = draw(st.sampled_from(every))
    coded = isinstance(scheme, EntropyCoded)
    widths = draw(st.lists(st.integers(2 if coded else 1, 8), min_size=1, max_size=7))
    columns = draw(st.sampled_from([2, 6, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    weight = torch.randn(len(widths), columns, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 50.0]))
    weight += draw(st.sampled_from([0.0, 0.0, 2.0, -30.0]))
    if draw(st.booleans()):
        weight[0] = draw(st.sampled_from([0.0, 1.5, -2.5]))  # a constant channel
    if isinstance(scheme, EntropyCoded) and scheme.step is not None:
        finest = scheme.finest_step(float(weight.abs().max()), min(widths))
        offset = draw(st.sampled_from([0.1, 0.36, 0.5]))
        scheme = EntropyCoded(step=max(finest, 1e-6) * draw(st.sampled_from([1.3, 5.0])), rounding_offset=offset)
    groups = {b: tuple(i for i, w in enumerate(widths) if w == b) for b in set(widths)}
    choice = linear("fc", len(widths), columns, scheme, groups if len(groups) > 1 else widths[0])
    rounding = Rounding.of(weight, choice)
    with torch.no_grad():
        decided = torch.randn(weight.shape, generator=generator) * 5
        rounding.v.copy_(torch.where(rounding.step > 0, decided, rounding.v))
    return weight, choice, rounding


@pytest.mark.slow
@given(roundings())
def test_learned_codes_survive_quantizing(case: tuple[torch.Tensor, LayerChoice, Rounding]) -> None:
    _, choice, rounding = case
    learned = rounding.rounded()
    found = settled(learned, choice)
    assert simulate_layer(found, choice).equal(found)
    assert integer_weight(found, choice).dequantized().equal(found)
    gap = torch.where(rounding.step > 0, rounding.step, math.inf)
    assert ((found - learned).abs() < 0.01 * gap).all()
    assert torch.allclose(found, learned, rtol=1e-5, atol=1e-5 * float(learned.abs().max()))


@given(roundings())
def test_to_nearest_is_what_the_plan_makes(case: tuple[torch.Tensor, LayerChoice, Rounding]) -> None:
    weight, choice, rounding = case
    assert torch.allclose(rounding.to_nearest(), simulate_layer(weight, choice), rtol=1e-6, atol=0)


@given(roundings())
def test_every_weight_goes_to_a_level_beside_it(case: tuple[torch.Tensor, LayerChoice, Rounding]) -> None:
    weight, choice, rounding = case
    free = rounding.step > 0
    slack = 1e-5 * weight.abs().max()
    binary = torch.tensor([bits == 1 for bits, part in _widths(choice) for _ in part])
    inside = free & ~binary[:, None]  # binary weights may lie outside their two levels
    assert (rounding.low[inside] <= weight[inside] + slack).all()
    assert ((rounding.low + rounding.step)[inside] >= weight[inside] - slack).all()
    assert rounding.rounded()[~free].equal(rounding.to_nearest()[~free])


def _widths(choice: LayerChoice) -> list[tuple[int, tuple[int, ...]]]:
    by_channel = {channel: part.bits for part in choice.all_parts for channel in part.channels}
    return [(by_channel[channel], (channel,)) for channel in range(choice.channels)]


@given(st.sampled_from(SCHEMES), st.integers(2, 8), st.integers(0, 99))
def test_it_begins_at_the_float_weight(scheme: Affine, bits: int, seed: int) -> None:
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    rounding = Rounding.of(weight, linear("fc", 4, 12, scheme, bits))
    weights, h = soft_weights({"w": rounding})
    free = rounding.step > 0
    assert torch.allclose(weights["w"][free], weight[free], atol=1e-5)
    # Rounded without learning, it is rounded to nearest but for ties.
    share = h["w"].detach()
    ties = (share - 0.5).abs() < 1e-4
    assert rounding.rounded()[~ties].equal(rounding.to_nearest()[~ties])


def test_a_plans_step_holds_nothing_and_leaves_neighbours_free() -> None:
    """Not the largest weight, nor a constant or single one: the step is found in the plan, and not in the weights."""
    weight = torch.tensor([[0.26, 0.26, 0.26], [-1.27, 1.21, 0.0], [0.0, 0.0, 0.05]])
    choice = linear("fc", 3, 3, EntropyCoded(step=0.01, rounding_offset=0.36), 8)
    for scheme_weight in (weight, weight[:, :1]):
        own = choice if scheme_weight is weight else linear("fc", 3, 1, choice.scheme, 8)
        rounding = Rounding.of(scheme_weight, own)
        # -127 is the last code below, and float32 has 0.26 / 0.01 and its like a little off a whole number or on it.
        assert (rounding.step > 0).all()
        assert torch.allclose(rounding.step, torch.full_like(scheme_weight, 0.01))
        assert torch.allclose(rounding.to_nearest(), simulate_layer(scheme_weight, own))
    top = Rounding.of(torch.tensor([[1.2731, 0.003]]), linear("fc", 1, 2, choice.scheme, 8))
    assert top.step.bool().tolist() == [[False, True]]  # there is no level above 127
    assert top.rounded()[0, 0] == pytest.approx(1.27)


def test_learned_codes_of_a_step_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    for offset in (0.1, 0.36, 0.5):
        weight = torch.randn(16, 40, generator=generator)
        choice = linear("fc", 16, 40, EntropyCoded(step=0.04, rounding_offset=offset), 8)
        rounding = Rounding.of(weight, choice)
        with torch.no_grad():
            rounding.v.copy_(torch.randn(weight.shape, generator=generator) * 5)
        learned = torch.where(rounding.step > 0, rounding.rounded(), rounding.low)
        codes = (learned / 0.04).round().to(torch.int8)
        assert integer_weight(learned, choice).codes.equal(codes)
        found = settled(learned, choice)
        assert simulate_layer(found, choice).equal(found)
        assert rounding.changed() > 100


def test_the_formulas_are_the_papers() -> None:
    weight = torch.tensor([[0.0, 0.3, 0.6, 1.0, -0.4, 3.0]])
    rounding = Rounding.of(weight, linear("fc", 1, 6, Affine(granularity="per_channel"), 3))
    with torch.no_grad():
        rounding.v.copy_(torch.tensor([[-4.0, -1.0, 0.0, 0.5, 2.0, 4.0]]))
    h = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1)) for v in (-4.0, -1.0, 0.0, 0.5, 2.0, 4.0)]
    assert rounding.h()[0].tolist() == pytest.approx(h, abs=1e-6)
    for beta in (20.0, 7.0, 2.0):
        expected = sum(1 - abs(2 * own - 1) ** beta for own in h)
        assert float(undecided({"w": rounding.h()}, beta).detach()) == pytest.approx(expected, rel=1e-5)


def test_beta_falls_from_twenty_to_two_after_the_warm_up() -> None:
    schedule = [beta_at(step, 1000) for step in range(1000)]
    assert schedule[:200] == [None] * 200
    assert schedule[200] == 20.0
    assert schedule[600] == pytest.approx(11.0)
    assert schedule[999] == pytest.approx(2.0, abs=0.03)
    assert beta_at(0, 1) is None


def test_fixed_weights_have_no_gradient_and_no_regulariser() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0], [-9.0, 0.1, 9.0]])
    rounding = Rounding.of(weight, linear("fc", 2, 3, Affine(granularity="per_channel"), 4))
    assert rounding.step.bool().tolist() == [[False, False, False], [False, True, False]]
    weights, h = soft_weights({"w": rounding})
    (weights["w"].square().sum() + undecided(h, 3.0)).backward()
    assert rounding.v.grad is not None
    assert rounding.v.grad.bool().tolist() == rounding.step.bool().tolist()
    assert float(undecided({"w": h["w"][:1]}, 3.0).detach()) == 0


def test_a_tie_at_the_end_of_the_range_does_not_lose_the_grid() -> None:
    # -9 / 1.2 and 9 / 1.2 lie halfway between codes, so to nearest one end of 0..15 stays unused.
    choice = linear("fc", 1, 3, Affine(granularity="per_channel"), 4)
    rounding = Rounding.of(torch.tensor([[-9.0, 0.1, 9.0]]), choice)
    for v in (-5.0, 5.0):
        with torch.no_grad():
            rounding.v.copy_(torch.where(rounding.step > 0, v, rounding.v))
        assert torch.allclose(settled(rounding.rounded(), choice), rounding.rounded(), rtol=1e-5, atol=0)


def test_parts_in_float_and_another_axis_are_kept() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    parts = (Part(bits=2, channels=(0, 2)), Part(bits=16, channels=(1,)))
    choice = LayerChoice(name="up", kind="conv_transpose2d", shape=(4, 3, 2, 2), channel_axis=1, numel=48, parts=parts,
                         scheme=Affine(granularity="per_channel"))  # fmt: skip
    rounding = Rounding.of(weight, choice)
    assert torch.allclose(rounding.to_nearest(), simulate_layer(weight, choice))
    assert rounding.rounded()[:, 1].equal(weight[:, 1].half().float())


@pytest.mark.parametrize(
    ("weight", "scheme", "said"),
    [
        (torch.randn(2, 4), Piecewise(), "layer 'fc': rounding is learned between the levels of one grid"),
        (torch.randn(2, 4).bfloat16(), Affine(), r"layer 'fc': torch.bfloat16 .*reconstruct model.float\(\)"),
    ],
)
def test_what_cannot_be_learned_is_refused(weight: torch.Tensor, scheme: Affine | Piecewise, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        Rounding.of(weight, linear("fc", 2, 4, scheme, 3))
