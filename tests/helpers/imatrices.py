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
    """inputs: tensor -> sums of x_j^2, (matrices, columns), and positions, (matrices,)."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    if chunk is not None:
        writer.add_uint32("imatrix.chunk_size", chunk)
    for name, (sums, counts) in inputs.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
