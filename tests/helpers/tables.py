"""Tables made of plain numbers, for tests that need no weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mpq_plugins import Affine, LayerStats, LayerTable, Piecewise
from mpq_plugins.common.checksum import checksum_text, sealed
from mpq_plugins.plans.scheme import Scheme

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


def resealed(path: Path, arrays: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A table's file with arrays replaced (None removes one) and fields of its description changed, those that it lacks
    in its first layer; under right checksums, as only somebody who knows the format makes them."""
    with safe_open(path, "numpy") as file:
        found = {name: file.get_tensor(name) for name in sorted(file.keys())} | (arrays or {})
        metadata = dict(file.metadata())
    description = json.loads(metadata["table"])
    for key, value in changes.items():
        (description if key in description else description["layers"][0])[key] = value
    found = {name: array for name, array in found.items() if array is not None}
    nothing = np.empty(0)
    checksums = {name: checksum_text(found.get(name, nothing).tobytes()) for name in description["checksums"]}
    save_file(found, path, metadata | {"table": json.dumps(sealed({**description, "checksums": checksums}))})
    return path


def version_1(path: Path) -> Path:
    """A table's file as the version before checksums wrote it."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    description = json.loads(metadata["table"])
    del description["checksums"], description["checksum"], description["rest_bytes"], description["ladder"]
    save_file(arrays, path, metadata | {"table": json.dumps({**description, "version": 1})})
    return path


def version_2(path: Path) -> Path:
    """A table's file as the version wrote it that did not say what a model stores beside the layers."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    description = json.loads(metadata["table"])
    del description["rest_bytes"], description["checksum"], description["ladder"]
    save_file(arrays, path, metadata | {"table": json.dumps(sealed({**description, "version": 2}))})
    return path


def version_3(path: Path) -> Path:
    """A table's file as the version wrote it that had no ladder of steps."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    description = json.loads(metadata["table"])
    del description["ladder"], description["checksum"]
    save_file(arrays, path, metadata | {"table": json.dumps(sealed({**description, "version": 3}))})
    return path


def version_4(path: Path) -> Path:
    """A table's file as the version wrote it that had no types, and no scales of 16 bits."""
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(file.metadata())
    description = json.loads(metadata["table"])
    description["scheme"].pop("scale_dtype", None)
    del description["checksum"]
    save_file(arrays, path, metadata | {"table": json.dumps(sealed({**description, "version": 4}))})
    return path
