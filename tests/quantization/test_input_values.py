"""Ranges of a layer's inputs, batch after batch."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpq_plugins import Activations, SettingError
from mpq_plugins.models.input_ranges import InputQuantizer, InputRange, fake_quantize_input
from mpq_plugins.plans.activations import INPUT_RANGES, InputRangeName
from mpq_plugins.quantization.input_values import InputValues


def values_of(*batches: Tensor) -> InputValues:
    values = InputValues("a.fc")
    for batch in batches:
        values.look(batch)
    return values


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (40, 6)), generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Tensor] = {
    "normal": normal(0),
    "positive": normal(1).relu() + 0.1,
    "negative": -torch.rand(40, 6, generator=torch.Generator().manual_seed(2)) - 3,
    "outlier": normal(3).index_fill(0, torch.tensor([7]), 60.0),
    "skewed": normal(4).exp() - 0.3,
    "small": normal(5) * 1e-6,
    "constant": torch.full((40, 6), 2.5),
    "negative constant": torch.full((40, 6), -0.1),
}


def quantized(x: Tensor, own: InputRange) -> Tensor:
    return fake_quantize_input(x, torch.tensor(own.scale), torch.tensor(float(own.zero_point)), own.bits)


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=12),
)
def test_extremes_and_moving_average_are_torchs(batches: list[list[float]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

        average, extremes = MovingAverageMinMaxObserver(), MinMaxObserver()
    values = InputValues("fc")
    for batch in batches:
        for watching in (average, extremes, values.look):
            watching(torch.tensor(batch))
    low, high = values._average
    assert (low, high) == pytest.approx((float(average.min_val), float(average.max_val)), rel=1e-5, abs=1e-4)
    assert (values.low, values.high) == (float(extremes.min_val), float(extremes.max_val))
    assert values.batches == len(batches)


def test_a_range_of_moving_averages_goes_by_them() -> None:
    values = values_of(torch.tensor([-1.0, 2.0]), torch.tensor([-101.0, 102.0]))
    assert values.ends(Activations(8, range="moving_average")) == pytest.approx((-2.0, 3.0))
    assert values.ends(Activations(8, range="minmax")) == (-101.0, 102.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("name", INPUT_RANGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_has_codes_and_zero_is_a_level(
    shape: str, name: InputRangeName, bits: int, symmetric: bool
) -> None:
    x = SHAPES[shape]
    values = values_of(*x.split(5))
    own = values.range(Activations(bits, symmetric=symmetric, range=name))
    assert own == InputRange(bits, own.scale, own.zero_point)
    assert 0 < own.scale < math.inf
    assert 0 <= own.zero_point < 2**bits
    if symmetric:
        assert own.zero_point == 2 ** (bits - 1)
    elif "negative" in shape:
        assert own.zero_point == 2**bits - 1
    elif shape in ("positive", "constant"):
        assert own.zero_point == 0
    assert float(quantized(torch.zeros(1), own)) == 0
    if name == "minmax" or "constant" in shape:
        assert float((quantized(x, own) - x).abs().max()) <= own.scale * (0.5 + 2.0**bits * 2**-22) * 1.001
    mean = float((quantized(x, own) - x).double().square().mean())
    assert values.mean_squared_error(own) == pytest.approx(mean, rel=0.05, abs=1e-12 * float(x.square().max()))


def test_an_input_of_one_constant_keeps_it() -> None:
    for name in INPUT_RANGES:
        for constant in (2.5, -0.1):
            x = torch.full((9,), constant)
            own = values_of(x).range(Activations(4, range=name))
            assert float(quantized(x, own)[0]) == pytest.approx(constant, rel=1e-6)


def test_sixteen_bits_are_as_fine_as_float32_lets_them() -> None:
    x = normal(8, 4000) * 1000
    own = values_of(x).range(Activations(16))
    codes = torch.round(x / own.scale) + own.zero_point
    assert codes.min() >= 0
    assert codes.max() <= 65_535
    assert float((quantized(x, own) - x).abs().max()) <= own.scale * 0.52


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_other_dtypes_are_looked_at_in_float32(dtype: torch.dtype) -> None:
    x = normal(9).to(dtype)
    assert values_of(x).range(Activations(4)) == values_of(x.float()).range(Activations(4))


def test_a_dynamic_range_needs_no_values() -> None:
    own = InputValues("fc").range(Activations(8, dynamic="per_token", symmetric=True))
    assert own == InputRange(8, dynamic="per_token", symmetric=True)


def test_a_layer_is_watched_until_the_handle_is_removed() -> None:
    layer, values = nn.Linear(6, 2), InputValues("fc")
    handle = values.watch(layer)
    layer(SHAPES["normal"])
    layer(input=SHAPES["normal"] * 2)
    layer(torch.zeros(0, 6))  # an empty batch says nothing
    handle.remove()
    layer(SHAPES["normal"] * 1000)
    assert values.batches == 2
    assert values.high == float(SHAPES["normal"].max()) * 2
    quantizer = InputQuantizer(4)
    values.fit(quantizer, Activations(4, range="minmax"))
    own = values.range(Activations(4, range="minmax"))
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (own.scale, own.zero_point)


def test_extremes_hold_what_a_sample_leaves_out() -> None:
    x = torch.zeros(1, 400_000)
    x[0, 1] = 5.0
    values = values_of(x)
    assert values.ends(Activations(8, range="minmax")) == (0.0, 5.0)
    assert values.ends(Activations(8, range="mse"))[1] == pytest.approx(5.0, rel=0.1)


def test_percentiles_of_a_million_values_are_exact_at_the_ends() -> None:
    x = normal(10, 1_000_000)
    low, high = values_of(*x.split(100_000)).ends(Activations(8, range="percentile", share=0.9999))
    assert (low, high) == pytest.approx(tuple(np.quantile(x.double().numpy(), [0.00005, 0.99995])), rel=1e-9)


@pytest.mark.parametrize("name", INPUT_RANGES)
@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no batch reaches it"),
        ([torch.zeros(0, 4)], "no batch reaches it"),
        ([torch.zeros(3, 4), -torch.zeros(2, 4)], "its inputs are all zero"),
    ],
)
def test_inputs_without_a_range_name_the_layer(batches: list[Tensor], said: str, name: InputRangeName) -> None:
    values = values_of(*batches)
    with pytest.raises(SettingError, match=rf"layer 'a\.fc': {said}"):
        values.range(Activations(8, range=name))
    with pytest.raises(SettingError, match=rf"layer 'a\.fc': {said}"):
        values.mean_squared_error(InputRange(8, 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_name_the_layer_and_the_batch(bad: float) -> None:
    values = values_of(torch.ones(3), torch.ones(3))
    with pytest.raises(SettingError, match=r"layer 'a\.fc': activations hold NaN or infinity in batch 3; look"):
        values.look(torch.tensor([1.0, bad, 2.0]))


def test_a_percentile_that_holds_only_zeros_is_refused() -> None:
    values = values_of(torch.nn.functional.pad(torch.ones(1), (0, 999)))
    with pytest.raises(SettingError, match=r"layer 'a\.fc': the percentile range .* nothing but 0"):
        values.range(Activations(8, range="percentile", share=0.9))
    assert values.ends(Activations(8, range="percentile", share=1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ends", [(-1e-44, 1e-44), (0.0, 1e-38), (-3e38, 3e38)])
def test_a_scale_that_float32_does_not_have_is_refused(ends: tuple[float, float], symmetric: bool) -> None:
    if symmetric and ends[0] < -1:
        assert values_of(torch.tensor(ends)).range(Activations(8, range="minmax", symmetric=True)).scale < math.inf
        return
    with pytest.raises(SettingError, match=r"layer 'a\.fc': its inputs reach from .* is no float32"):
        values_of(torch.tensor(ends)).range(Activations(8, range="minmax", symmetric=symmetric))
