"""The compiled and the torch path against each other and against plain sums."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from mpq_plugins import Affine, Piecewise
from mpq_plugins.plans.affine import Symmetry
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.quantization import kernel
from mpq_plugins.quantization.grid import Grids, minmax_grids
from mpq_plugins.quantization.quantize import choose_grids
from tests.quantization import oracle

# Lengths around the block size and around where float32 begins, where an off-by-one would show.
AGREEMENT = 1e-6  # the compiled path works in float32 where that is safe, in float64 elsewhere
LENGTHS = [1, 2, 3, 7, 63, 64, 65, 1023, 1024, 1025, 2049, 4099]


def grids_for(rows: Tensor, shared: bool, symmetric: Symmetry = False, bits: range = range(1, 9)) -> Grids:
    stats = kernel.row_stats(rows).merged() if shared else kernel.row_stats(rows)
    return minmax_grids(stats, bits, Affine(symmetric=symmetric))


@pytest.fixture(params=["numba", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernel, "numba_available", lambda: request.param == "numba")
    return str(request.param)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("largest", [False, True])
def test_both_paths_agree(length: int, shared: bool, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    rows[0, 0] = 0.0
    grids = grids_for(rows, shared)
    monkeypatch.setattr(kernel, "numba_available", lambda: True)
    compiled = kernel.error_sums(rows, grids, largest)
    monkeypatch.setattr(kernel, "numba_available", lambda: False)
    plain = kernel.error_sums(rows, grids, largest)
    np.testing.assert_allclose(compiled, plain, rtol=AGREEMENT)


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-(2.0**99), 2.0**99, width=32)
    )
)
def test_both_paths_agree_on_any_float(values: NDArray[np.float32]) -> None:
    rows = torch.from_numpy(values)
    for symmetric in (False, "full"):
        grids = grids_for(rows, False, symmetric, bits=range(2, 9))
        compiled = kernel._numba_sums(rows, grids, True)
        plain = kernel._torch_sums(rows, grids, True)
        np.testing.assert_allclose(compiled, plain, rtol=AGREEMENT)


@pytest.mark.parametrize("exponent", [-140, -120, -60, -41, -39, 0, 39, 41, 100])
def test_any_magnitude_and_rows_the_grid_holds_exactly(exponent: int) -> None:
    steps = torch.randint(-100, 101, (6, 501), generator=torch.Generator().manual_seed(0)).float()
    steps[:, :2] = torch.tensor([-127.0, 127.0])
    rows = torch.ldexp(steps, torch.tensor(exponent - 7))
    rows[1] *= 1.01
    rows[2, 5:300] *= 2.0**-60
    rows[3] = 0.0
    rows[4, 1:] = 0.0
    rows[5, 7] += rows[5, 7] * 1e-6
    grids = grids_for(rows, False, symmetric=True, bits=range(2, 9))
    compiled, plain = kernel._numba_sums(rows, grids, True), kernel._torch_sums(rows, grids, True)
    assert (plain[0, -1] == 0).all()  # 8 bits hold it exactly
    np.testing.assert_allclose(compiled, plain, rtol=AGREEMENT)


def near_ties() -> dict[str, Tensor]:
    """Weights on or beside the middle between two levels, where the first rounding in float32 may go wrong."""
    odd = torch.arange(1, 511, 2).float()
    return {
        "one among exact ones": torch.tensor([[3.0, 0.0, 1.3] + [1.0] * 62]),
        "many": torch.cat([odd.repeat(16), torch.tensor([0.0, 510.0])])[None] * 0.0173,
        "at many scales": torch.cat([odd, torch.tensor([0.0, 510.0])])[None] * torch.linspace(0.01, 1, 100)[:, None],
    }


@pytest.mark.parametrize("name", near_ties())
@pytest.mark.parametrize("symmetric", [False, True, "full"])
def test_near_ties_are_rounded_right(name: str, symmetric: Symmetry) -> None:
    rows = near_ties()[name]
    grids = grids_for(rows, False, symmetric, range(2, 9))
    compiled, plain = kernel._numba_sums(rows, grids, True), kernel._torch_sums(rows, grids, True)
    np.testing.assert_allclose(compiled, plain, rtol=AGREEMENT)


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_what_the_slow_loop_adds_up(route: str, seed: int) -> None:
    rows = torch.randn(2, 301, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed * 4 - 8)
    rows[:, ::50] = 0.0
    for bits in range(1, 9):
        for symmetric in (False, True, "full"):
            grids = grids_for(rows, False, symmetric, range(bits, bits + 1))
            sums = kernel.error_sums(rows, grids, largest=True)[:, 0]
            for row, got in zip(rows.tolist(), sums, strict=True):
                quantized = oracle.fake(row, bits, symmetric)
                expected = [
                    oracle.error(row, quantized, "relative") * len(row),
                    oracle.error(row, quantized, "mse") * len(row),
                    oracle.error(row, quantized, "max_abs"),
                ]
                np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_totals_are_the_sums_of_all_rows(route: str, length: int) -> None:
    values = torch.randn(5, length, generator=torch.Generator().manual_seed(1))
    grids = grids_for(values, shared=True)
    by_row = kernel.error_sums(values, grids, largest=True)
    np.testing.assert_allclose(
        kernel.error_totals(values, grids, largest=True)[0], kernel.add_sums(by_row), rtol=AGREEMENT
    )


def test_a_strided_matrix_is_read_right(route: str) -> None:
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    grids = grids_for(rows, shared=True)
    np.testing.assert_allclose(
        kernel.error_sums(rows.t(), grids).sum(0), kernel.error_sums(rows, grids).sum(0), rtol=AGREEMENT
    )


@pytest.mark.parametrize("length", [1, 5, 2050])
def test_row_stats(route: str, length: int) -> None:
    rows = torch.randn(3, length, generator=torch.Generator().manual_seed(4))
    rows[2] = -rows[2].abs()
    stats = kernel.row_stats(rows)
    assert stats.low.tolist() == rows.amin(1).tolist()
    assert stats.high.tolist() == rows.amax(1).tolist()
    np.testing.assert_allclose(stats.absolute, rows.double().abs().sum(1), rtol=1e-12)
    np.testing.assert_allclose(stats.squared, rows.double().square().sum(1), rtol=1e-12)
    whole = stats.merged()
    assert (whole.low[0], whole.high[0]) == (rows.min(), rows.max())
    np.testing.assert_allclose(whole.mean_abs, [rows.double().abs().mean()], rtol=1e-12)


def test_row_stats_show_what_is_not_finite(route: str) -> None:
    rows = torch.ones(3, 2050)
    rows[1, 7] = float("nan")
    rows[2, 9] = float("-inf")
    assert np.isfinite(kernel.row_stats(rows).squared).tolist() == [True, False, False]


def test_nothing_to_sum(route: str) -> None:
    assert (
        kernel.error_sums(torch.empty(3, 0), grids_for(torch.ones(3, 1), False)).tolist()
        == np.zeros((3, 8, 3)).tolist()
    )
    assert kernel.error_totals(torch.empty(0), grids_for(torch.ones(1, 1), True)).sum() == 0


def test_the_float32_path_is_what_these_tests_see(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpq_plugins.quantization import kernel_numba

    seen: list[np.dtype[np.generic]] = []
    run = kernel_numba._run

    def watched(rows: NDArray[np.float32], scale: NDArray[np.floating], *rest: object) -> NDArray[np.float64]:
        seen.append(scale.dtype)
        return run(rows, scale, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_numba, "_run", watched)
    for length in LENGTHS[3:]:
        rows = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
        for symmetric in (False, "full"):
            kernel._numba_sums(rows, grids_for(rows, True, symmetric, bits=range(2, 9)), True)
    assert seen == [np.float32] * 2 * len(LENGTHS[3:])


def test_a_numba_that_does_not_load_gives_a_warning_and_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    kernel.numba_available.cache_clear()
    monkeypatch.setitem(sys.modules, "mpq_plugins.quantization.kernel_numba", None)
    monkeypatch.delattr("mpq_plugins.quantization.kernel_numba", raising=False)
    try:
        with pytest.warns(UserWarning, match="numba cannot be used"):
            assert not kernel.numba_available()
    finally:
        kernel.numba_available.cache_clear()


def every_bfloat16() -> Tensor:
    """All 65536 of them, NaN and infinities included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bfloat16_rows() -> dict[str, Tensor]:
    normal = torch.randn(4, 1027, generator=torch.Generator().manual_seed(5))
    zeros = normal.clone()
    zeros[:, ::3], zeros[:, 1::3], zeros[3] = 0.0, -0.0, -0.0
    patterns = every_bfloat16()
    return {
        "normal": normal.bfloat16(),
        "zeros of both signs": zeros.bfloat16(),
        "subnormal": (normal * 2.0**-130).bfloat16(),
        "subnormal among normal": torch.where(normal > 1, normal * 2.0**-130, normal).bfloat16(),
        "huge": (normal * 2.0**120).bfloat16(),
        "all equal": torch.full((2, 65), -1.5, dtype=torch.bfloat16),
        "one weight": torch.tensor([[3.0], [-0.0], [-7.0]], dtype=torch.bfloat16),
        "every bit pattern": patterns[patterns.isfinite()][None],
        "transposed": normal.bfloat16().T,
    }


