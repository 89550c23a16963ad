"""One measurement: check the request, cut the work, hand it out, build the table from what comes back."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..checkpoints.readers import FileColumns, FileRows
from ..checkpoints.scaled import ScaledRows
from ..checkpoints.torch_files import Expanded
from ..common.files import exists, unchanged
from ..common.progress import Progress
from ..common.record import Arrays, Record
from ..common.text import first_few
from ..errors import MeasureWarning, SettingError
from ..models.device import checked_device
from ..models.fingerprint import fingerprint
from ..models.folding import has_batch_norm, training_norms
from ..plans.scheme import Affine, Scheme
from ..plans.stats import METRICS, LayerStats
from ..plans.table import LayerTable, with_macs
from ..quantization.kernel import kernel_name
from ..weights.chunks import Array, Op, chunks
from ..weights.find import find_weights
from ..weights.handles import Weight, Weights
from .error import Request, Sums, answers, layer_stats, unit_sums, whole_sums
from .macs import count_macs
from .units import Unit, Work, cut, cut_layer
from .workers import Call, Workers

SHARED_AT_ONCE = 16  # layers that are handed out pass by pass; each only waits
CUDA_THREADS = 4  # one reads and copies while others' kernels run


def measure(  # noqa: PLR0913  # each option is a user's word
    source: nn.Module | str | Path,
    scheme: Scheme | None = None,
    bits: Sequence[int] = range(2, 9),
    metrics: Sequence[str] = ("relative", "mse"),
    *,
    per_channel: bool = False,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    fold_bn: bool | Literal["auto"] = "auto",
    weights: str | None = None,
    model: nn.Module | None = None,
    already_quantized: bool = False,
    example_input: Any = None,
    executor: Executor | None = None,
    journal: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> LayerTable:
    """The quantization error of every layer at every bit-width, and its importance, as plain numbers.

    source: a module, a `.safetensors` file, a directory of shards or a torch checkpoint; from files one chunk
    of a tensor is in memory at a time. scheme: Affine() (asymmetric, per tensor, min-max) by default.
    bits: any of 1..8. metrics: `relative` mean |w - w'| / |w| (zero weights count 0), `mse`, `rmse`, `sqnr_db`,
    `max_abs`. per_channel: the errors of each output channel too. skip, only: globs on layer names.
    fold_bn: whether conv weights are measured with their BatchNorm folded in; "auto" folds a module's for
    per_tensor, where folding changes the codes, and not otherwise. weights, model, already_quantized: which weights of
    a checkpoint are meant, and what is known of it, as in find_weights. example_input: a module's input (a tensor,
    or a tuple of arguments), to count multiply-accumulates.

    executor: a concurrent.futures.Executor that measures units of at most 64 MiB (one output channel at least, and
    a layer with one scale up to 256 MiB): threads, processes, or dask's `client.get_executor()`, whose machines need
    the files under the same paths, and the same processors and packages; a module's weights travel to them. As many
    threads as torch uses by default. The table is the same to the last bit whoever measures. Each worker needs 20 MiB,
    beside libraries and the table itself, whatever the model. journal: a file where finished units are kept, so that
    an interrupted measurement goes on; it stays, to be removed once the table is saved. Another job's is written anew,
    with a MeasureWarning. device: where torch computes, as "cuda"; the weights' own by default, files' on the CPU.

    Raises SettingError, SourceError or WeightError, each naming the argument, file or layer, and WorkerError where an
    executor's workers fail.
    """
    scheme = scheme or Affine()
    widths = checked_bits(bits, scheme)
    found_device = checked_device(device, here=executor is None)  # its workers may have what this process lacks
    request = Request(scheme, widths, checked_metrics(metrics), per_channel, kernel_name(), found_device)
    if example_input is not None and not isinstance(source, nn.Module):
        raise SettingError("example_input: multiply-accumulates can only be counted on a module, not on a file")
    fold = resolve_fold(source, scheme, fold_bn)
    with unchanged(source):
        found = find_weights(
            source, skip=skip, only=only, fold_bn=fold, weights=weights, model=model,
            already_quantized=already_quantized,
        )  # fmt: skip
        if fold:
            _check_norms(source, fold_bn)
        layers = _checked_and_measured(found, request, source, executor, journal, progress)
    table = LayerTable(
        tuple(layers),
        scheme,
        widths,
        request.metrics,
        found.folded,
        fingerprint(layer.digest for layer in layers),
        found.skipped,
        found.left_alone,
        found.key,
    )
    if example_input is None:
        return table
    assert isinstance(source, nn.Module)
    return with_macs(table, count_macs(source, example_input))


def _checked_and_measured(
    weights: Weights,
    request: Request,
    source: nn.Module | str | Path,
    executor: Executor | None,
    journal: str | Path | None,
    progress: Progress | None,
) -> list[LayerStats]:
    """Every layer's numbers, once none of them is known to be impossible."""
    scheme = request.scheme
    for weight in weights:  # what does not fit a layer is found before the first one is measured
        if isinstance(weight.read_rows, Expanded):
            raise weight.read_rows.error
        scheme.groups_per_channel(weight.shape, weight.channel_axis, weight.name)
        scheme.check_part(max(request.bits), weight.shape, weight.channel_axis, weight.channels, weight.name)
    if journal is not None:
        _check_journal(Path(journal), source, weights)
    return _measured(list(weights), request, executor, journal, progress)


