"""Filling a table with a sensitivity: what quantizing each layer, at each bit-width, is predicted to cost.

A sensitivity needs the model and a few hundred unlabeled inputs; weight errors (`mse`, `relative`) need neither and are
in every table. Each kind is a frozen dataclass that an entry point of the group `mpq_plugins.sensitivities` names.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from ..common import registry
from ..common.checks import shown
from ..common.progress import Progress, check_callbacks, part_of
from ..common.store import Store, opened
from ..common.text import first_few
from ..errors import MismatchError, PluginError, SettingError
from ..models.arguments import check_module
from ..models.fingerprint import batches_digest, model_digest, source_digest
from ..models.folding import folded_copy
from ..models.kinds import quantizable_weights
from ..models.running import checked_batches, evaluating, outside_inference_mode, seeded
from ..plans.arguments import check_any_table
from ..plans.stats import LayerStats
from ..plans.table import LayerTable
from ..plans.type_table import TypeTable
from ..quantization.fitted import check_fits
from ..weights.find import find_weights
from .contract import Curves, Job, Output, Sensitivity
from .error import weights_fingerprint
from .moments import second_moments, weight_users

LOG = logging.getLogger(__name__)

AnyTable = TypeVar("AnyTable", LayerTable, TypeTable)


@outside_inference_mode()
def sensitivity(  # noqa: PLR0913  # each option is a user's word
    model: nn.Module,
    table: AnyTable,
    kind: "str | Sensitivity",
    batches: Iterable[Any],
    *,
    output: Output | None = None,
    seed: int = 0,
    fit_ranges: bool = False,
    executor: Executor | None = None,
    store: str | Path | Store | None = None,
    progress: Progress | None = None,
) -> AnyTable:
    """Add one more sensitivity to a table: what quantizing each layer is predicted to cost, at all of its bit-widths.

    Args:
        model: The model; it is not changed.
        table: The table that was measured of it, or a table of types, of which every type is measured.
        kind: `output_mse`, the squared error of the layer's output (one pass), and `compensated_mse`, the same once
            `compensate` has rounded the layer; `kl`, the divergence of the model's predictions, and `distance`,
            1 - cosine of its output, with that layer alone quantized; `fisher` and `hessian`, quadratics around the
            float weights; another that an entry point names; or a value of such a class, as Hessian(probes=16).
        batches: A few hundred inputs without labels, as for `correct`.
        output: (model, batch) -> tensor (samples, features), for models whose own output is no logits.
        seed: Of labels and probes; the same seed gives the same table.
        fit_ranges: Whether to quantize by the ranges of least input-weighted squared error, as the same argument of
            `correct` puts them into the model (for tables measured under affine per_channel minmax).
        executor: A concurrent.futures.Executor for kl and distance (layers on one batch are a unit) and compensated_mse
            (a layer is one): threads, processes, or dask's. The model travels to it. The others take a pass or two over
            the model, and are measured here. The table is the same to the last bit.
        store: Where finished layers are kept (kl and distance), so that an interrupted measurement goes on, as in
            `measure`.
        progress: Called with what is being done, how much of it is done and how much there is.

    Returns:
        The table with the sensitivity.

    Raises:
        SettingError: Inputs or outputs are not of use, or no input reaches a layer.
        MismatchError: The table is another model's.
        PluginError: The kind is not installed.
        WorkerError: An executor's workers fail, or the model cannot be sent to them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
        >>> table = mpq.sensitivity(net, mpq.measure(net), "output_mse", [torch.ones(4, 8)])
        >>> table.sensitivities
        ('output_mse',)
    """
    check_module(model)
    check_any_table(table)
    check_callbacks(progress=progress)
    measurer = _made(kind) if isinstance(kind, str) else kind
    if isinstance(measurer, type) or not hasattr(measurer, "measure"):
        raise SettingError(f"kind: {shown(kind)} is no sensitivity; a name, or a value such as Hessian(probes=8)")
    asked = _Asked(measurer, checked_batches(batches), output, seed, fit_ranges, executor)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise SettingError(f"seed: {shown(seed)} is not allowed; an integer from 0 up")
    with opened(store) as kept:
        if not isinstance(table, TypeTable):
            return _filled(model, table, asked, kept, progress, measurer.name)
        tables: dict[str, LayerTable] = {}
        for n, column in enumerate(table.columns):
            reported = None if progress is None else part_of(progress, n, len(table.columns))
            job = f"{measurer.name} {column.type.name}"
            tables[column.type.name] = _filled(model, column.table, asked, kept, reported, job)
        return table.with_tables(table.base, tables)


@dataclass(frozen=True)
class _Asked:
    """What is measured, on which inputs; shared: what is worked out once for all types."""

    measurer: Sensitivity
    batches: Sequence[Any]
    output: Output | None
    seed: int
    fit_ranges: bool
    executor: Executor | None
    shared: dict[Any, Any] = field(default_factory=dict)


def _filled(
    model: nn.Module, table: LayerTable, asked: _Asked, store: Store | None, progress: Progress | None, name: str
) -> LayerTable:
    """The table with one more sensitivity; name: what a store calls the job."""
    measurer, given, output, seed, fit_ranges = (
        asked.measurer, asked.batches, asked.output, asked.seed, asked.fit_ranges
    )  # fmt: skip
    copied = folded_copy(model, table)
    weights = weights_of(copied, table)
    modules = {layer.name: weight_users(copied, weights[layer.name]) for layer in table.layers}
    for layer in table.layers if fit_ranges else ():
        check_fits(table.scheme_of(layer), layer.name)
    finished = None
    if store is not None:
        facts = _facts(copied, table, measurer, given, output, seed) | {"fit_ranges": str(fit_ranges)}
        finished = store.job(name, facts)
    with evaluating(copied), seeded(seed) as generator:
        moments = second_moments(copied, modules, given) if fit_ranges else None
        job = Job(
            copied, table, given, weights, modules, output, moments, finished, progress, generator, shared=asked.shared,
            executor=asked.executor, seed=seed,
        )  # fmt: skip
        LOG.info("%s of %d layers on %d batches", measurer.name, len(table.layers), len(given))
        curves = _measured(measurer, job)
    layers = tuple(_with_curves(layer, measurer.name, curves[layer.name]) for layer in table.layers)
    return replace(table, layers=layers)


def _made(name: str) -> Sensitivity:
    """The installed sensitivity of that name, with its defaults. Raises PluginError."""
    kind = registry.load("sensitivities", name)
    with registry.at_work("sensitivities", kind):
        made: Sensitivity = kind()
    return made


def _measured(measurer: Sensitivity, job: Job) -> Mapping[str, Curves]:
    """The curves of every layer. Raises PluginError naming a sensitivity of another package that fails."""
    with registry.at_work("sensitivities", measurer):
        curves = measurer.measure(job)
    count = len(job.table.bits)
    for layer in job.table.layers:
        given = curves.get(layer.name) if isinstance(curves, Mapping) else None
        if not isinstance(given, Curves) or np.shape(given.layer) != (count,):
            raise PluginError(
                f"{registry.described('sensitivities', measurer)} gives no curve of {count} bit-widths for layer "
                f"{layer.name!r}; measure(job) returns Curves for every layer of job.table"
            )
    return curves


def _with_curves(layer: LayerStats, name: str, curves: Curves) -> LayerStats:
    bad = [curve for curve in (curves.layer, curves.channels) if curve is not None and not np.isfinite(curve).all()]
    if bad:
        raise SettingError(f"layer {layer.name!r}: its {name} is NaN or infinite; look at the inputs and the model")
    channels = {key: value for key, value in layer.channel_sensitivities.items() if key != name}
    if curves.channels is not None:
        channels[name] = curves.channels
    return replace(layer, sensitivities={**layer.sensitivities, name: curves.layer}, channel_sensitivities=channels)


def weights_of(model: nn.Module, table: LayerTable) -> dict[str, Tensor]:
    """The weights that a table was measured on, by layer. Raises MismatchError for a model that has others."""
    weights = quantizable_weights(model)
    missing = [layer.name for layer in table.layers if layer.name not in weights]
    other = [
        layer.name
        for layer in table.layers
        if layer.name in weights and tuple(weights[layer.name].shape) != layer.shape
    ]
    if missing or other:
        named = first_few([repr(name) for name in (missing or other)], ", ")
        what = "lacks" if missing else "has other shapes of"
        raise MismatchError(f"{type(model).__name__}: {what} {named}; the table was measured on another model")
    planned = {layer.name for layer in table.layers}
    handles = [weight for weight in find_weights(model, refuse=False) if weight.name in planned]
    if weights_fingerprint(handles) != table.fingerprint:
        raise MismatchError(f"{type(model).__name__}: has other weights than those the table was measured on")
    return {layer.name: weights[layer.name].detach() for layer in table.layers}


def _facts(
    model: nn.Module, table: LayerTable, kind: Sensitivity, batches: Sequence[Any], output: Output | None, seed: int
) -> dict[str, str]:
    measured = hashlib.sha256(f"{table.fingerprint} {table.scheme} {table.bits}".encode()).hexdigest()
    return {
        "sensitivity": repr(kind), "model": model_digest(model), "table": measured, "batches": batches_digest(batches),
        "output": source_digest(output) if output is not None else "", "seed": str(seed),
    }  # fmt: skip