def fewer(rows: Tensor, route: str) -> Tensor:
    """Of torch, which turns all of them to float32 first, some hundred weights say what a thousand do."""
    if route == "numba":
        return rows
    return rows[:, ::7] if rows.shape[1] > rows.shape[0] else rows[::7]


@pytest.mark.parametrize("name", bfloat16_rows())
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("symmetric", [False, True, "full"])
def test_bfloat16_has_the_sums_of_the_same_floats(route: str, name: str, shared: bool, symmetric: Symmetry) -> None:
    rows = fewer(bfloat16_rows()[name], route)
    widths = range(2, 9) if name == "every bit pattern" else range(1, 9)  # of all floats the mean overflows
    grids = grids_for(rows.float(), shared, symmetric, widths)
    found = kernel.error_sums(rows, grids, largest=True)
    np.testing.assert_array_equal(found, kernel.error_sums(rows.float(), grids, largest=True))
    if shared:
        found = kernel.error_totals(rows, grids)
        np.testing.assert_array_equal(found, kernel.error_totals(rows.float(), grids))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bfloat16_rows() if name != "every bit pattern"])
@pytest.mark.parametrize("scheme", [
    Piecewise(), Piecewise(granularity="per_channel"), Affine(granularity="per_channel", range="mse"),
    Affine(range="mse", symmetric=True),
], ids=str)  # fmt: skip
def test_bfloat16_has_the_searched_grids_and_sums_of_the_same_floats(route: str, name: str, scheme: Scheme) -> None:
    rows = fewer(bfloat16_rows()[name], route)

    def of(own: Tensor) -> NDArray[np.float64]:
        stats = kernel.row_stats(own)
        groups = stats.merged() if scheme.granularity == "per_tensor" else stats
        return kernel.error_sums(own, choose_grids(lambda op: op(own), groups, (2, 4, 8), scheme), largest=True)

    np.testing.assert_array_equal(of(rows), of(rows.float()))


