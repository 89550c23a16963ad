"""Codes found some rows at a time are those of the whole layer, and what differs from them is told."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine
from mpq_plugins.adapters.shared import layer_codes
from mpq_plugins.adapters.shared.layer_codes import Scales, code_chunks, code_problem, exact_dtype
from mpq_plugins.checkpoints.readers import MemoryRows
from mpq_plugins.simulation.integers import integer_weight
from tests.helpers.plans import linear

SCHEMES = [
    Affine(symmetric=symmetric, granularity=granularity, group_size=4 if granularity == "per_group" else None)
    for symmetric in (False, True)
    for granularity in ("per_tensor", "per_channel", "per_group")
]


@given(st.sampled_from(SCHEMES), st.integers(1, 8), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40))
def test_chunks_are_the_whole(scheme: Affine, bits: int, rows: int, groups: int, size: int) -> None:
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(rows))
    choice = linear("fc", rows, 4 * groups, scheme, bits)
    whole = integer_weight(weight, choice)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_codes, "CHUNK", size)
        chunks = list(code_chunks(MemoryRows(weight), choice))
    assert torch.equal(torch.cat([chunk.codes for chunk in chunks]), whole.codes)
    scales = Scales.of(chunks)
    assert torch.equal(scales.scale, whole.scale)
    assert torch.equal(scales.zero_point, whole.zero_point)
    assert code_problem(chunks, whole.codes, scales) is None
    if scheme.granularity != "per_tensor":
        assert max(chunk.codes.numel() for chunk in chunks) <= max(size, 4 * groups)


def test_a_difference_is_told() -> None:
    choice = linear("fc", 2, 8, Affine(granularity="per_group", group_size=4), 4)
    chunks = [integer_weight(torch.arange(16.0).view(2, 8), choice)]
    codes, scales = chunks[0].codes, Scales.of(chunks)
    assert code_problem(chunks, codes ^ 1, scales) == "has 16 of 16 codes that are not the plan's"
    assert code_problem(chunks, codes, replace(scales, scale=scales.scale * 2)) == "has other scales than the plan's"
    moved = replace(scales, zero_point=scales.zero_point + 1)
    assert code_problem(chunks, codes, moved) == "has other zero points than the plan's"
    longer = torch.cat([codes, codes])
    twice = Scales(torch.cat([scales.scale] * 2), torch.cat([scales.zero_point] * 2))
    assert code_problem(chunks, longer, twice) == "has 4 rows, the plan 2"


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_repeated_scales_say_the_same(groups: int) -> None:
    choice = linear("fc", 3, 16, Affine(granularity="per_group", group_size=8), 4)
    whole = integer_weight(torch.randn(3, 16), choice)
    repeated = Scales(whole.scale, whole.zero_point).repeated(groups)
    same = replace(whole, scale=repeated.scale, zero_point=repeated.zero_point)
    assert torch.equal(same.dequantized(), whole.dequantized())


def test_scales_are_in_the_models_dtype_where_that_is_exact() -> None:
    exact, odd = torch.tensor([0.5, -0.25, 1.5]), torch.tensor([0.1])
    assert exact_dtype(torch.bfloat16, exact) == torch.bfloat16
    assert exact_dtype(torch.bfloat16, exact, odd) == torch.float32
    assert exact_dtype(torch.float16, torch.tensor([1e6])) == torch.float32
    assert exact_dtype(torch.float32, odd) == torch.float32
