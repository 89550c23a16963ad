"""The full range of symmetric codes: every one of 2^b levels, scales of either sign."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Affine, SettingError
from mpq_plugins.quantization.affine import dequantize, quantize
from mpq_plugins.quantization.quantize import fake_quantize
from tests.quantization.test_affine import weights

FULL = Affine(symmetric="full", granularity="per_channel")
CLIPPED = Affine(symmetric="full", granularity="per_channel", range="mse")
GROUPS = {"granularity": "per_group", "group_size": 32}


@given(weights(), st.sampled_from(range(2, 9)))
def test_the_farthest_weight_is_exact_and_quantizing_again_changes_nothing(weight: Tensor, bits: int) -> None:
    once = fake_quantize(weight, bits, FULL)
    farthest = weight.abs().argmax(1, keepdim=True)
    tied = (weight.amin(1) == -weight.amax(1))[:, None]  # the negative one is exact
    farthest = torch.where(tied, weight.argmin(1, keepdim=True), farthest)
    assert once.gather(1, farthest).equal(weight.gather(1, farthest))
    assert fake_quantize(once, bits, FULL).equal(once)


@given(weights(), st.sampled_from(range(2, 9)))
def test_clipped_weights_quantized_again_differ_by_the_scales_rounding(weight: Tensor, bits: int) -> None:
    once = fake_quantize(weight, bits, CLIPPED)
    again = fake_quantize(once, bits, CLIPPED)
    torch.testing.assert_close(again, once, rtol=0, atol=1e-6 * float(weight.abs().max()))


@given(weights(), st.sampled_from(range(2, 9)))
def test_the_search_is_no_worse_than_extremes_nor_than_either_sign_of_any_scale(weight: Tensor, bits: int) -> None:
    """Against a finer exhaustive search, whose error it comes near."""
    half = 2 ** (bits - 1)
    searched = fake_quantize(weight, bits, CLIPPED).double()
    extremes = fake_quantize(weight, bits, FULL).double()
    for row, own, plain in zip(weight.double(), searched, extremes, strict=True):
        error = float((own - row).square().sum())
        least = float((plain - row).square().sum())
        slack = 1e-12 * float(row.square().sum())
        assert error <= least * (1 + 1e-5) + slack
        for scale in (float(row.abs().max()) / (half - 1) * np.linspace(0.04, 1, 49)).tolist():
            for signed in (scale, -scale) if scale else ():
                tried = (row / signed).round().clamp(-half, half - 1) * signed
                least = min(least, float((tried - row).square().sum()))
        assert error <= least * (1 + 1e-4) + slack


def test_the_error_on_gaussian_weights_is_what_is_published_for_such_a_grid() -> None:
    weight = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    published = {2: 0.131, 3: 0.0303, 4: 0.00740, 5: 0.00182}
    plain, full, clipped = (
        Affine(symmetric=symmetric, range=rule, **GROUPS)  # type: ignore[arg-type]
        for symmetric, rule in ((True, "minmax"), ("full", "minmax"), ("full", "mse"))
    )
    for bits, expected in published.items():
        error = {scheme: float((fake_quantize(weight, bits, scheme) - weight).square().mean())
                 for scheme in (plain, full, clipped)}  # fmt: skip
        assert error[full] / float(weight.square().mean()) == pytest.approx(expected, rel=0.01)
        assert error[clipped] < error[full] < error[plain]


def test_both_signs_and_all_codes_are_used() -> None:
    quantized = quantize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), 3, FULL)
    assert set(quantized.codes.flatten().tolist()) == set(range(-4, 4))
    assert {math.copysign(1, scale) for scale in quantized.grid.scale.flatten()} == {-1.0, 1.0}
    assert not quantized.grid.zero_point.any()
    assert not ((dequantize(quantized) == 0) & dequantize(quantized).signbit()).any()  # no -0


def test_a_lone_far_weight_of_either_side_decides_the_sign() -> None:
    weight = torch.tensor([[-1.0, 0.5, 0.25], [1.0, -0.5, -0.25], [-1.0, 1.0, 0.0]])
    quantized = quantize(weight, 2, FULL)
    assert quantized.grid.scale.tolist() == [[0.5], [-0.5], [0.5]]
    assert quantized.codes.tolist() == [[-2, 1, 0], [-2, 1, 0], [-2, 1, 0]]


def test_one_bit_is_binary_as_under_other_symmetries() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for rule in ("minmax", "mse"):
        full, plain = (
            Affine(symmetric=symmetric, granularity="per_channel", range=rule) for symmetric in ("full", True)
        )
        assert fake_quantize(weight, 1, full).equal(fake_quantize(weight, 1, plain))
        assert (full.levels(1), full.has_zero(1), full.zero_point_bits(4)) == (2, False, 0)


@pytest.mark.parametrize("bad", ["Full", "", 1, None, "true"])
def test_other_symmetries_are_refused(bad: object) -> None:
    with pytest.raises(SettingError, match=r"symmetric: .* is not allowed; True, False or 'full'"):
        Affine(symmetric=bad)  # type: ignore[arg-type]
