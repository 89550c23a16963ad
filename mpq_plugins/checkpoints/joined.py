"""Experts that a checkpoint keeps one below the other in a single matrix, as DBRX's does, seen as the stack they are.

How many there are says the router beside them, which has an output for each. Without it the matrix stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..plans.names import JOINED
from .buffers import chunk_buffer
from .readers import Allocate, RowReader, StoredTensor

ROUTER = "router.layer.weight"


def with_stacks(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by name, those of joined experts (experts x rows, columns) as (experts, rows, columns)."""
    return {name: _stack(name, tensor, stored) for name, tensor in stored.items()}


def _stack(name: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor]) -> StoredTensor:
    match = JOINED.search(name)
    router = stored.get(f"{name[: match.start()]}{match[1]}{ROUTER}") if match is not None else None
    if router is None or len(tensor.shape) != 2 or len(router.shape) != 2:
        return tensor
    (experts, hidden), (joined, columns) = router.shape, tensor.shape
    if not experts or joined % experts or columns != hidden:
        return tensor
    rows = joined // experts
    return replace(tensor, shape=(experts, rows, columns), read_rows=StackedRows(tensor.read_rows, rows))


@dataclass(frozen=True)
class StackedRows:
    """A matrix's rows as those of a stack, whose first axis are the experts; rows: of each expert."""

    matrix: RowReader
    rows: int

    def __call__(self, start: int, stop: int, allocate: Allocate = chunk_buffer) -> Tensor:
        """See RowReader."""
        return self.matrix(start * self.rows, stop * self.rows, allocate).reshape(stop - start, -1)

    def at_once(self, start: int, stop: int, allocate: Allocate) -> Tensor | None:
        """See RowReader."""
        read = self.matrix.at_once(start * self.rows, stop * self.rows, allocate)
        return None if read is None else read.reshape(stop - start, -1)

    def part(self, index: int, transposed: bool) -> RowReader:
        """See RowReader."""
        return self.matrix.cut(index * self.rows, (index + 1) * self.rows).along(int(transposed))

    def along(self, axis: int) -> RowReader:
        """They are along the experts already."""
        raise NotImplementedError

    def cut(self, start: int, stop: int) -> "StackedRows":
        """See RowReader."""
        return replace(self, matrix=self.matrix.cut(start * self.rows, stop * self.rows))

    def signature(self) -> str:
        """See RowReader."""
        return f"{self.matrix.signature()} {self.rows}"
