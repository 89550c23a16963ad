"""LayerTable: plain numbers per layer, measured once and reused by every allocator; one file on disk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingError
from .scheme import Scheme

METRICS = ("relative", "mse", "rmse", "sqnr_db", "max_abs")

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # arrays have no single truth value; a layer is itself
class LayerStats:
    """One layer's numbers.

    shape: the weight's; channels: output channels; macs: multiply-accumulates for the example input, where
    one was given; importance: F_l = sum |w|; channel_importance: F_c = ||w_c||_2, (channels,); errors:
    metric -> (bit-widths,), in the order of the table's `bits`; channel_errors: metric -> (bit-widths, channels),
    empty unless asked for; sensitivities: name -> (bit-widths,), what quantizing the whole layer is predicted to
    cost, in the sensitivity's own unit, so that layers add up; channel_sensitivities: the same of each output channel,
    (bit-widths, channels), for those that can tell; tied: other names of the same weight; digest: see
    fingerprint.layer_digest.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    channel_axis: int
    importance: float
    channel_importance: Array
    errors: Mapping[str, Array]
    channel_errors: Mapping[str, Array] = field(default_factory=dict)
    sensitivities: Mapping[str, Array] = field(default_factory=dict)
    channel_sensitivities: Mapping[str, Array] = field(default_factory=dict)
    macs: int | None = None
    tied: tuple[str, ...] = ()
    digest: str = ""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.channel_axis]


@dataclass(frozen=True, eq=False)
class LayerTable:
    """What was measured, on which weights, under which scheme."""

    layers: tuple[LayerStats, ...]
    scheme: Scheme
    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    fold_bn: bool
    fingerprint: str
    skipped: tuple[str, ...] = ()
    left_alone: tuple[tuple[str, str], ...] = ()
    weights: str | None = None  # the key of those in a torch checkpoint (see weights.Weights.key)

    @property
    def sensitivities(self) -> tuple[str, ...]:
        """Names of the sensitivities that every layer has."""
        return tuple(self.layers[0].sensitivities) if self.layers else ()

    @property
    def channel_sensitivities(self) -> tuple[str, ...]:
        """Names of those that every layer has for each of its channels."""
        return tuple(self.layers[0].channel_sensitivities) if self.layers else ()

    def error(self, layer: LayerStats, metric: str, bits: int) -> float:
        """The error of a layer at a bit-width. Raises SettingError where it was not measured."""
        return float(layer.errors[self._check_metric(metric)][self.position(bits)])

    def errors(self, metric: str, bits: Sequence[int]) -> Array:
        """The errors of all layers at several bit-widths, (layers, len(bits)). Raises SettingError as `error`."""
        name, columns = self._check_metric(metric), [self.position(b) for b in bits]
        return np.array([layer.errors[name] for layer in self.layers])[:, columns]

    def channel_error(self, layer: LayerStats, metric: str, bits: int) -> Array:
        """The error of each output channel, (channels,). Raises SettingError where it was not measured."""
        if self._check_metric(metric) not in layer.channel_errors:
            raise SettingError(f"layer {layer.name!r}: no errors per channel in this table; measure(per_channel=True)")
        errors: Array = layer.channel_errors[metric][self.position(bits)]
        return errors

    def covers(self, bits: Sequence[int], metrics: Sequence[str], channel_errors: bool) -> bool:
        """Whether every number asked for is here."""
        return (
            set(bits) <= set(self.bits)
            and set(metrics) <= set(self.metrics)
            and (not channel_errors or all(layer.channel_errors for layer in self.layers))
        )

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file with its description in the header; atomically.

        The same table gives the same bytes.
        """
        from .table_file import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "LayerTable":
        """Read a table. Raises FormatError naming file, field and value."""
        from .table_file import read

        return read(Path(path))

    def _check_metric(self, metric: str) -> str:
        if metric not in self.metrics:
            raise SettingError(f"metric: {metric!r} was not measured; this table has {', '.join(self.metrics)}")
        return metric

    def position(self, bits: int) -> int:
        """Where a bit-width stands among those measured. Raises SettingError."""
        if bits not in self.bits:
            raise SettingError(f"bits: {bits} was not measured; this table has {', '.join(map(str, self.bits))}")
        return self.bits.index(bits)


def is_table(path: Path) -> bool:
    """Whether the file is a table rather than weights; looks at the header only."""
    from .table_file import begins_as_table

    return begins_as_table(path)


def with_macs(table: LayerTable, macs: Mapping[str, int]) -> LayerTable:
    """The table with multiply-accumulates filled in by module name; tied layers' are added up.

    A look-up has 0; any other layer that was not seen at work keeps None, for it may work outside its module.
    """

    def count(layer: LayerStats) -> int | None:
        seen = [macs[name] for name in (layer.name, *layer.tied) if name in macs]
        return sum(seen) if seen or layer.kind == "embedding" else None

    return replace(table, layers=tuple(replace(layer, macs=count(layer)) for layer in table.layers))
