"""Shards of bounded size, read by the library that everybody reads them with."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpq_plugins.adapters.shared.shard_writer import ShardWriter
from mpq_plugins.checkpoints.checkpoint import open_checkpoint


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 120))
def test_every_tensor_is_in_the_shard_that_the_index_names(sizes: list[int], limit: int) -> None:
    tensors = {f"t{number}": torch.full((size,), number, dtype=torch.int32) for number, size in enumerate(sizes)}
    with TemporaryDirectory() as made:
        folder = Path(made)
        writer = ShardWriter(folder, limit=limit)
        for name, tensor in tensors.items():
            assert writer.put(name, tensor) == 4 * len(tensor)
        writer.finish()
        check(folder, tensors, limit)
        assert writer.total == 4 * sum(sizes)


def check(folder: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    stored = open_checkpoint(folder)  # which refuses an index and shards that disagree
    assert {name: tensor.tensor().tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        return
    document = json.loads(index.read_text())
    assert document["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = {*document["weight_map"].values()}
    assert {path.name for path in folder.iterdir()} == {*files, index.name}
    for file in files:
        held = load_file(folder / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
