"""The ladder of steps against codes counted one at a time."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpq_plugins import EntropyCoded, PartShape
from mpq_plugins.quantization import ladder as module
from mpq_plugins.quantization.ladder import CODES, OCTAVE, RUNGS, climbed, entropies, ladder
from mpq_plugins.quantization.quantize import quantizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slow(weights: list[float], step: float, offset: float) -> tuple[float, float]:
    """Bits and squared error of one step, weight by weight."""
    counts: Counter[int] = Counter()
    lost = 0.0
    for weight in weights:
        code = int(math.copysign(min(127, math.floor(abs(weight) / step + offset)), weight))
        counts[code] += 1
        lost += (weight - code * step) ** 2
    total = len(weights)
    return sum(-count * math.log2(count / total) for count in counts.values()), lost


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.sampled_from([0.1, 0.36, 0.5]), st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_bits_and_errors_are_those_of_counting(seed: int, count: int, offset: float, dtype: torch.dtype) -> None:
    weights = torch.randn(1, count, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scheme = EntropyCoded(rounding_offset=offset)
    steps, bits, squared = climbed(lambda op: op(weights), scheme)
    for k in (0, 7, 20, 33, 50, RUNGS - 1):
        wanted = slow(weights.double().flatten().tolist(), float(np.float32(steps[k])), offset)
        # A weight within float32's last bits of a threshold may have either code.
        assert bits[k] == pytest.approx(wanted[0], rel=1e-3, abs=20)
        assert squared[k] == pytest.approx(wanted[1], rel=1e-3, abs=1e-9)


def test_the_torch_route_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(7, 900, generator=torch.Generator().manual_seed(1))
    compiled = climbed(lambda op: op(weights), EntropyCoded())
    monkeypatch.setattr(module, "numba_available", lambda: False)
    plain = climbed(lambda op: op(weights), EntropyCoded())
    assert np.array_equal(compiled[0], plain[0])
    assert compiled[1] == pytest.approx(plain[1], rel=1e-3)
    assert compiled[2] == pytest.approx(plain[2], rel=1e-4)


def test_chunks_add_up_to_the_whole() -> None:
    weights = torch.randn(6, 700, generator=torch.Generator().manual_seed(2))
    whole = climbed(lambda op: op(weights), EntropyCoded())
    parts = climbed(lambda op: np.concatenate([op(part) for part in weights.split(2)]), EntropyCoded())
    assert np.array_equal(whole[1], parts[1])
    assert whole[2] == pytest.approx(parts[2], rel=1e-6)


@pytest.mark.parametrize("weights", [torch.zeros(2, 3), torch.zeros(0, 4), torch.zeros(3, 0)], ids=str)
def test_weights_that_are_zero_or_none_cost_nothing(weights: Tensor) -> None:
    steps, bits, squared = climbed(lambda op: op(weights), EntropyCoded())
    assert (steps > 0).all()
    assert not bits.any()
    assert not squared.any()


@given(st.floats(1e-20, 1e20), st.floats(0.1, 0.5))
def test_the_finest_step_has_codes_of_8_bits_and_a_finer_one_has_not(largest: float, offset: float) -> None:
    largest = float(np.float32(largest))
    scheme = EntropyCoded(rounding_offset=offset)
    steps = ladder(largest, scheme)
    assert steps[OCTAVE] == pytest.approx(2 * steps[0])
    assert np.floor(largest / steps[0] + offset) == 127
    assert np.floor(largest / (steps[0] * 0.999) + offset) == 128
    fits = EntropyCoded(step=float(np.float32(steps[0])), rounding_offset=offset)
    part = PartShape((1, 1), 0, 8, fits, "fc")
    assert quantizer(fits).encode(torch.tensor([[largest]]), part).symbols.tolist() == [127]


def test_the_entropy_is_that_of_the_histogram() -> None:
    counts = np.zeros((3, CODES))
    counts[0, 0] = 8
    counts[1, [0, 1, 129, 5]] = 4
    counts[2, [0, 1]] = (3, 1)
    assert entropies(counts) == pytest.approx([0, 32, 8 - 3 * math.log2(3)])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e20])
def test_very_large_and_very_small_weights_have_their_errors(scale: float) -> None:
    weights = torch.randn(1, 2000, generator=torch.Generator().manual_seed(4))
    usual, scaled = (climbed(lambda op, w=w: op(w), EntropyCoded())[2] for w in (weights, weights * scale))  # type: ignore[misc]
    assert np.isfinite(scaled).all()
    assert scaled / scale**2 == pytest.approx(usual, rel=1e-3)
