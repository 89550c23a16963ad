"""Fitted ranges: never worse than the extremes, and nothing that a backend of extremes could not find itself."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Affine, EntropyCoded, Piecewise
from mpq_plugins.errors import SettingError
from mpq_plugins.quantization.affine import quantize
from mpq_plugins.quantization.fitted import check_fits, fitted
from mpq_plugins.quantization.quantize import fake_quantize

SCHEMES = [Affine(granularity="per_channel", symmetric=symmetric) for symmetric in (False, True, "full")]
PLAIN = SCHEMES[0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights and their importance, (channels, inputs)."""
    channels, inputs = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    scale = draw(st.sampled_from([1e-6, 1.0, 300.0]))
    values = st.floats(-4, 4, width=32) | st.integers(-4, 4).map(float) | st.sampled_from([0.0, 1e-3, 2.5, -2.5])
    heavy = st.floats(0, 8, width=32) | st.sampled_from([0.0, 1.0, 1e4])
    count = channels * inputs
    weight = torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).float() * scale
    importance = torch.tensor(draw(st.lists(heavy, min_size=count, max_size=count))).float()
    return weight.reshape(channels, inputs), importance.reshape(channels, inputs)


def weighted_error(weight: Tensor, quantized: Tensor, importance: Tensor) -> Tensor:
    """Of each row, in float64."""
    return ((quantized.double() - weight.double()).square() * importance.double()).sum(1)


@given(problems(), st.integers(1, 8), st.sampled_from(SCHEMES))
def test_the_weighted_error_is_never_above_that_of_the_extremes(
    problem: tuple[Tensor, Tensor], bits: int, scheme: Affine
) -> None:
    weight, importance = problem
    clipped = fitted(weight, bits, scheme, importance, 0)
    extremes = weighted_error(weight, fake_quantize(weight, bits, scheme), importance)
    reached = weighted_error(weight, fake_quantize(clipped, bits, scheme), importance)
    rounding = (weight.abs().amax(1).double() * 1e-6).square() * importance.double().sum(1)
    assert (reached <= extremes * (1 + 1e-5) + rounding).all()


@given(problems(), st.integers(2, 8), st.sampled_from(SCHEMES))
def test_fitted_weights_are_clipped_and_their_grid_lies_inside_the_old_range(
    problem: tuple[Tensor, Tensor], bits: int, scheme: Affine
) -> None:
    weight, importance = problem
    clipped = fitted(weight, bits, scheme, importance, 0)
    low, high = clipped.amin(1, keepdim=True), clipped.amax(1, keepdim=True)
    assert clipped.equal(weight.clamp(low, high))
    assert (clipped.abs() <= weight.abs()).all()
    quantized = fake_quantize(clipped, bits, scheme)
    least, most = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    if scheme.symmetric:
        most = torch.maximum(-least, most)
        least = -most
    slack = (most - least) / (2**bits - 1) * 0.501  # a zero point is rounded, which shifts the grid by half a step
    assert (quantized.amin(1) >= least - slack).all()
    assert (quantized.amax(1) <= most + slack).all()


