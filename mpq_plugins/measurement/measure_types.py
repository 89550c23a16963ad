"""One measurement a type: which layers can have it, and what they lose; together a table of types."""

import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..common.progress import Progress, check_callbacks, part_of
from ..common.store import Store, opened
from ..common.text import first_few
from ..errors import MeasureWarning, SettingError
from ..models.arguments import check_source
from ..plans.affine import Affine
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..plans.type_table import TypeColumn, TypeTable
from ..plans.types import NamedType, types_of
from ..weights.handles import Weight
from .measure import Means, run
from .request import DEFAULT_METRICS, MeasureRequest

BASE = Affine(symmetric=True, granularity="per_channel")
BASE_BITS = (8,)


def measure_types(  # noqa: PLR0913  # each option is a user's word
    source: nn.Module | str | Path,
    types: Iterable[str | NamedType],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    weights: str | None = None,
    model: nn.Module | None = None,
    already_quantized: bool = False,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> TypeTable:
    """Measure what every layer loses as each type that it can have.

    Args:
        source: A module, or a checkpoint, as in `measure`.
        types: Names of types, as `int4_g32` or `mxfp4`, or of families of them: `int` (2 to 8 bits in groups of 32),
            `mx`, `fp8`; or NamedType values.
        metrics: The errors, as in `measure`.
        skip: As in `measure`.
        only: As in `measure`.
        weights: As in `measure`.
        model: As in `measure`.
        already_quantized: As in `measure`.
        executor: As in `measure`.
        store: As in `measure`.
        device: As in `measure`.
        progress: As in `measure`; weights count once for each type, and once more for what all types share.

    Returns:
        The table.

    Raises:
        SettingError: An argument is not allowed, or a layer can have none of the types. The message names both.
        SourceError: The source cannot be read.
        WeightError: A layer's weight cannot be measured.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure_types(torch.nn.Sequential(torch.nn.Linear(64, 8)), ("int4_g32", "mxfp4"))
        >>> mpq.Budget(total_average_bits=4.25)(table).layers[0].type
        'mxfp4'
    """
    check_source(source)
    check_callbacks(progress=progress)
    kinds = types_of(types)
    request = MeasureRequest(
        BASE, BASE_BITS, metrics, skip=skip, only=only, fold_bn=False, weights=weights, model=model,
        already_quantized=already_quantized,
    ).checked()  # fmt: skip
    return run_types(source, kinds, request, Means(executor, store, device, progress))


def run_types(
    source: nn.Module | str | Path, kinds: Sequence[NamedType], request: MeasureRequest, means: Means
) -> TypeTable:
    """What `measure_types` does for types and a request that are made already; the request's scheme is the base's."""
    with opened(means.store) as store:
        steps = 1 + len(kinds)
        reports = [None if means.progress is None else part_of(means.progress, n, steps) for n in range(steps)]
        _check_fit(request.find(source), kinds)  # before the work
        base = run(source, request, replace(means, store=store, progress=reports[0]))
        columns = [
            TypeColumn(kind, _column(source, kind, base, request, replace(means, store=store, progress=report)))
            for kind, report in zip(kinds, reports[1:], strict=True)
        ]
    gone = [column.type.name for column in columns if not column.table.layers]
    if gone:
        named = first_few(gone, ", ")
        text = f"types: no layer's inputs divide into the groups of {named}, so no layer is given these types"
        warnings.warn(MeasureWarning(text), stacklevel=3)
    return TypeTable(base, tuple(column for column in columns if column.table.layers))


def _column(
    source: nn.Module | str | Path, kind: NamedType, base: LayerTable, request: MeasureRequest, means: Means
) -> LayerTable:
    """The layers that can have the type, measured as it."""
    unfit = [layer for layer in base.layers if not kind.fits(layer.shape, layer.channel_axis)]
    if len(unfit) == len(base.layers):
        return replace(base, layers=(), scheme=kind.scheme, bits=(kind.bits,))
    skip = (*request.skip, *([_exactly(unfit)] if unfit else []))
    of_type = replace(request, scheme=kind.scheme, bits=(kind.bits,), skip=skip).checked()
    return run(source, of_type, replace(means, job=f"measure {kind.name}"))


def _exactly(layers: Sequence[LayerStats]) -> str:
    """A pattern of these layers' names and of no other."""
    return f"re:(?:{'|'.join(re.escape(layer.name) for layer in layers)})$"


def _check_fit(weights: Iterable[Weight], kinds: Sequence[NamedType]) -> None:
    """Refuse layers that can have none of the types."""
    without = [layer for layer in weights if not any(kind.fits(layer.shape, layer.channel_axis) for kind in kinds)]
    if without:
        layer = without[0]
        named = first_few([kind.name for kind in kinds], ", ")
        more = f", one of {len(without)} such," if len(without) > 1 else ""
        raise SettingError(
            f"types: layer {layer.name!r}{more} has the shape {list(layer.shape)}, whose inputs do not divide into the "
            f"groups of any of {named}. Add a type with smaller groups, as int8 (a scale for each channel), or skip "
            "the layer"
        )
