"""A short name for a model's weights: equal for equal weights, whatever file or class they came from."""

import hashlib
from collections.abc import Iterable

from torch import Tensor

from .weights import Weight

SAMPLED = 1024


def fingerprint(weights: Iterable[Weight]) -> str:
    """sha256 over names, shapes and up to 1,024 evenly spread values of the middle row of every layer.

    One row, for training moves them all, so that a checkpoint of any size is recognised without reading it
    whole; names and shapes are compared in full elsewhere. Values are taken as float32, so a float16 and a
    float32 copy of the same float16 weights agree.
    """
    digest = hashlib.sha256()
    for weight in sorted(weights, key=lambda weight: weight.name):
        digest.update(f"{weight.name}{weight.shape}".encode())
        if weight.numel == 0:
            continue
        values = _row(weight, weight.shape[0] // 2)
        digest.update(values[:: max(1, values.numel() // SAMPLED)].cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _row(weight: Weight, row: int) -> Tensor:
    """Along the first axis as stored, whichever axis the channels are on: a file does not know that."""
    values = weight.rows(row, row + 1) if weight.channel_axis == 0 else weight.tensor()[row]
    return values.float().reshape(-1)
