"""One-dimensional k-means against every clustering there is, and Lloyd's iteration written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from mpq_plugins.plans.codebook import INITS, InitName
from mpq_plugins.quantization import kmeans
from mpq_plugins.quantization.kmeans import centroids, edges

Values = NDArray[np.float32]

VALUES = hnp.arrays(np.float32, st.integers(4, 11), elements=st.floats(-100, 100, width=32))
STARTS: tuple[InitName, ...] = ("linear", "density", "forgy")
BELL = np.random.default_rng(0).standard_normal(5000).astype(np.float32)


def cost(values: Values, book: Values) -> float:
    """Of every value going to its nearest centroid."""
    wide, ascending = values.astype(np.float64), np.sort(book).astype(np.float64)
    right = np.clip(np.searchsorted(ascending, wide), 1, len(book) - 1)
    nearest = np.minimum((wide - ascending[right]) ** 2, (wide - ascending[right - 1]) ** 2)
    return math.fsum(nearest.tolist())


def interval_cost(values: list[float], pinned: bool) -> float:
    """Of one cluster: about its mean, or about 0 where it holds the weights that are 0."""
    centre = 0.0 if pinned and 0.0 in values else math.fsum(values) / len(values)
    return math.fsum((w - centre) ** 2 for w in values)


def brute_force(values: Values, k: int) -> float:
    """The least cost over all ways to cut the sorted values into k runs."""
    ordered = sorted(float(w) for w in values)
    pinned = 0.0 in ordered
    return min(
        sum(interval_cost(ordered[a:b], pinned) for a, b in itertools.pairwise((0, *cuts, len(ordered))))
        for cuts in itertools.combinations(range(1, len(ordered)), k - 1)
    )


def lloyd(values: Values, start: list[float], pinned: bool) -> list[float]:
    """Assign every value to the nearest centroid, the lower of two; move centroids to means; until nothing changes."""
    book, known = list(start), None
    while True:
        nearest = [min(range(len(book)), key=lambda c: (abs(w - book[c]), c)) for w in map(float, values)]
        if nearest == known:
            return book
        known = nearest
        zero = min(range(len(book)), key=lambda c: abs(book[c])) if pinned else -1
        for c in range(len(book)):
            own = [float(w) for w, n in zip(values, nearest, strict=True) if n == c]
            if own and c != zero:
                book[c] = math.fsum(own) / len(own)


@given(VALUES, st.integers(1, 2), st.booleans())
def test_optimal_is_the_best_of_all_clusterings(values: Values, bits: int, zeros: bool) -> None:
    if zeros:
        values = np.concatenate((values, np.zeros(2, np.float32)))
    (book,) = centroids(values, [bits], "optimal")
    least = brute_force(values, 2**bits)
    assert cost(values, book) <= least * (1 + 1e-5) + 1e-6 * float(np.abs(values).max()) ** 2


def dynamic(values: Values, k: int) -> float:
    """The least cost again, one cluster more at a time, every cost summed afresh about its own mean."""
    ordered = np.sort(values).astype(np.float64)
    n, pinned = len(ordered), bool((ordered == 0).any())
    cost = np.array(
        [[interval_cost(ordered[a:b].tolist(), pinned) if b > a else 0 for b in range(n + 1)] for a in range(n)]
    )
    best = np.where(np.arange(n + 1) == 0, 0.0, np.inf)
    for _ in range(k):
        best = np.array([np.inf, *(min(best[a] + cost[a, b] for a in range(b)) for b in range(1, n + 1))])
    return float(best[n])


@pytest.mark.parametrize("outlier", [1e3, -1e6, 1e8, 1e15, -1e30])
@pytest.mark.parametrize("zeros", [0, 8])
def test_an_outlier_hides_nothing_of_the_rest(outlier: float, zeros: int) -> None:
    values = np.concatenate((BELL[:40], np.zeros(zeros), [outlier])).astype(np.float32)
    for bits in (2, 3, 4):
        (book,) = centroids(values, [bits], "optimal")
        assert (np.diff(book) >= 0).all()
        assert cost(values, book) <= dynamic(values, 2**bits) * 1.001
        others = [centroids(values, [bits], init)[0] for init in STARTS]
        assert all(np.isfinite(other).all() and (np.diff(other) >= 0).all() for other in others)


@pytest.mark.parametrize("init", INITS)
def test_the_widest_ranges(init: InitName) -> None:
    values = np.concatenate((BELL, [3.4e38, -3.4e38])).astype(np.float32)
    for book in centroids(values, range(1, 9), init):
        assert np.isfinite(book).all()
        assert (np.diff(book) >= 0).all()


@pytest.mark.parametrize("zeros", [0, 2000])
@pytest.mark.parametrize("bits", range(1, 9))
def test_optimal_is_never_worse_than_any_start(bits: int, zeros: int) -> None:
    values = np.concatenate((BELL, np.zeros(zeros, np.float32)))
    best, *others = [cost(values, centroids(values, [bits], init)[0]) for init in ("optimal", *STARTS)]
    assert best <= min(others) * (1 + 1e-6)


def samples() -> dict[str, Values]:
    rng = np.random.default_rng(1)
    found = {
        "normal": rng.standard_normal(20_000), "heavy": rng.standard_t(2, 20_000),
        "lognormal": np.exp(2 * rng.standard_normal(20_000)), "two scales": np.outer([1, 1e-3], BELL).ravel(),
        "outlier": np.append(BELL, 1e6), "zeros": np.concatenate((BELL, 40 * BELL[:30], np.zeros(900))),
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in found.items()}


@pytest.mark.parametrize("name", samples())
def test_gathered_into_cells_it_is_nearly_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = samples()[name]
    monkeypatch.setattr(kmeans, "CELLS", 1 << 20)
    exact = [cost(values, book) for book in centroids(values, range(1, 8), "optimal")]
    monkeypatch.setattr(kmeans, "CELLS", 1 << 13)
    gathered = [cost(values, book) for book in centroids(values, range(1, 8), "optimal")]
    assert all(b <= a * 1.003 for a, b in zip(exact, gathered, strict=True))


def test_one_search_serves_all_widths() -> None:
    together = centroids(BELL, range(1, 9), "optimal")
    alone = [centroids(BELL, [bits], "optimal")[0] for bits in range(1, 9)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(together, alone, strict=True))


@given(st.sampled_from(STARTS[:2]), st.integers(1, 5), st.booleans())
def test_the_papers_starts_go_on_as_lloyds_iteration_does(init: InitName, bits: int, zeros: bool) -> None:
    values = BELL[:150] if not zeros else np.concatenate((BELL[:150], np.zeros(40, np.float32)))
    free = 2**bits - zeros
    if init == "linear":
        start = np.linspace(values.min(), values.max(), free, dtype=np.float64)
    else:  # where equal shares of the weights lie, by their middles
        start = np.sort(values[values != 0])[((np.arange(free) + 0.5) / free * 150).astype(int)].astype(np.float64)
    expected = lloyd(np.sort(values), sorted([*start.tolist(), *([0.0] if zeros else [])]), zeros)
    (book,) = centroids(values, [bits], init)
    np.testing.assert_allclose(book, expected, rtol=1e-6, atol=1e-7)


def test_forgys_start_is_drawn_from_the_weights_and_always_the_same() -> None:
    first = kmeans._initial(np.sort(BELL), 16, "forgy")
    assert np.isin(first, BELL).all()
    assert first.tobytes() == kmeans._initial(np.sort(BELL), 16, "forgy").tobytes()


@pytest.mark.parametrize("init", INITS)
def test_zeros_keep_a_centroid_at_zero_and_nothing_else_does(init: InitName) -> None:
    (with_zeros,) = centroids(np.append(BELL, np.float32(0)), [3], init)
    (without,) = centroids(BELL + np.float32(0.5), [3], init)
    assert (with_zeros == 0).sum() == 1
    assert not (without == 0).any()
    for book in (with_zeros, without):
        assert (np.diff(book) >= 0).all()
        assert book.dtype == np.float32


@pytest.mark.parametrize("init", INITS)
def test_few_different_weights_are_their_own_centroids(init: InitName) -> None:
    values = np.array([3, -1, 3, 3, 0.1, -1, 7, 0.1], np.float32)
    for bits in range(2, 9):
        (book,) = centroids(values, [bits], init)
        np.testing.assert_array_equal(book, np.pad(np.unique(values), (0, 2**bits - 4), "edge"))
    (book,) = centroids(np.array([-0.0, 0.0], np.float32), [1], init)
    assert not np.signbit(book).any()


@given(hnp.arrays(np.float32, st.integers(2, 9), elements=st.floats(-(2.0**100), 2.0**100, width=32), unique=True))
def test_an_edge_belongs_to_the_left_and_a_centroid_to_itself(values: Values) -> None:
    book = np.sort(values)
    between = edges(book)
    assert (np.searchsorted(between, book) == np.arange(len(book))).all()
    middle = (book[:-1].astype(np.float64) + book[1:]) / 2
    assert (between <= middle).all()
    assert (np.nextafter(between, np.float32(np.inf)) > middle).all()


def test_far_from_zero_nothing_cancels() -> None:
    values = (np.float32(1000) + BELL / 1000).astype(np.float32)
    (book,) = centroids(values, [3], "optimal")
    assert cost(values, book) < 0.05 * float(((values.astype(np.float64) - values.mean()) ** 2).sum())
