"""Pictures for people; matplotlib is imported only to draw one."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ..common.extras import how_to_install
from ..common.files import atomic_path
from ..common.text import printable
from ..errors import SettingError
from ..evaluation.sweep import SweepRow

FORMATS = (".png", ".svg", ".pdf")
MADE_BY = {  # by which a later run knows the picture as its own
    ".png": {"Software": "mpq-plugins"}, ".svg": {"Creator": "mpq-plugins"}, ".pdf": {"Creator": "mpq-plugins"},
}  # fmt: skip


def check_plot(path: Path | None) -> None:
    """Refuse what cannot be drawn before the work is done. Raises SettingError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise SettingError(f"plot: {path} should end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingError(f"plot: matplotlib is not installed: {how_to_install('report')}; or leave --plot out")


def sweep_plot(rows: Sequence[SweepRow], path: Path, title: str) -> None:
    """Score (or error) against true size, one series per allocator, the Pareto front as a line; atomically."""
    from matplotlib.figure import Figure

    name = next(iter(rows[0].scores), None)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plans = [row for row in rows if row.allocator != "float" and row.score is not None]
    for series in dict.fromkeys(row.name for row in plans):
        series_rows = [row for row in plans if row.name == series]
        marker = "s" if series == "uniform" else "o"
        line = "-" if any(row.series for row in series_rows) else ""  # named series are curves over the same budgets
        axes.plot(*_points(series_rows, name), f"{marker}{line}", label=printable(series), alpha=0.8)
    front = sorted((row for row in plans if row.pareto), key=lambda row: row.total_bytes)
    axes.plot(
        *_points(front, name), "-", drawstyle="steps-post", color="0.5", linewidth=1, label="Pareto front", zorder=0
    )
    for row in rows:
        if row.allocator == "float" and row.score is not None:
            axes.axhline(row.score, linestyle="--", color="0.7", linewidth=1, label="float")
    axes.set_xlabel("bits a weight in total: codes, scales, zero points, part maps")
    error = next(iter(rows[0].errors), "")
    axes.set_ylabel(printable(name or f"predicted {error}"), parse_math=False)
    if name is None and plans:
        axes.set_yscale("log")
    axes.set_title(printable(title), fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower()[1:], dpi=150, metadata=MADE_BY[path.suffix.lower()])


def _points(rows: Sequence[SweepRow], score: str | None) -> tuple[list[float], list[float]]:
    """Sizes and scores, or errors, of rows that have one."""
    scores = [row.score or 0.0 for row in rows]
    return [row.total_average_bits for row in rows], scores if score is not None else [-value for value in scores]
