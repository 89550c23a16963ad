"""Sizes against a count made layer by layer, part by part, scale by scale."""

import math

import pytest
from hypothesis import given

from mpq_plugins import Affine, Codebook, Minifloat, Piecewise, Plan
from mpq_plugins.errors import SettingError
from tests.helpers.plans import SCHEMES, linear, plan_of, plans

HALVES = [scheme for scheme in SCHEMES if "scales in" in str(scheme)]


@given(plans)
def test_size_is_what_a_file_would_hold(plan: Plan) -> None:
    codes = total = 0
    for layer in plan.layers:
        inputs = layer.shape[1]
        for part in layer.all_parts:
            with_bit = isinstance(layer.scheme, Piecewise) and layer.scheme.storage == "region_bit"
            width = part.bits + (with_bit and part.bits <= 8)
            codes += width * len(part.channels) * inputs
            total += width * len(part.channels) * inputs
            if part.bits > 8:
                continue
            groups = {
                "per_tensor": 1,
                "per_channel": len(part.channels),
                "per_group": len(part.channels) * inputs // 2,
            }
            for _ in range(groups[layer.scheme.granularity]):
                step = getattr(layer.scheme, "step", None)  # which is the plan's, and costs the file nothing
                total += {
                    "affine": 16 if layer.scheme in HALVES else 32, "piecewise": 64, "codebook": 32 * 2**part.bits,
                    "entropy_coded": 0 if step else 32,
                }[layer.scheme.name]  # fmt: skip
                if isinstance(layer.scheme, Affine) and not layer.scheme.symmetric and part.bits > 1:
                    total += part.bits
        if len(layer.all_parts) > 1:
            total += layer.channels * math.ceil(math.log2(len(layer.all_parts)))
    size = plan.size()
    assert size.weights_only_bits == codes
    assert size.total_bits == total
    assert size.total_bytes == math.ceil(total / 8)
    assert size.average_bits == codes / size.numel


def test_a_worked_example() -> None:
    per_channel = Affine(granularity="per_channel")
    plan = plan_of(
        linear("a", 100, 50, per_channel, 4),
        linear("b", 100, 50, per_channel, {2: tuple(range(75)), 8: tuple(range(75, 100))}),
    )
    size = plan.size(scale_bits=16)
    assert size.layers["a"].total == 100 * 50 * 4 + 100 * 16 + 100 * 4
    assert size.layers["b"].total == 75 * 50 * 2 + 25 * 50 * 8 + 100 * 16 + 75 * 2 + 25 * 8 + 100
    assert size.numel == 10_000
    assert size.against_fp32 == 320_000 / size.total_bits
    assert size.against_int8 == 80_000 / size.total_bits
    assert plan.size().total_bits == size.total_bits + 200 * 16


@pytest.mark.parametrize("scale_bits", [16, 32])
def test_centroids_are_as_wide_as_scales(scale_bits: int) -> None:
    plan = plan_of(linear("a", 4, 8, Codebook(granularity="per_channel"), 3))
    size = plan.size(scale_bits=scale_bits)
    assert size.total_bits == 4 * 8 * 3 + 4 * 2**3 * scale_bits


def test_a_scale_of_the_layer_counts_once() -> None:
    nvfp4 = Minifloat(format="nvfp4")
    plan = plan_of(linear("a", 100, 48, nvfp4, 4), linear("b", 100, 0, nvfp4, 4), linear("c", 100, 48, nvfp4, 16))
    assert [layer.total for layer in plan.size().layers.values()] == [100 * 48 * 4 + 100 * 3 * 8 + 32, 0, 100 * 48 * 16]
    assert plan.size(scale_bits=16).layers["a"].scales == 100 * 3 * 16 + 16


def test_other_scales_are_refused() -> None:
    with pytest.raises(SettingError, match="scale_bits: 8 is not allowed"):
        plan_of(linear("a", 2, 2, Affine(), 4)).size(scale_bits=8)
