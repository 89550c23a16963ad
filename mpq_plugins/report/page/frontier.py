"""The plans that a page sets side by side: every allocator over its own grid, and uniform widths."""

import warnings
from collections.abc import Iterator
from typing import Any

from ...allocation.budget import Budget
from ...allocation.mixquant import MixQuant
from ...allocation.ptilmpq import PTILMPQ
from ...allocation.sqnr import SQNR
from ...allocation.uniform import Uniform
from ...errors import PlanWarning, SettingError
from ...evaluation.pareto import PER_CHANNEL, PER_LAYER, LabelledPlan
from ...plans.table import LayerTable
from .commands import MOST_CHANNELS
from .measured import widths_of

BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
BUDGETS_BY_CHANNEL = (2.0, 4.0)  # each takes a second for a thousand channels
MOST_LAYERS = 2_000  # of which every allocator's grid is tried


def frontier(table: LayerTable) -> tuple[list[LabelledPlan], list[str]]:
    """Make the plans, and say which allocators have none and what they lack.

    Args:
        table: The measured layers.

    Returns:
        The plans with the names of their series, and a line for each series that is left out.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> plans, left_out = frontier(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=range(2, 9)))
        >>> sorted({plan.series for plan in plans})
        ['budget per layer', 'mixquant', 'ptilmpq', 'sqnr', 'uniform']
    """
    plans: list[LabelledPlan] = []
    left_out: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # the page says it of each
        for series, allocators in _tried(table):
            why = _why_not(table, series)
            refusals = []
            for allocator in allocators if why is None else ():
                try:
                    _check_measured(table, allocator)
                    plans.append(LabelledPlan(series, allocator(table)))
                except SettingError as error:
                    refusals.append(str(error))
            if why is not None or not any(plan.series == series for plan in plans):
                left_out.append(f"{series}: {why or [*refusals, _none_within(table)][0]}")
    return plans, left_out


def _tried(table: LayerTable) -> Iterator[tuple[str, list[Any]]]:
    """Each series with its allocators."""
    bits = widths_of(table)
    few = len(table.layers) > MOST_LAYERS
    yield "uniform", [Uniform(bits=b) for b in bits]
    budgets = [one for one in (BUDGETS_BY_CHANNEL if few else BUDGETS) if min(bits) <= one <= max(bits)]
    sensitivity = usual_sensitivity(table)
    yield PER_LAYER, [Budget(average_bits=one, bits=bits, parts=False, sensitivity=sensitivity) for one in budgets]
    by_channel = [one for one in BUDGETS_BY_CHANNEL if one in budgets]
    yield PER_CHANNEL, [Budget(average_bits=one, bits=bits, sensitivity=sensitivity) for one in by_channel]
    yield "mixquant", [MixQuant(qem=one) for one in (MixQuant.grid["qem"][:: 4 if few else 2])]
    yield "ptilmpq", [PTILMPQ(alpha=one) for one in (PTILMPQ.grid["alpha"][:: 5 if few else 2])]
    yield "sqnr", [SQNR(average_bits=one, bits=bits) for one in budgets[::2]]


def _check_measured(table: LayerTable, allocator: Any) -> None:
    """Raise SettingError for widths that the table does not have, as `mpq plan` does."""
    missing = [bits for bits in allocator.needs.bits if bits not in table.bits]
    if missing:
        raise SettingError(f"{missing[0]} bits were not measured; measure with --bits 1-8")


def _why_not(table: LayerTable, series: str) -> str | None:
    """Why a series is not tried, with what to do; None where it is."""
    if series != PER_CHANNEL:
        return None
    again = "measure with --granularity per_channel --per-channel-errors"
    if table.scheme.granularity == "per_tensor":
        return f"layers were measured with one scale a tensor; {again}"
    if not all(layer.channel_errors for layer in table.layers):
        return f"errors of channels were not measured; {again}"
    channels = sum(layer.channels for layer in table.layers)
    if channels > MOST_CHANNELS:
        return f"deciding {channels:,} channels takes minutes; mpq plan TABLE --average-bits 4 does it"
    return None


def _none_within(table: LayerTable) -> str:
    """Why nothing was tried."""
    least, most = BUDGETS[0], BUDGETS[-1]
    widths = ", ".join(map(str, widths_of(table)))
    return (
        f"its plans here have {least:g} to {most:g} bits a weight, and {widths} bits were measured; measure with "
        "--bits 1-8"
    )


def usual_sensitivity(table: LayerTable) -> str:
    """What Budget keeps low where nothing is said: mse, or what was measured first of a table without."""
    return "mse" if "mse" in table.metrics else (*table.metrics, *table.sensitivities)[0]
