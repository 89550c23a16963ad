"""--file-bits and --file-size: what a container may take, and the plan that meets it."""

from typing import TYPE_CHECKING, Any

import click

from ..errors import SettingError
from ..report.progress import progress_bar
from .fitting import Fitting
from .sources import Source

if TYPE_CHECKING:  # `mpq --help` should not wait for these
    from torch import nn

    from ..plans.plan import Plan

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


def fitted_to_file(
    source: Source, plan: "Plan", fitting: Fitting, weights: str | None, model: "nn.Module | None"
) -> "tuple[Any, Plan]":
    """What to write and the plan to write it by, so that the file takes what the plan was made for.

    Raises SettingError, and as `fit_file`.
    """
    from ..compression.fit import fit_file
    from ..evaluation.scored import not_compensated

    batches = inputs(source, fitting)
    if batches is not None and fitting.rounding != "compensated":
        raise not_compensated(fitting.rounding)
    with progress_bar("fitting") as progress:
        fitted = fit_file(source.weights, plan, batches, progress=progress, weights=weights, model=model)
    return fitted.model, fitted.plan


def inputs(source: Source, fitting: Fitting) -> list[Any] | None:
    """The inputs to round on. Raises SettingError where there is nothing to run them through."""
    if not fitting.calibrated:
        return None
    if source.module is None:
        raise SettingError(
            f"calibrate: {source.text} is a file, and weights are rounded on inputs by running the model; give what "
            "makes it, package.module:factory, as SOURCE"
        )
    return fitting.batches(source.module)
