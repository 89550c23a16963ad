"""The benchmark of coded files picks what it says: the smallest file that is good enough."""

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from tests.benchmarks.bench_coded import File, contained, first


@pytest.mark.parametrize("least", [-1.0, 0.0, 2.5, 6.0, 7.0])
def test_the_smallest_file_that_is_good_enough(least: float) -> None:
    sizes = tuple(range(8))
    nets = {bits: nn.Linear(1, bits + 1) for bits in sizes}
    scores = {id(net): float(bits) for bits, net in nets.items()}
    made: list[int] = []

    def make(bits: int) -> File:
        made.append(bits)
        return File(nets[bits], bits, 0.0, 0.0)

    found = first(make, sizes, lambda net: scores[id(net)], least)
    assert found is not None
    assert found.bits == min(bits for bits in sizes if bits >= least)
    assert len(made) <= 4
    assert first(make, sizes, lambda net: scores[id(net)], 7.5) is None


def test_what_a_file_holds_is_the_quantized_net() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    plan = mpq.Uniform(bits=3)(mpq.measure(net))
    file = contained(net, plan)
    inputs = torch.randn(5, 64)
    assert torch.equal(file.net(inputs), mpq.apply(net, plan)(inputs))
    assert 3 < file.bits < 8
