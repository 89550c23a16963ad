"""One measurement: check the request, cut the work, hand it out, build the table from what comes back."""

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoints.readers import FileColumns, FileRows
from ..checkpoints.scaled import ScaledRows
from ..checkpoints.torch_files import Expanded
from ..common.checks import shown
from ..common.files import exists, same_place, unchanged
from ..common.progress import Progress, check_callbacks
from ..common.store import Arrays, Finished, Store, opened
from ..common.text import first_few
from ..common.workers import Call, Workers
from ..errors import MeasureWarning, SettingError
from ..models.arguments import check_source
from ..models.device import checked_device
from ..models.fingerprint import fingerprint
from ..models.folding import training_norms
from ..plans.affine import Affine
from ..plans.granular import inputs_of
from ..plans.group_sizes import fitted_to
from ..plans.scheme import Scheme
from ..plans.stats import LayerStats
from ..plans.table import LayerTable, with_macs
from ..quantization.kernel import kernel_name
from ..weights.chunks import Array, Op, chunks
from ..weights.handles import Weight, Weights
from ..weights.rest import rest_bytes
from .cache import cached
from .coded import coded_curve, coded_sums, has_ladder
from .error import Sums, UnitRequest, answers, layer_stats, unit_sums, whole_sums
from .macs import count_macs
from .request import DEFAULT_BITS, DEFAULT_METRICS, FoldBN, MeasureRequest
from .units import Unit, Work, cut, cut_layer

LOG = logging.getLogger(__name__)

SHARED_AT_ONCE = 16  # layers that are handed out pass by pass; each only waits
CUDA_THREADS = 4  # one reads and copies while others' kernels run


