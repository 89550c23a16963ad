"""The levels of a weight are what quantizing can give it, and weights moved among them are found again."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from examples.plugins.scheme.mpq_powers import Powers
from mpq_plugins import Affine, Codebook, LayerChoice, Minifloat, Piecewise, WeightError
from mpq_plugins.plans.scheme import Scheme, scale_bits_of
from mpq_plugins.reconstruction.levels import Levels
from mpq_plugins.simulation.layer import simulate_layer
from tests.helpers.plans import linear, possible
from tests.helpers.says import naming

pytestmark = pytest.mark.usefixtures("one_thread")

GRAINS: list[dict[str, Any]] = [
    {"granularity": "per_tensor"}, {"granularity": "per_channel"}, {"granularity": "per_group", "group_size": 4},
]  # fmt: skip
AFFINE: list[Scheme] = [
    Affine(symmetric=symmetric, range=kind, **grain)
    for symmetric in (False, True) for kind in ("minmax", "mse") for grain in GRAINS
]  # fmt: skip
AFFINE += [
    Affine(symmetric=symmetric, range=kind, scale_dtype=dtype, **GRAINS[-1])  # type: ignore[arg-type]
    for symmetric, kind, dtype in (
        ("full", "minmax", "float32"), ("full", "mse", "float32"), ("full", "minmax", "float16"),
        ("full", "mse", "bfloat16"), (False, "minmax", "float16"), (True, "minmax", "bfloat16"),
    )
]  # fmt: skip
PIECEWISE: list[Scheme] = [
    Piecewise(storage=storage, breakpoint=kind, **grain)
    for storage in ("region_bit", "shared") for kind in ("search", "gaussian") for grain in GRAINS
]  # fmt: skip
CODEBOOKS: list[Scheme] = [Codebook(init=init, **grain) for init in ("linear", "optimal") for grain in GRAINS]
FLOATS = (16, 32)
FEW = settings(max_examples=12)  # for each of many schemes


def widths(scheme: Scheme, channels: int = 4) -> list[int]:
    """Those that a (4, 8) layer can have."""
    every = [*possible(scheme, 4, 8, channels), *(5, 6, 7)]
    return sorted(bits for bits in set(every) if bits not in FLOATS and _fits(scheme, bits, channels))


def _fits(scheme: Scheme, bits: int, channels: int) -> bool:
    try:
        scheme.check_bits(bits)
        scheme.check_part(bits, (4, 8), 0, channels, "fc")
    except ValueError:
        return False
    return True


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(4, 8): of any scale, with zeros, a constant row, rows of one sign or an outlier."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(4, 8, generator=generator) * 10.0 ** draw(st.integers(-4, 2))
    if draw(st.booleans()):
        weight[torch.rand(4, 8, generator=generator) < 0.4] = 0
    row = draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["as it is", "constant", "zero", "positive", "outlier"]))
    if kind == "constant":
        weight[row] = float(weight[row, 0]) or 0.5
    elif kind == "zero":
        weight[row] = 0
    elif kind == "positive":
        weight[row] = weight[row].abs() + 0.1 * weight.abs().max()
    elif kind == "outlier":
        weight[row, 3] = 20 * weight.abs().max()
    return weight


def tables_of(levels: Levels) -> list[Tensor]:
    bounds = levels.first.tolist()
    return [levels.values[low:high] for low, high in pairwise(bounds)]


def at_random(levels: Levels, seed: int) -> Tensor:
    """Each free weight at any of its levels."""
    generator, tables = torch.Generator().manual_seed(seed), tables_of(levels)
    moved = levels.held.clone()
    for at in levels.held.isnan().nonzero().tolist():
        table = tables[int(levels.group[tuple(at)])]
        moved[tuple(at)] = table[int(torch.randint(len(table), (1,), generator=generator))]
    return moved


def check_members(weight: Tensor, choice: LayerChoice) -> Levels:
    """Every value that the plan gives is a level of its weight; tables ascend, and are no longer than the scheme's."""
    levels, simulated = Levels.of(weight, choice), simulate_layer(weight, choice)
    tables = tables_of(levels)
    for table in tables:
        assert (table.diff() >= 0).all()
    for part in choice.all_parts:
        for row in part.runs.array().tolist():
            for column in range(weight.shape[1]):
                held, value = float(levels.held[row, column]), float(simulated[row, column])
                if part.bits in FLOATS:
                    assert held == value
                    continue
                table = tables[int(levels.group[row, column])]
                assert value in table.tolist()
                assert len(table.unique()) <= choice.scheme.levels(part.bits)
                if not np.isnan(held):
                    # An extreme of a tie is held at the end that is as near.
                    step = float(table.diff().abs().max()) if len(table) > 1 else 0.0
                    # Rounding a scale below float16's normal numbers moves an end by more.
                    coarse = getattr(choice.scheme, "scale_dtype", "") == "float16" and step < 2.0**-14
                    assert coarse or abs(held - value) <= 1.001 * step
    return levels


