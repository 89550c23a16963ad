"""Checkpoints with the tensors of real language models and seeded random values, in shards, as hubs keep them.

    python -m tests.benchmarks.llm 7b FOLDER

Shapes: TinyLlama-1.1B (arXiv 2401.02385), Llama-2-7B (arXiv 2307.09288), and Mixtral-8x7B (arXiv 2401.04088) cut to
two of its 32 blocks, its eight experts stacked in one tensor for each projection, as fused implementations store them.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpq_plugins.checkpoints.shards import INDEX_NAME

SHARD = 2 << 30  # bytes
POOL = 1 << 24  # random values that tensors are filled from, each beginning elsewhere

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama-like model; experts: 0 for none."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    experts: int = 0

    def shapes(self) -> Shapes:
        """Tensor names and shapes, in a checkpoint's order."""
        keys = self.hidden // self.heads * self.key_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for block in range(self.blocks):
            prefix = f"model.layers.{block}"
            for name, rows in (("q_proj", self.hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", self.hidden)):
                shapes[f"{prefix}.self_attn.{name}.weight"] = (rows, self.hidden)
            if self.experts:
                shapes[f"{prefix}.mlp.gate.weight"] = (self.experts, self.hidden)
                shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (self.experts, 2 * self.inner, self.hidden)
                shapes[f"{prefix}.mlp.experts.down_proj"] = (self.experts, self.hidden, self.inner)
            else:
                shapes[f"{prefix}.mlp.gate_proj.weight"] = (self.inner, self.hidden)
                shapes[f"{prefix}.mlp.up_proj.weight"] = (self.inner, self.hidden)
                shapes[f"{prefix}.mlp.down_proj.weight"] = (self.hidden, self.inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (self.hidden,)
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


MODELS = {
    "1b": Llama(22, 2048, 5632, 32, 4, 32000),
    "7b-8blocks": Llama(8, 4096, 11008, 32, 32, 32000),  # as wide as 7b, and a quarter as deep
    "7b": Llama(32, 4096, 11008, 32, 32, 32000),
    "8x7b-2blocks": Llama(2, 4096, 14336, 32, 8, 32000, experts=8),
    "small": Llama(2, 256, 704, 4, 4, 512),
    "small-experts": Llama(2, 256, 448, 4, 2, 512, experts=8),
}


def write(name: str, folder: Path, shard: int = SHARD) -> Path:
    """Write a model's checkpoint in bfloat16 into a new folder, a shard of at most `shard` bytes at a time."""
    folder.mkdir(parents=True)
    model = MODELS[name]
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    values = memoryview(pool.view(torch.uint8).numpy().data)
    groups = list(_shards(model.shapes(), shard))
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_shard(folder / file, shapes, values)
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(2 * math.prod(shape) for shape in model.shapes().values())
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": model.hidden}))
    return folder


def _shards(shapes: Shapes, most: int) -> Iterator[Shapes]:
    own: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if own and size + length > most:
            yield own
            own, size = {}, 0
        own[name] = shape
        size += length
    yield own


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], values: memoryview) -> None:
    """By hand, for the library wants all of a shard's tensors in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for position, shape in enumerate(shapes.values()):
            left, begin = 2 * math.prod(shape), 2 * 65_537 * (position + 1) % len(values)
            while left:
                written = file.write(values[begin : begin + left])
                left, begin = left - written, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.model, options.folder)


if __name__ == "__main__":
    main()
