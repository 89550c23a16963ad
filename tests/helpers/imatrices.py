"""Importance matrices as llama-imatrix writes them, by the package gguf."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


def write_imatrix(
    path: Path, inputs: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], chunk: int | None = None
) -> Path:
    """inputs: tensor -> sums of x_j^2, (columns,) or (matrices, columns), and positions, (matrices,)."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    if chunk is not None:
        writer.add_uint32("imatrix.chunk_size", chunk)
    for name, (sums, counts) in inputs.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", _counts(np.asarray(counts, np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _counts(counts: NDArray[Any]) -> NDArray[Any]:
    """ggml leaves out outer sides of 1."""
    return counts if len(counts) == 1 else counts.reshape(-1, 1)
