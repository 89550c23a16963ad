"""Plans as points of the page's frontier, each with its layers' widths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...allocation.guard import compare, worse_text
from ...evaluation.sweep import SweepRow
from ...plans.granular import FLOAT_BITS
from ...plans.layers import LayerChoice
from ...plans.plan import Plan
from ...plans.scheme import Scheme
from ...plans.table import LayerTable
from ..details import value_text
from .commands import defaults_of, makes_again, plan_command

YARDSTICK = "uniform widths are what it compares other plans with"


@dataclass(frozen=True)
class Point:
    """A plan, what it costs and loses, and what the guard says of it.

    Attributes:
        plan: The plan.
        row: Its row of a sweep: sizes, predicted costs, scores.
        command: What makes the plan of the table; None where no command does.
        guard: The guard's word; None where it has none.
        worse: Whether it warns.
        sizes: Bits of each layer in total, of a plan that is given; else empty, for the page counts them.
        measured: Whether the table has the errors of what the plan's layers get.
    """

    plan: Plan
    row: SweepRow
    command: str | None
    guard: str | None
    worse: bool
    sizes: tuple[int, ...] = ()
    measured: bool = True

    @classmethod
    def of(cls, plan: Plan, row: SweepRow, table: LayerTable, file: str, judge: str | None) -> "Point":
        """Compare a plan that was made of a table with uniform widths.

        Args:
            plan: The plan.
            row: Its row.
            table: What it was made from.
            file: The table's file.
            judge: What is compared on.

        Returns:
            The point.
        """
        return cls(plan, row, plan_command(plan.allocator, file), *_guarded(plan, table, judge))

    @classmethod
    def of_given(cls, plan: Plan, row: SweepRow, table: LayerTable | None, file: str, judge: str | None) -> "Point":
        """Compare a plan that somebody gives, of whom only the layers are known to be the table's.

        Args:
            plan: The plan.
            row: Its row.
            table: What it is judged by; None where there is none.
            file: The table's file.
            judge: What is compared on.

        Returns:
            The point.
        """
        own = plan.size().layers
        sizes = tuple(own[layer.name].total for layer in plan.layers)
        if table is None:
            return cls(plan, row, None, None, False, sizes)
        command = plan_command(plan.allocator, file)
        if command is not None and not makes_again(plan, table):
            command = None
        measured = _is_measured(plan, table)
        guard, worse = _guarded(plan, table, judge) if measured else (None, False)
        return cls(plan, row, command, guard, worse, sizes, measured)

    def document(self) -> dict[str, Any]:
        """Give what the page embeds.

        Returns:
            Plain values.
        """
        row = self.row
        return {
            "series": row.name,
            "allocator": row.allocator,
            "label": label_of(self.plan),
            "parameters": ", ".join(f"{key}={value_text(value)}" for key, value in row.parameters.items()),
            "weights_only_bits": round(row.average_bits * self._numel),
            "total_bits": round(row.total_average_bits * self._numel),
            "file_bytes": row.file_bytes,
            "cost": next(iter(row.errors.values()), None),
            "scores": scores_of(row),
            "rounding": row.rounding,
            "pareto": row.pareto,
            "layers": [widths_of(layer) for layer in self.plan.layers],
            "sizes": list(self.sizes),
            "measured": self.measured,
            "command": self.command,
            "guard": self.guard,
            "worse": self.worse,
        }

    @property
    def _numel(self) -> int:
        return max(1, sum(layer.numel for layer in self.plan.layers))


def _guarded(plan: Plan, table: LayerTable, judge: str | None) -> tuple[str | None, bool]:
    """The guard's word, and whether it warns."""
    if plan.allocator.name == "uniform":
        return YARDSTICK, False
    found = None if judge is None else compare(table, plan, judge)
    if found is None:
        return None, False
    return worse_text(plan, found) if found.worse else found.text(), found.worse


def _is_measured(plan: Plan, table: LayerTable) -> bool:
    """Whether the table has errors of what every layer gets."""
    pairs = zip(plan.layers, table.layers, strict=True)
    return all(layer.in_float or _is_layer_measured(layer, table.scheme_of(of), table.bits) for layer, of in pairs)


def _is_layer_measured(layer: LayerChoice, scheme: Scheme, bits: Sequence[int]) -> bool:
    known = {*bits, *FLOAT_BITS}
    return layer.scheme == scheme and layer.coded_bytes is None and all(width in known for width, _ in layer.widths)


def scores_of(row: SweepRow) -> dict[str, Any]:
    """A row's scores as JSON has them, which has no infinity: as a text, which JavaScript takes for that number.

    Examples:
        >>> import mpq_plugins as mpq
        >>> scores_of(mpq.SweepRow("uniform", {}, 1, 1, 1, 1, {}, {"loss": float("inf"), "accuracy": 0.5}))
        {'loss': 'Infinity', 'accuracy': 0.5}
    """
    return {
        name: value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
        for name, value in row.scores.items()
    }


def label_of(plan: Plan) -> str:
    """What tells plans of one series apart: the first number among the parameters that somebody has set.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> label_of(mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))))
        'bits 4'
    """
    numbers = {
        name: value
        for name, value in plan.allocator.parameters.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    usual = defaults_of(plan.allocator.name) or {}
    named = [name for name in numbers if numbers[name] != usual.get(name)] or list(numbers)
    return f"{named[0].replace('_', ' ')} {value_text(numbers[named[0]])}" if named else ""


def widths_of(layer: LayerChoice) -> Any:
    """Bits of a layer, [[bits, channels], ...] of its parts, or {"coded": bits} for what its codes take in a file."""
    if layer.coded_bytes is not None:
        return {"coded": 8 * layer.coded_bytes / max(1, layer.numel)}
    return layer.bits if layer.bits is not None else [list(part) for part in layer.widths]


def plain_row(plan: Plan, series: str) -> SweepRow:
    """A row of a plan that no table can judge.

    Args:
        plan: The plan.
        series: What it is called.

    Returns:
        Its sizes, without errors and scores.
    """
    size = plan.size()
    return SweepRow(
        plan.allocator.name, plan.allocator.parameters, size.average_bits, size.total_average_bits,
        size.weights_only_bytes, size.total_bytes, {}, {}, series=series,
    )  # fmt: skip
