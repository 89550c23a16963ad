"""llama.cpp's importance matrices: of each matrix sum x_j^2 of its inputs, and over how many positions.

A GGUF file with NAME.in_sum2, (matrices, columns), and NAME.counts, (matrices, 1); stacks of experts have several
matrices. `imatrix.chunk_size` says how many positions a chunk of text has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.gguf_files import gguf_tensors
from ..checkpoints.gguf_header import is_gguf, read_gguf
from ..checkpoints.readers import StoredTensor
from ..errors import FormatError, SettingError
from ..plans.names import layer_name

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK = "imatrix.chunk_size"
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Of one tensor: sums of x_j^2, (matrices, columns), and how many positions each matrix saw, (matrices,)."""

    sums: Array
    counts: Array


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix; tensors: by their names without `.weight`; chunk: positions of a chunk of text."""

    path: Path
    tensors: Mapping[str, Inputs]
    chunk: int

    @property
    def positions(self) -> float:
        """How many positions of text the whole model saw: no matrix saw more."""
        return max(float(inputs.counts.max()) for inputs in self.tensors.values())

    def find(self, names: Iterable[str]) -> tuple[str, int] | None:
        """The tensor that a layer of these names is in, and which matrix of it: experts are NAME.0, NAME.1 ..."""
        for name in names:
            if name in self.tensors:
                return name, 0
            stack, _, number = name.rpartition(".")
            if stack in self.tensors and number.isascii() and number.isdecimal() and len(number) < 10:
                return stack, int(number)
        return None

    def moments(self, tensor: str, matrix: int) -> Array | None:
        """h_j = 1/N sum_n,p x_npj^2 of one matrix over chunks n and positions p, (columns,); None if none reached it.

        What every position passes counts by its own number of positions. An expert sees some of them alone, and its
        error is in the output there alone, so that it counts by all positions.
        """
        inputs = self.tensors[tensor]
        count = inputs.counts[matrix]
        if not count:
            return None
        seen = count if len(inputs.counts) == 1 else self.positions
        moments: Array = inputs.sums[matrix] / seen * self.chunk
        return moments


def holds_imatrix(path: Path) -> bool:
    """Whether a GGUF file holds sums of inputs."""
    return is_gguf(path) and any(entry.name.endswith(SUMS) for entry in read_gguf(path).tensors)


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix. Raises FormatError for another file, or one whose sums make no sense, SourceError."""
    if not is_gguf(path):
        raise FormatError(
            f"{path}: not a GGUF file, as llama-imatrix writes; of the .dat file of an earlier one, make it: "
            "llama-imatrix --in-file OLD.dat -o NEW.gguf"
        )
    stored = gguf_tensors(path)
    chunk = read_gguf(path).metadata.get(CHUNK, 1)
    if type(chunk) is not int or chunk < 1:
        raise FormatError(f"{path}: {CHUNK} is {chunk!r:.40}; a number of positions from 1 up")
    tensors = {
        layer_name(name.removesuffix(SUMS)): _inputs(path, name.removesuffix(SUMS), stored)
        for name in stored
        if name.endswith(SUMS)
    }
    if not tensors:
        raise FormatError(
            f"{path}: a GGUF file without any NAME{SUMS}, so no importance matrix; llama-imatrix makes one"
        )
    made = Imatrix(path, tensors, chunk)
    if not made.positions:
        raise SettingError(f"{path}: saw no text at all; run llama-imatrix on more")
    return made


def _inputs(path: Path, name: str, stored: Mapping[str, StoredTensor]) -> Inputs:
    if name + COUNTS not in stored:
        raise FormatError(f"{path}: has {name}{SUMS} and no {name}{COUNTS}; make the file again")
    sums, counts = _values(path, name + SUMS, stored), _values(path, name + COUNTS, stored).reshape(-1)
    sums = sums.reshape(-1, sums.shape[-1])
    if len(sums) != len(counts) or not sums.size:
        raise FormatError(
            f"{path}: {name}{SUMS} is of {len(sums)} matrices, and {name}{COUNTS} of {len(counts)}; make the file again"
        )
    return Inputs(sums, counts)


def _values(path: Path, name: str, stored: Mapping[str, StoredTensor]) -> Array:
    """A tensor of sums or counts, with two axes. Raises FormatError for values that neither can have."""
    tensor = stored[name]
    if tensor.foreign or not tensor.dtype.is_floating_point or not 1 <= len(tensor.shape) <= 2:
        raise FormatError(
            f"{path}: {name} is {tensor.foreign or tensor.dtype} of shape {list(tensor.shape)}; no matrix"
        )
    values: Array = tensor.tensor().double().numpy()
    if not np.isfinite(values).all() or (values < 0).any():
        raise FormatError(f"{path}: {name} has values that are negative, infinite or NaN; make the file again")
    return values
