"""A table kept in a file: read where it answers what is asked, measured and written anew where it does not."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..common.files import claimed, exists
from ..common.store import Store
from ..errors import SettingError
from ..plans.table import LayerTable
from ..plans.table_file import is_table
from ..weights.rest import rest_bytes
from .error import weights_fingerprint
from .request import MeasureRequest

Said = Callable[[str], None]


def cached(
    cache: Path,
    source: nn.Module | str | Path,
    request: MeasureRequest,
    measured: Callable[[Store | None], LayerTable],
    store: Callable[[], AbstractContextManager[Store | None]] | None = None,
    said: Said = lambda _: None,
) -> LayerTable:
    """The table in the file `cache`, where it answers the request; else one from `measured`.

    It answers where it is of the same weights and has what is asked for. A new one is saved before what it could have
    gone on from, a store beside the file or that of `store()`, goes.

    said: told which of the two it is. Raises SettingError where the file is no table, or another run writes it;
    FormatError for a damaged table; and what `measured` raises.
    """
    if exists(cache):
        if not is_table(cache):
            raise SettingError(f"table: {cache} exists and is no table; remove it, or name another file")
        table = LayerTable.load(cache)
        reason = why_stale(table, source, request)
        if reason is None:
            said(f"reusing the measurement in {cache}")
            # The rest of the model may have changed, and tables of earlier versions do not tell.
            return replace(table, rest_bytes=rest_bytes(source, request.find(source), request.weights))
        said(f"measuring again: {cache} {reason}")
    with claimed(cache), Store.beside(cache) if store is None else store() as kept:
        table = measured(kept)
        table.save(cache)
    return table


def why_stale(table: LayerTable, source: nn.Module | str | Path, request: MeasureRequest) -> str | None:
    """What of the table is not what a measurement of the source would give; None where it answers the request."""
    if table.scheme != request.scheme:
        return f"holds the scheme {table.scheme}"
    if not request.is_covered_by(table):
        return "lacks bit-widths or metrics"
    weights = request.find(source)
    if weights.folded != table.fold_bn:
        return "was measured with another BatchNorm folding"
    if weights_fingerprint(weights) != table.fingerprint or weights.skipped != table.skipped:
        return "is of other weights"
    return None
