"""From an importance matrix of llama.cpp to a sensitivity: output_mse, without running the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import path_of
from ..common.files import unchanged
from ..common.progress import Progress, check_callbacks
from ..common.text import first_few
from ..errors import MismatchError, SettingError
from ..measurement.contract import Curves
from ..measurement.error import weights_fingerprint
from ..measurement.output_error import OutputMSE
from ..measurement.weighted import squared_errors
from ..models.arguments import check_source
from ..plans.arguments import check_any_table
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..quantization.quantize import fake_quantize
from ..weights.find import find_weights
from ..weights.gguf_names import architecture_of, mapped
from ..weights.handles import Weight
from ..weights.rest import rest_bytes
from ..weights.roles import read_config
from .filling import AnyTable, filled, layers_of, names_of, with_rest, without
from .imatrix import Imatrix, read_imatrix

Curve = dict[str, Curves]


def import_imatrix(
    path: str | Path,
    table: AnyTable,
    source: nn.Module | str | Path,
    *,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> AnyTable:
    """Add `output_mse` to a table, of inputs that llama.cpp's `llama-imatrix` saw: no model is run.

    It is sum_j (w - w')_cj^2 h_j of every output channel c, as `sensitivity` measures it, where h_j is the mean square
    of input j, times the positions of a chunk of text. An expert counts by the positions that reached it.

    Args:
        path: The importance matrix, a GGUF file. Its tensors are called as the table's layers, or as GGUF files call
            them (for which the extra `gguf` is needed).
        table: The table, of widths or of types.
        source: The weights that the table was measured on.
        skip: Globs on layers that the result is without, such as those that the file says nothing of.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        The table with the sensitivity.

    Raises:
        SettingError: The file says nothing of a layer, or no text reached it.
        MismatchError: The source has other weights than the table, or the file is another model's.
        FormatError: The file is no importance matrix.
        SourceError: The file or the source cannot be read.

    Examples:
        >>> import gguf, numpy as np, mpq_plugins as mpq, torch
        >>> writer = gguf.GGUFWriter("im.gguf", "imatrix")
        >>> writer.add_tensor("0.weight.in_sum2", np.ones((1, 8), np.float32))
        >>> writer.add_tensor("0.weight.counts", np.full((1, 1), 4, np.float32))
        >>> writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        (None, None, None)
        >>> writer.close()
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2))
        >>> mpq.import_imatrix("im.gguf", mpq.measure(net), net).sensitivities
        ('output_mse',)
    """
    check_any_table(table)
    check_source(source)
    check_callbacks(progress=progress)
    imatrix = read_imatrix(path_of("path", path))
    table = without(table, skip)
    with unchanged(source):
        places = _places(imatrix, layers_of(table), source)
        first = table if isinstance(table, LayerTable) else table.base
        handles = _handles(source, first)
        if skip:
            table = with_rest(table, _rest(source, first, handles))
        curves = _Errors(imatrix, places, handles, progress).of(_tables(table))
    return filled(table, OutputMSE.name, lambda one: curves[id(one)])


def _tables(table: Any) -> list[LayerTable]:
    return [table] if isinstance(table, LayerTable) else [column.table for column in table.columns]


class _Errors:
    """The curves of all layers, each layer's weight being read once and let go."""

    def __init__(
        self,
        imatrix: Imatrix,
        places: Mapping[str, tuple[str, int]],
        handles: Mapping[str, Weight],
        progress: Progress | None,
    ) -> None:
        self.imatrix, self.places, self.handles, self.progress = imatrix, places, handles, progress

    def of(self, tables: Sequence[LayerTable]) -> dict[int, Curve]:
        """By a table's id and a layer's name."""
        curves: dict[int, Curve] = {id(table): {} for table in tables}
        by_name = [(table, {layer.name: layer for layer in table.layers}) for table in tables]
        done, total = 0, sum(handle.numel for handle in self.handles.values())
        for name, handle in self.handles.items():
            self._said(name, done, total)
            exact = handle.tensor()
            for table, layers in by_name:
                if name in layers:
                    curves[id(table)][name] = self._curves(table, layers[name], exact)
            done += handle.numel
        self._said("", done, total)
        return curves

    def _curves(self, table: LayerTable, layer: LayerStats, exact: Tensor) -> Curves:
        scheme, axis = table.scheme_of(layer), layer.channel_axis
        rounded = (fake_quantize(exact, bits, scheme, channel_axis=axis, layer=layer.name) for bits in table.bits)
        channels = squared_errors(exact, rounded, self._counts(layer), axis)
        return Curves(channels.sum(1), channels)

    def _counts(self, layer: LayerStats) -> Tensor:
        """How much the error of each weight counts, broadcast over output channels."""
        moments = self.imatrix.moments(*self.places[layer.name])
        assert moments is not None
        return torch.from_numpy(moments).unsqueeze(layer.channel_axis)

    def _said(self, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(name, done, total)


def _places(
    imatrix: Imatrix, layers: Sequence[LayerStats], source: nn.Module | str | Path
) -> dict[str, tuple[str, int]]:
    """Where the file has what it says of each layer. Raises SettingError naming those of which it says nothing."""
    found = {layer.name: imatrix.find(names_of(layer)) for layer in layers}
    missing = [layer for layer in layers if found[layer.name] is None]
    if missing:
        names = _gguf_names(missing, source)
        found |= {layer.name: imatrix.find(names.get(name, "") for name in names_of(layer)) for layer in missing}
    places = {name: place for name, place in found.items() if place is not None}
    _check_all(imatrix, [layer.name for layer in layers if layer.name not in places], "says nothing of")
    for layer in layers:
        _check_shape(imatrix, layer, *places[layer.name])
    unseen = [layer.name for layer in layers if imatrix.moments(*places[layer.name]) is None]
    _check_all(imatrix, unseen, "was made of text that never reached")
    return places


def _gguf_names(layers: Sequence[LayerStats], source: nn.Module | str | Path) -> dict[str, str]:
    """Layers -> what GGUF files call them; none where the source does not say what model it is."""
    architecture, blocks = architecture_of(_configuration(source))
    if architecture is None:
        return {}
    return mapped([name for layer in layers for name in names_of(layer)], architecture, blocks)


def _configuration(source: nn.Module | str | Path) -> Mapping[str, Any]:
    if isinstance(source, str | Path):
        return read_config(Path(source))
    to_dict: Any = getattr(getattr(source, "config", None), "to_dict", dict)
    configuration: Mapping[str, Any] = to_dict()
    return configuration


def _check_all(imatrix: Imatrix, names: Sequence[str], what: str) -> None:
    """Raise SettingError, naming layers, if there are any."""
    if names:
        skipped = " ".join(f"--skip '{name}'" for name in names[:3])
        raise SettingError(
            f"{imatrix.path}: {what} {first_few([repr(name) for name in names], ', ')}. Make it of more text, with "
            f"--process-output for the output head, or leave layers in floating point ({skipped}"
            f"{' ...' if len(names) > 3 else ''})"
        )


def _check_shape(imatrix: Imatrix, layer: LayerStats, tensor: str, matrix: int) -> None:
    """Refuse what is no matrix, and sums over another number of columns or fewer experts."""
    inputs = imatrix.tensors[tensor]
    if len(layer.shape) != 2:
        raise SettingError(
            f"layer {layer.name!r}: has the shape {list(layer.shape)}, and {imatrix.path} is of matrices; skip it"
        )
    columns = layer.shape[1 - layer.channel_axis]
    if inputs.sums.shape[1] != columns or matrix >= len(inputs.sums):
        raise MismatchError(
            f"layer {layer.name!r}: has {columns} inputs, and {imatrix.path} is of {len(inputs.sums)} matrices of "
            f"{inputs.sums.shape[1]} for {tensor!r}; it is another model's"
        )


def _handles(source: nn.Module | str | Path, table: LayerTable) -> dict[str, Weight]:
    """The table's layers in the source. Raises MismatchError where it has other weights."""
    found = find_weights(source, fold_bn=table.fold_bn, refuse=False, weights=table.weights, already_quantized=True)
    by_name = {name: weight for weight in found for name in weight.names}
    # A bare file leaves some layers alone by default that a table may have been asked for.
    if any(layer.name not in by_name for layer in table.layers) and not isinstance(source, nn.Module):
        by_name |= _asked_for(source, table, by_name)
    handles: dict[str, Weight] = {}
    for layer in table.layers:
        weight = by_name.get(layer.name)
        if weight is None or weight.shape != layer.shape:
            has = "lacks it" if weight is None else f"has {list(weight.shape)}"
            raise MismatchError(f"layer {layer.name!r}: the source {has}; the table was measured on another model")
        handles[layer.name] = weight
    if weights_fingerprint(handles.values()) != table.fingerprint:
        raise MismatchError(
            f"the source has other weights than those the table was measured on ({table.fingerprint:.19})"
        )
    return handles


def _rest(source: nn.Module | str | Path, table: LayerTable, handles: Mapping[str, Weight]) -> int | None:
    """What the source stores beside these layers."""
    found = find_weights(source, fold_bn=table.fold_bn, refuse=False, weights=table.weights, already_quantized=True)
    return rest_bytes(source, replace(found, weights=tuple(handles.values())), table.weights)


def _asked_for(source: str | Path, table: LayerTable, known: Mapping[str, Weight]) -> dict[str, Weight]:
    """Layers that are left alone unless they are named."""
    names = {name for layer in table.layers for name in names_of(layer)} - known.keys()
    every = find_weights(source, only=["*"], refuse=False, weights=table.weights, already_quantized=True)
    return {name: weight for weight in every for name in weight.names if name in names}