@pytest.mark.parametrize("scheme", [*AFFINE, *PIECEWISE, *CODEBOOKS], ids=str)
def test_every_quantized_value_is_a_level(scheme: Scheme) -> None:
    @FEW
    @given(weights(), st.sampled_from(widths(scheme)))
    def check(weight: Tensor, bits: int) -> None:
        check_members(weight, linear("fc", 4, 8, scheme, bits))

    check()


@pytest.mark.parametrize(
    "scheme", [AFFINE[1], AFFINE[9], PIECEWISE[1], PIECEWISE[8], CODEBOOKS[0], CODEBOOKS[4]], ids=str
)
def test_parts_of_a_layer_have_levels_of_their_own(scheme: Scheme) -> None:
    @FEW
    @given(weights(), st.lists(st.sampled_from([*widths(scheme, 1), *FLOATS]), min_size=4, max_size=4))
    def check(weight: Tensor, bits: list[int]) -> None:
        parts = {b: tuple(k for k, own in enumerate(bits) if own == b) for b in dict.fromkeys(bits)}
        check_members(weight, linear("fc", 4, 8, scheme, parts))

    check()


@pytest.mark.parametrize("scheme", [*AFFINE, *CODEBOOKS], ids=str)
def test_weights_anywhere_among_their_levels_are_found_again(scheme: Scheme) -> None:
    """All affine schemes and codebooks: any choice of levels is what the plan makes of itself, scale and zero point."""

    @FEW
    @given(weights(), st.sampled_from(widths(scheme)), st.integers(0, 2**16))
    def check(weight: Tensor, bits: int, seed: int) -> None:
        choice = linear("fc", 4, 8, scheme, bits)
        moved = at_random(Levels.of(weight, choice), seed)
        limit = 1e-5 * float(weight.abs().max())
        torch.testing.assert_close(simulate_layer(moved, choice), moved, rtol=0, atol=limit)

    check()


@FEW
@given(weights(), st.integers(0, 2**16))
def test_weights_among_their_levels_are_found_again_under_a_scale_of_the_layer(weight: Tensor, seed: int) -> None:
    """Among them blocks that have the least scale there is, and blocks of zeros."""
    whole = torch.cat([weight.reshape(1, 32), 1e-4 * weight.reshape(1, 32), torch.zeros(1, 32)])
    choice = linear("fc", 3, 32, Minifloat(format="nvfp4"), 4)
    moved = at_random(check_members(whole, choice), seed)
    limit = 1e-6 * float(whole.abs().max())
    torch.testing.assert_close(simulate_layer(moved, choice), moved, rtol=0, atol=limit)
    assert (moved[whole == 0] == 0).all()


