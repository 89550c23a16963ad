"""Cached tensors: in memory up to a limit, beyond it in files that are mapped into memory."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..errors import SourceError

IMAGES = 4  # dimensions
CACHE = "cache-"  # how folders of cached tensors are named


class Cache:
    """Rows of several columns, appended batch by batch; `memory` bytes of them all stay in memory.

    folder: where files go, in a temporary one inside it whose name begins with `name`; by default the system's. A
    context manager, at whose end the files are gone; tensors of it live on until they are let go.
    """

    def __init__(self, memory: int, folder: Path | None = None, name: str = f"mpq-{CACHE}") -> None:
        self._left, self._parent, self._name = memory, folder, name
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> bool:
        """Whether anything had to go to a file."""
        return self._folder is not None

    def column(self) -> "Column":
        """A new column."""
        return Column(self)

    def take(self, count: int) -> bool:
        """Whether so many bytes more fit into memory, and are now counted."""
        if count > self._left:
            return False
        self._left -= count
        return True

    def give_back(self, count: int) -> None:
        """Bytes that have left memory."""
        self._left += count

    def new_file(self) -> Path:
        """A name for a file of a column."""
        if self._folder is None:
            try:
                self._folder = tempfile.TemporaryDirectory(prefix=self._name, dir=self._parent)
            except OSError as error:
                raise SourceError(
                    f"{self._parent or tempfile.gettempdir()}: cannot keep the blocks' inputs there ({error.strerror})"
                ) from error
        self._files += 1
        return Path(self._folder.name) / str(self._files)


class Column:
    """Tensors of one shape but for the first dimension, and one dtype, appended and then read as one.

    Images (4-D) are kept channels last, as convolutions on a CPU like to have them.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._parts: list[Tensor] = []
        self._file: Path | None = None
        self._rows = 0
        self._like: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Copy rows (n, ...) into the cache. Raises SourceError where a disk is full."""
        plain = rows.detach().movedim(1, -1) if rows.dim() == IMAGES else rows.detach()
        copied = plain.to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._rows += len(copied)
        self._like = copied[:0]
        if self._file is None and self._cache.take(copied.nbytes):
            self._parts.append(copied)
            return
        if self._file is None:
            self._file = self._cache.new_file()
            self._write(self._parts)
            self._cache.give_back(sum(part.nbytes for part in self._parts))
            self._parts = []
        self._write([copied])

    def tensor(self) -> Tensor:
        """All rows, on the CPU; a file's are read when they are used."""
        whole = self._whole()
        return whole.movedim(-1, 1) if whole.dim() == IMAGES else whole

    def _whole(self) -> Tensor:
        assert self._like is not None
        if self._file is None:
            whole = torch.cat(self._parts)
            self._parts = [whole]
            return whole
        shape = (self._rows, *self._like.shape[1:])
        count = math.prod(shape)
        if not count:
            return self._like.new_empty(shape)
        mapped = torch.from_file(str(self._file), shared=False, size=count, dtype=self._like.dtype)
        return mapped.reshape(shape)

    def _write(self, parts: Sequence[Tensor]) -> None:
        assert self._file is not None
        try:
            with self._file.open("ab") as file:
                for part in parts:
                    if part.numel():
                        file.write(part.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise SourceError(
                f"{self._file.parent}: cannot keep the blocks' inputs there ({error.strerror}); give a folder with "
                "more room (TMPDIR, or store=), fewer batches, or more memory="
            ) from error
