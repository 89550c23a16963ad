"""The errors of weights at every bit-width: sums over a unit of work, and what the sums of a layer's units say of it.

A unit is measured wherever there is room: in a thread, another process, on another machine. What it gives is sums for
each chunk and channel, and these are added in the chunks' order, so a table is the same to the last bit however the
work was shared out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import WeightError, WorkerError
from ..models.device import own_stream
from ..models.fingerprint import fingerprint, layer_digest
from ..plans.group_sizes import fitted_to
from ..plans.scheme import Scheme, needs_whole_layer, scales_per_layer
from ..plans.stats import LayerStats
from ..quantization.grid import GroupStats
from ..quantization.groups import group_rows
from ..quantization.kernel import (
    LARGEST,
    RELATIVE,
    SQUARED,
    add_sums,
    error_sums,
    error_totals,
    kernel_name,
    row_stats,
)
from ..quantization.quantize import choose_grids
from ..weights.chunks import Op, chunks, over_chunks, read
from ..weights.handles import Weight
from .importance import channel_importance, layer_importance

Array = NDArray[np.float64]
Sums = Mapping[str, Array]
"""magnitudes: sums of |w| and w^2, (channels, 2); extremes: least and greatest weight, (channels, 2); totals: error
sums of each chunk, (chunks, bits, 3); channels: of each channel, (channels, bits, 3), where asked for."""

LARGEST_METRIC = "max_abs"


@dataclass(frozen=True)
class UnitRequest:
    """What a worker is asked of every unit.

    kernel: what does the arithmetic, which every worker must have; device: where, None for where the weights are.
    """

    scheme: Scheme
    bits: tuple[int, ...]
    metrics: tuple[str, ...]
    per_channel: bool
    kernel: str
    device: torch.device | None = None

    @property
    def whole(self) -> bool:
        """Whether a layer has one scale, so that all of it must be seen before any of it is quantized."""
        return needs_whole_layer(self.scheme)

    @property
    def largest(self) -> bool:
        """Whether the largest error is wanted."""
        return LARGEST_METRIC in self.metrics


def unit_sums(pieces: Sequence[Weight], request: UnitRequest) -> Sums:
    """The sums of all pieces, joined: whole layers, or whole chunks of them where no scale goes beyond a channel.

    Raises WeightError for NaN or infinity, SourceError where it cannot be read.
    """
    _check_kernel(request)
    with own_stream(request.device):
        if request.whole:
            return _joined([whole_sums(piece, request) for piece in pieces])
        parts = [part for piece in pieces for part in chunks(piece)]
        rows = read(parts, request.device)
        return _joined(
            [_chunk_sums(weight, piece_rows, request) for (weight, _, _), piece_rows in zip(parts, rows, strict=True)]
        )


def whole_sums(weight: Weight, request: UnitRequest, each: Callable[[Op], Array] | None = None) -> Sums:
    """The sums of a layer with one scale. `each` asks all of its chunks something, here or elsewhere.

    A layer of several chunks is read twice, for its range and then its errors; again for each step of a search.
    """
    each = each or over_chunks(weight, request.device)
    table = each(_stats_table)
    stats = _stats(table, weight)
    sums = {"magnitudes": table[:, 2:], "extremes": table[:, :2]}
    if scales_per_layer(request.scheme):
        by_channel = each(_Grouped.of(weight, request, stats.largest))
    else:
        grids = choose_grids(each, stats.merged(), request.bits, request.scheme, weight.name)
        if not request.per_channel:
            return sums | {"totals": each(partial(error_totals, grids=grids, largest=request.largest))}
        by_channel = each(partial(error_sums, grids=grids, largest=request.largest))
    totals = np.stack([add_sums(by_channel[start:stop]) for _, start, stop in chunks(weight)])
    return sums | {"totals": totals} | ({"channels": by_channel} if request.per_channel else {})


def _chunk_sums(weight: Weight, rows: Tensor, request: UnitRequest) -> Sums:
    """Of one chunk, whose groups are complete."""
    of_groups = _Grouped.of(weight, request)
    groups, finer = of_groups.groups, of_groups.rows(rows)
    table = _stats_table(finer)
    by_channel = of_groups.sums(finer, _stats(table, weight, groups))
    of_channel = table.reshape(-1, groups, 4)
    chunk_sums = {
        "magnitudes": of_channel[:, :, 2:].sum(axis=1),
        "extremes": np.stack((of_channel[:, :, 0].min(axis=1), of_channel[:, :, 1].max(axis=1)), axis=1),
        "totals": add_sums(by_channel)[None],
    }
    return chunk_sums | {"channels": by_channel} if request.per_channel else chunk_sums


@dataclass(frozen=True)
class _Grouped:
    """The error sums of each channel, (channels, bits, 3), for a scheme whose groups are within channels; an Op.

    scheme: the layer's own; groups: of a channel; layer_largest: the layer's greatest magnitude, where it is needed.
    """

    scheme: Scheme
    bits: tuple[int, ...]
    groups: int
    name: str
    largest: bool
    layer_largest: float | None

    @classmethod
    def of(cls, weight: Weight, request: UnitRequest, layer_largest: float | None = None) -> Self:
        """Of a layer's weight."""
        scheme = fitted_to(request.scheme, weight.shape, weight.channel_axis)
        # A layer without inputs has no group in a channel, and its rows are its channels.
        groups = max(1, scheme.groups_per_channel(weight.shape, weight.channel_axis, weight.name))
        return cls(scheme, request.bits, groups, weight.name, request.largest, layer_largest)

    def __call__(self, rows: Tensor) -> Array:
        """Of channels, whose groups are complete."""
        finer = self.rows(rows)
        return self.sums(finer, replace(row_stats(finer), layer_largest=self.layer_largest))

    def rows(self, channels: Tensor) -> Tensor:
        """The groups of these channels."""
        return group_rows(channels, self.scheme, self.groups)

    def sums(self, finer: Tensor, stats: GroupStats) -> Array:
        """Of groups, and what is known of each."""
        grids = choose_grids(lambda op: op(finer), stats, self.bits, self.scheme, self.name)
        sums = error_sums(finer, grids, self.largest)
        return add_sums(sums.reshape(-1, self.groups, *sums.shape[1:]).swapaxes(0, 1))


