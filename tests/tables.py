"""Tables made of plain numbers, for tests that need no weights."""

import numpy as np

from mpq_plugins import Affine, LayerStats, LayerTable

BITS = tuple(range(1, 9))


def table(curves: dict[str, list[float]], metric: str = "relative", channels: int = 4) -> LayerTable:
    """One linear layer (channels, 10) per curve of errors at 1 to 8 bits."""
    layers = tuple(
        LayerStats(
            name, "linear", (channels, 10), 0, 1.0, np.ones(channels), {metric: np.array(curve)}
        )
        for name, curve in curves.items()
    )  # fmt: skip
    return LayerTable(layers, Affine(), BITS, (metric,), False, "sha256:test")
