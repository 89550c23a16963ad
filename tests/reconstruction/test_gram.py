"""Sums over batches are those of all inputs at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.reconstruction.gram import PIECE, Gram

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 2**16))
def test_batches_add_up(counts: list[int], groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(n, groups, 4, generator=generator) for n in counts]
    lacking = [torch.randn(n, groups, 3, generator=generator) for n in counts]
    gram = Gram()
    for some, lost in zip(columns, lacking, strict=True):
        gram.add(some, lost)
    u, e = torch.cat(columns).double(), torch.cat(lacking).double()
    assert gram.count == sum(counts)
    if not gram.count:
        return
    for g in range(groups):
        torch.testing.assert_close(gram.h[g], u[:, g].T @ u[:, g], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gram.g[g], e[:, g].T @ u[:, g], rtol=1e-5, atol=1e-5)


def test_many_columns_are_summed_in_float64() -> None:
    """In float32 alone a sum stops growing: 2^24 and 1 are 2^24."""
    columns = torch.ones(PIECE + 1, 1, 1)
    columns[:PIECE] = 2.0**12  # their squares are 2^35 in all
    gram = Gram()
    gram.add(columns, columns)
    assert float(gram.h[0, 0, 0]) == PIECE * 2.0**24 + 1
    assert float(gram.g[0, 0, 0]) == PIECE * 2.0**24 + 1
    assert gram.h.dtype == gram.g.dtype == torch.float64


def test_without_anything_lacking_there_is_no_g() -> None:
    gram = Gram()
    gram.add(torch.randn(5, 1, 3), None)
    assert gram.h.shape == (1, 3, 3)
    assert not gram.g.numel()
    assert gram.finite


def test_two_are_independent() -> None:
    one, other = Gram(), Gram()
    one.add(torch.ones(2, 1, 1), None)
    other.add(torch.ones(3, 1, 1), None)
    assert (float(one.h), float(other.h)) == (2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["columns", "lacking"])
def test_what_is_not_finite_is_seen(bad: float, where: str) -> None:
    columns, lacking = torch.randn(6, 2, 3), torch.randn(6, 2, 4)
    (columns if where == "columns" else lacking)[2, 1, 0] = bad
    gram = Gram()
    gram.add(columns, lacking)
    # The square of 1e30 is beyond float32; its product with what is usual is not.
    assert gram.finite == (bad == 1e30 and where == "lacking")
