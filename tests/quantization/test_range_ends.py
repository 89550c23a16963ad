"""Where ranges end: by brute force, by numpy's quantiles, and by what every rule must hold."""

import numpy as np
import pytest
import torch

from mpq_plugins.models.input_ranges import range_grid
from mpq_plugins.quantization.range_ends import Ends, kl_ends, mse_ends, percentile_ends
from mpq_plugins.quantization.value_sample import SortedValues


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


NORMAL = drawn(0).standard_normal(1000)
VALUES = {
    "normal": NORMAL,
    "positive": np.maximum(drawn(1).standard_normal(1000), 0),
    "negative": -drawn(2).random(1000) - 3,
    "outlier": np.append(drawn(3).standard_normal(1000), 60.0),
    "skewed": np.exp(drawn(4).standard_normal(1000)) - 0.3,
    "heavy": drawn(5).standard_t(3, 1000),
    "gelu": np.maximum(NORMAL, -0.15),
    "small": NORMAL * 1e-6,
    "constant": np.full(1000, 2.5),
    "negative constant": np.full(1000, -2.5),
    "two": np.repeat([-1.0, 3.0], 2000),
}
KINDS = ["percentile", "kl", "mse"]


def sorted_values(name: str) -> SortedValues:
    return SortedValues.of(np.sort(VALUES[name]))


def ends_of(kind: str, values: SortedValues, bits: int, *, symmetric: bool) -> Ends:
    if kind == "percentile":
        return percentile_ends(values, 0.99, symmetric=symmetric)
    return (kl_ends if kind == "kl" else mse_ends)(values, bits, symmetric=symmetric)


def error_of(name: str, ends: Ends, bits: int, *, symmetric: bool) -> float:
    low, high = torch.tensor(ends)
    scale, zero_point = (float(x) for x in range_grid(low, high, bits, symmetric=symmetric))
    values = VALUES[name]
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1)
    return float(((values - (codes - zero_point) * scale) ** 2).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VALUES)
def test_ranges_hold_zero_and_lie_within_the_extremes(name: str, kind: str, bits: int, symmetric: bool) -> None:
    values = sorted_values(name)
    low, high = ends_of(kind, values, bits, symmetric=symmetric)
    farthest = max(-values.low, values.high)
    if symmetric:
        assert low == -high
        assert 0 < high <= farthest * (1 + 1e-12)
    else:
        assert values.low * (1 + 1e-12) <= low <= 0 <= high <= values.high * (1 + 1e-12)
        assert low < high


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", VALUES)
def test_mse_is_no_worse_than_extremes_and_nearly_what_brute_force_finds(name: str, bits: int, symmetric: bool) -> None:
    values = sorted_values(name)
    low, high = (-1.0, 1.0) if symmetric else (values.low, values.high)
    if symmetric:
        low, high = (end * max(-values.low, values.high) for end in (low, high))
    own = error_of(name, mse_ends(values, bits, symmetric=symmetric), bits, symmetric=symmetric)
    assert own <= error_of(name, (low, high), bits, symmetric=symmetric) * (1 + 1e-6)
    ratios = np.linspace(1, 0.01, 34)
    pairs = [(a, a) for a in ratios] if symmetric or 0 in (low, high) else [(a, b) for a in ratios for b in ratios]
    least = min(error_of(name, (a * low, b * high), bits, symmetric=symmetric) for a, b in pairs)
    assert own <= least * 1.02 + 1e-9 * float((VALUES[name] ** 2).sum())


@pytest.mark.parametrize("share", [0.6, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("name", VALUES)
def test_percentiles_are_numpys(name: str, share: float) -> None:
    values, own = VALUES[name], sorted_values(name)
    reach = np.quantile(np.abs(values), share)
    assert percentile_ends(own, share, symmetric=True) == pytest.approx((-reach, reach))
    low, high = percentile_ends(own, share, symmetric=False)
    if values.min() >= 0:
        assert (low, high) == pytest.approx((0, np.quantile(values, share)))
    elif values.max() <= 0:
        assert (low, high) == pytest.approx((np.quantile(values, 1 - share), 0))
    else:
        expected = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
        assert (low, high) == pytest.approx((min(0, expected[0]), max(0, expected[1])))


def test_kl_leaves_out_a_tail_and_not_a_peak_at_zero() -> None:
    random = drawn(7)
    tailed = SortedValues.of(np.sort(random.standard_t(3, 200_000)))
    low, high = kl_ends(tailed, 8, symmetric=False)
    assert tailed.low < low < -5
    assert 5 < high < tailed.high
    active = np.sort(np.maximum(random.standard_normal(200_000), 0))
    with_peak = kl_ends(SortedValues.of(active), 8, symmetric=False)
    assert with_peak == kl_ends(SortedValues.of(active[active > 0]), 8, symmetric=False)
    assert with_peak[1] > 3


@pytest.mark.parametrize("bits", [12, 16])
def test_kl_of_more_levels_than_bins_reaches_the_extremes(bits: int) -> None:
    values = sorted_values("heavy")
    assert kl_ends(values, bits, symmetric=False) == pytest.approx((values.low, values.high))
