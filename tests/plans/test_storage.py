"""Bytes that a backend keeps, counted by hand."""

import pytest

from mpq_plugins import Affine, Storage
from mpq_plugins.plans.storage import stored_bytes
from tests.helpers.plans import linear, plan_of

PER_CHANNEL = Affine(granularity="per_channel")
INT8 = Storage("int8", 8, scale_bits=32, zero_point_bits=8)


@pytest.mark.parametrize(
    ("scheme", "storage", "count"),
    [
        (PER_CHANNEL, INT8, 60 + 6 * 5),  # a byte a weight, and five for each of six channels
        (Affine(), INT8, 60 + 6 * 5),
        (Affine(), Storage("int8", 8, 32, 8, one_scale=True), 60 + 5),
        (Affine(granularity="per_group", group_size=5), INT8, 60 + 12 * 5),
        (PER_CHANNEL, Storage("floats"), 4 * 60),
        (PER_CHANNEL, Storage("packed", 4), 30),
    ],
)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_width_takes_the_same(scheme: Affine, storage: Storage, count: int, bits: int) -> None:
    plan = plan_of(linear("fc", 6, 10, scheme, bits))
    assert stored_bytes(plan, storage, {"fc": 32}) == count


def test_parts_are_whole_bytes_too_and_have_scales_of_their_own() -> None:
    plan = plan_of(linear("fc", 6, 10, Affine(), {2: (0, 1, 2), 8: (3, 4, 5)}))
    assert stored_bytes(plan, Storage("int8", 8, 32, 8, one_scale=True), {"fc": 32}) == 60 + 6 * 5


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype_bits", [16, 32])
def test_a_layer_in_float_keeps_the_models_dtype(bits: int, dtype_bits: int) -> None:
    plan = plan_of(linear("a", 6, 10, PER_CHANNEL, 4), linear("b", 6, 10, PER_CHANNEL, bits))
    assert stored_bytes(plan, INT8, {"a": 32, "b": dtype_bits}) == 60 + 6 * 5 + 60 * dtype_bits // 8
