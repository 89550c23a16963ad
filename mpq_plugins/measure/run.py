"""One measurement: check the request, walk the weights, build the table."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import SettingError
from ..fingerprint import fingerprint
from ..fold import has_batch_norm
from ..scheme import Scheme
from ..table import METRICS, LayerStats, LayerTable, with_macs
from ..weights import Weight, Weights, find_weights
from . import Progress
from .error import MapChunks, layer_stats
from .macs import count_macs

SMALLEST_UNIT, LARGEST_UNIT = 1 << 16, 1 << 22  # weights
UNITS = 16


def run(
    source: nn.Module | str | Path,
    scheme: Scheme,
    bits: Sequence[int],
    metrics: Sequence[str],
    *,
    per_channel: bool,
    skip: Sequence[str],
    only: Sequence[str],
    fold_bn: bool | Literal["auto"],
    example_input: Any,
    progress: Progress | None,
) -> LayerTable:
    """What `measure` promises."""
    widths = checked_bits(bits, scheme)
    names = checked_metrics(metrics)
    if example_input is not None and not isinstance(source, nn.Module):
        raise SettingError("example_input: multiply-accumulates can only be counted on a module, not on a file")
    weights = find_weights(source, skip=skip, only=only, fold_bn=resolve_fold(source, scheme, fold_bn))
    for weight in weights:  # a group size that does not fit is found before the first layer is measured
        scheme.regions_per_channel(weight.shape, weight.channel_axis, weight.name)
    layers = _side_by_side(
        lambda weight, map_chunks: layer_stats(weight, scheme, widths, names, per_channel, map_chunks),
        weights,
        progress,
    )
    table = LayerTable(
        tuple(layers),
        scheme,
        widths,
        names,
        weights.folded,
        fingerprint(layer.digest for layer in layers),
        weights.skipped,
        weights.left_alone,
    )
    if example_input is None:
        return table
    assert isinstance(source, nn.Module)
    return with_macs(table, count_macs(source, example_input))


def _side_by_side(
    work: Callable[[Weight, MapChunks], LayerStats], weights: Weights, progress: Progress | None
) -> list[LayerStats]:
    """Measure on as many threads as torch uses, units of layers and a large layer's chunks; in the layers' order."""
    total, done = sum(weight.numel for weight in weights), 0
    layers: list[LayerStats] = []
    # Two pools, for a layer waits for its chunks. The kernel runs outside Python's lock.
    pool, chunk_pool = (ThreadPoolExecutor(torch.get_num_threads(), name) for name in ("mpq-layer", "mpq-chunk"))
    try:
        units = list(_units(weights, total))
        futures = [pool.submit(lambda unit: [work(w, chunk_pool.map) for w in unit], unit) for unit in units]
        for unit, future in zip(units, futures, strict=True):
            if progress is not None:
                progress(unit[0].name, done, total)
            layers += future.result()
            done += sum(weight.numel for weight in unit)
    finally:  # an error in one layer, or Ctrl-C, must not wait for all the others
        chunk_pool.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)
    if progress is not None:
        progress("", total, total)
    return layers


def _units(weights: Weights, total: int) -> Iterator[list[Weight]]:
    """Neighbouring layers that are worth waking a thread for, and few enough to share the work out evenly."""
    enough = min(LARGEST_UNIT, max(SMALLEST_UNIT, total // UNITS))
    unit: list[Weight] = []
    gathered = 0
    for weight in weights:
        unit.append(weight)
        gathered += weight.numel
        if gathered >= enough:
            yield unit
            unit, gathered = [], 0
    if unit:
        yield unit


def resolve_fold(source: nn.Module | str | Path, scheme: Scheme, fold_bn: bool | Literal["auto"]) -> bool:
    """Whether to fold: "auto" folds a module's BatchNorm for per_tensor, and nothing else."""
    if fold_bn == "auto":
        return isinstance(source, nn.Module) and scheme.granularity == "per_tensor" and has_batch_norm(source)
    if not isinstance(fold_bn, bool):
        raise SettingError(f"fold_bn: {fold_bn!r} is not allowed; True, False or 'auto'")
    return fold_bn


def checked_bits(bits: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """Distinct bit-widths, ascending. Raises SettingError outside what the scheme has, or for none."""
    if isinstance(bits, int) or not len(bits):
        raise SettingError(f"bits: {bits!r} is not allowed; a list of one or more of 1 to 8")
    return tuple(sorted({scheme.check_bits(b) for b in bits}))


def checked_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics, in the order METRICS has them. Raises SettingError for an unknown one or for none."""
    for metric in metrics:
        if metric not in METRICS:
            raise SettingError(f"metrics: {metric!r} is not allowed; {', '.join(METRICS)}")
    if not metrics:
        raise SettingError(f"metrics: none given; one or more of {', '.join(METRICS)}")
    return tuple(metric for metric in METRICS if metric in metrics)
