"""Scales rounded to a floating-point type before weights become codes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import Affine, Plan, SettingError, Uniform, compress, decompress, measure
from mpq_plugins.plans.affine import ScaleDtype
from mpq_plugins.quantization.affine import dequantize, quantize
from mpq_plugins.quantization.quantize import fake_quantize
from mpq_plugins.quantization.scales import rounded_scale
from tests.quantization.test_affine import weights

TORCH: dict[ScaleDtype, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
HALVES: list[ScaleDtype] = ["float16", "bfloat16"]
SCHEMES = [
    Affine(symmetric=symmetric, granularity="per_channel", range=rule, scale_dtype=dtype)
    for symmetric in (False, True, "full")
    for rule in ("minmax", "mse")
    for dtype in HALVES
]


@given(st.floats(0, 2.0**127, width=32), st.sampled_from(HALVES))
def test_rounding_is_torchs_but_for_what_would_be_zero(value: float, dtype: ScaleDtype) -> None:
    got = float(rounded_scale(np.array([value]), dtype)[0])
    expected = float(torch.tensor(value).to(TORCH[dtype]))
    if value == 0:
        assert got == 1
    elif expected == 0:
        assert got == torch.finfo(TORCH[dtype]).smallest_normal * torch.finfo(TORCH[dtype]).eps  # the smallest there is
    else:
        assert got == expected


@given(weights(), st.integers(1, 8), st.sampled_from(SCHEMES))
def test_every_scale_is_of_its_type_and_codes_are_the_nearest_on_it(weight: Tensor, bits: int, scheme: Affine) -> None:
    quantized = quantize(weight, bits, scheme)
    scale = torch.from_numpy(quantized.grid.scale)
    assert scale.to(TORCH[scheme.scale_dtype]).float().equal(scale)
    if bits == 1:
        return
    zero, least, greatest = (float(value) for value in (0, quantized.grid.qmin[0], quantized.grid.qmax[0]))
    for row, got, own, zero in zip(
        weight.tolist(), dequantize(quantized).tolist(), scale[:, 0].tolist(), quantized.grid.zero_point[:, 0].tolist(),
        strict=True,
    ):  # fmt: skip
        levels = [(code - zero) * own for code in range(int(least), int(greatest) + 1)]
        for w, value in zip(row, got, strict=True):
            assert abs(value - w) <= min(abs(level - w) for level in levels) + 1e-5 * abs(own)


@given(weights(), st.sampled_from(range(2, 9)), st.sampled_from([s for s in SCHEMES if s.range == "minmax"]))
def test_symmetric_weights_quantized_again_stay(weight: Tensor, bits: int, scheme: Affine) -> None:
    """An asymmetric group may lose its last code to the rounding of its scale, and then has another range."""
    if scheme.symmetric and bool((weight.abs().amax(1) > 0.1).all()):
        once = fake_quantize(weight, bits, scheme)
        assert fake_quantize(once, bits, scheme).equal(once)


@pytest.mark.parametrize("symmetric", [False, True, "full"])
def test_a_scale_that_would_be_zero_is_the_smallest_number(symmetric: bool) -> None:
    weight = torch.tensor([[1e-9, -2e-9, 0.0]])
    scheme = Affine(symmetric=symmetric, granularity="per_channel", scale_dtype="float16")
    quantized = quantize(weight, 4, scheme)
    assert np.abs(quantized.grid.scale).tolist() == [[2.0**-24]]
    assert dequantize(quantized).equal(torch.zeros(1, 3))


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_a_scale_beyond_the_type_is_refused_by_layer(bits: int, rule: str) -> None:
    scheme = Affine(symmetric="full", granularity="per_channel", range=rule, scale_dtype="float16")  # type: ignore[arg-type]
    weight = torch.tensor([[3e7, 2e7], [1.0, 2.0]])
    with pytest.raises(SettingError, match=r"layer 'fc': 1 scales are beyond float16, whose .* 65504.*float32"):
        quantize(weight, bits, scheme, layer="fc")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net[0].weight.data = weight
    for granularity in ("per_channel", "per_tensor"):
        with pytest.raises(SettingError, match="layer '0': 1 scales are beyond float16"):
            measure(net, Affine(granularity=granularity, scale_dtype="float16"), [bits])
    assert torch.isfinite(fake_quantize(weight, bits, Affine(granularity="per_channel", scale_dtype="bfloat16"))).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.7, -0.3, 1.5, -2.0, 300.1])
def test_a_constant_is_exact_where_it_is_of_the_type_and_else_as_near_as_a_scale(
    dtype: ScaleDtype, value: float
) -> None:
    weight = torch.full((2, 4), value)
    for symmetric in (False, True, "full"):
        for bits in range(1, 9):
            scheme = Affine(symmetric=symmetric, granularity="per_channel", scale_dtype=dtype)
            quantized = fake_quantize(weight, bits, scheme)
            if weight.to(TORCH[dtype]).float().equal(weight):
                assert quantized.equal(weight)
            torch.testing.assert_close(quantized, weight, rtol=torch.finfo(TORCH[dtype]).eps, atol=0)
            assert fake_quantize(quantized, bits, scheme).equal(quantized)


def test_the_error_that_is_measured_is_that_of_the_rounded_grid() -> None:
    net = torch.nn.Linear(64, 32)
    for scheme in SCHEMES:
        table = measure(net, scheme, [4], metrics=["mse"])
        weight = net.weight.detach()
        expected = float((fake_quantize(weight, 4, scheme) - weight).double().square().mean())
        assert float(table.layers[0].errors["mse"][0]) == pytest.approx(expected, rel=1e-5)


def test_sixteen_bits_count_and_files_without_the_field_are_as_they_were() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(64, 32))
    grain = {"granularity": "per_group", "group_size": 32}
    plain, half = (
        Uniform(bits=4)(measure(net, Affine(symmetric="full", scale_dtype=dtype, **grain), [4]))  # type: ignore[arg-type]
        for dtype in ("float32", "float16")
    )
    assert plain.size().total_bits - half.size().total_bits == 64 * 16
    assert half.size().total_average_bits == 4.5
    assert half.size(scale_bits=32).total_bits == plain.size().total_bits
    assert "scale_dtype" not in plain.to_json()
    for plan in (plain, half):
        assert Plan.model_validate_json(plan.to_json()) == plan


def test_a_container_holds_the_same_weights(tmp_path: Path) -> None:
    net = torch.nn.Linear(64, 32)
    for scheme in SCHEMES:
        plan = Uniform(bits=4)(measure(net, scheme, [4]))
        state = decompress(compress(net, plan, tmp_path / f"{SCHEMES.index(scheme)}.mpqc"))
        assert state["weight"].equal(fake_quantize(net.weight.detach(), 4, scheme))


@pytest.mark.parametrize("bad", ["float64", "fp16", 16, None])
def test_other_types_are_refused(bad: object) -> None:
    with pytest.raises(SettingError, match=r"scale_dtype: .* is not allowed; float32, float16, bfloat16"):
        Affine(scale_dtype=bad)  # type: ignore[arg-type]


def test_schemes_say_what_their_scales_take() -> None:
    assert [Affine(scale_dtype=dtype).scale_bits for dtype in TORCH] == [32, 16, 16]
    assert str(Affine(scale_dtype="float16", symmetric="full")) == (
        "full-range symmetric per_tensor minmax, scales in float16"
    )
    assert math.isinf(float(rounded_scale(np.array([65520.0]), "float16")[0]))
    assert float(rounded_scale(np.array([65519.9]), "float16")[0]) == 65504
