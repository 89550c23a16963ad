"""The error of one layer at every bit-width and metric, in one pass over its weights per range it needs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..buffers import chunk_buffer
from ..errors import WeightError
from ..fingerprint import fingerprint, layer_digest
from ..quantize.calibrate import choose_grids
from ..quantize.grid import RegionStats
from ..quantize.kernel import LARGEST, RELATIVE, SQUARED, add_sums, error_sums, error_totals, row_stats
from ..quantize.regions import region_rows
from ..scheme import Scheme
from ..table import LayerStats
from ..weights import Weight
from .importance import channel_importance, layer_importance

CHUNK = 1 << 21  # weights in memory at a time (8 MiB as float32); whole output channels, so at least one

Array = NDArray[np.float64]
Result = TypeVar("Result")
MapChunks = Callable[..., Iterable[Any]]
"""The builtin map, or an executor's."""

LARGEST_METRIC = "max_abs"


def layer_stats(
    weight: Weight,
    scheme: Scheme,
    bits: tuple[int, ...],
    metrics: tuple[str, ...],
    per_channel: bool,
    map_chunks: MapChunks = map,
) -> LayerStats:
    """Errors and importances of one layer. Raises WeightError for NaN or infinity.

    Chunks of output channels are read one at a time, or as many as `map_chunks` (an executor's) takes side by
    side; sums are added in the chunks' order, so the result is the same to the last bit. Where scales stay
    inside a channel each chunk is read once; one scale for the whole tensor needs the range of all chunks
    first, so a tensor of several chunks is read twice (again for each step of a clipping search).
    """
    chunks = list(_chunks(weight))
    one_region = scheme.granularity == "per_tensor"

    def measured(unit: Sequence[tuple[int, int]]) -> _Sums:
        return _unit(weight, unit, scheme, bits, per_channel, LARGEST_METRIC in metrics, map_chunks)

    parts = [measured(chunks)] if one_region else list(map_chunks(measured, [[chunk] for chunk in chunks]))
    magnitudes = np.concatenate([part.magnitudes for part in parts])
    totals = add_sums(np.stack([part.totals for part in parts]))
    channels = [part.channels for part in parts if part.channels is not None]
    extremes = np.concatenate([part.extremes for part in parts])
    per = weight.numel // max(1, weight.channels)
    by_channel = _metrics(np.concatenate(channels), magnitudes[:, 1:2], per, metrics) if channels else {}
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
        digest=layer_digest(weight.name, weight.shape, *extremes.T),
    )


@dataclass(frozen=True)
class _Sums:
    """Of chunks: magnitudes, extremes (channels, 2); errors in total (bits, 3) and, if asked, (channels, bits, 3)."""

    magnitudes: Array
    extremes: Array
    totals: Array
    channels: Array | None


def _unit(
    weight: Weight,
    chunks: Sequence[tuple[int, int]],
    scheme: Scheme,
    bits: tuple[int, ...],
    per_channel: bool,
    largest: bool,
    map_chunks: MapChunks,
) -> _Sums:
    """The sums of chunks whose regions are complete."""
    one_region = scheme.granularity == "per_tensor"
    regions = scheme.regions_per_channel(weight.shape, weight.channel_axis, weight.name)
    kept = _read(weight, chunks[0]) if len(chunks) == 1 else None

    def each(work: Callable[[Tensor], Result]) -> list[Result]:
        """Apply to every chunk, as rows of whatever is finer: a channel, or a region of one."""
        if kept is not None:
            return [work(kept if one_region else region_rows(kept, scheme, regions))]
        return list(map_chunks(lambda chunk: work(_read(weight, chunk)), chunks))

    parts = each(lambda rows: _finite_stats(weight.name, rows))
    stats = _joined(parts).merged() if one_region else parts[0]
    grids = choose_grids(each, stats, bits, scheme)
    magnitudes = np.concatenate([_channel_magnitudes(part, max(1, regions)) for part in parts])
    extremes = np.concatenate([_channel_extremes(part, max(1, regions)) for part in parts])
    if one_region and not per_channel:
        totals = add_sums(np.stack(each(lambda rows: error_totals(rows, grids, largest))))
        return _Sums(magnitudes, extremes, totals, None)
    by_channel = np.concatenate(each(lambda rows: _by_channel(error_sums(rows, grids, largest), max(1, regions))))
    return _Sums(magnitudes, extremes, add_sums(by_channel), by_channel if per_channel else None)


def _by_channel(sums: Array, regions: int) -> Array:
    """Row sums (channels * regions, bits, 3) -> (channels, bits, 3)."""
    return add_sums(sums.reshape(-1, regions, *sums.shape[1:]).swapaxes(0, 1))


def _channel_magnitudes(stats: RegionStats, regions: int) -> Array:
    """Sums of |w| and w^2 of each output channel, (channels, 2)."""
    magnitudes: Array = np.stack((stats.absolute, stats.squared), axis=1).reshape(-1, regions, 2).sum(axis=1)
    return magnitudes


def _channel_extremes(stats: RegionStats, regions: int) -> Array:
    """Least and greatest weight of each output channel, (channels, 2)."""
    low, high = stats.low.reshape(-1, regions).min(axis=1), stats.high.reshape(-1, regions).max(axis=1)
    return np.stack((low, high), axis=1)


def channel_extremes(weight: Weight) -> Array:
    """Least and greatest weight of each output channel, (channels, 2), read in chunks. Raises as layer_stats."""
    parts = [_finite_stats(weight.name, _read(weight, chunk)) for chunk in _chunks(weight)]
    return np.concatenate([_channel_extremes(part, 1) for part in parts])


def _joined(parts: Sequence[RegionStats]) -> RegionStats:
    if len(parts) == 1:
        return parts[0]
    return RegionStats(
        np.concatenate([part.low for part in parts]),
        np.concatenate([part.high for part in parts]),
        np.concatenate([part.absolute for part in parts]),
        np.concatenate([part.squared for part in parts]),
        parts[0].count,
    )


def _read(weight: Weight, chunk: tuple[int, int]) -> Tensor:
    """Output channels as float32 rows."""
    rows = weight.rows(*chunk)
    if rows.dtype == torch.float32 or rows.device.type != "cpu" or not rows.numel():
        return rows.float().contiguous()
    buffer = chunk_buffer(4 * rows.numel())
    return torch.frombuffer(buffer, dtype=torch.float32).view(rows.shape).copy_(rows)


def _chunks(weight: Weight) -> Iterator[tuple[int, int]]:
    rows = max(1, CHUNK // max(1, weight.numel // max(1, weight.channels)))
    if weight.channels == 0:
        yield 0, 0
    for start in range(0, weight.channels, rows):
        yield start, min(start + rows, weight.channels)


def _finite_stats(layer: str, rows: Tensor) -> RegionStats:
    stats = row_stats(rows)
    if not np.isfinite(stats.squared).all():
        raise WeightError(f"layer {layer!r}: holds NaN or infinite weights. Repair the checkpoint, or skip the layer.")
    return stats


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


def weights_fingerprint(weights: Iterable[Weight]) -> str:
    """The fingerprint a measurement of these weights would have; reads them once."""
    return fingerprint(layer_digest(w.name, w.shape, *channel_extremes(w).T) for w in weights)
