"""Memory for chunks of weights that goes back to the system when it is freed."""

import mmap
import threading

Buffer = mmap.mmap | bytearray | memoryview

LARGE = 1 << 18  # bytes; below this the heap is faster and what it keeps does not matter


def chunk_buffer(size: int) -> mmap.mmap | bytearray:
    """A writable, zeroed buffer of `size` bytes; a large one is a mapping of its own.

    Chunks taken from the heap would stay there: the small results made between two chunks settle in the hole
    the first one left, so the second does not fit and the heap grows, by gigabytes over a large checkpoint.
    """
    return mmap.mmap(-1, size) if size >= LARGE else bytearray(size)


class Scratch(threading.local):
    """One buffer for each purpose and thread, used again: the first touch of fresh memory costs more than reading."""

    def __init__(self) -> None:
        self._buffers: dict[str, Buffer] = {}

    def take(self, purpose: str, size: int) -> memoryview:
        """`size` bytes that hold anything; what was taken before for the same purpose is written over."""
        if len(self._buffers.get(purpose, b"")) < size:
            self._buffers.pop(purpose, None)
            self._buffers[purpose] = chunk_buffer(size)
        return memoryview(self._buffers[purpose])[:size]
