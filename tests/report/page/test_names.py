"""What layers and files are called: commands name the one that is meant, and a reader sees it."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpq_plugins as mpq
from mpq_plugins.common.patterns import matches
from mpq_plugins.errors import SettingError
from mpq_plugins.report.page.answers import Answers
from mpq_plugins.report.page.document import page_of_table
from mpq_plugins.report.page.patterns import pattern_of
from mpq_plugins.report.page.writer import page_html
from tests.conftest import Ran
from tests.helpers.synthetic_tables import synthetic_table
from tests.report.page.nets import bare, bare_html
from tests.report.page.opened import Opened

Mpq = Callable[..., Ran]
Open = Callable[[str], Opened]
# Names that are patterns, that lose their ends, that a shell takes apart, that a terminal obeys, or that nobody sees.
NAMES = (
    "a", "", "a=b", "a,b", "a/4", "[a]", "*", "?", "re:a", "-a", "it's", 'q"x', "${HOME}", "back\\slash", "a{b}",
    "tab\t", " lead", "trail ", "new\nline", "\x1clead", "\x85lead", "\ufefflead", "\u2028", "\x03", "a\x1bb", "\x7f",
    "a\u202eb", "__proto__", "constructor", "層 é😀", "#", "!x", "a^b",
)  # fmt: skip


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
def test_a_pattern_names_its_layer_alone_and_holds_nothing_that_a_terminal_obeys(name: str) -> None:
    pattern = pattern_of(name)
    assert matches(pattern, name)
    assert not matches(pattern, f"{name}x")
    assert pattern.isprintable()
    assert pattern.strip() == pattern


def test_a_pin_is_of_the_layer_that_is_clicked_whatever_it_is_called() -> None:
    table = synthetic_table([(name, (8, 32)) for name in NAMES])
    answers = Answers(table, "t.mpqt", "mse", ())
    asked = {"allocator": "budget", "budget": 20, "counted": "codes", "sensitivity": "mse"}
    for name in NAMES:
        answer = answers.plan(asked | {"pins": [[name, 1]]})
        assert answer["layers"] == [1 if other == name else 8 for other in NAMES], name


@pytest.mark.slow
def test_the_pages_own_pins_are_the_same_in_its_command(opened: Open) -> None:
    table = synthetic_table([(name, (8, 32)) for name in NAMES])
    page = opened(bare_html(table))
    page.js("mpq.change({budget: 20})")
    for place, name in enumerate(NAMES):
        page.js("mpq.page.state.pins.clear(); mpq.pin(arguments[0], 1)", place)
        words = shlex.split(page.text("#command"))
        pin = words[words.index("--pin") + 1]
        plan = mpq.Budget(average_bits=20, parts=False, pin=(pin,))(table)
        assert [layer.bits for layer in plan.layers] == page.js("return mpq.page.plan.choices"), name


@pytest.mark.parametrize("file", ["-dash.mpqt", "it's; $(x) net.mpqt", "a:b.mpqt", "層.mpqt", "x.json"])
def test_a_command_takes_the_table_by_any_name(
    mpq: Mpq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table = synthetic_table([("a", (8, 8)), ("b", (16, 8))])
    table.save(Path(file))
    page = page_of_table(table, file, {}, title="t")
    command = page.points[0].command
    assert command is not None
    words = shlex.split(command)
    assert words[2] == page.document()["table"]["file"]
    ran = mpq(*words[1:])
    assert ran.code == 0, ran.err


def test_what_no_file_can_hold_is_one_line() -> None:
    table = synthetic_table([("a", (8, 8))])
    with pytest.raises(SettingError, match=r"udcff.*rename"):
        page_html(bare(table, "bad\udcff.mpqt"))


@pytest.mark.slow
def test_a_layer_without_a_name_can_be_seen_and_clicked(opened: Open) -> None:
    page = opened(bare_html(synthetic_table([("", (8, 8)), ("b", (8, 8))])))
    page.js("mpq.select(1); document.querySelector('#rows .wide button').click()")
    assert page.text("#details h3") == page.text("#rows .wide") == "(no name)"
    assert page.js("return document.querySelector('#rows .wide button').getBoundingClientRect().width") > 20


@pytest.mark.slow
def test_a_command_is_selected_to_the_last_space(opened: Open) -> None:
    page = opened(page_html(bare(synthetic_table([("a", (8, 8))]), "two  spaces\nand a line.mpqt")))
    page.js("getSelection().selectAllChildren(document.getElementById('command'))")
    assert page.js("return getSelection().toString()") == page.js("return mpq.page.plan.command")


@pytest.mark.slow
def test_a_name_of_ten_thousand_letters_leaves_room_for_the_rest(opened: Open) -> None:
    page = opened(bare_html(synthetic_table([("x" * 10_000, (8, 8)), ("b", (8, 8))])))
    page.js("mpq.pin(0, 3)")
    assert len(page.text("#command")) > 10_000
    assert page.js("return document.documentElement.scrollHeight") < 3000
