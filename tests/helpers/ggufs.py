"""Small GGUF files, written by the package gguf: a llama of one block, and whatever else a test adds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, INNER, VOCABULARY = 64, 256, 40
SHAPES: Mapping[str, tuple[int, ...]] = {
    "token_embd.weight": (VOCABULARY, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (INNER, HIDDEN),
    "blk.0.ffn_up.weight": (INNER, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
}


def values(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def tiny() -> dict[str, NDArray[Any]]:
    """The tensors of a llama of one block, whose embedding is its head."""
    return {name: values(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def write_gguf(
    path: Path, tensors: Mapping[str, NDArray[Any]], types: Mapping[str, str] | None = None, **metadata: int
) -> Path:
    """Float tensors as they are, or as blocks of a type that the package writes; metadata: numbers, `__` for a dot."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_file_type(1)
    writer.add_token_list(["<s>", "a", "\u00e9"])
    writer.add_array("some.numbers", [1, 2, 3])
    for key, number in metadata.items():
        writer.add_uint32(key.replace("__", "."), number)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            number = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(name, gguf.quants.quantize(tensor, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_back(path: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Types and values of a file's tensors, by the package gguf alone."""
    return {
        tensor.name: (
            tensor.tensor_type.name.lower(),
            gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(
                [int(side) for side in tensor.shape[::-1]]
            ),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
