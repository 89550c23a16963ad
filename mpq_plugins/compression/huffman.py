"""Huffman's code for symbols 0 .. n - 1: the paper's third stage (arXiv 1510.00149, sec. 4).

Codes are canonical (shorter first, then by symbol) and at most LONGEST bits, so a table of their lengths, LENGTH_BITS
for each symbol, says all of them. It comes first; the codes follow, highest bit first.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .bitpack import Codes, pack, packed_bytes, unpack

LONGEST = 15
LENGTH_BITS = 4  # of a code's length in the table, 0 for a symbol that does not occur

Lengths = NDArray[np.int64]


def entropy_bits(counts: Sequence[int] | NDArray[np.int64]) -> float:
    """Bits that symbols of these counts take at the least: sum of n log2(N / n)."""
    weights = np.asarray(counts, np.float64)
    weights = weights[weights > 0]
    return float((weights * np.log2(weights.sum() / weights)).sum())


def coded_bytes(counts: Sequence[int] | NDArray[np.int64]) -> int:
    """Bytes that symbols of these counts take, with the table of lengths, without coding them."""
    frequencies = np.asarray(counts, np.int64)
    return -(-int(code_lengths(frequencies) @ frequencies) // 8) + packed_bytes(len(frequencies), LENGTH_BITS)


def code_lengths(counts: Sequence[int] | NDArray[np.int64]) -> Lengths:
    """Bits of each symbol's code, (symbols,): of least total length, but for the limit of LONGEST.

    Where a code would be longer, counts are halved (none to 0) and the tree is made anew, which costs next to nothing:
    such symbols occur once in 2^15 or less.
    """
    frequencies = np.asarray(counts, np.int64)
    lengths = _tree_depths(frequencies)
    while lengths.max(initial=0) > LONGEST:
        frequencies = (frequencies + 1) // 2
        lengths = _tree_depths(frequencies)
    return lengths


def encode(symbols: Codes, alphabet: int) -> bytes:
    """Symbols (n,) below `alphabet`, itself at most 2^LONGEST, as coded_bytes of their counts."""
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    words = _canonical_words(lengths)
    spans = lengths[symbols]
    ends = np.cumsum(spans)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(lengths.max(initial=0)):  # counted from a code's last bit
        having = spans > place
        bits[ends[having] - 1 - place] = words[symbols[having]] >> place & 1
    return pack(lengths.astype(np.uint8), LENGTH_BITS) + np.packbits(bits).tobytes()


def decode(data: bytes | memoryview, alphabet: int, count: int) -> Codes | None:
    """Undo encode: (count,), by a table of 2^LONGEST entries and one look-up a symbol; None for damaged data."""
    from .kernel_huffman import walk

    table = packed_bytes(alphabet, LENGTH_BITS)
    if len(data) < table or count > 8 * (len(data) - table):
        return None
    lengths = unpack(data[:table], LENGTH_BITS, alphabet).astype(np.int64)
    order = _ordered(lengths)
    share = 2 ** (LONGEST - lengths[order])
    if share.sum() > 1 << LONGEST:
        return None
    symbol_of, length_of = np.zeros(1 << LONGEST, np.uint16), np.ones(1 << LONGEST, np.uint8)
    symbol_of[: share.sum()], length_of[: share.sum()] = np.repeat(order, share), np.repeat(lengths[order], share)
    symbols: Codes = np.zeros(count, np.dtype(np.uint8 if alphabet <= 256 else np.uint16))
    bits = walk(np.frombuffer(bytes(data[table:]) + bytes(2), np.uint8), symbol_of, length_of, LONGEST, symbols)
    return symbols if -(-bits // 8) == len(data) - table else None


def _tree_depths(counts: Lengths) -> Lengths:
    """Depths in the tree that joins the two rarest until one is left; a single symbol takes one bit all the same."""
    present = np.flatnonzero(counts).tolist()
    lengths = np.zeros(len(counts), np.int64)
    heap: list[tuple[int, int, list[int]]] = [(int(counts[s]), s, [s]) for s in present]
    if len(heap) == 1:
        lengths[present] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, tie, left), (second, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left] += 1
        lengths[right] += 1
        heapq.heappush(heap, (first + second, tie, left + right))
    return lengths


def _ordered(lengths: Lengths) -> NDArray[np.int64]:
    """The symbols that occur, by the length of their code, then by number."""
    order = np.lexsort((np.arange(len(lengths)), lengths))
    return order[lengths[order] > 0]


def _canonical_words(lengths: Lengths) -> Lengths:
    """Each symbol's code as a number of `lengths` bits, highest bit first."""
    order = _ordered(lengths)
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(2 ** (LONGEST - lengths[order]))[:-1]))
    words = np.zeros(len(lengths), np.int64)
    words[order] = starts[: len(order)] >> (LONGEST - lengths[order])
    return words
