"""Ties and live sets, by the definition and by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mpq_plugins as mpq
from mpq_plugins.measurement.input_calls import Reads, live_sets, tensor_names

PASSES = st.lists(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 3)), min_size=1, max_size=8).map(tuple),
    min_size=1,
    max_size=3,
)


@given(PASSES)
def test_layers_are_tied_where_a_chain_of_tensors_joins_them(passes: list[Reads]) -> None:
    order = list(dict.fromkeys(name for reads in passes for name, _ in reads))
    groups = {name: {name} for name in order}
    joined = [
        (one, other)
        for reads in passes
        for one, first in reads
        for other, second in reads
        if first == second
    ]  # fmt: skip
    for _ in order:
        for one, other in joined:
            whole = groups[one] | groups[other]
            for name in whole:
                groups[name] = whole
    assert tensor_names(passes) == {name: min(groups[name], key=order.index) for name in order}


@given(PASSES)
def test_live_sets_are_those_of_the_definition(passes: list[Reads]) -> None:
    names = tensor_names(passes)
    sets = set()
    for reads in passes:
        calls = [names[name] for name, _ in reads]
        for place in range(len(calls)):
            sets.add(frozenset(set(calls[: place + 1]) & set(calls[place:])))
    found = live_sets(passes, names)
    assert {frozenset(live) for live in found} == {one for one in sets if not any(one < other for other in sets)}
    assert all(len(set(live)) == len(live) for live in found)
    assert len({*found}) == len(found)


def test_a_chain_needs_one_input_at_once() -> None:
    reads: Reads = (("a", 0), ("b", 1), ("c", 2))
    assert live_sets([reads], tensor_names([reads])) == (("a",), ("b",), ("c",))


def test_what_is_read_again_later_is_needed_in_between() -> None:
    reads: Reads = (("query", 0), ("key", 0), ("out", 1), ("up", 2), ("gate", 2), ("skip", 0), ("head", 3))
    names = tensor_names([reads])
    assert names == {
        "query": "query", "key": "query", "out": "out", "up": "up", "gate": "up", "skip": "query", "head": "head",
    }  # fmt: skip
    assert live_sets([reads], names) == (("query", "out"), ("query", "up"), ("head",))


def test_a_layer_that_reads_two_tensors_ties_their_readers() -> None:
    reads: Reads = (("a", 0), ("shared", 0), ("shared", 1), ("b", 1))
    assert set(tensor_names([reads]).values()) == {"a"}


def test_calls_that_only_one_pass_makes_count() -> None:
    passes: list[Reads] = [(("a", 0), ("b", 1)), (("a", 0), ("c", 1), ("b", 0))]
    names = tensor_names(passes)
    assert names == {"a": "a", "b": "a", "c": "c"}
    assert live_sets(passes, names) == (("a", "c"),)


class Twice(nn.Module):
    """One layer reads a tensor twice, another a reshaped view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.one(x) + self.one(x) + self.two(x.flatten(0, 1)).view(*x.shape[:2], 4)
        return total


def test_a_tensor_counts_once_however_often_and_in_whatever_shape_it_is_read() -> None:
    net = Twice().eval()
    table = mpq.measure_activations(net, mpq.measure(net, bits=(4,)), [torch.randn(5, 3, 8)], (4,))
    one, two = (layer.inputs for layer in table.layers)
    assert one is not None
    assert two is not None
    assert (one.numel, two.numel) == (24, 24)
    assert (one.tensor, two.tensor) == ("one", "one")
