"""A part's symbols and tables: back to the same codes, grids and weights, with 0 for the weight 0."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, Codebook, Piecewise
from mpq_plugins.compression.codes import are_zero, decode, encode
from mpq_plugins.errors import WeightError
from mpq_plugins.plans.granular import GRANULARITIES
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization import affine, codebook, piecewise
from mpq_plugins.quantization.contract import PartShape
from mpq_plugins.quantization.quantize import fake_quantize, quantizer

GROUPS = [{"granularity": grain, "group_size": 2 if grain == "per_group" else None} for grain in GRANULARITIES]
SCHEMES: list[Scheme] = [
    scheme
    for own in GROUPS
    for scheme in (
        Affine(**own),  # type: ignore[arg-type]
        Affine(symmetric=True, **own),  # type: ignore[arg-type]
        Affine(range="mse", **own),  # type: ignore[arg-type]
        Affine(symmetric="full", **own),  # type: ignore[arg-type]
        Affine(symmetric="full", range="mse", scale_dtype="bfloat16", **own),  # type: ignore[arg-type]
        Piecewise(**own),  # type: ignore[arg-type]
        Piecewise(storage="shared", **own),  # type: ignore[arg-type]
        Codebook(**own),  # type: ignore[arg-type]
    )
]


def part_of(scheme: Scheme, bits: int, shape: tuple[int, ...] = (6, 40, 3), axis: int = 0) -> PartShape | None:
    """The part, if the scheme has such a width and room for it."""
    try:
        scheme.check_bits(bits)
        scheme.check_part(bits, shape, axis, shape[axis], "fc")
    except ValueError:
        return None
    return PartShape(shape, axis, bits, scheme, "fc")


def sample(shape: tuple[int, ...], zeros: float = 0.3, shift: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) + shift
    return weight.masked_fill(torch.rand(shape, generator=generator) < zeros, 0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_come_back_as_the_scheme_makes_them(scheme: Scheme, axis: int) -> None:
    for bits, dtype in itertools.product(range(1, 9), (torch.float32, torch.bfloat16)):
        part = part_of(scheme, bits, axis=axis)
        if part is None:
            continue
        weight = sample(part.shape).to(dtype)
        codes = encode(weight, part)
        assert codes.symbols.max() < 2**part.width
        assert len(codes.symbols) == part.weights
        assert len(codes.tables) == part.table_entries
        assert len(codes.zero_points) == part.zero_points
        assert decode(codes, part, dtype).equal(fake_quantize(weight, bits, scheme, channel_axis=axis))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_grids_come_back_to_the_bit(scheme: Scheme) -> None:
    for bits in range(1, 9):
        part = part_of(scheme, bits)
        if part is None:
            continue
        weight = sample(part.shape)
        found = quantizer(scheme).restored(encode(weight, part), part, torch.float32)  # type: ignore[attr-defined]
        if isinstance(scheme, Codebook):
            book = codebook.quantize(weight, bits, scheme)
            assert isinstance(found, codebook.CodebookTensor)
            assert found.codes.equal(book.codes)
            assert found.centroids.equal(book.centroids)
        elif isinstance(scheme, Piecewise):
            two = piecewise.quantize(weight, bits, scheme)
            assert isinstance(found, piecewise.PiecewiseTensor)
            assert found.codes.equal(two.codes)
            assert found.tail.equal(two.tail)
            for own, other in ((found.grid.dense, two.grid.dense), (found.grid.tail, two.grid.tail)):
                np.testing.assert_array_equal(own, other)
        else:
            assert isinstance(scheme, Affine)
            one = affine.quantize(weight, bits, scheme)
            assert isinstance(found, affine.QuantizedTensor)
            assert found.codes.equal(one.codes)
            np.testing.assert_array_equal(found.grid.scale, one.grid.scale)
            np.testing.assert_array_equal(found.grid.zero_point, one.grid.zero_point)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_is_the_symbol_zero_where_the_scheme_has_one(scheme: Scheme) -> None:
    for bits in range(1, 9):
        part = part_of(scheme, bits)
        if part is None or not scheme.has_zero(bits):
            continue
        weight = sample(part.shape)
        codes = encode(weight, part)
        assert (codes.symbols.reshape(weight.shape)[(weight == 0).numpy()] == 0).all()
        zero = are_zero(codes, part).reshape(weight.shape)
        np.testing.assert_array_equal(zero, decode(codes, part, torch.float32).numpy() == 0)


def test_which_schemes_have_a_zero() -> None:
    assert [Affine().has_zero(b) for b in (1, 2, 8)] == [False, True, True]
    assert [Piecewise(storage=s).has_zero(4) for s in ("region_bit", "shared")] == [True, False]
    assert Codebook().has_zero(1)
    for scheme, bits in ((Affine(), 1), (Piecewise(storage="shared"), 4)):
        assert (fake_quantize(torch.zeros(4, 4) + torch.eye(4), bits, scheme) == 0).sum() == 0


@given(st.sampled_from(SCHEMES), st.integers(1, 8), st.sampled_from([1e-44, 1e-30, 1.0, 1e37]), st.floats(-1, 1))
def test_odd_ranges(scheme: Scheme, bits: int, factor: float, shift: float) -> None:
    part = part_of(scheme, bits)
    if part is None:
        return
    for weight in (sample(part.shape, shift=shift) * factor, torch.full(part.shape, shift * factor)):
        assert decode(encode(weight, part), part, torch.float32).equal(fake_quantize(weight, bits, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_is_stored_for_empty_parts(scheme: Scheme, shape: tuple[int, int]) -> None:
    part = PartShape(shape, 0, 4, scheme, "fc")
    codes = encode(torch.zeros(shape), part)
    assert len(codes.symbols) == len(codes.tables) == len(codes.zero_points) == part.table_entries == 0
    assert decode(codes, part, torch.float16).shape == shape


def test_ternary_is_symmetric_at_two_bits() -> None:
    part = PartShape((8, 50), 0, 2, Affine(symmetric=True), "fc")
    codes = encode(sample(part.shape), part)
    assert set(np.unique(codes.symbols)) == {0, 1, 3}  # 0, +a, and -a in two's complement
    values = decode(codes, part, torch.float32).unique()
    assert values.tolist() == [-codes.tables[0], 0, codes.tables[0]]


def test_bad_weights_are_named() -> None:
    with pytest.raises(WeightError, match="layer 'fc': 1 of 4"):
        encode(torch.tensor([[1.0, float("inf")], [0, 0]]), PartShape((2, 2), 0, 4, Affine(), "fc"))
