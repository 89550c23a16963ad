"""Values of many batches in bounded memory: exact while they are few, fair when they are many."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins.quantization import value_sample
from mpq_plugins.quantization.value_sample import SortedValues, ValueSample

FEW = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)


def sampled(batches: list[torch.Tensor]) -> ValueSample:
    sample = ValueSample()
    for batch in batches:
        sample.add(batch)
    return sample


@given(FEW, st.integers(1, 9))
def test_few_values_are_all_kept(values: list[float], size: int) -> None:
    sample = sampled(list(torch.tensor(values).split(size)))
    found = sample.values()
    assert sample.count == len(values)
    assert found.values.tolist() == sorted(values)
    assert (found.weights == 1).all()


@given(FEW, st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    found = SortedValues.of(np.sort(values)).quantile(share)
    assert found == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 5)), min_size=1, max_size=20), st.integers(2, 6))
def test_weights_are_as_many_values(pairs: list[tuple[int, int]], bits: int) -> None:
    """Of everything but quantiles, which go in a straight line between those that stand for several."""
    pairs = sorted(pairs)
    own = SortedValues(np.array([v for v, _ in pairs], float), np.array([n for _, n in pairs], float))
    each = SortedValues.of(np.repeat(own.values, own.weights.astype(int)))
    assert own.squared_error(0.75, 3, bits) == pytest.approx(each.squared_error(0.75, 3, bits), rel=1e-9, abs=1e-9)
    assert own.histogram(-20, 20, 7).tolist() == each.histogram(-20, 20, 7).tolist()
    assert own.magnitudes().values.tolist() == sorted(abs(v) for v, _ in pairs)
    assert own.magnitudes().weights.sum() == own.weights.sum()
    assert own.nonzero().weights.sum() == sum(n for v, n in pairs if v)


def slow_error(values: np.ndarray, scale: float, zero_point: int, bits: int) -> float:
    codes = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1)
    return float(((values - (codes - zero_point) * scale) ** 2).sum())


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 10, 11, 12, 16])
def test_squared_errors_are_those_of_every_value(bits: int) -> None:
    values = np.sort(np.random.default_rng(bits).standard_normal(5000))
    scale, zero_point = 8 / 2**bits, 2 ** (bits - 1)
    found = SortedValues.of(values).squared_error(scale, zero_point, bits)
    assert found == pytest.approx(slow_error(values, scale, zero_point, bits), rel=1e-6)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_sample, "MOST_VALUES", 2000)
    monkeypatch.setattr(value_sample, "MOST_EXTREME", 50)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("batch", [7, 1000, 3000, 40_000])
def test_many_values_are_sampled_fairly_and_the_farthest_are_all_there(batch: int) -> None:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(batch)).sort().values  # batches differ
    sample = sampled(list(x.split(batch)))
    found = sample.values()
    assert found.values.size <= 2000 + 2 * 50
    assert found.weights.sum() == pytest.approx(40_000)
    assert (np.diff(found.values) >= 0).all()
    assert found.values[:50].tolist() == x[:50].tolist()
    assert found.values[-50:].tolist() == x[-50:].tolist()
    for share in (0.05, 0.25, 0.5, 0.9):
        below = found.weights[found.values <= float(x.double().quantile(share))].sum() / 40_000
        assert below == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)
    for share in (0.0, 0.0003, 0.001, 0.9995, 1.0):  # where the farthest values decide
        assert found.quantile(share) == pytest.approx(float(np.quantile(x.double().numpy(), share)), rel=1e-9)


@pytest.mark.usefixtures("small")
def test_equal_values_keep_their_number() -> None:
    """Most inputs behind a ReLU are 0: more of them than are kept of the lowest."""
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(1)).relu()
    found = sampled(list(x.split(1000))).values()
    zeros = found.weights[found.values == 0].sum()
    assert zeros == pytest.approx(float((x == 0).sum()), rel=0.1)


@pytest.mark.usefixtures("small")
def test_a_channel_is_sampled_whatever_its_place() -> None:
    """Channels last, and as many of them as would make every step meet the same one."""
    x = torch.zeros(2500, 16)
    x[:, 5] = 1.0
    found = sampled([x]).values()
    assert found.weights[found.values == 1].sum() == pytest.approx(2500, rel=0.35)


@pytest.mark.usefixtures("small")
def test_the_same_batches_give_the_same_sample() -> None:
    x = torch.randn(9000, generator=torch.Generator().manual_seed(2))
    first, second = (sampled(list(x.split(900))).values() for _ in range(2))
    assert first.values.tolist() == second.values.tolist()


@pytest.mark.usefixtures("small")
def test_memory_is_bounded() -> None:
    sample = ValueSample()
    for seed in range(30):
        sample.add(torch.randn(997, generator=torch.Generator().manual_seed(seed)))
        held = (sample._some, sample._lowest, sample._highest)
        assert [part.numel() <= most for part, most in zip(held, (2000, 50, 50), strict=True)] == [True] * 3
        assert all(part.untyped_storage().nbytes() <= 4 * part.numel() for part in held)
    assert sample.count == 30 * 997
