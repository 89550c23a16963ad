"""Two-region quantization against the formula in plain Python, a sample, and a fine search."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mpq_plugins import Affine, Piecewise
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.plans.granular import GRANULARITIES
from mpq_plugins.plans.piecewise import BREAKPOINTS, STORAGES
from mpq_plugins.quantization import kernel
from mpq_plugins.quantization.breakpoint import DISTRIBUTIONS, expected_error
from mpq_plugins.quantization.grid import PiecewiseGrids
from mpq_plugins.quantization.piecewise import PiecewiseTensor, decode, dequantize, encode, quantize
from mpq_plugins.quantization.quantize import fake_quantize

BITS = range(2, 9)
SCHEMES = [
    Piecewise(granularity=grain, group_size=2 if grain == "per_group" else None, breakpoint=rule, storage=storage)  # type: ignore[arg-type]
    for grain, rule, storage in itertools.product(GRANULARITIES, BREAKPOINTS, STORAGES)
]
ANY = st.floats(-(2.0**126), 2.0**126, width=32)


def weights(elements: st.SearchStrategy[float] = ANY) -> st.SearchStrategy[Tensor]:
    shapes = st.tuples(st.integers(1, 5), st.sampled_from([2, 4, 6]))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements)).map(torch.from_numpy)


def oracle(w: float, bits: int, p: float, m: float, storage: str) -> float:
    """sign(w) uni(|w|): with b - 1 bits between the ends of an interval, or at the middles of 2^(b-2) cells of it."""
    start, width = (0.0, p) if abs(w) <= p else (p, m - p)
    if storage == "region_bit":
        step = width / (2 ** (bits - 1) - 1)
        level = start + min(round((abs(w) - start) / step), 2 ** (bits - 1) - 1) * step if step else start
    else:
        cell = width / 2 ** (bits - 2)
        inside = min(math.floor((abs(w) - start) / cell), 2 ** (bits - 2) - 1) if cell else 0
        level = start + (inside + 0.5) * cell
    return math.copysign(level, w)


@pytest.mark.parametrize("shared", [False, True])
def test_a_weight_at_the_breakpoint_is_inside_and_there_is_one_zero(shared: bool) -> None:
    unit = np.ones((1, 1), np.float32)
    grid = PiecewiseGrids(np.array([4]), shared, unit, 8 * unit)
    split = float(grid.split[0, 0])
    codes, tail = encode(torch.tensor([[split, -split, np.nextafter(np.float32(split), np.inf)]]), grid)
    assert tail.tolist() == [[False, False, True]]
    assert decode(codes, tail, grid)[0, :2].tolist() == [split - grid.offset, grid.offset - split]
    codes, tail = encode(torch.tensor([[0.0, -0.0, 0.25, -0.25]]), grid)
    assert len(set(codes[0].tolist())) == (2 if shared else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_greatest_weights_stay_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for bits, small in itertools.product(BITS, (0.01, 1 / 3, 2 / 3)):
        weight = torch.tensor([[most, -most * small, most / 8, -most]], dtype=dtype)
        assert fake_quantize(weight, bits, Piecewise()).isfinite().all()


@given(weights(st.floats(-1e3, 1e3, width=32)), st.sampled_from(BITS), st.sampled_from(STORAGES))
def test_it_is_the_formula(weight: Tensor, bits: int, storage: str) -> None:
    quantized = quantize(weight, bits, Piecewise(granularity="per_channel", storage=storage))  # type: ignore[arg-type]
    split = torch.from_numpy(quantized.grid.split)[:, 0].tolist()
    for row, got, p in zip(weight.tolist(), dequantize(quantized).tolist(), split, strict=True):
        m = max(map(abs, row))
        if len(set(row)) == 1:
            assert got == row
            continue
        for w, q in zip(row, got, strict=True):
            # Float32 may round a weight half-way between two levels, or at p, to the neighbour: as good.
            assert abs(q - w) == pytest.approx(abs(oracle(w, bits, p, m, storage) - w), abs=2e-6 * m)


@given(weights(), st.sampled_from(BITS), st.sampled_from(SCHEMES))
def test_codes_fit_their_bits_and_round_trip(weight: Tensor, bits: int, scheme: Piecewise) -> None:
    quantized = quantize(weight, bits, scheme)
    width = bits if scheme.storage == "region_bit" else bits - 1
    assert quantized.codes.min() >= 0
    assert quantized.codes.max() < 2**width
    back = dequantize(quantized)
    assert back.isfinite().all()
    assert quantized.code_bits + quantized.interval_bits == weight.numel() * (width + 1)
    rows = back.reshape(len(quantized.grid.dense), -1)
    again = decode(*encode(rows, quantized.grid), quantized.grid)
    assert again.equal(rows)


@given(weights(), st.sampled_from(BITS), st.sampled_from(SCHEMES))
def test_no_weight_leaves_its_interval_by_more_than_half_a_step(weight: Tensor, bits: int, scheme: Piecewise) -> None:
    quantized = quantize(weight, bits, scheme)
    grid, rows = quantized.grid, weight.reshape(len(quantized.grid.dense), -1).double()
    error = (dequantize(quantized).reshape(rows.shape).double() - rows).abs()
    unit = torch.where(quantized.tail.reshape(rows.shape), torch.from_numpy(grid.tail), torch.from_numpy(grid.dense))
    rounding = 1e-6 * rows.abs().amax(1, keepdim=True)
    assert (error <= unit.double() * (1 if grid.shared else 0.5) + rounding).all()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_degenerate_tensors_are_safe(scheme: Piecewise) -> None:
    one_outlier = torch.full((4, 6), 1e-3)
    one_outlier[1, 2] = 1e6
    cases = {"outlier": one_outlier, "positive": torch.linspace(0.1, 1, 24).reshape(4, 6),
             "tiny": torch.linspace(-1, 1, 24).reshape(4, 6) * 1e-44,
             "huge": torch.linspace(-3, 3, 24).reshape(4, 6) * 1e38,
             "two values": torch.tensor([-1.0, 1.0]).repeat(4, 3)}  # fmt: skip
    for (name, weight), bits in itertools.product(cases.items(), BITS):
        back = fake_quantize(weight, bits, scheme)
        assert back.isfinite().all(), (name, bits)
        assert (back - weight).abs().max() <= weight.abs().max() * 1.001, (name, bits)
    for shape in ((0, 4), (4, 0)):
        assert fake_quantize(torch.zeros(shape), 2, scheme).shape == shape


def squared_error(weight: Tensor, bits: int, scheme: Piecewise) -> Tensor:
    return (fake_quantize(weight, bits, scheme).double() - weight.double()).square().reshape(len(weight), -1).sum(1)


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(8, 300, generator=generator)
    outliers = gaussian.clone()
    outliers[:, 0] = 60.0
    return {"gaussian": gaussian, "laplacian": gaussian.sign() * gaussian.square(), "outliers": outliers,
            "uniform": torch.rand(8, 300, generator=generator) - 0.5, "few": gaussian[:, :4]}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", BITS)
def test_the_search_is_never_worse_than_any_formula(name: str, storage: str, bits: int) -> None:
    weight = samples()[name]
    for grain in ("per_channel", "per_tensor"):
        searched, *others = (
            squared_error(weight, bits, Piecewise(granularity=grain, breakpoint=rule, storage=storage))  # type: ignore[arg-type]
            for rule in BREAKPOINTS
        )
        for other in others:
            found, bound = (e.sum() if grain == "per_tensor" else e for e in (searched, other))
            assert (found <= bound * (1 + 1e-6)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "laplacian", "outliers"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_close_to_brute_force(name: str, bits: int) -> None:
    weight = samples()[name][:3]
    found = squared_error(weight, bits, Piecewise(granularity="per_channel"))
    for row, got in zip(weight.tolist(), found.tolist(), strict=True):
        m = max(map(abs, row))
        best = min(
            math.fsum((oracle(w, bits, m * ratio, m, "region_bit") - w) ** 2 for w in row)
            for ratio in np.linspace(0.005, 1, 400)
        )
        assert got <= best * 1.06


@pytest.mark.parametrize("bits", BITS)
def test_at_b_bits_in_each_interval_it_is_never_worse_than_one_symmetric_quantizer_of_b_bits(bits: int) -> None:
    for weight in samples().values():
        one = fake_quantize(weight, bits, Affine(symmetric=True, granularity="per_channel"))
        two = squared_error(weight, bits, Piecewise(granularity="per_channel"))
        assert (two <= (one.double() - weight.double()).square().sum(1) * (1 + 1e-6)).all()


@pytest.mark.slow
# The formula takes rounding errors for uniform within a cell; two wide cells of a bell are not, nor eight of an
# exponential.
@pytest.mark.parametrize(
    ("name", "storage", "bits"),
    [("gaussian", "region_bit", b) for b in range(3, 9)]
    + [("gaussian", "shared", b) for b in range(4, 9)]
    + [("laplacian", storage, b) for storage in STORAGES for b in range(5, 9)],
)
def test_the_error_on_a_large_sample_is_the_formulas(name: str, storage: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    if name == "gaussian":
        sample = torch.randn(1, 1_000_000, generator=generator)
    else:
        uniform = torch.rand(1, 1_000_000, generator=generator, dtype=torch.float64) - 0.5
        sample = -(uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    quantized = quantize(sample, bits, Piecewise(breakpoint=name, storage=storage))  # type: ignore[arg-type]
    deviation = sample.double().square().mean().sqrt().item()
    p, m = (np.array([value / deviation]) for value in (quantized.grid.split[0, 0], sample.abs().max().item()))
    steps = 2 ** (bits - 1) - 1 if storage == "region_bit" else 2 ** (bits - 2)
    got = (dequantize(quantized) - sample).double().square().mean().item() / deviation**2
    assert got == pytest.approx(expected_error(p, m, steps, DISTRIBUTIONS[name])[0], rel=0.05)


@given(weights(st.floats(-1e6, 1e6, width=32)), st.sampled_from(SCHEMES), st.booleans())
def test_the_kernels_sums_are_those_of_the_weights_it_gives(weight: Tensor, scheme: Piecewise, compiled: bool) -> None:
    for bits in (2, 5):
        quantized = quantize(weight, bits, scheme)
        rows = weight.reshape(len(quantized.grid.dense), -1)
        route = kernel._numba_piecewise if compiled else kernel._torch_piecewise
        relative, squared, largest = route(rows, quantized.grid, True)[:, 0].T
        error = (dequantize(quantized).reshape(rows.shape).double() - rows.double()).abs()
        magnitude, floor = rows.double().abs(), 1e-6 * float(rows.abs().max())
        parts = torch.where(magnitude > 0, error / magnitude, 0).sum(1)
        slack = torch.where(magnitude > 0, floor / magnitude, 0).sum(1)
        assert (np.abs(relative - parts.numpy()) <= slack.numpy() + 1e-9).all()
        np.testing.assert_allclose(squared, error.square().sum(1), rtol=1e-4, atol=rows.shape[1] * floor**2)
        np.testing.assert_allclose(largest, error.amax(1), rtol=1e-4, atol=floor)


def test_both_kernels_agree() -> None:
    rows = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    for storage, bits in itertools.product(STORAGES, BITS):
        grid = quantize(rows, bits, Piecewise(granularity="per_channel", storage=storage)).grid  # type: ignore[arg-type]
        compiled, plain = kernel._numba_piecewise(rows, grid, True), kernel._torch_piecewise(rows, grid, True)
        np.testing.assert_allclose(compiled, plain, rtol=1e-9)


def sized(storage: str) -> PiecewiseTensor:
    weight = torch.randn(16, 100, generator=torch.Generator().manual_seed(3))
    return quantize(weight, 3, Piecewise(granularity="per_channel", storage=storage))  # type: ignore[arg-type]


def test_sizes_are_true() -> None:
    with_bit, shared = sized("region_bit"), sized("shared")
    assert with_bit.code_bits + with_bit.interval_bits == 1600 * 4
    assert shared.code_bits + shared.interval_bits == 1600 * 3
    assert with_bit.scale_bits == 16 * 2 * 32
    assert with_bit.total_bits == 1600 * 4 + 1024
    share = with_bit.tail.sum().item() / 1600
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert with_bit.interval_entropy_bits == pytest.approx(1600 * entropy)
    assert 0 < with_bit.interval_entropy_bits < with_bit.interval_bits
    assert quantize(torch.ones(4, 4), 2).interval_entropy_bits == 0
    assert quantize(torch.ones(4, 0), 2).total_bits == 0


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("bits", BITS)
def test_a_group_holds_as_many_values_as_the_scheme_says(storage: str, bits: int) -> None:
    scheme = Piecewise(storage=storage)  # type: ignore[arg-type]
    values = fake_quantize(torch.linspace(-1, 1, 100_001), bits, scheme).unique()
    assert len(values) <= scheme.levels(bits)
    bell = torch.randn(1_000_000, generator=torch.Generator().manual_seed(4))
    assert len(fake_quantize(bell, bits, scheme).unique()) > 0.9 * scheme.levels(bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_itself(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    back = fake_quantize(weight, 4, Piecewise(granularity="per_channel"))
    assert back.dtype == dtype
    assert back.equal(fake_quantize(weight.float(), 4, Piecewise(granularity="per_channel")).to(dtype))


def test_the_channel_axis_is_anywhere() -> None:
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(6))
    scheme = Piecewise(granularity="per_channel")
    moved = fake_quantize(weight, 3, scheme, channel_axis=1)
    assert moved.equal(fake_quantize(weight.movedim(1, 0), 3, scheme).movedim(0, 1))


@pytest.mark.parametrize("bits", [1, 0, 9, True, 2.0])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match=r"layer 'fc': bits: .* not allowed.*[12] to 8"):
        quantize(torch.ones(2, 2), bits, layer="fc")


def test_bad_weights_are_refused() -> None:
    with pytest.raises(WeightError, match="layer 'fc': 1 of 4 weights"):
        quantize(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), 3, layer="fc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"breakpoint": "middle"}, "breakpoint: 'middle' is not allowed; search, gaussian"),
        ({"storage": "both"}, "storage: 'both' is not allowed; region_bit, shared"),
        ({"granularity": "per_row"}, "granularity: 'per_row'"),
        ({"name": "affine"}, "scheme: 'affine' is not allowed; piecewise"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Piecewise(**arguments)  # type: ignore[arg-type]
