"""The plan's integers of one layer, some rows at a time, so that memory does not follow the layer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_plugins.checkpoints.readers import RowReader
from mpq_plugins.plans.layers import LayerChoice
from mpq_plugins.simulation.integers import IntegerWeight, integer_weight

CHUNK = 1 << 22  # weights; each takes some 40 bytes while its codes are found


def code_chunks(read: RowReader, choice: LayerChoice) -> Iterator[IntegerWeight]:
    """The integers of a matrix, output channels first, in order; all of it at once where it has one scale.

    Rows have scales of their own otherwise, so that their codes are those of the whole. Raises as integer_weight.
    """
    rows, columns = choice.shape
    step = rows if choice.scheme.granularity == "per_tensor" else max(1, CHUNK // max(1, columns))
    for start in range(0, max(rows, 1), max(step, 1)):
        stop = min(start + step, rows)
        part = choice.model_copy(update={"shape": (stop - start, columns), "numel": (stop - start) * columns})
        yield integer_weight(read(start, stop).reshape(stop - start, columns), part)


@dataclass(frozen=True)
class Scales:
    """Of a whole layer: scale, zero_point: (channels, groups), float32 and int64."""

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, chunks: Iterable[IntegerWeight]) -> "Scales":
        """Those of the chunks, one after the other."""
        return cls.joined([cls(chunk.scale, chunk.zero_point) for chunk in chunks])

    @classmethod
    def joined(cls, parts: Sequence["Scales"]) -> "Scales":
        """Of parts of a layer, one after the other."""
        return cls(torch.cat([part.scale for part in parts]), torch.cat([part.zero_point for part in parts]))

    def repeated(self, groups: int) -> "Scales":
        """The same for so many groups a channel, of which one group now stands for all."""
        if self.scale.shape[1] == groups:
            return self
        return Scales(self.scale.repeat_interleave(groups, 1), self.zero_point.repeat_interleave(groups, 1))


def held_exactly(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every one of these float32 values."""
    return bool((values.to(dtype).float() == values).all())


def exact_dtype(dtype: torch.dtype, *values: Tensor) -> torch.dtype:
    """The model's own dtype where that holds all of these float32 values, and float32 where it does not."""
    return dtype if all(held_exactly(one, dtype) for one in values) else torch.float32


def code_problem(chunks: Iterable[IntegerWeight], codes: Tensor, scales: Scales) -> str | None:
    """How what was read back differs from the plan's integers, in words; None where it does not.

    codes: int8 (channels, inputs); scales: as they are stored, in a dtype in which the plan's are compared.
    """
    start = 0
    for chunk in chunks:
        stop = start + chunk.codes.shape[0]
        problem = chunk.code_problem(codes[start:stop])
        if problem is not None:
            return problem
        expected = Scales(chunk.scale, chunk.zero_point).repeated(scales.scale.shape[1])
        if not scales.scale[start:stop].equal(expected.scale.to(scales.scale.dtype)):
            return "has other scales than the plan's"
        if not scales.zero_point[start:stop].equal(expected.zero_point):
            return "has other zero points than the plan's"
        start = stop
    return None if start == codes.shape[0] else f"has {codes.shape[0]} rows, the plan {start}"
