"""Weights as rows, a chunk of output channels at a time, the next one read while the last is worked at."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.buffers import Buffer, Scratch, chunk_buffer
from .handles import Weight

CHUNK = 1 << 21  # weights in memory at a time (4 MiB of bfloat16); whole output channels, so at least one

Array = NDArray[np.float64]
Op = Callable[[Tensor], Array]
"""What is asked of each chunk: rows (channels, elements) -> float64, one or more rows. Another process can be
sent it, so no closure."""
Chunk = tuple[Weight, int, int]
"""Output channels of a weight, from and to."""

_OWN = threading.local()


def chunks(weight: Weight) -> list[Chunk]:
    """Runs of output channels of about CHUNK weights; a part of the weight that starts with one has the same."""
    per = chunk_channels(weight)
    starts = range(0, weight.channels, per)
    return [(weight, start, min(start + per, weight.channels)) for start in starts] or [(weight, 0, 0)]


def chunk_channels(weight: Weight) -> int:
    """Output channels in a chunk."""
    return max(1, CHUNK // max(1, weight.numel // max(1, weight.channels)))


def read(parts: Sequence[Chunk], device: torch.device | None = None) -> Iterator[Tensor]:
    """Each chunk as contiguous rows, float32 or bfloat16, good until the next.

    What a file's chunks have to be waited for is read by a thread of its own while the caller works at the chunk
    before. What is in memory anyway is read here: with the processors busy, a thread more would only be in the way.
    """
    scratch = _scratch(device)
    with ThreadPoolExecutor(1, "mpq-read") as reader:
        coming = _coming(parts, 0, scratch, reader)
        for position in range(len(parts)):
            rows = coming if isinstance(coming, Tensor) else coming.result()
            if position + 1 < len(parts):
                coming = _coming(parts, position + 1, scratch, reader)
            yield _as_rows(rows, scratch, device)


def over_chunks(weight: Weight, device: torch.device | None = None) -> Callable[[Op], Array]:
    """Ask something of every chunk; answers joined along the first axis. A single chunk is read once for all."""
    parts = chunks(weight)
    if len(parts) == 1:
        (rows,) = read(parts, device)
        return lambda op: op(rows)
    return lambda op: np.concatenate([op(rows) for rows in read(parts, device)])


def _coming(
    parts: Sequence[Chunk], position: int, scratch: Scratch, reader: ThreadPoolExecutor
) -> Tensor | Future[Tensor]:
    """A chunk's rows as they are stored, in one of two buffers in turn, at once or as soon as they are read."""
    weight, start, stop = parts[position]
    allocate = partial(scratch.take, position % 2)
    here = weight.read_rows.at_once(start, stop, allocate)
    return reader.submit(weight.rows, start, stop, allocate) if here is None else here


def _as_rows(rows: Tensor, scratch: Scratch, device: torch.device | None) -> Tensor:
    """Where they are to be measured, in a dtype that the kernel reads."""
    if device is not None and device != rows.device:
        return rows.to(device, non_blocking=True).contiguous()
    if rows.dtype != torch.float16 or rows.device.type != "cpu" or not rows.numel():
        return rows.contiguous()
    values = torch.frombuffer(scratch.take(torch.float32, 4 * rows.numel()), dtype=torch.float32).view(rows.shape)
    return values.copy_(rows)


def _scratch(device: torch.device | None) -> Scratch:
    """This thread's buffers; for CUDA in memory that can be copied from while this thread goes on."""
    pinned = device is not None and device.type == "cuda"
    known: dict[bool, Scratch] = _OWN.__dict__.setdefault("scratch", {})
    return known.setdefault(pinned, Scratch(_pinned if pinned else chunk_buffer))


def _pinned(size: int) -> Buffer:
    return memoryview(torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy())  # type: ignore[arg-type]  # it is one
