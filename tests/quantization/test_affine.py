import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mpq_plugins import Affine
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.plans.affine import Symmetry
from mpq_plugins.quantization.affine import dequantize, quantize
from mpq_plugins.quantization.quantize import fake_quantize
from tests.quantization import oracle

SCHEMES = [
    Affine(symmetric=symmetric, granularity=granularity, group_size=group, range=range_name)  # type: ignore[arg-type]
    for symmetric in (False, True, "full")
    for granularity, group in (("per_tensor", None), ("per_channel", None), ("per_group", 2))
    for range_name in ("minmax", "mse", "percentile", "kl")
]
BITS = range(1, 9)


def weights(max_side: int = 6) -> st.SearchStrategy[Tensor]:
    floats = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
    shapes = st.tuples(st.integers(1, max_side), st.sampled_from([2, 4, 6]))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=floats)).map(torch.from_numpy)


@given(weights(), st.sampled_from(range(2, 9)), st.sampled_from([False, True, "full"]))
def test_min_max_equals_the_slow_loop(weight: Tensor, bits: int, symmetric: Symmetry) -> None:
    scheme = Affine(symmetric=symmetric, granularity="per_channel")
    got = fake_quantize(weight, bits, scheme)
    for row, quantized in zip(weight.tolist(), got.tolist(), strict=True):
        scale = oracle.levels(row, bits, symmetric)[0]
        for w, q, expected in zip(row, quantized, oracle.fake(row, bits, symmetric), strict=True):
            # Where w / scale falls on a half, float32 and float64 may round to different neighbours, both right.
            tie = abs(abs(w / scale) % 1 - 0.5) < 1e-4
            assert q == pytest.approx(expected, rel=1e-6, abs=1e-30) or (
                tie and abs(abs(q - expected) / abs(scale) - 1) < 1e-4
            )


@given(weights(), st.sampled_from(BITS), st.sampled_from(SCHEMES))
def test_codes_fit_and_decode(weight: Tensor, bits: int, scheme: Affine) -> None:
    quantized = quantize(weight, bits, scheme)
    allowed = {-1, 1} if bits == 1 else set(range(int(quantized.grid.qmin[0]), int(quantized.grid.qmax[0]) + 1))
    assert set(quantized.codes.flatten().tolist()) <= allowed
    assert len(allowed) <= 2**bits
    back = dequantize(quantized)
    assert back.shape == weight.shape
    assert torch.isfinite(back).all()


@given(weights(), st.sampled_from(range(2, 9)), st.sampled_from([s for s in SCHEMES if s.range == "minmax"]))
def test_min_max_error_is_at_most_half_a_step(weight: Tensor, bits: int, scheme: Affine) -> None:
    quantized = quantize(weight, bits, scheme)
    steps = torch.from_numpy(quantized.grid.scale).abs()
    error = (dequantize(quantized) - weight).abs().reshape(len(steps), -1)
    # Half a step for rounding; half more at the far end, where the zero point's own rounding shifts the range, or where
    # the full range has one code less.
    limit = 0.5 if scheme.symmetric is True else 1.0
    assert (error <= steps * (limit + 1e-4)).all()


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_search_clips_either_end_alone(side: float) -> None:
    """An outlier at one end costs the other nothing: the error is that of the best pair of ends."""
    usual = torch.linspace(-1, 1, 4000)
    weight = torch.cat([usual, torch.tensor([1.35 * side])])[None]
    searched = fake_quantize(weight, 4, Affine(granularity="per_channel", range="mse"))
    error = float((searched - weight).square().sum())
    pairs = itertools.product(np.linspace(0.9, 1.0, 11), np.linspace(0.6, 1.0, 41))
    ends = [(-near, 1.35 * far) if side > 0 else (-1.35 * far, near) for near, far in pairs]
    least = min(error_between(weight[0].double(), low, high) for low, high in ends)
    assert error <= 1.01 * least