def _measured(
    weights: list[Weight],
    request: Request,
    executor: Executor | None,
    journal: str | Path | None,
    progress: Progress | None,
) -> list[LayerStats]:
    """Every layer's numbers, in the layers' order."""
    work = cut(weights, request.scheme)
    on_cuda = request.device is not None and request.device.type == "cuda"
    workers = Workers(executor, max(CUDA_THREADS if on_cuda else 1, torch.get_num_threads()))
    record = Record(Path(journal), _job(weights, request, work)) if journal is not None else None
    layers: dict[int, LayerStats] = {}
    total, done = sum(weight.numel for weight in weights), 0
    coordinators = ThreadPoolExecutor(SHARED_AT_ONCE, "mpq-shared")
    try:
        if progress is not None:
            progress(weights[0].name, 0, total)
        shared = {
            position: coordinators.submit(_shared, position, weights[position], request, work.size, workers, record)
            for position in work.shared
        }
        for name, numel, found in _by_unit(weights, request, work, workers, record):
            layers |= found
            done += numel
            if progress is not None:
                progress(name, done, total)
        for position, future in shared.items():
            if progress is not None:
                progress(weights[position].name, done, total)
            layers[position] = future.result()
            done += weights[position].numel
    finally:  # an error in one layer, or Ctrl-C, must not wait for all the others
        workers.close()
        coordinators.shutdown(cancel_futures=True)
        if record is not None:
            record.close()
    if progress is not None:
        progress("", total, total)
    return [layers[position] for position in range(len(weights))]


def _by_unit(
    weights: Sequence[Weight], request: Request, work: Work, workers: Workers, record: Record | None
) -> Iterator[tuple[str, int, dict[int, LayerStats]]]:
    """A unit's first layer, its weights, and the layers that are complete with it."""
    waiting: dict[int, list[Sums | None]] = {}
    slots: list[list[int]] = []  # of each unit's pieces, among those of their layers
    for unit in work.units:
        slots.append([])
        for position in unit.layers:
            own = waiting.setdefault(position, [])
            slots[-1].append(len(own))
            own.append(None)
    calls = [Call(str(n), unit_sums, (unit.pieces, request), unit.pieces[0].name) for n, unit in enumerate(work.units)]
    for call, sums in _finished(calls, workers, record):
        n = int(call.name)
        unit = work.units[n]
        complete: dict[int, LayerStats] = {}
        for position, slot, part in zip(unit.layers, slots[n], _split(unit, sums), strict=True):
            waiting[position][slot] = part
            parts = [found for found in waiting[position] if found is not None]
            if len(parts) == len(waiting[position]):
                complete[position] = layer_stats(weights[position], parts, request)
                del waiting[position]
        yield unit.pieces[0].name, unit.numel, complete


