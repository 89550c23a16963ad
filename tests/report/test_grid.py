"""Tables at any width: numbers whole, names told apart, nothing wider than what there is."""

import io
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mpq_plugins.report.console import PlainConsole, wrapped
from mpq_plugins.report.grid import ELLIPSIS, Grid, fitted, shortened
from mpq_plugins.report.tables import grid

NUMBER = re.compile(r"[0-9]+")
NAMES = [
    *(f"encoder.layer.{i}.attention.self.{what}" for i in range(12) for what in ("query", "key", "value")),
    "embeddings.word_embeddings", "pooler.dense",
]  # fmt: skip


def printed(table: Grid, width: int) -> list[str]:
    """The lines of a table at a width."""
    out = io.StringIO()
    PlainConsole(file=out, width=width, highlight=False, markup=False, emoji=False).print(table)
    return out.getvalue().splitlines()


def columns_shown(lines: list[str], headings: list[str]) -> list[str]:
    """The headings above the table, those that go over several lines joined."""
    above = [line for line in lines if line.startswith("┃")]
    cells = zip(*([cell.strip() for cell in line.strip("┃").split("┃")] for line in above), strict=True)
    found = [" ".join(word for word in cell if word) for cell in cells]
    assert set(found) <= set(headings)
    return found


words = st.text(string.ascii_letters + "._", min_size=1, max_size=30)
numbers = st.floats(1e-6, 1e6).map(lambda value: f"{value:.4g}") | st.integers(0, 10**9).map("{:,}".format)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Headings that differ, and rows of a name and numbers."""
    headings = draw(st.lists(words, min_size=2, max_size=9, unique=True))
    row = st.tuples(words, *([numbers] * (len(headings) - 1))).map(list)
    return headings, draw(st.lists(row, min_size=1, max_size=6))


@given(tables(), st.integers(40, 160))
def test_what_is_shown_is_shown_whole_and_fits(made: tuple[list[str], list[list[str]]], width: int) -> None:
    headings, rows = made
    lines = printed(grid("", headings, rows), width)
    assert max(map(cell_len, lines)) <= width
    shown = columns_shown(lines, headings)
    assert shown[0] == headings[0]
    inside = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert len(inside) == len(rows)  # nothing is broken over lines
    for cells, row in zip(inside, rows, strict=True):
        assert cells[1:] == [row[headings.index(heading)] for heading in shown[1:]]
    note = " ".join(lines[lines.index(next(line for line in lines if line.startswith("└"))) + 1 :])
    gone = [heading for heading in headings if heading not in shown]
    assert bool(note) == bool(gone)
    assert all(heading in note for heading in gone)


@pytest.mark.parametrize("width", range(14, 40))
def test_short_names_stay_apart_and_keep_their_numbers_whole(width: int) -> None:
    short = shortened(NAMES, width)
    assert max(map(len, short)) <= width
    for name, cut in zip(NAMES, short, strict=True):
        head, _, tail = cut.partition(ELLIPSIS)
        assert name.startswith(head)
        assert name.endswith(tail)
        assert set(NUMBER.findall(cut)) <= set(NUMBER.findall(name))
    if width >= 20:  # by hand: `encoder.layer.11…key` is that long
        assert len(set(short)) == len(NAMES)


def test_names_are_cut_at_their_dots() -> None:
    names = ["layer1.0.downsample.conv1", "layer1.0.downsample.conv2", "layer1.1.downsample.conv1"]
    assert shortened(names, 16) == ["layer1.0…conv1", "layer1.0…conv2", "layer1.1…conv1"]


def test_names_give_way_before_columns_and_columns_in_the_order_asked() -> None:
    rows = [["a" * 30 + ".weight", "conv2d", "3x3", "12.5 kB"], ["b" * 30 + ".weight", "conv2d", "3x3", "1.25 kB"]]
    made = grid("", ("layer", "kind", "shape", "size"), rows, left=3, leave_out=("kind", "shape"))
    shown = {width: [column.heading for column in fitted(made, width)[0]] for width in range(20, 80)}
    assert shown[79] == shown[60] == ["layer", "kind", "shape", "size"]
    assert ELLIPSIS in fitted(made, 60)[0][0].cells[0]
    assert [shown[width] for width in (50, 40, 34, 24)] == [
        ["layer", "kind", "shape", "size"], ["layer", "shape", "size"], ["layer", "size"], ["layer", "size"],
    ]  # fmt: skip


def test_a_text_of_several_words_goes_over_lines_between_them() -> None:
    lines = printed(grid("", ("layer", "bits"), [["conv1", " ".join(f"{bits}x1000" for bits in range(1, 9))]]), 40)
    assert [word for line in lines for word in re.findall(r"[0-9]x[0-9]+", line)] == [f"{b}x1000" for b in range(1, 9)]
    assert max(map(len, lines)) <= 40


def test_a_sentence_is_wrapped_between_words_under_its_label() -> None:
    text = "in total      103.86 kB, 3.097 bits a weight, with scales: 10.33x smaller than fp32"
    for width in range(40, 90):
        lines = wrapped(text, width)
        assert max(map(len, lines)) <= width
        assert " ".join(line.strip() for line in lines) == text
        assert all(line.startswith(" " * 14) for line in lines[1:])
        assert not any(line.endswith(("103.86", "3.097")) for line in lines)


def test_columns_of_one_heading_are_columns_of_their_own() -> None:
    """A score may be called what another column is."""
    made = grid("", ("plan", "size", "size"), [["uniform", "1.25 kB", "0.123456789"]])
    assert "0.123456789" in " ".join(printed(made, 40))
    lines = printed(made, 30)
    assert "1.25 kB" in " ".join(lines)
    assert "columns left out at this width: size; widen" in " ".join(lines)
