"""Bytes of each stage against counts made by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import Affine, Codebook, Sparsity, compress
from mpq_plugins.compression.huffman import coded_bytes
from mpq_plugins.compression.sparse import to_relative
from mpq_plugins.compression.stages import layer_stages, planned, total
from tests.helpers.plans import with_layer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 40))


def test_a_pruned_and_shared_layer(tmp_path: Path) -> None:
    model = net()
    plan = mpq.Uniform(bits=4)(mpq.measure(model, Codebook(), bits=(4,)))
    container = compress(model, plan, tmp_path / "x.mpq", prune=Sparsity(0.9))
    found = layer_stages(container, "0.weight")
    weight = container.tensor("0.weight").flatten().numpy()
    entries = len(to_relative((weight != 0).astype(np.uint8), 5).gaps)
    zeros = int((weight == 0).sum())
    assert (found.weights, found.zeros, found.original) == (5000, zeros, 20_000)
    assert found.sparsity == zeros / 5000 >= 0.9
    assert found.sparse == 4 * entries + math.ceil(5 * entries / 8)
    assert found.tables == 16 * 4
    assert (found.packed_codes, found.packed_gaps) == (math.ceil(entries / 2), math.ceil(5 * entries / 8))
    assert found.packed == found.tables + found.packed_codes + found.packed_gaps
    assert found.huffman_codes + found.huffman_gaps < found.packed_codes + found.packed_gaps
    assert found.huffman == found.tables + found.huffman_codes + found.huffman_gaps
    counts = np.unique(weight, return_counts=True)[1]
    assert found.entropy_bits == pytest.approx(-sum(n * math.log2(n / 5000) for n in counts))
    assert found.entropy_bits / 8 < found.stored == container.records["0.weight"].block_bytes <= found.huffman + 4 + 4


def test_an_unpruned_layer_keeps_all_codes(tmp_path: Path) -> None:
    model = net()
    for scheme in (Affine(granularity="per_channel"), Codebook()):
        plan = mpq.Uniform(bits=4)(mpq.measure(model, scheme, bits=(4,)))
        container = compress(model, plan, tmp_path / "x.mpq")
        found = layer_stages(container, "1.weight")
        weight = container.tensor("1.weight")
        assert found.zeros == int((weight == 0).sum())
        assert (found.packed_codes, found.packed_gaps) == (1000, 0)
        assert found.tables == (16 * 4 if isinstance(scheme, Codebook) else 40 * 4 + 20)
        (own,) = container.parts("1.weight")
        assert found.huffman_codes == coded_bytes(np.bincount(own.symbols, minlength=16))  # type: ignore[union-attr]


def test_layers_in_float_and_totals(tmp_path: Path) -> None:
    model = net()
    plan = with_layer(mpq.Uniform(bits=4)(mpq.measure(model, bits=(4,))), "1", bits=32)
    container = compress(model, plan, tmp_path / "x.mpq")
    assert planned(container) == ["0.weight", "1.weight"]
    first, second = (layer_stages(container, name) for name in planned(container))
    assert (second.original, second.packed, second.huffman, second.tables) == (8000, 8000, 8000, 0)
    assert second.entropy_per_weight == 32
    both = total([first, second])
    assert both.weights == 7000
    assert both.stored == first.stored + second.stored
    assert total([]).sparsity == total([]).entropy_per_weight == 0


def test_a_layer_of_zeros_has_no_entries(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator]
    plan = mpq.Uniform(bits=4)(mpq.measure(model, Codebook(), bits=(4,)))
    found = layer_stages(compress(model, plan, tmp_path / "x.mpq"), "0.weight")
    assert (found.zeros, found.entries, found.packed, found.sparse) == (5000, 0, 64, 0)
