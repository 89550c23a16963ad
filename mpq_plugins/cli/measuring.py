"""From a source and a request to a table: measured now, or read where it was measured before."""

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..allocation.contract import Needs
from ..common.files import exists
from ..common.store import Store
from ..errors import SettingError
from ..plans.affine import Affine
from ..plans.table import LayerTable
from ..report.progress import progress_bar, say
from .output import check_output
from .request import Request
from .sources import PRINTED, Source

if TYPE_CHECKING:  # `mpq --help` should not wait for it
    from torch import Tensor

USUAL = Affine(granularity="per_channel", range="mse")  # what a table is measured under where nothing is said
MOST_VALUES = 1 << 28  # of an input whose multiply-accumulates are counted: a gibibyte in float


def measured(source: Source, needs: Needs, request: Request, cache: Path | None) -> LayerTable:
    """The table for a source: the source itself if it is one, the cache if it answers the request, or measured now."""
    from ..measurement.cache import cached

    if source.is_table:
        return _given_table(source.path, needs, request, cache)
    if cache is None:
        return measure_now(source, needs, request)
    check_output(Store.beside(cache).path, source.text)
    return cached(
        cache, source.weights, request.of_measurement(needs),
        lambda store: measure_now(source, needs, request, store=store), lambda: kept_beside(cache), say,
    )  # fmt: skip


def measure_now(
    source: Source,
    needs: Needs,
    request: Request,
    input_shape: tuple[int, ...] | None = None,
    *,
    store: Store | None = None,
    executor: Executor | None = None,
    device: str | None = None,
) -> LayerTable:
    """Measure with a progress bar."""
    from ..measurement.measure import Means, run

    example = _zeros(input_shape) if input_shape is not None else None
    with progress_bar("measuring") as progress:
        table = run(source.weights, request.of_measurement(needs), Means(executor, store, device, progress), example)
    if source.module is None:
        _say_file(source.path)
    return table


@contextmanager
def kept_beside(output: Path | None) -> Iterator[Store | None]:
    """The store of a result, which says where finished work is when a run goes on from it, or is interrupted."""
    if output is None:
        yield None
        return
    with Store.beside(output) as store:
        before = len(store)
        if before:
            say(f"an earlier run left {store.path}: what it finished of this measurement is used")
        try:
            yield store
        except BaseException:
            if len(store) != before:
                say(f"what is finished is kept in {store.path}: the same command goes on from there")
            raise


def _say_file(source: Path) -> None:
    """Which file of a directory is read, where it has another name than weights have; and what is rounded already."""
    from ..checkpoints.gguf_files import on_a_grid
    from ..checkpoints.shards import USUAL, weight_files

    if rounded := on_a_grid(source):
        say(f"note: {rounded}")
    if exists(source) and source.is_dir():
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
    if not (request.empty or request.from_file) or cache is not None:
        raise SettingError(
            f"{path} is a table, already measured; scheme, skip, only, fold-bn and table options go with a model"
        )
    table = LayerTable.load(path)
    if needs.channel_errors and table.scheme.granularity == "per_tensor":
        raise SettingError(
            f"{path}: was measured per tensor, and channels of a layer that differ in width need scales of their own. "
            f"Add --no-parts for one width a layer, or measure again: mpq measure SOURCE --granularity per_channel -o "
            f"{path}"
        )
    if not table.covers(needs.bits, needs.metrics, needs.channel_errors):
        bits, metrics = sorted({*table.bits, *needs.bits}), dict.fromkeys([*table.metrics, *needs.metrics])
        raise SettingError(
            f"{path}: was measured at bits {list(table.bits)} with {', '.join(table.metrics)}; the allocator needs "
            f"bits {list(needs.bits)} with {', '.join(needs.metrics)}"
            f"{' per channel' if needs.channel_errors else ''}. Measure again: mpq measure SOURCE --bits "
            f"{','.join(map(str, bits))} --metrics {','.join(metrics)}"
            f"{' --per-channel-errors' if needs.channel_errors else ''} -o {path}"
        )
    if needs.scheme is not None and type(needs.scheme) is not type(table.scheme):
        say(f"note: {path} was measured under {table.scheme}, so that is the plan's scheme, not {needs.scheme}")
    return table