def error_between(weight: Tensor, low: float, high: float) -> float:
    scale = (high - low) / 15
    zero = round(-low / scale)
    codes = ((weight / scale).round() + zero).clamp(0, 15)
    return float(((codes - zero) * scale - weight).square().sum())


@given(weights(), st.sampled_from(BITS), st.sampled_from(SCHEMES))
def test_zero_stays_zero_and_order_is_kept(weight: Tensor, bits: int, scheme: Affine) -> None:
    if bits == 1:
        return  # two levels, neither of them zero
    quantized = fake_quantize(weight, bits, scheme)
    assert (quantized[weight == 0] == 0).all()
    if scheme.granularity == "per_tensor":
        in_order = quantized.flatten()[weight.flatten().argsort()]
        assert (in_order.diff() >= 0).all()


def test_odd_shapes_and_magnitudes() -> None:
    for scheme, bits in itertools.product(SCHEMES, BITS):
        where = f"{scheme} at {bits} bits"
        plain = torch.randn(4, 6, generator=torch.Generator().manual_seed(bits))
        for weight in (
            plain * 1e37,
            plain * 1e-37,
            plain * 1e-42,
            plain[:1],
            plain[:, :2],
            torch.empty(0, 4),
            torch.empty(4, 0),
        ):
            quantized = fake_quantize(weight, bits, scheme)
            assert quantized.shape == weight.shape, where
            assert torch.isfinite(quantized).all(), where
            if weight.numel() and bits == 8:
                assert (quantized - weight).abs().max() <= weight.abs().max() / 60 + 2e-45, where
        one = torch.tensor([[0.7]])
        scheme_for_one = scheme if scheme.granularity != "per_group" else Affine(granularity="per_group", group_size=1)
        assert fake_quantize(one, bits, scheme_for_one).equal(one), where


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_do_not_matter(scheme: Affine) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    assert fake_quantize(strided, 4, scheme).equal(fake_quantize(weight, 4, scheme))


def test_groups_follow_the_granularity() -> None:
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for scheme, groups in (
        (Affine(), weight.reshape(1, -1)),
        (Affine(granularity="per_channel"), weight.reshape(4, -1)),
        (Affine(granularity="per_group", group_size=2), weight.reshape(4 * 3, -1)),
    ):
        expected = torch.stack([fake_quantize(group, 3) for group in groups]).reshape(weight.shape)
        assert fake_quantize(weight, 3, scheme).equal(expected)


def test_channel_axis_moves_the_channels() -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scheme = Affine(granularity="per_channel")
    along_one = fake_quantize(weight, 3, scheme, channel_axis=1)
    assert along_one.equal(fake_quantize(weight.movedim(1, 0), 3, scheme).movedim(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_dtype_and_levels(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized = fake_quantize(weight, 3)
    assert quantized.dtype == dtype
    assert quantized.unique().numel() <= 8
    assert quantized.equal(fake_quantize(weight.float(), 3).to(dtype))


def test_float16_does_not_overflow_at_its_limit() -> None:
    weight = torch.tensor([[65504.0, -65504.0, 3.0]], dtype=torch.float16)
    for bits in BITS:
        assert torch.isfinite(fake_quantize(weight, bits)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_an_error_naming_the_layer(bad: float) -> None:
    weight = torch.tensor([[1.0, bad]])
    with pytest.raises(WeightError, match=r"layer 'stem\.conv': 1 of 2 weights"):
        quantize(weight, 4, layer="stem.conv")


@pytest.mark.parametrize("bits", [0, 9, -1, 3.0, True, "4"])
def test_bits_outside_are_refused(bits: object) -> None:
    with pytest.raises(SettingError, match="1 to 8"):
        quantize(torch.ones(2, 2), bits)  # type: ignore[arg-type]


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"layer 'fc': 6 inputs do not divide into groups of 4"):
        quantize(torch.ones(2, 6), 4, Affine(granularity="per_group", group_size=4), layer="fc")


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match=r"layer 'fc': dtype torch\.float64"):
        quantize(torch.ones(2, 2, dtype=torch.float64), 4, layer="fc")
