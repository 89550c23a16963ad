"""Small floating-point codes against a slow search over all values that a format has."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpq_plugins import Minifloat, SettingError, measure
from mpq_plugins.plans.minifloat import MINIFLOATS, MinifloatName
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import fake_quantize, quantizer
from tests.helpers.plans import linear

FORMATS = {  # exponent bits, mantissa bits, greatest value; OCP MX 1.0, section 5.3
    "mxfp4": (2, 1, 6.0), "mxfp6_e2m3": (2, 3, 7.5), "mxfp6_e3m2": (3, 2, 28.0), "mxfp8_e4m3": (4, 3, 448.0),
    "mxfp8_e5m2": (5, 2, 57344.0), "nvfp4": (2, 1, 6.0), "fp8_e4m3": (4, 3, 448.0), "fp8_e5m2": (5, 2, 57344.0),
}  # fmt: skip


def values(kind: str) -> list[float]:
    """Every finite value that is not negative, ascending, with even mantissas at even places."""
    exponent_bits, mantissa_bits, largest = FORMATS[kind]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    for exponent in range(1, 2**exponent_bits):
        found += [(1 + m / steps) * 2.0 ** (exponent - bias) for m in range(steps)]
    return [value for value in found if value <= largest]


def slowly(rows: np.ndarray, kind: str) -> np.ndarray:
    """One weight at a time, in Python's floats."""
    (_, _, largest), layer = FORMATS[kind], np.float32(np.abs(rows).max()) / np.float32(448 * 6)
    made = np.zeros_like(rows)
    for i, row in enumerate(rows.tolist()):
        most = max(map(abs, row))
        if not most:
            continue
        if kind.startswith("mx"):
            exponent = math.frexp(most)[1] - 1 - (math.frexp(largest)[1] - 1)
            scale = np.float32(2.0 ** min(max(exponent, -127), 127))
        elif kind == "nvfp4":
            block = max(float(np.float32(most) / np.float32(6) / layer), 2.0**-6)
            block_scale = np.float32(nearest(min(block, 448.0), "fp8_e4m3"))
            scale, factor = layer * block_scale, np.float32(1) / layer / block_scale
        else:
            scale = np.float32(most) / np.float32(largest)
        for j, weight in enumerate(row):
            magnitude = np.float32(abs(weight))
            scaled = float(magnitude * factor if kind == "nvfp4" else magnitude / scale)
            level = np.float32(nearest(min(scaled, largest), kind))
            made[i, j] = np.float32(math.copysign(float(level * scale), weight))
    return made


def nearest(scaled: float, kind: str) -> float:
    """Of two values that are as near that with the even mantissa."""
    levels = values(kind)
    distances = [abs(level - scaled) for level in levels]
    found = [k for k, distance in enumerate(distances) if distance == min(distances)]
    return levels[min(found, key=lambda k: k % 2)]


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    blocks = draw(st.integers(1, 2))
    unit = st.floats(-1, 1, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, 0.25, -1.25, 5.0, 2.5])
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 3e4]))
    return (draw(hnp.arrays(np.float32, (2, 32 * blocks), elements=unit)) * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize("kind", MINIFLOATS)
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_weights_are_at_the_nearest_value_of_their_format(kind: MinifloatName, weight: np.ndarray) -> None:
    scheme = Minifloat(format=kind)
    groups = weight if scheme.group_size is None else weight.reshape(-1, scheme.group_size)
    expected = slowly(groups, kind).reshape(weight.shape)
    found = fake_quantize(torch.from_numpy(weight), scheme.bits, scheme, channel_axis=0, layer="fc")
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_a_group_of_a_convolution_has_all_positions_of_its_inputs(kind: MinifloatName) -> None:
    scheme, weight = Minifloat(format=kind), torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    assert scheme.group_size is not None
    expected = slowly(weight.reshape(-1, scheme.group_size * 4).numpy(), kind).reshape(weight.shape)
    for axis in (0, 1):  # of output channels; of a transposed convolution the second
        given = weight.movedim(0, axis).contiguous()
        found = fake_quantize(given, scheme.bits, scheme, channel_axis=axis, layer="conv")
        assert np.array_equal(found.movedim(axis, 0).numpy(), expected)


@pytest.mark.parametrize("kind", MINIFLOATS)
def test_a_container_gives_the_same_weight_again(kind: MinifloatName) -> None:
    scheme, weight = Minifloat(format=kind), torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    part, made = PartShape((6, 64), 0, scheme.bits, scheme, "fc"), quantizer(scheme)
    codes = made.encode(weight, part)
    expected = fake_quantize(weight, scheme.bits, scheme, channel_axis=0, layer="fc")
    assert made.decode(codes, part, torch.float32).equal(expected)
    assert codes.symbols.max() < 2**scheme.bits
    assert (made.zeros(codes, part) == (expected == 0).numpy().reshape(-1)).all()
    assert len(np.unique(codes.symbols)) <= scheme.levels(scheme.bits)


@pytest.mark.parametrize("kind", MINIFLOATS)
def test_quantizing_twice_changes_nothing(kind: MinifloatName) -> None:
    scheme, weight = Minifloat(format=kind), torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    once = fake_quantize(weight, scheme.bits, scheme, channel_axis=0, layer="fc")
    twice = fake_quantize(once, scheme.bits, scheme, channel_axis=0, layer="fc")
    assert torch.allclose(twice, once, rtol=0 if scheme.microscaled else 1e-6, atol=0)


@pytest.mark.parametrize("kind", MINIFLOATS)
def test_measured_errors_are_those_of_the_weights(kind: MinifloatName) -> None:
    torch.manual_seed(0)
    linear, scheme = torch.nn.Linear(96, 5), Minifloat(format=kind)
    weight = linear.weight.detach()
    table = measure(torch.nn.Sequential(linear), scheme, (scheme.bits,))
    error = (fake_quantize(weight, scheme.bits, scheme, channel_axis=0, layer="0") - weight).double().square().mean()
    assert table.layers[0].errors["mse"][0] == pytest.approx(float(error), rel=1e-12)


def test_channels_of_a_layer_with_one_scale_have_one_width() -> None:
    some, others = tuple(range(3)), tuple(range(3, 8))
    with pytest.raises(ValueError, match=r"layer 'fc': 5 of 8 channels are nvfp4, .* Give all channels .* one width"):
        linear("fc", 8, 32, Minifloat(format="nvfp4"), {4: others, 16: some})
    assert linear("fc", 8, 32, Minifloat(format="mxfp4"), {4: others, 16: some}).widths == ((4, 5), (16, 3))
    assert linear("fc", 8, 32, Minifloat(format="nvfp4"), 4).widths == ((4, 8),)


def test_a_type_has_one_width_and_its_own_name() -> None:
    with pytest.raises(SettingError, match="bits: 5 is not allowed with mxfp4, which has 4 bits"):
        Minifloat(format="mxfp4").check_bits(5)
    with pytest.raises(SettingError, match="format: 'mxfp5' is not allowed; mxfp4, mxfp6_e2m3"):
        Minifloat(format="mxfp5")  # type: ignore[arg-type]
