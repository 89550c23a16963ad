"""Plans as points: how good against how small."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.text import printable
from ..evaluation.scored import FLOAT
from ..evaluation.sweep import SweepRow, by_files
from .labels import place_labels
from .plots import save_plot, write_plain_numbers
from .sweep import values_text, varying_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "oD^vP*Xph<>d"
BUDGETS = (
    "average_bits",
    "total_average_bits",
    "file_bits",
    "bits",
)  # parameters that say how large a plan may be, in bits
IN_TOTAL = "bits a weight in total: codes, scales, zero points, part maps"
IN_FILE = "bits a weight in the file: all of its bytes, header and all, but those of other tensors"
MOST_TICKS = 12
LEAST_SHOWN = 0.4  # of the plans
FAR = 4.0  # a loss so many times that of the best third makes all of those one blob


@dataclass(frozen=True)
class Point:
    """A plan in a picture: its size in bits a weight, its score or error, and the parameters that set it apart.

    bits: in its file, if all plans have one, or else in total.
    """

    bits: float
    value: float
    label: str
    row: SweepRow


def sweep_plot(rows: Sequence[SweepRow], path: Path, title: str) -> None:
    """Score (or error) against true size, a marker per allocator, the Pareto front as a line; atomically."""
    from matplotlib.figure import Figure

    score = next(iter(rows[0].scores), None)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    series = _series(rows, score)
    points = [point for made in series.values() for point in made]
    for position, (name, made) in enumerate(series.items()):
        marker = "s" if name == "uniform" else MARKERS[position % len(MARKERS)]
        line = "-" if made[0].row.series else ""  # named series are curves over the same budgets
        axes.plot(*_columns(made), f"{marker}{line}", label=printable(name), alpha=0.8, markersize=5, linewidth=1)
    front = sorted((point for point in points if point.row.pareto), key=lambda point: point.bits)
    if front:
        axes.plot(*_columns(front), drawstyle="steps-post", color="0.6", linewidth=1, label="Pareto front", zorder=0)
    axes.set_xlabel(IN_FILE if by_files(rows) else IN_TOTAL)
    axes.set_ylabel(printable(score or _error_name(rows)))
    axes.set_title(printable(title), fontsize="medium")
    axes.grid(alpha=0.3)
    _set_ticks(axes, rows)
    _set_range(axes, points, score, next((row.score for row in rows if row.allocator == FLOAT), None))
    if points:
        axes.legend(fontsize="small")
    place_labels(axes, [(point.bits, point.value, point.label) for point in points])
    save_plot(figure, path)


def _error_name(rows: Sequence[SweepRow]) -> str:
    error = next(iter(rows[0].errors), "")
    return f"predicted {error}"


def _series(rows: Sequence[SweepRow], score: str | None) -> Mapping[str, list[Point]]:
    """The points of each series, those of plans that have a score, or an error."""
    plans = [row for row in rows if row.allocator != FLOAT and row.score is not None]
    made: dict[str, list[Point]] = {}
    files = by_files(rows)
    for name in dict.fromkeys(row.name for row in plans):
        own = [row for row in plans if row.name == name]
        varying = varying_parameters(own)
        made[name] = [Point(_bits(row, files), _value(row, score), _label(row, varying), row) for row in own]
    return made


def _bits(row: SweepRow, files: bool) -> float:
    return row.file_bits if files and row.file_bits is not None else row.total_average_bits


def _label(row: SweepRow, varying: Mapping[str, Sequence[str]]) -> str:
    """The size that was asked for where the plans differ in that, or whatever they differ in."""
    names = varying.get(row.allocator, ())
    asked = [name for name in names if name in BUDGETS]
    return printable(values_text(row, {row.allocator: asked[:1] or names}))


def _value(row: SweepRow, score: str | None) -> float:
    value = row.score or 0.0
    return value if score is not None else -value


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.bits for point in points], [point.value for point in points]


def _set_ticks(axes: "Axes", rows: Sequence[SweepRow]) -> None:
    """Ticks at the sizes that were asked for, where any were."""
    asked = {_number(row.parameters.get(name)) for row in rows for name in BUDGETS}
    low, high = axes.get_xlim()
    ticks = sorted(tick for tick in asked if tick is not None and low <= tick <= high)
    if 1 < len(ticks) <= MOST_TICKS:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _set_range(axes: "Axes", points: Sequence[Point], score: str | None, baseline: float | None) -> None:
    """Errors by their logarithm; scores over the range in which most plans lie, and a note of those below it."""
    if score is None:
        if any(point.value > 0 for point in points):
            axes.set_yscale("log")
            write_plain_numbers(axes.yaxis)
        return
    if baseline is not None:
        axes.axhline(baseline, linestyle="--", color="0.6", linewidth=1, label="float")
    low, high = worth_looking_at([point.value for point in points], baseline)
    margin = 0.06 * (high - low) or 1e-3 * (abs(high) or 1.0)
    axes.set_ylim(low - margin, high + margin)
    below = [point for point in points if point.value < low]
    if below:
        foot = axes.get_xaxis_transform()
        axes.plot([point.bits for point in below], [0.01] * len(below), "v", color="0.5", markersize=4, transform=foot)
        best = max(point.value for point in below)
        said = f"{len(below)} of {len(points)} plans are below the picture (grey); the best of them is at {best:.4g}"
        axes.set_xlabel(f"{axes.get_xlabel()}\n{said}")


def worth_looking_at(scores: Sequence[float], baseline: float | None) -> tuple[float, float]:
    """The least and the greatest score of a picture, which leaves out what is far below the best third of the plans.

    A loss is the distance to the best of the scores and the float model's. Of plans whose losses are evenly spread,
    none is left out. Where the best third are alike, so that hardly any would be left, two thirds of all are shown.
    """
    known = [*scores, *([baseline] if baseline is not None else [])]
    if not scores:
        return (min(known), max(known)) if known else (0.0, 1.0)
    best = max(known)
    losses = sorted(best - score for score in scores)
    most = FAR * losses[(len(losses) - 1) // 3]
    if sum(loss <= most for loss in losses) < LEAST_SHOWN * len(losses):
        most = losses[(len(losses) - 1) * 2 // 3]
    return min(score for score in known if best - score <= most), best
