"""Tables made of plain numbers, for tests that need no weights."""

import dataclasses

import numpy as np

from mpq_plugins import Affine, LayerStats, LayerTable, Piecewise
from mpq_plugins.scheme import Scheme

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


def norms_table(
    importances: list[float], norms: list[list[float]], scheme: Scheme | None = None, per_channel: int = 10
) -> LayerTable:
    """One linear layer per importance F_l with these channel norms F_c; errors halve with every bit."""
    curve = np.array([0.5**b for b in BITS])
    layers = tuple(
        LayerStats(
            f"layer{i}", "linear", (len(own), per_channel), 0, importance, np.array(own, np.float64),
            {"relative": curve, "mse": curve**2}, {"relative": np.outer(curve, np.ones(len(own)))},
        )
        for i, (importance, own) in enumerate(zip(importances, norms, strict=True))
    )  # fmt: skip
    scheme = scheme or Piecewise(granularity="per_channel")
    return LayerTable(layers, scheme, BITS, ("relative", "mse"), False, "sha256:test")


def contents(value: object) -> object:
    """All that a table holds as plain values that `==` compares to the last bit."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if dataclasses.is_dataclass(value):
        return [contents(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return {name: contents(own) for name, own in value.items()}
    return [contents(own) for own in value] if isinstance(value, tuple | list) else value
