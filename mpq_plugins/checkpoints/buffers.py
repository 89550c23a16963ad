"""Memory for chunks of weights that goes back to the system when it is freed."""

import mmap
from collections.abc import Callable, Hashable

Buffer = mmap.mmap | bytearray | memoryview

LARGE = 1 << 18  # bytes; below this the heap is faster and what it keeps does not matter


def chunk_buffer(size: int) -> mmap.mmap | bytearray:
    """A writable, zeroed buffer of `size` bytes; a large one is a mapping of its own.

    Chunks taken from the heap would stay there: the small results made between two chunks settle in the hole
    the first one left, so the second does not fit and the heap grows, by gigabytes over a large checkpoint.
    """
    return mmap.mmap(-1, size) if size >= LARGE else bytearray(size)


class Scratch:
    """A buffer for each purpose, used again: to touch fresh memory takes longer than to read a file into it."""

    def __init__(self, allocate: Callable[[int], Buffer] = chunk_buffer) -> None:
        self._allocate = allocate
        self._buffers: dict[Hashable, Buffer] = {}

    def take(self, purpose: Hashable, size: int) -> memoryview:
        """`size` bytes that hold anything; what was taken before for the same purpose is written over."""
        if purpose not in self._buffers or len(self._buffers[purpose]) < size:
            self._buffers.pop(purpose, None)
            self._buffers[purpose] = self._allocate(size)
        return memoryview(self._buffers[purpose])[:size]
