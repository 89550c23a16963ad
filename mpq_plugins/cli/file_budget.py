"""--file-bits and --file-size: what a container may take, and the plan that meets it."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import SettingError
from ..reconstruction.rounding import COMPENSATED
from ..report.progress import progress_bar
from .fitting import Fitting
from .request import Request
from .sources import Source

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from concurrent.futures import Executor

    from torch import nn

    from ..plans.plan import Plan
    from ..plans.table import LayerTable

OPTIONS = (
    click.option(
        "--file-bits", type=float, metavar="BITS",
        help="Without PLAN: bits a weight in the file, header and all, but without other tensors.",
    ),
    click.option("--file-size", metavar="SIZE", help="Without PLAN: most bytes of the file, as 60kB."),
)  # fmt: skip


def file_options(command: Any) -> Any:
    """Give a command the two options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def planned_for_file(
    source: Source, file_bits: float | None, file_size: str | None, weights: str | None, model: "nn.Module | None"
) -> "Plan":
    """A plan of steps for that budget, measured now. Raises SettingError."""
    from ..allocation.budget import Budget
    from ..measurement.measure import measure

    budget = Budget(file_bits=file_bits, file_size=file_size)
    if source.is_table:
        raise SettingError(f"{source.text}: is a table, and a container is written from weights; give the model")
    needs = budget.needs
    with progress_bar("measuring") as progress:
        return budget(measure(
            source.weights, needs.scheme, needs.bits, needs.metrics, weights=weights, model=model, progress=progress
        ))  # fmt: skip


def check_written(evaluation: str | None, fitting: Fitting) -> None:
    """Refuse, before the work, files of models that are not evaluated, and roundings that files cannot be fitted to."""
    if evaluation is None:
        raise SettingError(
            "file-bits: files are written of models that are evaluated; add --eval package.module:function"
        )
    _check_compensated(fitting)


def table_of_steps(
    source: Source, table: "LayerTable", model: "nn.Module", request: Request, sensitivity: str
) -> "LayerTable":
    """The layers of a table measured under the entropy-coded scheme, of what the table is of. Raises SettingError.

    model: what is measured where the source is a table itself.
    """
    from ..allocation.budget import Budget
    from ..allocation.objective import parts_of
    from ..plans.stats import METRICS
    from .measuring import measure_now

    beyond = [name for name in parts_of(sensitivity) if name not in METRICS]
    if beyond:
        raise SettingError(
            f"sensitivity: {beyond[0]!r} is not measured for entropy-coded steps here; leave out --file-bits, or plan "
            f"by an error: {', '.join(METRICS)}"
        )
    needs = Budget(file_bits=1, sensitivity=sensitivity).needs
    if source.is_table:
        same = tuple(f"re:{re.escape(layer.name)}" for layer in table.layers)
        return measure_now(Source(source.text, "module", model), needs, Request(only=same))
    return measure_now(source, needs, replace(request, scheme_name=None, scheme_fields=()))


def fitted_to_file(
    source: Source,
    plan: "Plan",
    fitting: Fitting,
    weights: str | None,
    model: "nn.Module | None",
    executor: "Executor | None" = None,
) -> "tuple[Any, Plan]":
    """What to write and the plan to write it by, so that the file takes what the plan was made for.

    Raises SettingError, and as `fit_file`.
    """
    from ..compression.fit import fit_file

    batches = inputs(source, fitting)
    _check_compensated(fitting)
    with progress_bar("fitting") as progress:
        fitted = fit_file(
            source.weights, plan, batches, executor=executor, progress=progress, weights=weights, model=model
        )
    return fitted.model, fitted.plan


def _check_compensated(fitting: Fitting) -> None:
    from ..evaluation.scored import not_compensated

    if fitting.calibrated and fitting.rounding != COMPENSATED:
        raise not_compensated(fitting.rounding)


def that_runs(source: Source, fitting: Fitting, model: "nn.Module | None", factory: str, weights: str | None) -> Source:
    """A checkpoint's model with its weights, where there are inputs to run through it. Raises SourceError."""
    from ..checkpoints.checkpoint import read_checkpoint
    from .calibration import load_tensors

    if model is None or source.module is not None or not fitting.calibrated:
        return source
    load_tensors(model, source.path, read_checkpoint(source.path, weights, whole=True).tensors, factory)
    return Source(source.text, "module", model)


def inputs(source: Source, fitting: Fitting) -> list[Any] | None:
    """The inputs to round on. Raises SettingError where there is nothing to run them through."""
    if not fitting.calibrated:
        return None
    if source.module is None:
        raise SettingError(
            f"calibrate: {source.text} is a file, and weights are rounded on inputs by running the model; say what "
            "makes it, --model package.module:factory"
        )
    return fitting.batches(source.module)
