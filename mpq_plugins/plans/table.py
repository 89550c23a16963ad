"""LayerTable: plain numbers per layer, measured once and reused by every allocator; one file on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..common.checks import path_of
from ..common.public import public
from ..errors import SettingError
from .inline import table_html
from .stats import Array, LayerStats, Measured
from .table_file import read, write


@public
@dataclass(frozen=True, eq=False)
class LayerTable(Measured):
    """What was measured, on which weights, under which scheme.

    Attributes:
        layers: The numbers of each layer.
        scheme: How weights were quantized.
        bits: The widths that were measured.
        metrics: The errors that were measured, by name.
        fold_bn: Whether conv weights had their BatchNorm folded in.
        fingerprint: The weights' own, by which a plan knows its model.
        skipped: Quantizable layers that were left out.
        left_alone: (parameter, why) of tensors with two or more dimensions that are no quantizable layer.
        weights: The key of the weights in a torch checkpoint; None for the top.
        rest_bytes: Bytes of all that is stored beside the layers' weights; None where that is not known.
        activations: How inputs were quantized, but for their width; None where they were not measured.
        input_bits: The widths of inputs that were measured.
        live: The largest sets of inputs, by `InputStats.tensor`, that a forward pass needs at once.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=(2, 4))
        >>> table.save("net.mpqt")
        >>> mpq.LayerTable.load("net.mpqt").bits
        (2, 4)
    """

    def error(self, layer: LayerStats, metric: str, bits: int) -> float:
        """Look up the error of a layer at a bit-width.

        Args:
            layer: The layer, of this table.
            metric: The error's name.
            bits: The width.

        Returns:
            The error, in the metric's unit.

        Raises:
            SettingError: It was not measured.
        """
        return float(layer.errors[self._check_metric(metric)][self.position(bits)])

    def errors(self, metric: str, bits: Sequence[int]) -> Array:
        """Look up the errors of all layers at several bit-widths.

        Args:
            metric: The error's name.
            bits: The widths.

        Returns:
            The errors, (layers, len(bits)).

        Raises:
            SettingError: One was not measured.
        """
        name, columns = self._check_metric(metric), [self.position(b) for b in bits]
        return np.array([layer.errors[name] for layer in self.layers])[:, columns]

    def channel_error(self, layer: LayerStats, metric: str, bits: int) -> Array:
        """Look up the error of each output channel.

        Args:
            layer: The layer, of this table.
            metric: The error's name.
            bits: The width.

        Returns:
            The errors, (channels,).

        Raises:
            SettingError: They were not measured.
        """
        if self._check_metric(metric) not in layer.channel_errors:
            raise SettingError(f"layer {layer.name!r}: no errors per channel in this table; measure(per_channel=True)")
        errors: Array = layer.channel_errors[metric][self.position(bits)]
        return errors

    def covers(self, bits: Sequence[int], metrics: Sequence[str], channel_errors: bool) -> bool:
        """Tell whether every number asked for is here.

        Args:
            bits: The widths.
            metrics: The errors, by name.
            channel_errors: Whether they are needed for each output channel.

        Returns:
            Whether it is.
        """
        return (
            set(bits) <= set(self.bits)
            and set(metrics) <= set(self.metrics)
            and (not channel_errors or all(layer.channel_errors for layer in self.layers))
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return table_html(self)

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file with its description in the header; atomically.

        The same table gives the same bytes.

        Args:
            path: The file to write.
        """
        write(self, path_of("path", path))

    @classmethod
    def load(cls, path: str | Path) -> "LayerTable":
        """Read a table.

        Args:
            path: The table's file.

        Returns:
            The table.

        Raises:
            FormatError: The file is no table, damaged, or newer than this version. The message names file, field and
                value.
        """
        return read(path_of("path", path), cls)

    def _check_metric(self, metric: str) -> str:
        if metric not in self.metrics:
            raise SettingError(f"metric: {metric!r} was not measured; this table has {', '.join(self.metrics)}")
        return metric

    def position(self, bits: int) -> int:
        """Find where a bit-width stands among those measured.

        Args:
            bits: The width.

        Returns:
            Its place in `bits`, from 0.

        Raises:
            SettingError: The width was not measured.
        """
        if bits not in self.bits:
            raise SettingError(f"bits: {bits} was not measured; this table has {', '.join(map(str, self.bits))}")
        return self.bits.index(bits)


def with_macs(table: LayerTable, macs: Mapping[str, int]) -> LayerTable:
    """The table with multiply-accumulates filled in by module name; tied layers' are added up.

    A look-up has 0; any other layer that was not seen at work keeps None, for it may work outside its module.
    """

    def count(layer: LayerStats) -> int | None:
        seen = [macs[name] for name in (layer.name, *layer.tied) if name in macs]
        return sum(seen) if seen or layer.kind == "embedding" else None

    return replace(table, layers=tuple(replace(layer, macs=count(layer)) for layer in table.layers))