@pytest.mark.parametrize("scheme", AFFINE, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_extremes_of_every_group_are_held_at_the_ends_of_its_grid(scheme: Affine, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 8, generator=generator)
    levels = Levels.of(weight, linear("fc", 4, 8, scheme, bits))
    tables = tables_of(levels)
    for number in range(len(tables)):
        own = levels.group == number
        values, held = weight[own], levels.held[own]
        if scheme.symmetric:
            assert int(values.abs().argmax()) in (~held.isnan()).nonzero().flatten().tolist()
            assert int((~held.isnan()).sum()) == 1
            continue
        assert int((~held.isnan()).sum()) == 2 if values.min() < 0 < values.max() else 1
        if values.max() > 0:
            assert float(held[values.argmax()]) == float(tables[number][-1])
        if values.min() < 0:
            assert float(held[values.argmin()]) == float(tables[number][0])


@pytest.mark.parametrize("scheme", [*AFFINE, *PIECEWISE, *CODEBOOKS], ids=str)
def test_zeros_stay_zero_where_there_is_a_level_for_them(scheme: Scheme) -> None:
    @FEW
    @given(weights(), st.sampled_from(widths(scheme)), st.integers(0, 2**16))
    def check(weight: Tensor, bits: int, seed: int) -> None:
        assume((weight == 0).any())
        choice = linear("fc", 4, 8, scheme, bits)
        levels = Levels.of(weight, choice)
        moved, tables = at_random(levels, seed), tables_of(levels)
        for row, column in (weight == 0).nonzero().tolist():
            group = int(levels.group[row, column])
            if (tables[group] == 0).any() and not (weight[levels.group == group] == 0).all():
                assert float(moved[row, column]) == 0
        if scheme.has_zero(bits):
            assert (moved[weight == 0] == 0).all()

    check()


@pytest.mark.parametrize("scheme", [*AFFINE, *PIECEWISE, *CODEBOOKS], ids=str)
@pytest.mark.parametrize("value", [0.7, -0.3, 0.0, 1e-30])
def test_a_constant_group_is_held_where_quantizing_leaves_it(scheme: Scheme, value: float) -> None:
    for bits in widths(scheme):
        choice = linear("fc", 4, 8, scheme, bits)
        weight = torch.full((4, 8), value)
        levels = Levels.of(weight, choice)
        made = simulate_layer(weight, choice)
        if scale_bits_of(scheme) == 16:  # which may have no scale for the constant
            assert levels.held.equal(made)
            assert simulate_layer(made, choice).equal(made)
            continue
        assert levels.held.equal(weight)
        torch.testing.assert_close(made, weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_transposed_layers_groups_are_its_output_channels(axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 2, 2, generator=generator)
    choice = LayerChoice(
        name="up", kind="conv_transpose2d" if axis else "conv2d", shape=(3, 5, 2, 2), channel_axis=axis, numel=60,
        bits=3, scheme=Affine(granularity="per_channel"),
    )  # fmt: skip
    levels = Levels.of(weight, choice)
    expected = torch.arange(weight.shape[axis]).view([-1 if k == axis else 1 for k in range(4)]).expand(weight.shape)
    assert levels.group.long().equal(expected)


@pytest.mark.parametrize("grain", GRAINS, ids=lambda grain: str(grain["granularity"]))
def test_a_scheme_of_another_distribution_has_levels_too(grain: dict[str, Any]) -> None:
    @FEW
    @given(weights(), st.integers(2, 8), st.integers(0, 2**16))
    def check(weight: Tensor, bits: int, seed: int) -> None:
        # The name is of no distribution that is installed, which files alone would mind.
        choice = linear("fc", 4, 8, Affine(**grain), bits).model_copy(update={"scheme": Powers(**grain)})
        levels = check_members(weight, choice)
        moved = at_random(levels, seed)
        assert simulate_layer(moved, choice).equal(moved)

    check()


def test_a_layer_of_no_weights_has_no_levels() -> None:
    levels = Levels.of(torch.zeros(0, 4), linear("fc", 0, 4, Affine(granularity="per_channel"), 3))
    assert levels.group.shape == levels.held.shape == (0, 4)


@pytest.mark.parametrize("scheme", [AFFINE[0], PIECEWISE[1], CODEBOOKS[0]], ids=str)
def test_weights_that_are_no_numbers_are_refused_by_name(scheme: Scheme) -> None:
    weight = torch.randn(4, 8)
    weight[1, 2] = float("nan")
    with pytest.raises(WeightError, match=naming("'fc'", "NaN")):
        Levels.of(weight, linear("fc", 4, 8, scheme, 3))
