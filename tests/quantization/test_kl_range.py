"""Ranges of least divergence: against a loop written from the slides, one bin after the other."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from mpq_plugins.quantization.kl_range import divergences, kl_window, windows


def slow_divergence(counts: Sequence[float], start: int, stop: int, levels: int) -> float:
    """Of the reference, outliers in its outermost bins, from the bins joined into levels and spread out again."""
    kept = list(counts[start:stop])
    reference = list(kept)
    reference[0] += sum(counts[:start])
    reference[-1] += sum(counts[stop:])
    cell_of = [place * levels // len(kept) for place in range(len(kept))]
    joined, holding = [0.0] * levels, [0] * levels
    for place, cell in enumerate(cell_of):
        joined[cell] += kept[place]
        holding[cell] += kept[place] > 0
    spread = [joined[cell] / holding[cell] if kept[place] > 0 else 0.0 for place, cell in enumerate(cell_of)]
    if not sum(spread):
        return math.inf
    divergence = 0.0
    for p, q in zip(reference, spread, strict=True):
        if p > 0 and q == 0:
            return math.inf
        if p > 0:
            p, q = p / sum(reference), q / sum(spread)
            divergence += p * math.log(p / q)
    return divergence


def slow_windows(bins: int, below: int, levels: int) -> list[tuple[int, int]]:
    found = []
    for kept in range(min(max(levels, bins // 16), bins), bins + 1):
        start = math.floor(below * (bins - kept) / bins + 0.5)
        found.append((start, start + kept))
    return found


def random_counts(random: np.random.Generator, bins: int) -> np.ndarray:
    """Of a bell, a peak and a tail, or nothing like that; many bins are empty in some."""
    kind, holding = random.integers(4), random.random(bins) < 0.3
    if kind == 0:
        return random.integers(0, 50, bins).astype(float)
    if kind == 1:
        return np.histogram(random.standard_normal(2000), bins)[0].astype(float)
    if kind == 2:
        return np.histogram(np.abs(random.standard_t(2, 500)), bins)[0].astype(float)
    sparse: np.ndarray = np.where(holding, random.integers(0, 9, bins), 0).astype(float)
    sparse[random.integers(bins)] += 1
    return sparse


def test_a_thousand_histograms_are_as_the_slow_loop_has_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(1000):
        bins = int(random.integers(16, 48))
        levels = int(random.choice([2, 4, 8, 16]))
        below = int(random.integers(0, bins + 1)) if random.random() < 0.5 else 0
        counts = random_counts(random, bins)
        starts, stops = windows(bins, below, levels)
        assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == slow_windows(bins, below, levels)
        slow = [slow_divergence(counts.tolist(), a, b, levels) for a, b in slow_windows(bins, below, levels)]
        found = divergences(counts, starts, stops, levels)
        assert np.isinf(found).tolist() == np.isinf(slow).tolist()
        finite = np.isfinite(slow)
        assert np.abs(found[finite] - np.array(slow)[finite]).max() <= 1e-6
        chosen = slow_windows(bins, below, levels).index(kl_window(counts, below, levels))
        assert slow[chosen] <= min(slow) + 1e-6


@pytest.mark.parametrize(("levels", "below"), [(128, 0), (256, 700), (2, 0), (8, 2048)])
def test_two_thousand_bins_are_as_the_slow_loop_has_them(levels: int, below: int) -> None:
    random = np.random.default_rng(levels)
    counts = np.histogram(random.standard_normal(1 << 20) ** 3, 2048)[0].astype(float)
    starts, stops = windows(2048, below, levels)
    found = divergences(counts, starts, stops, levels)
    for place in range(0, starts.size, 97):
        slow = slow_divergence(counts.tolist(), int(starts[place]), int(stops[place]), levels)
        assert found[place] == pytest.approx(slow, abs=1e-9)


def test_as_many_levels_as_bins_keep_all() -> None:
    counts = np.arange(16.0)
    assert kl_window(counts, 4, 16) == (0, 16)
    assert kl_window(counts, 4, 1 << 16) == (0, 16)


def test_of_equal_windows_the_widest_is_kept() -> None:
    """A single bin in use is one level of every window that it is in."""
    counts = np.zeros(64)
    counts[5] = 10
    assert kl_window(counts, 0, 8) == (0, 64)
    counts[:] = 0
    counts[63] = 10
    assert kl_window(counts, 0, 8) == (0, 64)


@pytest.mark.parametrize("below", [0, 500, 2048])
def test_windows_hold_zero(below: int) -> None:
    starts, stops = windows(2048, below, 4)
    assert (starts <= below).all()
    assert (stops >= below).all()
    assert (starts.min(), stops.max()) == (0, 2048)
    assert (starts >= 0).all()
    assert (stops <= 2048).all()


def test_outliers_are_left_out() -> None:
    random = np.random.default_rng(1)
    counts = np.histogram(np.append(np.abs(random.standard_normal(100_000)), 20.0), 2048, (0, 20))[0].astype(float)
    start, stop = kl_window(counts, 0, 128)
    assert start == 0
    assert 2 < stop / 2048 * 20 < 5


def test_a_window_ends_where_something_is() -> None:
    """Outliers that its last bin would have alone make a divergence infinite."""
    counts = np.append(np.full(40, 100.0), np.zeros(2008))
    counts[-1] = 1
    assert kl_window(counts, 0, 8) == (0, 2048)
