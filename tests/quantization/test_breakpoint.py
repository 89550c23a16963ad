"""Breakpoints against a fine grid, an integral and a sample."""

import numpy as np
import pytest
from scipy import integrate, stats

from mpq_plugins.quantization.breakpoint import DISTRIBUTIONS, GAUSSIAN, LAPLACIAN, expected_error, optimal_root
from mpq_plugins.quantization.grid import Floats

REFERENCE = {"gaussian": stats.norm(), "laplacian": stats.laplace(scale=np.sqrt(0.5))}
RANGE = np.linspace(3, 10, 141)


def array(*values: float) -> Floats:
    return np.array(values, np.float64)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_those_of_the_name_at_unit_deviation(name: str) -> None:
    x = np.linspace(-8, 8, 161)
    np.testing.assert_allclose(DISTRIBUTIONS[name].cdf(x), REFERENCE[name].cdf(x), atol=1e-12)
    np.testing.assert_allclose(DISTRIBUTIONS[name].density(x), REFERENCE[name].pdf(x), atol=1e-12)
    assert REFERENCE[name].std() == pytest.approx(1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("m", [1.0, 2.0, 3.0, 5.0, 10.0, 40.0])
def test_the_root_is_where_the_expected_error_is_least(name: str, m: float) -> None:
    fine = np.linspace(1e-6, m / 2, 200_001)
    errors = expected_error(fine, np.full_like(fine, m), 3, DISTRIBUTIONS[name])
    root = optimal_root(array(m), DISTRIBUTIONS[name])
    assert root[0] == pytest.approx(fine[errors.argmin()], abs=1e-3)
    p = root[0]
    f, density = REFERENCE[name].cdf(p), REFERENCE[name].pdf(p)
    if p < m / 2 - 1e-9:  # the optimality condition, as it is printed
        assert 2 * m * f == pytest.approx(2 * m - p + m * (m - 2 * p) * density, rel=1e-9)


def test_the_gaussian_closed_form_is_within_its_bounds() -> None:
    closed, root = GAUSSIAN.closed_form(RANGE), optimal_root(RANGE, GAUSSIAN)
    assert np.abs(closed / root - 1).max() < 0.015
    # 4.10 % at 2 deviations: the figure of the formula itself, whatever is computed from it.
    at_two = GAUSSIAN.closed_form(array(2.0)) / optimal_root(array(2.0), GAUSSIAN) - 1
    assert at_two[0] == pytest.approx(-0.0410, abs=5e-4)


def test_the_laplacian_closed_form_is_within_its_bounds() -> None:
    closed, root = LAPLACIAN.closed_form(RANGE), optimal_root(RANGE, LAPLACIAN)
    assert np.abs(closed / root - 1).max() < 0.015


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("m", "p"), [(3.0, 0.5), (3.0, 1.2), (6.0, 2.5)])
def test_the_expected_error_is_the_integral_it_stands_for(name: str, m: float, p: float) -> None:
    """Uniform rounding errors: a cell of width w has w^2 / 12, here over the density on either side of p."""
    steps = 7
    inside = integrate.quad(REFERENCE[name].pdf, -p, p)[0]
    expected = ((p / steps) ** 2 * inside + ((m - p) / steps) ** 2 * (1 - inside)) / 12
    got = expected_error(array(p), array(m), steps, DISTRIBUTIONS[name])
    assert got[0] == pytest.approx(expected, rel=1e-9)
