"""Pictures: what range they show, where labels go, which layers share rows, and that they are written whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpq_plugins import Affine, Budget, EntropyCoded, LayerTable, measure
from mpq_plugins.evaluation.pareto import pareto
from mpq_plugins.evaluation.sweep import SweepRow, sweep
from mpq_plugins.report.layer_plots import MOST_ROWS, Rows, bits_plot, errors_plot, plan_title, table_title
from mpq_plugins.report.sweep_plot import sweep_plot, worth_looking_at

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from mpq_plugins.report.labels import place_labels


@pytest.fixture(scope="module")
def table() -> LayerTable:
    torch.manual_seed(0)
    net = nn.ModuleDict({f"$layer{i}$": nn.Linear(8, 8) for i in range(70)})
    return measure(net, scheme=Affine(granularity="per_channel", range="mse"), bits=range(1, 9), per_channel=True)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.none() | st.floats(0, 100))
def test_the_range_holds_the_best_third_and_the_float_model(scores: list[float], baseline: float | None) -> None:
    low, high = worth_looking_at(scores, baseline)
    assert high == max([*scores, *([] if baseline is None else [baseline])])
    third = sorted(scores, reverse=True)[: max(1, (len(scores) + 2) // 3)]
    assert min(third) >= low
    assert low in [*scores, baseline]


def test_the_range_leaves_out_what_fails_and_keeps_what_is_evenly_spread() -> None:
    good = [92.2, 92.0, 91.9, 91.7, 91.6, 90.9, 90.5, 85.8]
    assert worth_looking_at([*good, 72.0, 60.0, 40.0, 30.0, 25.0, 12.0, 10.0, 10.0], 91.7) == (90.5, 92.2)
    even = [float(score) for score in range(50, 93)]
    assert worth_looking_at(even, 92.0) == (50.0, 92.0)
    alike = [99.37] * 4 + [99.25, 99.12, 99.0, 98.8, 98.6, 98.4, 85.6, 40.9]
    assert worth_looking_at(alike, 99.37) == (98.8, 99.37)


def boxes(figure: Figure) -> list[tuple[float, float, float, float]]:
    figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in figure.axes[0].texts]
    return [(extent.x0, extent.y0, extent.x1, extent.y1) for extent in extents]


@pytest.mark.parametrize("count", [2, 12, 60])
def test_labels_do_not_overlap_and_stay_inside(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(count, 2, generator=generator).tolist()
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([x for x, _ in points], [y for _, y in points], "o")
    place_labels(axes, [(x, y, f"{x:.2f}, {y:.2f}") for x, y in points])
    placed = boxes(figure)
    assert len(placed) == count if count == 2 else len(placed) > 5
    frame = axes.get_window_extent()
    for i, (left, bottom, right, top) in enumerate(placed):
        assert frame.x0 <= left <= right <= frame.x1
        assert frame.y0 <= bottom <= top <= frame.y1
        for other in placed[:i]:
            assert left >= other[2] or other[0] >= right or bottom >= other[3] or other[1] >= top


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 120, 400])
def test_more_layers_than_can_be_read_share_rows(count: int) -> None:
    rows = Rows.of([f"layer{i}" for i in range(count)])
    assert len(rows.names) == len(rows.layers) <= MOST_ROWS
    assert [i for one in rows.layers for i in range(count)[one]] == list(range(count))
    assert (rows.note(count, "") != "") == (count > MOST_ROWS)
    assert len(set(rows.names)) == len(rows.names)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_layers_are_drawn_in_every_format(table: LayerTable, tmp_path: Path, ending: str) -> None:
    plan = Budget(average_bits=3.0)(table)
    bits_plot(plan, tmp_path / f"bits.{ending}", plan_title(plan, "$net"))
    errors_plot(table, tmp_path / f"errors.{ending}", table_title(table, "$net"))
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"bits.{ending}", f"errors.{ending}"]


def test_entropy_coded_layers_are_drawn_by_what_they_take(tmp_path: Path) -> None:
    import matplotlib as mpl

    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plan = Budget(file_bits=3.0)(measure(net, EntropyCoded()))
    with mpl.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        bits_plot(plan, tmp_path / "bits.svg", "net")
    text = (tmp_path / "bits.svg").read_text()
    assert "bits a weight in the entropy-coded file" in text
    assert "8 bits" not in text


def test_titles_say_the_name_and_the_quantizer_in_words(table: LayerTable) -> None:
    plan = Budget(average_bits=3.0)(table)
    bits = f"{plan.size().total_average_bits:.2f}"
    assert plan_title(plan, "net") == f"net: budget, {bits} bits a weight in total\naffine, per channel, clipped"
    assert table_title(table, "net") == "net: affine, per channel, clipped"


def svg(rows: tuple[SweepRow, ...], path: Path) -> str:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        sweep_plot(rows, path, "net: affine")
    return path.read_text()


def test_a_picture_of_budgets_has_their_ticks_a_marker_each_and_no_formulas(table: LayerTable, tmp_path: Path) -> None:
    made = pareto(table, [2.5, 3.5])
    text = svg(sweep(table, [one.plan for one in made], series=[one.series for one in made], judge="mse"),
               tmp_path / "out.svg")  # fmt: skip
    for word in ("2.5", "3.5", "uniform", "budget per channel", "mixquant", "predicted mse", "net: affine"):
        assert f">{word}<" in text, word
    assert "mathdefault" not in text


def test_plans_below_the_picture_are_counted(table: LayerTable, tmp_path: Path) -> None:
    rows = sweep(table, [Budget(average_bits=1.0 + i / 4)(table) for i in range(9)])
    accuracies = [10.0, 12.0, 40.0, 91.1, 91.2, 91.5, 91.6, 91.7, 91.8]
    scored = tuple(replace(row, scores={"top-1": score}) for row, score in zip(rows, accuracies, strict=True))
    assert "3 of 9 plans are below the picture (grey); the best of them is at 40" in svg(scored, tmp_path / "out.svg")
