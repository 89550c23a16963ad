"""Costs of codes: shares that sum to one, and the two-sided geometric distribution that is counted in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.reconstruction.code_costs import PRIOR, code_costs, counts_of

MOST = 127


def costs_of(codes: list[int], most: int = MOST) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return code_costs(counts_of([torch.tensor(codes, dtype=torch.int16)], most))


def test_counts_are_of_all_matrices() -> None:
    codes = [torch.tensor([[-3, 0], [0, 2]], dtype=torch.int16), torch.tensor([[3]], dtype=torch.int16)]
    assert counts_of(codes, 3).tolist() == [1, 0, 0, 2, 0, 1, 1]


@given(st.lists(st.integers(-MOST, MOST), max_size=60))
def test_shares_sum_to_one(codes: list[int]) -> None:
    assert float((2.0 ** -costs_of(codes)).sum()) == pytest.approx(1, abs=1e-3)


@given(st.lists(st.integers(-9, 9), min_size=5, max_size=60))
def test_more_codes_are_cheaper_and_none_is_impossible(codes: list[int]) -> None:
    costs = costs_of(codes)
    assert np.isfinite(costs).all()
    assert costs_of([*codes, 9])[9 + MOST] < costs[9 + MOST]


def test_the_prior_has_the_codes_own_mean_size() -> None:
    codes = [-2, -1, 0, 0, 1, 2, 3] * 3
    counts = counts_of([torch.tensor(codes, dtype=torch.int16)], MOST)
    shares = 2.0 ** -code_costs(counts) * (len(codes) + PRIOR)
    prior = (shares - counts) / PRIOR
    assert prior.sum() == pytest.approx(1, abs=1e-6)
    assert (prior * np.abs(np.arange(-MOST, MOST + 1))).sum() == pytest.approx(np.abs(codes).mean(), rel=1e-4)
    assert np.diff(np.log(prior[MOST : MOST + 12])) == pytest.approx(np.log(prior[MOST + 1] / prior[MOST]))


def test_of_zeros_alone_zero_is_nearly_free() -> None:
    costs = costs_of([0] * 1000)
    assert costs[MOST] < 0.001
    assert costs.argmin() == MOST
