"""From a source and a request to a table: measured now, or read where it was measured before."""

import math
from concurrent.futures import Executor
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from ..allocation.contract import Needs
from ..common.files import claimed, exists
from ..errors import SettingError
from ..plans.table import LayerTable
from ..plans.table_file import is_table
from ..report.progress import progress_bar, say
from .output import check_output
from .partial import kept_at, partial_file, save_measured
from .request import Request
from .sources import PRINTED, resolve_source

MOST_VALUES = 1 << 28  # of an input whose multiply-accumulates are counted: a gibibyte in float


def measured(source: "str | Path | nn.Module", needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    """The table for a source: the source itself if it is one, the cache if it answers the request, or measured now."""
    if isinstance(source, str) and is_table(Path(source)):
        return _given_table(Path(source), needs, request, cache)
    resolved = resolve_source(source) if isinstance(source, str) else source
    if cache is not None and exists(cache):
        if not is_table(cache):
            raise SettingError(f"table: {cache} exists and is no table; remove it, or name another file")
        table = LayerTable.load(cache)
        reason = _why_stale(table, resolved, needs, request)
        if reason is None:
            say(f"reusing the measurement in {cache}")
            return table
        say(f"measuring again: {cache} {reason}")
    journal = partial_file(cache)
    check_output(journal, source if isinstance(source, str) else None)
    with nullcontext() if cache is None else claimed(cache):
        table = measure_now(resolved, needs, request, None, journal=journal)
        save_measured(table, cache)
    return table


def measure_now(
    source: "Path | nn.Module",
    needs: Needs,
    request: Request,
    input_shape: tuple[int, ...] | None,
    *,
    journal: Path | None = None,
    executor: Executor | None = None,
    device: str | None = None,
) -> LayerTable:
    """Measure with a progress bar."""
    from ..measurement.measure import measure

    example = _zeros(input_shape) if input_shape is not None else None
    with kept_at(journal), progress_bar("measuring") as progress:
        table = measure(
            source, request.scheme(needs.scheme), needs.bits, needs.metrics, per_channel=needs.channel_errors,
            skip=request.skip, only=request.only, fold_bn=request.fold,  # type: ignore[arg-type]
            weights=request.weights, already_quantized=bool(request.already_quantized),
            example_input=example, journal=journal, executor=executor, device=device, progress=progress,
        )  # fmt: skip
    _say_file(source)
    return table


def _say_file(source: "Path | nn.Module") -> None:
    """Which file of a directory is read, where it has another name than weights have."""
    from ..checkpoints.shards import USUAL, weight_files

    if isinstance(source, Path) and exists(source) and source.is_dir():
        file = weight_files(source).chosen
        if file.name not in USUAL:
            say(f"weights: {file.name}, the only ones in {source}")


def _zeros(shape: tuple[int, ...]) -> "Tensor":
    """An input of this shape."""
    import torch

    count = math.prod(shape)
    if count > MOST_VALUES:
        values = f"{count:,} values" if count.bit_length() < PRINTED else f"more than 2^{PRINTED - 1} values"
        raise SettingError(f"input-shape: {list(shape)!s:.80} has {values}; at most {MOST_VALUES:,}")
    return torch.zeros(shape)


def _given_table(path: Path, needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    if not request.empty or cache is not None:
        raise SettingError(
            f"{path} is a table, already measured; scheme, skip, only, fold-bn and table options go with a model"
        )
    table = LayerTable.load(path)
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        raise SettingError(
            f"{path}: was measured at bits {list(table.bits)} with {', '.join(table.metrics)}; the allocator needs "
            f"bits {list(needs.bits)} with {', '.join(needs.metrics)}"
            f"{' per channel' if needs.channel_errors else ''}. Measure again."
        )
    if needs.scheme is not None and type(needs.scheme) is not type(table.scheme):
        say(f"note: {path} was measured under {table.scheme}, so that is the plan's scheme, not {needs.scheme}")
    return table


def _why_stale(table: LayerTable, source: "Path | nn.Module", needs: Needs, request: Request) -> str | None:
    from ..measurement.error import weights_fingerprint
    from ..measurement.measure import resolve_fold
    from ..weights.find import find_weights

    scheme = request.scheme(needs.scheme)
    if table.scheme != scheme:
        return f"holds the scheme {table.scheme}"
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        return "lacks bit-widths or metrics"
    fold = resolve_fold(source, scheme, request.fold)  # type: ignore[arg-type]  # checked there
    found = find_weights(
        source, skip=request.skip, only=request.only, fold_bn=fold, weights=request.weights,
        already_quantized=bool(request.already_quantized),
    )  # fmt: skip
    if found.folded != table.fold_bn:
        return "was measured with another BatchNorm folding"
    if weights_fingerprint(found) != table.fingerprint or found.skipped != table.skipped:
        return "is of other weights"
    return None
