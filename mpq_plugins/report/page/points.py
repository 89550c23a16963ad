"""Plans as points of the page's frontier, each with its layers' widths."""

from dataclasses import dataclass
from typing import Any

from ...allocation.guard import compare, worse_text
from ...evaluation.sweep import SweepRow
from ...plans.layers import LayerChoice
from ...plans.plan import Plan
from ...plans.table import LayerTable
from ..details import value_text
from .commands import plan_command

YARDSTICK = "uniform widths are what it compares other plans with"


@dataclass(frozen=True)
class Point:
    """A plan, what it costs and loses, and what the guard says of it.

    Attributes:
        plan: The plan.
        row: Its row of a sweep: sizes, predicted costs, scores.
        command: What makes the plan again; None where no command does.
        guard: The guard's word; None where it has none.
        worse: Whether it warns.
        sizes: Bits of each layer in total, for a page without a table; else empty.
    """

    plan: Plan
    row: SweepRow
    command: str | None
    guard: str | None
    worse: bool
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: Plan, row: SweepRow, table: LayerTable | None, file: str, judge: str | None) -> "Point":
        """Compare a plan with uniform widths, where there is a table that can.

        Args:
            plan: The plan.
            row: Its row.
            table: What it was made from, or is judged by.
            file: The table's file.
            judge: What is compared on.

        Returns:
            The point.
        """
        if table is None:
            sizes = plan.size().layers
            return cls(plan, row, None, None, False, tuple(sizes[layer.name].total for layer in plan.layers))
        command = plan_command(plan.allocator, file)
        if plan.allocator.name == "uniform":
            return cls(plan, row, command, YARDSTICK, False)
        found = None if judge is None else compare(table, plan, judge)
        if found is None:
            return cls(plan, row, command, None, False)
        return cls(plan, row, command, worse_text(plan, found) if found.worse else found.text(), found.worse)

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
            "scores": dict(row.scores),
            "rounding": row.rounding,
            "pareto": row.pareto,
            "layers": [widths_of(layer) for layer in self.plan.layers],
            "sizes": list(self.sizes),
            "command": self.command,
            "guard": self.guard,
            "worse": self.worse,
        }

    @property
    def _numel(self) -> int:
        return max(1, sum(layer.numel for layer in self.plan.layers))


def label_of(plan: Plan) -> str:
    """What tells plans of one series apart: the first number among the parameters.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> label_of(mpq.Uniform(bits=4)(mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)))))
        'bits 4'
    """
    for name, value in plan.allocator.parameters.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{name.replace('_', ' ')} {value_text(value)}"
    return ""


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
