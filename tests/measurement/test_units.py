"""Units hold every channel once, in order, at whole chunks, and about as many bytes as they should."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_plugins import Affine, Piecewise
from mpq_plugins.checkpoints.readers import MemoryRows
from mpq_plugins.measurement import units
from mpq_plugins.measurement.units import LARGEST, LARGEST_SEARCHED, SMALLEST, UNITS, WHOLE, Work, cut, stored_bytes
from mpq_plugins.plans.scheme import Scheme
from mpq_plugins.weights import chunks
from mpq_plugins.weights.handles import Weight

SCHEMES: list[Scheme] = [
    Affine(), Affine(granularity="per_channel"), Affine(range="mse"), Piecewise(granularity="per_channel")
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def weight(name: str, channels: int, inputs: int, dtype: torch.dtype = torch.float32, axis: int = 0) -> Weight:
    """As large as it likes: it takes no memory."""
    shape = (inputs, channels) if axis else (channels, inputs)
    return Weight(name, "linear", shape, dtype, axis, MemoryRows(torch.empty((), dtype=dtype).expand(shape), axis))


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 1))
models = st.lists(sizes, min_size=1, max_size=12).map(
    lambda drawn: [weight(f"layer{n}", *own) for n, own in enumerate(drawn)]
)


def pieces_of(work: Work) -> list[tuple[int, Weight]]:
    """In the order of the units."""
    return [pair for unit in work.units for pair in zip(unit.layers, unit.pieces, strict=True)]


@given(models, st.sampled_from(SCHEMES), st.integers(1, 200), st.integers(1, 2000))
def test_every_channel_is_in_one_unit_at_whole_chunks(
    weights: list[Weight], scheme: Scheme, chunk: int, smallest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        patch.setattr(units, "SMALLEST", smallest)
        work = cut(weights, scheme)
        by_unit = pieces_of(work)
        assert [position for position, _ in by_unit] == sorted(position for position, _ in by_unit)
        assert {position for position, _ in by_unit}.isdisjoint(work.shared)
        assert {position for position, _ in by_unit} | {*work.shared} == {*range(len(weights))}
        for position, own in enumerate(weights):
            of_layer = [piece for found, piece in by_unit if found == position]
            if position in work.shared:
                assert scheme.granularity == "per_tensor"
                assert stored_bytes(own) > WHOLE * work.size
                of_layer = units.cut_layer(own, work.size)
            elif scheme.granularity == "per_tensor":
                assert of_layer == [own]
            assert sum(piece.channels for piece in of_layer) == own.channels
            # The chunks of the pieces are the chunks of the layer: sums are added in the same order.
            of_pieces = [stop - start for piece in of_layer for _, start, stop in chunks.chunks(piece)]
            assert of_pieces == [stop - start for _, start, stop in chunks.chunks(own)]
        for unit in work.units[:-1]:
            assert sum(map(stored_bytes, unit.pieces)) >= work.size
            assert sum(map(stored_bytes, unit.pieces[:-1])) < work.size
        assert sum(unit.numel for unit in work.units) == sum(
            own.numel for position, own in enumerate(weights) if position not in work.shared
        )


@given(models, st.sampled_from(SCHEMES))
def test_the_same_weights_are_cut_alike(weights: list[Weight], scheme: Scheme) -> None:
    again = [dataclasses.replace(own) for own in weights]
    assert cut(weights, scheme) == cut(again, scheme)


def test_sizes_at_scale() -> None:
    block = [weight("q", 4096, 4096, torch.bfloat16)] * 4 + [weight("up", 11008, 4096, torch.bfloat16)] * 3
    plain, searched = Affine(granularity="per_channel"), Affine(granularity="per_channel", range="mse")
    small, large = [weight("a", 64, 64)], block * 32
    assert cut(small, plain).size == SMALLEST
    assert cut(large, plain).size == LARGEST
    assert cut(large, searched).size == LARGEST_SEARCHED
    assert cut(block, plain).size == sum(map(stored_bytes, block)) // UNITS
    chunk = 2 * chunks.CHUNK  # bytes
    for scheme in (plain, searched):
        work = cut(large, scheme)
        assert max(sum(map(stored_bytes, unit.pieces)) for unit in work.units) <= 2 * work.size + chunk


def test_a_layer_with_one_scale_is_shared_out_beyond_four_units() -> None:
    one = Affine()
    large = weight("large", 4096, 4096)
    rest = [weight(f"{n}", 64, 64) for n in range(3)]
    assert cut([*rest, large], one).shared == (3,)
    assert cut([*rest, large], Affine(granularity="per_channel")).shared == ()
    # Of a single chunk there is nothing to share.
    assert cut([*rest, weight("wide", 1, 1 << 24)], one).shared == ()
