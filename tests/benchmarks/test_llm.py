"""The generated checkpoints have the published numbers of weights, and are files that the libraries read."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpq_plugins import find_weights
from mpq_plugins.checkpoints.shards import INDEX_NAME
from tests.benchmarks import llm

# Parameters in billions: the model cards' of TinyLlama-1.1B and Llama-2-7B; for Mixtral (46.70) 30 blocks fewer.
PUBLISHED = {"1b": 1.100, "7b": 6.738}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_as_published(name: str) -> None:
    total = sum(math.prod(shape) for shape in llm.MODELS[name].shapes().values())
    assert total / 1e9 == pytest.approx(PUBLISHED[name], abs=0.0005)


def test_mixtral_with_all_its_blocks_is_as_published() -> None:
    cut = llm.MODELS["8x7b-2blocks"]
    whole = llm.Llama(32, cut.hidden, cut.inner, cut.heads, cut.key_heads, cut.vocabulary, cut.experts)
    assert sum(math.prod(shape) for shape in whole.shapes().values()) / 1e9 == pytest.approx(46.70, abs=0.005)


@pytest.mark.parametrize("name", ["small", "small-experts"])
def test_a_checkpoint_is_what_its_shapes_say(name: str, tmp_path: Path) -> None:
    shard = 1 << 20
    folder = llm.write(name, tmp_path / "model", shard)
    shapes = llm.MODELS[name].shapes()
    index = json.loads((folder / INDEX_NAME).read_text())
    assert list(index["weight_map"]) == list(shapes)
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        held = load_file(folder / file)
        assert len(held) == 1 or sum(2 * tensor.numel() for tensor in held.values()) <= shard
        assert all(index["weight_map"][own] == file for own in held)
        tensors |= held
    assert {own: tuple(tensor.shape) for own, tensor in tensors.items()} == shapes
    assert sum(2 * tensor.numel() for tensor in tensors.values()) == index["metadata"]["total_size"]
    for tensor in tensors.values():
        assert tensor.dtype == torch.bfloat16
        assert tensor.float().std().item() == pytest.approx(0.02, rel=0.2)
    again = llm.write(name, tmp_path / "again", shard)
    assert all((again / file).read_bytes() == (folder / file).read_bytes() for file in [*files, INDEX_NAME])


def test_its_layers_are_found_as_of_a_language_model(tmp_path: Path) -> None:
    folder = llm.write("small-experts", tmp_path / "model")
    found = {weight.name: weight for weight in find_weights(folder)}
    assert len(found) == 2 + 2 * (4 + 1 + 2 * 8)
    assert {weight.channel_axis for weight in found.values()} == {0}
    skipped = find_weights(folder, skip=["role:embeddings", "role:lm_head", "role:routers"]).skipped
    assert set(skipped) == {"model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