def _shared(
    position: int, weight: Weight, request: Request, size: int, workers: Workers, record: Record | None
) -> LayerStats:
    """A large layer with one scale: each pass over it handed out in pieces."""
    pieces = cut_layer(weight, size)
    passes = count()

    def each(op: Op) -> Array:
        own = f"{position}.{next(passes)}"
        calls = [Call(f"{own}.{k}", answers, (piece, op, request), weight.name) for k, piece in enumerate(pieces)]
        found = {call.name: result["values"] for call, result in _finished(calls, workers, record)}
        return np.concatenate([found[call.name] for call in calls])

    return layer_stats(weight, [whole_sums(weight, request, each)], request)


def _finished(calls: Iterable[Call], workers: Workers, record: Record | None) -> Iterator[tuple[Call, Arrays]]:
    """What an earlier run finished, then what the workers do."""
    left: list[Call] = []
    for call in calls:
        if record is not None and call.name in record:
            yield call, record.take(call.name)
        else:
            left.append(call)
    for call, result in workers.finished(left):
        if record is not None:
            record.add(call.name, result)
        yield call, result


def _split(unit: Unit, sums: Sums) -> list[Sums]:
    """A unit's sums as those of its pieces."""
    channels = np.cumsum([piece.channels for piece in unit.pieces])[:-1]
    by_chunk = np.cumsum([len(chunks(piece)) for piece in unit.pieces])[:-1]
    parts = {name: np.split(array, by_chunk if name == "totals" else channels) for name, array in sums.items()}
    return [{name: own[k] for name, own in parts.items()} for k in range(len(unit.pieces))]


def _check_journal(path: Path, source: nn.Module | str | Path, weights: Iterable[Weight]) -> None:
    """Raise SettingError where finished units would be written over what is measured."""
    readers = [own.codes if isinstance(own, ScaledRows) else own for own in (weight.read_rows for weight in weights)]
    files = {reader.path for reader in readers if isinstance(reader, FileRows | FileColumns)}
    if not isinstance(source, nn.Module):
        files.add(Path(source))
    if exists(path) and any(path.samefile(file) for file in files):
        raise SettingError(f"journal: {path} is what is measured; name another file")


def _job(weights: Sequence[Weight], request: Request, work: Work) -> str:
    """What a record is told apart by: weights, to the byte or by their files' times and sizes, and every setting."""
    digest = hashlib.sha256()
    for weight in weights:
        facts = (weight.name, weight.kind, weight.shape, str(weight.dtype), weight.channel_axis)
        digest.update(f"{facts} {weight.read_rows.signature()}".encode())
    return json.dumps(
        {
            "mpq-plugins": version("mpq-plugins"), "weights": digest.hexdigest(), "scheme": repr(request.scheme),
            "bits": request.bits, "metrics": request.metrics, "per_channel": request.per_channel,
            "device": str(request.device), "kernel": request.kernel, "unit": work.size,
        },
        sort_keys=True,
    )  # fmt: skip


def resolve_fold(source: nn.Module | str | Path, scheme: Scheme, fold_bn: bool | Literal["auto"]) -> bool:
    """Whether to fold: "auto" folds a module's BatchNorm for per_tensor, and nothing else."""
    if fold_bn == "auto":
        return isinstance(source, nn.Module) and scheme.granularity == "per_tensor" and has_batch_norm(source)
    if not isinstance(fold_bn, bool):
        raise SettingError(f"fold_bn: {fold_bn!r} is not allowed; True, False or 'auto'")
    return fold_bn


def _check_norms(source: nn.Module | str | Path, fold_bn: bool | Literal["auto"]) -> None:
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