@pytest.mark.slow
@given(problems())
def test_one_bit_is_the_weighted_mean(problem: tuple[Tensor, Tensor]) -> None:
    weight, importance = problem
    for scheme in SCHEMES:
        clipped = fitted(weight, 1, scheme, importance, 0)
        quantized = fake_quantize(clipped, 1, scheme)
        torch.testing.assert_close(quantized, clipped, rtol=1e-5, atol=0)
        for row, h, own in zip(weight.tolist(), importance.tolist(), clipped.tolist(), strict=True):
            total = math.fsum(h)
            level = math.fsum(abs(w) * x for w, x in zip(row, h, strict=True)) / total if total else None
            if level is None:
                level = math.fsum(map(abs, row)) / len(row)
            for w, value in zip(row, own, strict=True):
                assert value == pytest.approx(-level if w < 0 else level, rel=1e-5, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_finds_about_what_an_exhaustive_search_finds(bits: int, scheme: Affine) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(6, 40) ** 3
    importance = torch.rand(6, 40) ** 4
    reached = weighted_error(
        weight, fake_quantize(fitted(weight, bits, scheme, importance, 0), bits, scheme), importance
    )
    best = torch.full((6,), math.inf, dtype=torch.float64)
    for ratio in torch.linspace(0.08, 1, 1500).tolist():
        low, high = weight.amin(1, keepdim=True) * ratio, weight.amax(1, keepdim=True) * ratio
        if scheme.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        tried = fake_quantize(weight.clamp(low, high), bits, scheme)
        best = torch.minimum(best, weighted_error(weight, tried, importance))
    extremes = weighted_error(weight, fake_quantize(weight, bits, scheme), importance)
    assert (reached <= best * 1.1).all()
    assert (reached < extremes * 0.9).any()


def test_what_is_heavy_keeps_its_range_and_what_is_light_loses_it() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 50), torch.tensor([8.0])])[None]
    light, heavy = torch.ones_like(weight), torch.ones_like(weight)
    light[0, -1], heavy[0, -1] = 1e-4, 1e4
    assert fitted(weight, 3, PLAIN, light, 0).max() < 5
    assert fitted(weight, 3, PLAIN, heavy, 0).max() > 6


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_nothing_counts_nothing_changes(bits: int, scheme: Affine) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert fitted(weight, bits, scheme, torch.zeros_like(weight), 0).equal(weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [0.0, 0.7, -0.3, 1e-40, 3e38])
def test_rows_of_one_value_stay_what_they_are(bits: int, scheme: Affine, value: float) -> None:
    weight = torch.full((2, 5), value)
    importance = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    quantized = fake_quantize(fitted(weight, bits, scheme, importance, 0), bits, scheme)
    torch.testing.assert_close(quantized, weight, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_column_is_exact(bits: int, scheme: Affine) -> None:
    weight = torch.randn(7, 1, generator=torch.Generator().manual_seed(0))
    clipped = fitted(weight, bits, scheme, torch.ones_like(weight), 0)
    torch.testing.assert_close(fake_quantize(clipped, bits, scheme), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_shape_dtype_and_axis_are_kept_and_the_weight_is_not_touched(bits: int, dtype: torch.dtype, axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, 3, 2, generator=generator).to(dtype)
    importance = torch.rand(4, 6, 3, 2, generator=generator)
    before = weight.clone()
    own = fitted(weight, bits, PLAIN, importance, axis)
    assert (own.shape, own.dtype) == (weight.shape, dtype)
    assert weight.equal(before)
    assert own.data_ptr() != weight.data_ptr()
    for channel in range(weight.shape[axis]):
        alone = [tensor.select(axis, channel).reshape(1, -1) for tensor in (weight, importance, own)]
        assert fitted(alone[0], bits, PLAIN, alone[1], 0).equal(alone[2])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("bits", [1, 4])
def test_empty_weights_stay_empty(shape: tuple[int, int], bits: int) -> None:
    assert fitted(torch.zeros(shape), bits, PLAIN, torch.zeros(shape), 0).shape == shape


def test_the_extremes_of_fitted_weights_are_the_range_again() -> None:
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(8, 30, generator=torch.Generator().manual_seed(1))
    for scheme in SCHEMES:
        clipped = fitted(weight, 3, scheme, importance, 0)
        once = quantize(clipped, 3, scheme)
        again = quantize(clipped.clamp(clipped.amin(1, keepdim=True), clipped.amax(1, keepdim=True)), 3, scheme)
        assert once.codes.equal(again.codes)
        assert once.grid.scale.tolist() == again.grid.scale.tolist()


@pytest.mark.parametrize(
    "scheme",
    [
        Affine(), Affine(granularity="per_group", group_size=2), Affine(granularity="per_channel", range="mse"),
        Piecewise(granularity="per_channel"), EntropyCoded(step=0.1),
    ],
    ids=str,
)  # fmt: skip
def test_other_schemes_are_refused_by_layer(scheme: Any) -> None:
    with pytest.raises(SettingError, match=r"layer 'fc': .*affine per_channel minmax.*measure under that"):
        check_fits(scheme, "fc")
    for fits in SCHEMES:
        assert check_fits(fits, "fc") is fits
