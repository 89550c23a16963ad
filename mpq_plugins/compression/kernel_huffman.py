"""The compiled loop of Huffman decoding. Importing this module imports numba."""

import numpy as np

from ..quantization.exactly import exactly


@exactly
def walk(data, symbol_of, length_of, longest, symbols):  # type: ignore[no-untyped-def]
    """Fill `symbols` from `data`, highest bit first, which has two bytes more than it needs; the bits that took.

    Damaged data may come to their end too soon: then what is returned is more than there is.
    """
    position = np.int64(0)
    shift = 24 - longest
    for i in range(len(symbols)):
        byte = position >> 3
        if byte + 2 >= len(data):
            return position + 24
        window = np.int64(data[byte]) << 16 | np.int64(data[byte + 1]) << 8 | np.int64(data[byte + 2])
        ahead = (window << (position & 7) & 0xFFFFFF) >> shift
        symbols[i] = symbol_of[ahead]
        position += length_of[ahead]
    return position
