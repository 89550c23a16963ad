"""A short name for a model's weights: equal for equal weights, whatever file or class they came from."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def layer_digest(name: str, shape: Sequence[int], low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """sha256 over a layer's name, shape, and the least and greatest weight of every output channel, (channels,).

    Extremes are exact whatever adds the sums up and in whatever order, they come with the measurement for
    nothing, and hardly any change of a channel leaves both as they were. A transposed convolution read from a
    bare file, which does not know its channels, has another digest than the module's.
    """
    digest = hashlib.sha256(f"{name}{tuple(shape)}".encode())
    digest.update(np.asarray(low, np.float32).tobytes() + np.asarray(high, np.float32).tobytes())
    return digest.hexdigest()


def fingerprint(digests: Iterable[str]) -> str:
    """One name for the digests of all layers, in any order."""
    return f"sha256:{hashlib.sha256(''.join(sorted(digests)).encode()).hexdigest()}"
