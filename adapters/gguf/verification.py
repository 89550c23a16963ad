"""Reading a GGUF file back: every block, every copied byte and all metadata, against the plan and the source."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from mpq_plugins.checkpoints.gguf_blocks import dequantize_rows
from mpq_plugins.checkpoints.gguf_header import GGUFHeader, TensorEntry, read_gguf
from mpq_plugins.checkpoints.readers import RowReader
from mpq_plugins.common.checks import path_of
from mpq_plugins.common.progress import Progress
from mpq_plugins.common.text import first_few
from mpq_plugins.errors import SourceError, VerifyError
from mpq_plugins.plans.ggml import TYPES
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.plans.plan import Plan
from mpq_plugins.quantization.ggml import rounded_rows

from ..contract import LayerCheck
from ..shared.layer_codes import code_chunks
from .blocks import Bytes, block_codes, unpacked
from .checks import Opened, Target, opened
from .encoding import encoded, matrices, row_chunks
from .layout import copied, layout, span
from .writing import Meter

Held = Callable[[int, int], Bytes]
"""Rows of blocks, from and to, as a file holds them."""


def verify(exported: Path, plan: Plan, source: Path, *, progress: Progress | None = None) -> tuple[LayerCheck, ...]:
    """Read a written file back: types, codes and scales of planned layers, and all else to the byte.

    Args:
        exported: What `export` wrote.
        plan: The plan.
        source: The GGUF file that it was written from.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        A check for each planned layer that is stored as codes; `stored` is ggml's type.

    Raises:
        VerifyError: The file does not hold the plan. The message lists what is wrong.
        MismatchError: The plan is another model's.
        SourceError: A file cannot be read.
    """
    made, found = opened(plan, path_of("source", source)), read_gguf(path_of("exported", exported))
    meter = Meter(made, progress)
    problems = [*_header_problems(made, found)]
    entries = {entry.name: entry for entry in found.tensors}
    checks: list[LayerCheck] = []
    for target in made.targets if not problems else ():
        problem = _problem(made, target, found, entries[target.entry.name], meter)
        if problem is not None:
            problems.append(f"{target.entry.name!r} {problem}")
        elif target.kind is not None and target.kind in TYPES:
            checks += [LayerCheck.of(choice, target.kind) for choice in target.choices]
    if problems:
        raise VerifyError(f"{exported} does not hold the plan: {first_few(problems)}")
    meter.finish()
    return tuple(checks)


def _header_problems(made: Opened, found: GGUFHeader) -> Iterator[str]:
    """Other metadata, or tensors of other names, shapes and types."""
    expected = layout(made.header, made.targets)
    start = found.fields[0].start if found.fields else 0
    stop = found.fields[-1].stop if found.fields else 0
    told = b"".join(copied(found.path, start, stop))
    if told not in expected.head:
        yield "its metadata is not the source's"
    for wanted, held in zip_longest(expected.entries, found.tensors):
        if held is None:
            yield f"{wanted.name!r} is missing"
        elif wanted is None or wanted.name != held.name:
            yield f"{held.name!r} is no tensor of the source's at its place"
        elif (wanted.shape, wanted.type) != (held.shape, held.type):
            yield (
                f"{held.name!r} is {held.type_name} of shape {list(held.shape)}, and should be {wanted.type_name} of "
                f"{list(wanted.shape)}"
            )


def _problem(made: Opened, target: Target, found: GGUFHeader, entry: TensorEntry, meter: Meter) -> str | None:
    """How a tensor differs from what it should be, in words."""
    held = copied(found.path, *span(found, entry))
    if target.kind is None:
        same = _joined(copied(made.header.path, *span(made.header, target.entry)), held)
        return None if same else "is not the source's own, and the plan leaves it alone"
    if target.kind == "f16":
        same = _joined((part.tobytes() for part in encoded(target, meter)), held)
        return None if same else "is not the source's in half precision"
    return _block_problem(target, target.kind, found, entry, meter)


def _block_problem(target: Target, kind: str, found: GGUFHeader, entry: TensorEntry, meter: Meter) -> str | None:
    """How blocks differ: values of what ggml rounds, codes and scales of what the plan does."""
    at = span(found, entry)[0]
    for choice, read in matrices(target):
        meter(choice)
        width = choice.shape[1] // TYPES[kind].weights * TYPES[kind].size
        same = _same_values if target.rounds else _same_codes
        if not same(choice, read, kind, partial(_rows, found.path, at, width)):
            what = f"values than ggml's {kind}" if target.rounds else "codes or scales than the plan's"
            return f"has other {what} of {choice.name!r}"
        at += choice.shape[0] * width
    return None


def _same_values(choice: LayerChoice, read: RowReader, kind: str, held: Held) -> bool:
    start = 0
    for part in row_chunks(choice, read):
        blocks, start = held(start, start + len(part)), start + len(part)
        if not np.array_equal(dequantize_rows(blocks, kind), rounded_rows(part.float().numpy(), kind)):
            return False
    return True


def _same_codes(choice: LayerChoice, read: RowReader, kind: str, held: Held) -> bool:
    start = 0
    for part in code_chunks(read, choice):
        blocks, start = held(start, start + len(part.codes)), start + len(part.codes)
        if not unpacked(blocks, kind).same_as(block_codes(part, kind, choice)):
            return False
    return True


def _rows(path: Path, at: int, width: int, start: int, stop: int) -> Bytes:
    """Rows of a matrix of blocks that begins at a byte of the file."""
    data = b"".join(copied(path, at + start * width, at + stop * width))
    return np.frombuffer(data, np.uint8).reshape(stop - start, width)


def _joined(one: Iterator[bytes], other: Iterator[bytes]) -> bool:
    """Whether two streams of bytes are the same, however they are cut."""
    first, second = b"", b""
    try:
        while True:
            first = first or next(one, b"")
            second = second or next(other, b"")
            if not first or not second:
                return not first and not second
            common = min(len(first), len(second))
            if first[:common] != second[:common]:
                return False
            first, second = first[common:], second[common:]
    except OSError as error:
        raise SourceError(f"a file cannot be read ({error.strerror or error})") from error