def measure(  # noqa: PLR0913  # each option is a user's word
    source: nn.Module | str | Path,
    scheme: Scheme | None = None,
    bits: Sequence[int] = DEFAULT_BITS,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    per_channel: bool = False,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: FoldBN = "auto",
    weights: str | None = None,
    model: nn.Module | None = None,
    already_quantized: bool = False,
    example_input: Any = None,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    cache: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> LayerTable:
    """Measure the quantization error of every layer at every bit-width, and its importance, as plain numbers.

    The table is the same to the last bit whoever measures. Each worker needs 20 MiB, beside libraries and the table
    itself, whatever the model.

    Args:
        source: A module, a `.safetensors` file, a directory of shards or a torch checkpoint. From files one chunk of a
            tensor is in memory at a time.
        scheme: How weights are quantized; Affine() (asymmetric, per tensor, min-max) by default. A layer whose inputs
            do not divide into its groups has groups of the largest power of two that is smaller, divides them and is 16
            or more, or else one an output channel; a MeasureWarning names such layers, and `table.scheme_of` tells.
        bits: Any of 1..8.
        metrics: `relative` mean |w - w'| / |w| (zero weights count 0), `mse`, `rmse`, `sqnr_db`, `max_abs`.
        per_channel: Whether the errors of each output channel are measured too.
        skip: Globs on the names of layers to leave out, as in `find_weights`.
        only: Globs on the names of the layers to measure, as in `find_weights`.
        fold_bn: Whether conv weights are measured with their BatchNorm folded in. "auto" folds a module's for
            per_tensor, where folding changes the codes, and not otherwise.
        weights: The key of the weights that are meant in a torch checkpoint, as in `find_weights`.
        model: The module whose checkpoint the source is, as in `find_weights`.
        already_quantized: Whether a checkpoint may hold packed weights, as in `find_weights`.
        example_input: A module's input (a tensor, or a tuple of arguments), to count multiply-accumulates.
        executor: A concurrent.futures.Executor that measures units of at most 64 MiB (one output channel at least, and
            a layer with one scale up to 256 MiB): threads, processes, or dask's `client.get_executor()`, whose machines
            need the files under the same paths, and the same processors and packages. A module's weights travel to
            them. As many threads as torch uses by default.
        store: Where finished units are kept, so that an interrupted measurement goes on: a file's path, which is there
            until the table is returned, or an open `Store`, which is there until its block ends. Another job's is
            refused.
        cache: A file for the table itself. It is read where it is of these weights and has what is asked for, and
            otherwise written anew, with a store beside it until then.
        device: Where torch computes, as "cuda"; the weights' own by default, files' on the CPU.
        progress: Called with a layer's name, weights done and weights in all.

    Returns:
        The table.

    Raises:
        SettingError: An argument is not allowed.
        SourceError: The source cannot be read.
        WeightError: A layer's weight cannot be measured.
        WorkerError: An executor's workers fail.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=(2, 4, 8))
        >>> table.errors("relative", (2, 8)).shape
        (1, 2)
    """
    check_source(source)
    check_callbacks(progress=progress)
    request = MeasureRequest(
        Affine() if scheme is None else scheme,
        bits,
        metrics,
        per_channel,
        skip,
        only,
        fold_bn,
        weights,
        model,
        already_quantized,
    ).checked()
    means = Means(executor, store, device, progress)
    if cache is None:
        return run(source, request, means, example_input)
    _check_example(source, example_input)
    place = _cache_file(cache, store)
    table = cached(
        place, source, request, lambda kept: run(source, request, replace(means, store=kept), example_input),
        None if store is None else lambda: opened(store),
    )  # fmt: skip
    return table if example_input is None else _with_macs(table, source, example_input)


@dataclass(frozen=True)
class Means:
    """What measures, and what is told of it; none of it changes the table. The fields are arguments of `measure`.

    job: what a store calls the measurement, where it keeps several.
    """

    executor: Executor | None = None
    store: str | Path | Store | None = None
    device: torch.device | str | None = None
    progress: Progress | None = None
    job: str = "measure"


def run(
    source: nn.Module | str | Path, request: MeasureRequest, means: Means = Means(), example_input: Any = None
) -> LayerTable:
    """What `measure` does for a request that is made already, without a cache."""
    # Its workers may have a device that this process lacks.
    device = checked_device(means.device, here=means.executor is None)
    of_unit = UnitRequest(
        request.scheme, tuple(request.bits), tuple(request.metrics), request.per_channel, kernel_name(), device
    )
    _check_example(source, example_input)
    fold = request.folds(source)
    with unchanged(source):
        weights = request.find(source)
        if fold:
            _check_norms(source, request.fold_bn)
        rest = rest_bytes(source, weights, request.weights)
        folded = ", BatchNorm folded in" if weights.folded else ""
        LOG.info("%d layers under %s, bits %s%s", len(weights), of_unit.scheme, of_unit.bits, folded)
        layers = _checked_and_measured(weights, of_unit, source, means)
        _say_own_groups(weights, request.scheme)
    table = LayerTable(
        tuple(layers),
        of_unit.scheme,
        of_unit.bits,
        of_unit.metrics,
        weights.folded,
        fingerprint(layer.digest for layer in layers),
        weights.skipped,
        weights.left_alone,
        weights.key,
        rest,
    )
    return table if example_input is None else _with_macs(table, source, example_input)


def _cache_file(cache: object, store: str | Path | Store | None) -> Path:
    """The file of a table. Raises SettingError where it is none, or is the store, which goes once it is written."""
    if not isinstance(cache, str | Path) or not str(cache):
        raise SettingError(f"cache: {shown(cache)} is not allowed; a file's path")
    place = Path(cache)
    kept = store.path if isinstance(store, Store) else Path(store) if isinstance(store, str | Path) else None
    if kept is not None and same_place(place, kept):
        raise SettingError(f"store: {kept} is the cache; name another file")
    return place


def _check_example(source: object, example_input: Any) -> None:
    if example_input is not None and not isinstance(source, nn.Module):
        raise SettingError("example_input: multiply-accumulates can only be counted on a module, not on a file")


def _with_macs(table: LayerTable, source: object, example_input: Any) -> LayerTable:
    assert isinstance(source, nn.Module)
    return with_macs(table, count_macs(source, example_input))


def _checked_and_measured(
    weights: Weights,
    request: UnitRequest,
    source: nn.Module | str | Path,
    means: Means,
) -> list[LayerStats]:
    """Every layer's numbers, once none of them is known to be impossible."""
    for weight in weights:  # what does not fit a layer is found before the first one is measured
        if isinstance(weight.read_rows, Expanded):
            raise weight.read_rows.error
        scheme = fitted_to(request.scheme, weight.shape, weight.channel_axis)
        scheme.groups_per_channel(weight.shape, weight.channel_axis, weight.name)
        scheme.check_part(max(request.bits), weight.shape, weight.channel_axis, weight.channels, weight.name)
    if isinstance(means.store, str | Path):
        _check_store(Path(means.store), source, weights)
    with opened(means.store) as store:
        return _measured(list(weights), request, means, store)


def _measured(weights: list[Weight], request: UnitRequest, means: Means, store: Store | None) -> list[LayerStats]:
    """Every layer's numbers, in the layers' order."""
    work = cut(weights, request.scheme)
    on_cuda = request.device is not None and request.device.type == "cuda"
    workers = Workers(means.executor, max(CUDA_THREADS if on_cuda else 1, torch.get_num_threads()))
    kept = store.job(means.job, _facts(weights, request, work)) if store is not None else None
    progress = means.progress
    layers: dict[int, LayerStats] = {}
    laddered = has_ladder(request.scheme)  # which looks at every weight once more
    total, done = sum(weight.numel for weight in weights) * (2 if laddered else 1), 0
    coordinators = ThreadPoolExecutor(SHARED_AT_ONCE, "mpq-shared")
    try:
        if progress is not None:
            progress(weights[0].name, 0, total)
        shared = {
            position: coordinators.submit(_shared, position, weights[position], request, work.size, workers, kept)
            for position in work.shared
        }
        for name, numel, complete in _by_unit(weights, request, work, workers, kept):
            layers |= complete
            done += numel
            for position in complete:
                LOG.debug("%s", weights[position].name)
            if progress is not None:
                progress(name, done, total)
        for position, layer in _with_curves(weights, layers, request, workers, kept) if laddered else ():
            layers[position] = layer
            done += weights[position].numel
            if progress is not None:
                progress(layer.name, done, total)
        for position, future in shared.items():
            if progress is not None:
                progress(weights[position].name, done, total)
            layers[position] = future.result()
            LOG.debug("%s", weights[position].name)
            done += weights[position].numel
    finally:  # an error in one layer, or Ctrl-C, must not wait for all the others
        workers.close()
        coordinators.shutdown(cancel_futures=True)
    if progress is not None:
        progress("", total, total)
    return [layers[position] for position in range(len(weights))]


def _by_unit(
    weights: Sequence[Weight], request: UnitRequest, work: Work, workers: Workers, kept: Finished | None
) -> Iterator[tuple[str, int, dict[int, LayerStats]]]:
    """A unit's first layer, its weights, and the layers that are complete with it."""
    waiting: dict[int, list[Sums | None]] = {}
    slots: list[list[int]] = []  # of each unit's pieces, among those of their layers
    for unit in work.units:
        slots.append([])
        for position in unit.layers:
            pieces = waiting.setdefault(position, [])
            slots[-1].append(len(pieces))
            pieces.append(None)
    calls = [Call(str(n), unit_sums, (unit.pieces, request), unit.pieces[0].name) for n, unit in enumerate(work.units)]
    for call, sums in _finished(calls, workers, kept):
        n = int(call.name)
        unit = work.units[n]
        complete: dict[int, LayerStats] = {}
        for position, slot, part in zip(unit.layers, slots[n], _split(unit, sums), strict=True):
            waiting[position][slot] = part
            parts = [sums_of_piece for sums_of_piece in waiting[position] if sums_of_piece is not None]
            if len(parts) == len(waiting[position]):
                complete[position] = layer_stats(weights[position], parts, request)
                del waiting[position]
        yield unit.pieces[0].name, unit.numel, complete


def _shared(
    position: int, weight: Weight, request: UnitRequest, size: int, workers: Workers, kept: Finished | None
) -> LayerStats:
    """A large layer with one scale: each pass over it handed out in pieces."""
    pieces = cut_layer(weight, size)
    passes = count()

    def each(op: Op) -> Array:
        prefix = f"{position}.{next(passes)}"
        calls = [Call(f"{prefix}.{k}", answers, (piece, op, request), weight.name) for k, piece in enumerate(pieces)]
        values = {call.name: result["values"] for call, result in _finished(calls, workers, kept)}
        return np.concatenate([values[call.name] for call in calls])

    return layer_stats(weight, [whole_sums(weight, request, each)], request)


def _finished(calls: Iterable[Call], workers: Workers, kept: Finished | None) -> Iterator[tuple[Call, Arrays]]:
    """What an earlier run finished, then what the workers do."""
    left: list[Call] = []
    for call in calls:
        known = kept.arrays(call.name) if kept is not None else None
        if known is not None:
            yield call, known
        else:
            left.append(call)
    for call, result in workers.finished(left):
        if kept is not None:
            kept.add_arrays(call.name, result)
        yield call, result


def _with_curves(
    weights: Sequence[Weight],
    layers: Mapping[int, LayerStats],
    request: UnitRequest,
    workers: Workers,
    kept: Finished | None,
) -> Iterator[tuple[int, LayerStats]]:
    """The layers with what they cost entropy coded, each of which one worker measures by itself."""
    known = dict(layers)
    calls = [
        Call(f"coded {position}", coded_sums, (weights[position], request.scheme, request.device), layer.name)
        for position, layer in known.items()
    ]
    for call, sums in _finished(calls, workers, kept):
        position = int(call.name.split()[1])
        yield position, replace(known[position], coded=coded_curve(sums))


def _split(unit: Unit, sums: Sums) -> list[Sums]:
    """A unit's sums as those of its pieces."""
    channels = np.cumsum([piece.channels for piece in unit.pieces])[:-1]
    by_chunk = np.cumsum([len(chunks(piece)) for piece in unit.pieces])[:-1]
    parts = {name: np.split(array, by_chunk if name == "totals" else channels) for name, array in sums.items()}
    return [{name: arrays[k] for name, arrays in parts.items()} for k in range(len(unit.pieces))]


def _check_store(path: Path, source: nn.Module | str | Path, weights: Iterable[Weight]) -> None:
    """Raise SettingError where finished units would be written over what is measured."""
    readers = [
        row_reader.codes if isinstance(row_reader, ScaledRows) else row_reader
        for row_reader in (weight.read_rows for weight in weights)
    ]
    files = {reader.path for reader in readers if isinstance(reader, FileRows | FileColumns)}
    if not isinstance(source, nn.Module):
        files.add(Path(source))
    if exists(path) and any(path.samefile(file) for file in files):
        raise SettingError(f"store: {path} is what is measured; name another file")


def _facts(weights: Sequence[Weight], request: UnitRequest, work: Work) -> dict[str, str]:
    """What decides the units' numbers: weights, to the byte or by their files' times and sizes, and every setting."""
    digest = hashlib.sha256()
    for weight in weights:
        facts = (weight.name, weight.kind, weight.shape, str(weight.dtype), weight.channel_axis)
        digest.update(f"{facts} {weight.read_rows.signature()}".encode())
    return {
        "version": version("mpq-plugins"), "weights": digest.hexdigest(), "scheme": repr(request.scheme),
        "bits": str(request.bits), "metrics": str(request.metrics), "per_channel": str(request.per_channel),
        "device": str(request.device), "kernel": request.kernel, "unit": str(work.size),
    }  # fmt: skip


def _say_own_groups(weights: Iterable[Weight], scheme: Scheme) -> None:
    """Warn of layers whose inputs do not divide into the groups that were asked for, which have groups of their own."""
    own = [
        f"{weight.name!r} ({inputs_of(weight.shape, weight.channel_axis)} inputs, "
        f"{'per channel' if fitted.group_size is None else f'groups of {fitted.group_size}'})"
        for weight in weights
        if (fitted := fitted_to(scheme, weight.shape, weight.channel_axis)) != scheme
    ]
    if own:
        text = f"group_size: {scheme.group_size} does not divide the inputs of {len(own)} layers, which have groups"
        warnings.warn(MeasureWarning(f"{text} of their own: {first_few(own, ', ')}"), stacklevel=4)


def _check_norms(source: nn.Module | str | Path, fold_bn: FoldBN) -> None:
    """Say that norms in training mode are not folded; raise SettingError where that was asked for."""
    trained = training_norms(source) if isinstance(source, nn.Module) else []
    if not trained:
        return
    text = (
        f"fold_bn: BatchNorm is in training mode ({first_few([repr(name) for name in trained], ', ')}), where it "
        "normalises by its batch and cannot be folded"
    )
    if fold_bn is True:
        raise SettingError(f"{text}; call model.eval(), or measure with fold_bn=False")
    warnings.warn(MeasureWarning(f"{text}; call model.eval() first to have it folded"), stacklevel=4)
