"""A table with one more sensitivity, or with fewer layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..common.patterns import matches
from ..common.text import first_few
from ..errors import SettingError
from ..measurement.contract import Curves
from ..models.fingerprint import fingerprint
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..plans.type_table import TypeTable
from ..weights.roles import PREFIX

AnyTable = TypeVar("AnyTable", LayerTable, TypeTable)


def layers_of(table: LayerTable | TypeTable) -> tuple[LayerStats, ...]:
    """All layers of a table, of either kind."""
    return table.base.layers if isinstance(table, TypeTable) else table.layers


def names_of(layer: LayerStats) -> tuple[str, ...]:
    """A layer's name, then its tied ones."""
    return (layer.name, *layer.tied)


def filled(table: AnyTable, name: str, curves: Callable[[LayerTable], Mapping[str, Curves]]) -> AnyTable:
    """The table with a sensitivity; curves: what gives those of every layer of one table of widths."""
    if isinstance(table, TypeTable):
        columns = {column.type.name: _with_curves(column.table, name, curves(column.table)) for column in table.columns}
        return table.with_tables(table.base, columns)
    return _with_curves(table, name, curves(table))


def _with_curves(table: LayerTable, name: str, curves: Mapping[str, Curves]) -> LayerTable:
    def of(layer: LayerStats) -> LayerStats:
        made = curves[layer.name]
        if not np.isfinite(made.layer).all():
            raise SettingError(f"layer {layer.name!r}: its {name} is NaN or infinite; measure it again")
        channels = {key: value for key, value in layer.channel_sensitivities.items() if key != name}
        if made.channels is not None:
            channels[name] = made.channels
        sensitivities = {**layer.sensitivities, name: made.layer}
        return replace(layer, sensitivities=sensitivities, channel_sensitivities=channels)

    return replace(table, layers=tuple(map(of, table.layers)))


def without(table: AnyTable, skip: Sequence[str]) -> AnyTable:
    """The table without the layers that these globs name, which its plans then leave in floating point.

    What the model stores beside the layers' weights is not known of it. Raises SettingError for a glob that matches no
    layer, and where none is left.
    """
    if not skip:
        return table
    layers = layers_of(table)
    dropped: set[str] = set()
    for pattern in skip:
        named = {layer.name for layer in layers if any(matches(pattern, name) for name in names_of(layer))}
        if not named:
            if pattern.startswith(PREFIX):
                raise SettingError(f"skip: {pattern!r}: a table knows no roles; name layers by globs")
            some = first_few([repr(layer.name) for layer in layers], ", ")
            raise SettingError(f"skip: {pattern!r} matches none of the table's {len(layers)} layers; they are {some}")
        dropped |= named
    if len(dropped) == len(layers):
        raise SettingError(f"skip: all {len(layers)} layers of the table are skipped; relax it")
    if isinstance(table, TypeTable):
        columns = tuple(replace(column, table=_without(column.table, dropped)) for column in table.columns)
        return TypeTable(_without(table.base, dropped), tuple(column for column in columns if column.table.layers))
    return _without(table, dropped)


def with_rest(table: AnyTable, rest: int | None) -> AnyTable:
    """The table with what the model stores beside its layers, in bytes."""
    if isinstance(table, TypeTable):
        return TypeTable(replace(table.base, rest_bytes=rest), table.columns)
    return replace(table, rest_bytes=rest)


def _without(table: LayerTable, dropped: set[str]) -> LayerTable:
    kept = tuple(layer for layer in table.layers if layer.name not in dropped)
    more = tuple(layer.name for layer in table.layers if layer.name in dropped)
    return replace(
        table, layers=kept, skipped=(*table.skipped, *more), rest_bytes=None,
        fingerprint=fingerprint(layer.digest for layer in kept),
    )  # fmt: skip