@pytest.mark.parametrize("name", bfloat16_rows())
def test_bfloat16_has_the_statistics_of_the_same_floats(route: str, name: str) -> None:
    rows = bfloat16_rows()[name]
    found, plain = kernel.row_stats(rows), rows.double()
    assert found.low.tolist() == plain.amin(1).tolist()
    assert found.high.tolist() == plain.amax(1).tolist()
    np.testing.assert_allclose(found.absolute, plain.abs().sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.squared, plain.square().sum(1), rtol=1e-12)


def test_any_bfloat16_is_its_own_least_and_greatest(route: str) -> None:
    patterns = every_bfloat16()
    patterns = patterns[patterns.isfinite()]
    alone = kernel.row_stats(patterns[:, None])
    assert alone.low.tolist() == alone.high.tolist() == patterns.double().tolist()
    # Each beside zero and beside its neighbour in the order of bits, where a wrong sign would show.
    for other in (torch.zeros_like(patterns), patterns.roll(1)):
        both = torch.stack((patterns, other), dim=1)
        stats = kernel.row_stats(both)
        assert stats.low.tolist() == both.double().amin(1).tolist()
        assert stats.high.tolist() == both.double().amax(1).tolist()


def test_every_nan_and_infinity_of_bfloat16_shows(route: str) -> None:
    patterns = every_bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN that signal
        shown = np.isfinite(kernel.row_stats(patterns[:, None]).squared)
    assert shown.tolist() == patterns.isfinite().tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 1023, 1024, 2049])
def test_bfloat16_row_stats_show_what_is_not_finite(route: str, bad: float, position: int) -> None:
    rows = torch.ones(3, 2050, dtype=torch.bfloat16)
    rows[1, position] = bad
    assert np.isfinite(kernel.row_stats(rows).squared).tolist() == [True, False, True]


def test_bfloat16_is_not_copied_to_be_read() -> None:
    rows = torch.randn(3, 70).bfloat16()
    read = kernel.stored_values(rows)
    assert read.dtype == np.uint16
    assert read.ctypes.data == rows.data_ptr()
