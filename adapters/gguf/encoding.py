"""The bytes that stand for a planned tensor, some rows at a time, so that memory does not follow the tensor."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import RowReader
from mpq_plugins.errors import SettingError, WeightError
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.quantization.ggml import quantize_rows
from mpq_plugins.simulation.floats import as_float
from mpq_plugins.weights.dtypes import check_weight

from ..shared.layer_codes import code_chunks
from .blocks import Bytes, block_codes, packed
from .checks import Target

CHUNK = 1 << 22  # weights


def matrices(target: Target) -> Iterator[tuple[LayerChoice, RowReader]]:
    """The layers of a tensor: itself, or each expert of a stack, in order."""
    reader = target.stored.read_rows
    if len(target.choices) == 1 and len(target.entry.shape) == 2:
        yield target.choices[0], reader
        return
    for number, choice in enumerate(target.choices):
        yield choice, reader.part(number, False)


def row_chunks(choice: LayerChoice, read: RowReader) -> Iterator[Tensor]:
    """A layer's rows, as they are stored, in order. Raises WeightError for NaN, infinity, and other dtypes."""
    rows, columns = choice.shape
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = read(start, min(start + step, rows))
        check_weight(part, choice.name)
        yield part


def encoded(target: Target, starts: Callable[[LayerChoice], None]) -> Iterator[Bytes]:
    """The tensor's bytes, in order; starts: told before each layer. Raises SettingError and WeightError by name."""
    assert target.kind is not None
    for choice, read in matrices(target):
        starts(choice)
        if target.kind == "f16":
            for part in row_chunks(choice, read):
                yield _bytes(as_float(part.float(), 16, choice.name).to(torch.float16))
        elif target.rounds:
            for part in row_chunks(choice, read):
                yield _rounded(part, target.kind, choice)
        else:
            for chunk in code_chunks(read, choice):
                yield packed(block_codes(chunk, target.kind, choice), target.kind)


def _rounded(part: Tensor, kind: str, choice: LayerChoice) -> Bytes:
    try:
        return quantize_rows(part.float().numpy(), kind)
    except (SettingError, WeightError) as error:
        raise type(error)(f"layer {choice.name!r}: {error}") from error


def _bytes(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(flat)
