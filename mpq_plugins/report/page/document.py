"""All that a page shows, as one document: plain values that are the same for the same table and plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...allocation.guard import judge_of
from ...errors import SettingError
from ...evaluation.pareto import LabelledPlan
from ...evaluation.sweep import SweepRow, sweep
from ...plans.plan import Plan
from ...plans.table import LayerTable
from .distribution import Distribution
from .frontier import frontier, usual_sensitivity
from .measured import Measured
from .points import Point, plain_row, scores_of

FORMAT = "mpq-page"
GIVEN = "given"


class Evaluated(Protocol):
    """What gives plans their scores: `sweep` with a model, its evaluation and its inputs."""

    def __call__(self, table: LayerTable, plans: Sequence[Plan], series: Sequence[str], judge: str | None) -> Any:
        """Make a row for each plan, the float model's first where models are evaluated."""
        ...


def unevaluated(
    table: LayerTable, plans: Sequence[Plan], series: Sequence[str], judge: str | None
) -> tuple[SweepRow, ...]:
    """Make rows without scores: sizes, and costs that the table predicts."""
    return sweep(table, plans, series=series, judge=judge)


@dataclass(frozen=True)
class PageDocument:
    """What a page says.

    Attributes:
        title: What it is about.
        layers: Name, kind, shape, output axis and other names of each layer, in the network's order.
        measured: The table, as the page plans from it; None for a page of plans alone.
        points: The plans side by side.
        chosen: Which of them the page shows first; None for what it plans itself.
        float_row: The float model's row, where models were evaluated.
        left_out: Why some series have no plan.
        weights: Distributions of layers' weights by place.
        sensitivity: What Budget keeps low at first.
    """

    title: str
    layers: tuple[Mapping[str, Any], ...]
    measured: Measured | None
    points: tuple[Point, ...]
    chosen: int | None = None
    float_row: SweepRow | None = None
    left_out: tuple[str, ...] = ()
    weights: Mapping[int, Distribution] = field(default_factory=dict)
    sensitivity: str = "mse"

    def document(self) -> dict[str, Any]:
        """Give what the page embeds.

        Returns:
            Plain values.
        """
        row = self.float_row
        return {
            "format": FORMAT,
            "version": 1,
            "title": self.title,
            "layers": [dict(layer) for layer in self.layers],
            "table": None if self.measured is None else self.measured.document(),
            "points": [point.document() for point in self.points],
            "chosen": self.chosen,
            "float": None if row is None else {"scores": scores_of(row), "file_bytes": row.file_bytes},
            "left_out": list(self.left_out),
            "weights": {str(place): one.document() for place, one in self.weights.items()},
            "sensitivity": self.sensitivity,
        }


def page_of_table(
    table: LayerTable,
    file: str,
    given: Mapping[str, Plan],
    *,
    title: str,
    judge: str | None = None,
    evaluated: Evaluated = unevaluated,
    weights: Mapping[int, Distribution] | None = None,
) -> PageDocument:
    """Set every allocator's plans and those that are given side by side.

    Args:
        table: The measured layers.
        file: What the command line calls the table.
        given: Plans of the table's layers by name, shown beside.
        title: What the page is about.
        judge: What plans are compared on; by default what the guard chooses.
        evaluated: What makes rows of plans.
        weights: Distributions of layers' weights by place.

    Returns:
        The document.

    Raises:
        SettingError: A plan is of other layers, the judge was not measured, or as `evaluated`.

    Examples:
        >>> import mpq_plugins as mpq, torch
        >>> table = mpq.measure(torch.nn.Sequential(torch.nn.Linear(8, 8)), bits=range(2, 9))
        >>> page_of_table(table, "t.mpqt", {}, title="net").document()["layers"][0]["shape"]
        [8, 8]
    """
    for name, plan in given.items():
        _check_layers(name, plan, table.layers, file)
    made, left_out = frontier(table)
    labelled = [*(LabelledPlan(name, plan) for name, plan in given.items()), *made]
    plans = [one.plan for one in labelled]
    judged = judge_of(table, plans, judge)
    rows = evaluated(table, plans, [one.series for one in labelled], judged) if plans else ()
    floats, rows = rows[: len(rows) - len(plans)], rows[len(rows) - len(plans) :]
    how = [*(Point.of_given for _ in given), *(Point.of for _ in made)]
    points = (of(plan, row, table, file, judged) for of, plan, row in zip(how, plans, rows, strict=True))
    return PageDocument(
        title, tuple(map(_said, table.layers)), Measured(table, file, judged), tuple(points),
        0 if given else None, floats[0] if floats else None, tuple(left_out), weights or {}, usual_sensitivity(table),
    )  # fmt: skip


def page_of_plans(given: Mapping[str, Plan], title: str) -> PageDocument:
    """Set plans of one network side by side, without a table: sizes and widths, and nothing predicted.

    Args:
        given: One or more plans by name.
        title: What the page is about.

    Returns:
        The document.

    Raises:
        SettingError: The plans are of different layers, or have none.
    """
    (first, plan), *_ = given.items()
    if not plan.layers:
        raise SettingError(f"{first}: the plan has no layers, so there is nothing to show")
    for name, other in given.items():
        _check_layers(name, other, plan.layers, first)
    points = (Point.of_given(one, plain_row(one, name), None, "", None) for name, one in given.items())
    return PageDocument(title, tuple(map(_said, plan.layers)), None, tuple(points), 0)


def _check_layers(name: str, plan: Plan, layers: Sequence[Any], of: str) -> None:
    """Raise SettingError for a plan of another network's layers, by their names and shapes."""
    own, wanted = ({layer.name: (layer.shape, layer.channel_axis) for layer in some} for some in (plan.layers, layers))
    if list(own.items()) == list(wanted.items()):
        return
    other = next((one for one in (*own, *wanted) if own.get(one) != wanted.get(one)), next(iter(own), ""))
    raise SettingError(
        f"{name}: is a plan of other layers than {of} ({other!r}); give plans and the table of one network"
    )


def _said(layer: Any) -> dict[str, Any]:
    """What both a table's layer and a plan's say of themselves."""
    return {
        "name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "channel_axis": layer.channel_axis,
        "tied": list(layer.tied),
    }  # fmt: skip