def layer_stats(weight: Weight, parts: Sequence[Sums], request: UnitRequest) -> LayerStats:
    """Errors and importances of one layer from the sums of its pieces, in its chunks' order."""
    joined = _joined(parts)
    magnitudes, totals = joined["magnitudes"], add_sums(joined["totals"])
    per = weight.numel // max(1, weight.channels)
    metrics = request.metrics
    by_channel = _metrics(joined["channels"], magnitudes[:, 1:2], per, metrics) if "channels" in joined else {}
    return LayerStats(
        name=weight.name,
        kind=weight.kind,
        shape=weight.shape,
        channel_axis=weight.channel_axis,
        importance=layer_importance(magnitudes),
        channel_importance=channel_importance(magnitudes),
        errors=_metrics(totals, magnitudes[:, 1].sum(), weight.numel, metrics),
        channel_errors={metric: values.T for metric, values in by_channel.items()},
        tied=weight.tied,
        digest=layer_digest(weight.name, weight.shape, *joined["extremes"].T),
    )


def answers(piece: Weight, op: Op, request: UnitRequest) -> Sums:
    """What the chunks of a piece answer, joined under `values`: a unit of work of its own."""
    _check_kernel(request)
    with own_stream(request.device):
        return {"values": over_chunks(piece, request.device)(op)}


def _check_kernel(request: UnitRequest) -> None:
    """Raise WorkerError where this worker would add up in another order than the others."""
    if kernel_name() != request.kernel:
        raise WorkerError(
            f"executor: a worker measures with {kernel_name()}, and this process with {request.kernel}: the last bits "
            "would depend on who measured what. Use workers with the same processors and packages"
        )


def weights_fingerprint(weights: Iterable[Weight]) -> str:
    """The fingerprint a measurement of these weights would have; reads them once. Raises WeightError."""

    def digest(weight: Weight) -> str:
        table = over_chunks(weight)(_stats_table)
        _stats(table, weight)
        return layer_digest(weight.name, weight.shape, *table[:, :2].T)

    return fingerprint(map(digest, weights))


def _joined(parts: Sequence[Sums]) -> Sums:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stats_table(rows: Tensor) -> Array:
    """Least and greatest weight, sums of |w| and w^2 of each row, (rows, 4)."""
    stats = row_stats(rows)
    return np.stack((stats.low, stats.high, stats.absolute, stats.squared), axis=1)


def _stats(table: Array, weight: Weight, groups: int = 1) -> GroupStats:
    if not np.isfinite(table[:, 3]).all():
        raise WeightError(
            f"layer {weight.name!r}: holds NaN or infinite weights. Repair the checkpoint, or skip the layer."
        )
    low, high, absolute, squared = np.ascontiguousarray(table.T)
    return GroupStats(low, high, absolute, squared, weight.numel // max(1, weight.channels * groups))


def _metrics(sums: Array, squares: Array, numel: int, metrics: tuple[str, ...]) -> dict[str, Array]:
    """Metrics (..., bits) from sums (..., bits, 3) over numel weights whose squares sum to `squares`."""
    return {metric: METRIC_FORMULAS[metric](sums, squares, max(1, numel)) for metric in metrics}


def _sqnr_db(sums: Array, squares: Array, numel: int) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels: Array = 10 * np.log10(squares / sums[..., SQUARED])
    return np.where(sums[..., SQUARED] == 0, np.inf, decibels)


METRIC_FORMULAS: dict[str, Callable[[Array, Array, int], Array]] = {
    "relative": lambda sums, _, numel: sums[..., RELATIVE] / numel,
    "mse": lambda sums, _, numel: sums[..., SQUARED] / numel,
    "rmse": lambda sums, _, numel: np.sqrt(sums[..., SQUARED] / numel),
    "sqnr_db": _sqnr_db,
    LARGEST_METRIC: lambda sums, _, numel: sums[..., LARGEST],
}
