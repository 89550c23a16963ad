"""Plans across budgets: every allocator at the same sizes, so that they can be set side by side."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..allocation.budget import Budget
from ..allocation.mixquant import MixQuant
from ..allocation.ptilmpq import PTILMPQ
from ..allocation.sqnr import SQNR
from ..allocation.uniform import Uniform
from ..common.checks import is_number, listed, shown
from ..common.public import public
from ..errors import PlanWarning, SettingError
from ..plans.arguments import check_table
from ..plans.granular import check_bits
from ..plans.plan import Plan
from ..plans.table import LayerTable

PER_CHANNEL, PER_LAYER, CODED = "budget per channel", "budget per layer", "entropy coded"


@public
@dataclass(frozen=True)
class LabelledPlan:
    """A plan, and the series it belongs to in a table or picture.

    Attributes:
        series: The name of the series.
        plan: The plan.
    """

    series: str
    plan: Plan


def pareto(  # each option is a user's word
    table: LayerTable,
    budgets: Sequence[float],
    sensitivity: str = "mse",
    bits: Sequence[int] | None = None,
    *,
    coded: LayerTable | None = None,
    file_bits: Sequence[float] = (),
    executor: Executor | None = None,
) -> tuple[LabelledPlan, ...]:
    """Make plans of at most these average bits: Budget per channel and per layer, MixQuant, PTILMPQ, SQNR.

    Uniform plans of all the table's widths are beside them. An allocator that has no plan as small as a budget has no
    row there. Plans of entropy-coded steps are made for bytes of a file, and the others for bits a weight: set them
    side by side by what the files take, with `sweep(files=True)`.

    Args:
        table: The measured layers, which have errors per channel unless the scheme is per_tensor.
        budgets: Average bits a weight, codes alone.
        sensitivity: What Budget keeps low, an error or sensitivity of the table.
        bits: Candidate widths, the table's by default.
        coded: The same layers measured under `EntropyCoded`, for plans of steps.
        file_bits: Bits a weight in the file, for each of which there is such a plan (`Budget(file_bits=...)`).
        executor: A concurrent.futures.Executor that makes the plans, each a unit of work. The tables travel to it.

    Returns:
        The plans with the names of their series: uniform ones first, then budget by budget, entropy coded ones last.

    Raises:
        SettingError: There are no budgets, one is below the least width, the table lacks what Budget needs, or only one
            of `coded` and `file_bits` is given.
        WorkerError: An executor's workers fail, or the tables cannot be sent to them.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=(2, 3, 4))
        >>> [row.series for row in mpq.pareto(table, [3])]
        ['uniform', 'uniform', 'uniform', 'budget per layer', 'mixquant', 'ptilmpq', 'sqnr']
    """
    check_table(table)
    if coded is not None:
        check_table(coded, "coded")
    file_averages = listed("file_bits", file_bits, AVERAGES)
    _check_numbers("file_bits", file_averages)
    if (coded is None) != (not file_averages):
        raise SettingError("file_bits and coded belong together: bits a weight, and a table under EntropyCoded()")
    asked_bits = [] if bits is None else listed("bits", bits, "a list of widths, 1 to 8")
    widths = tuple(sorted(map(check_bits, asked_bits))) or table.bits
    asked = [*_by_size(table, budgets, sensitivity, widths), *_by_file(file_averages, sensitivity)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # the comparison is what this is for
        plans = dict(_made(table, coded, asked, executor))
    return tuple(LabelledPlan(one.series, plan) for n, one in enumerate(asked) if (plan := plans[n]) is not None)


@dataclass(frozen=True)
class _Asked:
    """One plan to be made. of_files: from the table under EntropyCoded."""

    series: str
    make: Callable[[LayerTable], Plan | None]
    of_files: bool = False


AVERAGES = "one or more averages, as in 2,2.5,3,4"


def _by_size(
    table: LayerTable, budgets: Sequence[float], sensitivity: str, widths: tuple[int, ...]
) -> Iterator[_Asked]:
    averages = listed("budgets", budgets, AVERAGES)
    if not averages:
        raise SettingError(f"budgets: none given; {AVERAGES}")
    _check_numbers("budgets", averages)
    parts = table.scheme.granularity != "per_tensor"
    for b in widths:
        yield _Asked("uniform", Uniform(bits=b))
    for average in sorted(set(averages)):
        for series, whole in ((PER_CHANNEL, True), (PER_LAYER, False)):
            if parts or not whole:
                yield _Asked(series, Budget(average_bits=average, sensitivity=sensitivity, bits=widths, parts=whole))
        yield _Asked("mixquant", partial(mixquant_at, average=average, widths=widths))
        yield _Asked("ptilmpq", partial(ptilmpq_at, average=average, widths=widths))
        yield _Asked("sqnr", partial(_or_none, SQNR(average_bits=average, bits=widths)))


def _check_numbers(name: str, averages: Sequence[object]) -> None:
    if not all(map(is_number, averages)):
        raise SettingError(f"{name}: {shown(averages)} is not allowed; {AVERAGES}")


def _by_file(file_bits: Sequence[float], sensitivity: str) -> Iterator[_Asked]:
    for asked in sorted(set(file_bits)):
        yield _Asked(CODED, Budget(file_bits=asked, sensitivity=sensitivity), of_files=True)


def _made(
    table: LayerTable, coded: LayerTable | None, asked: Sequence[_Asked], executor: Executor | None
) -> Iterator[tuple[int, Plan | None]]:
    """Each plan by its position; None where there is none so small."""
    if executor is None:
        for position, one in enumerate(asked):
            yield position, _plan(table, coded, one)
        return
    from ..models.units import Job, Unit

    units = [Unit(str(position), one.series, (one,)) for position, one in enumerate(asked)]
    job = Job(_plan, {"table": table, "table of steps": coded}, "planning")
    for unit, plan in job.results(units, executor):
        yield int(unit.name), plan


def _plan(table: LayerTable, coded: LayerTable | None, one: _Asked) -> Plan | None:
    """What a worker does."""
    measured = coded if one.of_files else table
    assert measured is not None, "files are planned from a table of their own"
    return one.make(measured)


def mixquant_at(table: LayerTable, average: float, widths: Sequence[int]) -> Plan | None:
    """MixQuant with the least QEM whose plan is small enough; None where none is.

    Its plan changes only where QEM passes some layer's ratio of errors, so these are all there are to try.
    """
    bits = tuple(b for b in widths if b > 1) or tuple(widths)
    errors = table.errors("relative", (*bits, max(widths)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = errors[:, :-1] / errors[:, -1:]
    # A little above each, for the rule is QE(b) <= QEM x QE(8) in floating point.
    candidates = np.unique(ratios[np.isfinite(ratios) & (ratios > 0)]) * (1 + 1e-9)
    low, high = 0, len(candidates)
    best: Plan | None = None
    while low < high:
        middle = (low + high) // 2
        plan = MixQuant(qem=float(candidates[middle]), bits=bits, baseline=max(widths))(table)
        if plan.size().average_bits <= average:
            best, high = plan, middle
        else:
            low = middle + 1
    return best


def ptilmpq_at(table: LayerTable, average: float, widths: Sequence[int]) -> Plan | None:
    """PTILMPQ with the widest pairs of neighbouring widths, and the greatest alpha, that are small enough."""
    for n in sorted(widths, reverse=True):
        if not {n - 1, n, n + 1} <= set(widths):
            continue
        plan = _or_none(PTILMPQ(important_bits=(n + 1, n), other_bits=(n, n - 1), average_bits=average), table)
        if plan is not None:
            return plan
    return None


def _or_none(allocator: PTILMPQ | SQNR, table: LayerTable) -> Plan | None:
    try:
        return allocator(table)
    except SettingError:  # no plan of these widths is as small
        return None
