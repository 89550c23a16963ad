"""Numbers as the page holds them: eight bytes each, or just as many bits as they need, in base64."""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def doubles(values: Sequence[Array] | Array) -> dict[str, Any]:
    """Numbers to the last bit, infinities too, in half the room of their digits.

    Args:
        values: Numbers of any shape.

    Returns:
        The shape, and base64 of little-endian float64 in C order.

    Examples:
        >>> doubles(np.array([1.0]))
        {'shape': [1], 'f64': 'AAAAAAAA8D8='}
    """
    array = np.ascontiguousarray(values, np.float64)
    return {"shape": list(array.shape), "f64": base64.b64encode(array.astype("<f8").tobytes()).decode()}


def permutations(orders: Iterable[NDArray[np.intp]]) -> str:
    """Several permutations of 0..n-1, each entry in the bits that n-1 needs, one after another.

    Args:
        orders: The permutations. Their lengths are not kept: the reader knows them.

    Returns:
        Base64; of each entry its highest bit first.

    Examples:
        >>> permutations([np.array([1, 0, 2, 3])])  # 01 00 10 11
        'Sw=='
    """
    bits = [_bits(order) for order in orders]
    return base64.b64encode(np.packbits(np.concatenate(bits) if bits else np.zeros(0, np.uint8)).tobytes()).decode()


def _bits(order: NDArray[np.intp]) -> NDArray[np.uint8]:
    width = max(0, len(order) - 1).bit_length()
    places = np.arange(width - 1, -1, -1)
    return ((np.asarray(order)[:, None] >> places) & 1).astype(np.uint8).ravel()
