"""Plans that stand beside a table, and may be of another measurement: nothing of the table's is said of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mpq_plugins as mpq
from mpq_plugins import LayerTable, Plan
from mpq_plugins.errors import SettingError
from mpq_plugins.report.page.document import page_of_plans, page_of_table
from mpq_plugins.report.page.points import label_of
from mpq_plugins.report.page.writer import page_html
from tests.conftest import Ran
from tests.helpers.synthetic_tables import synthetic_table
from tests.report.page.opened import Opened

Open = Callable[[str], Opened]
Mpq = Callable[..., Ran]
SHAPES = [("a", (8, 32)), ("b", (16, 32)), ("c", (8, 64))]


def table_of(scheme: mpq.Scheme | None = None, bits: tuple[int, ...] = tuple(range(1, 9))) -> LayerTable:
    whole = synthetic_table(SHAPES, scheme=scheme)
    layers = (
        replace(one, errors={name: own[[b - 1 for b in bits]] for name, own in one.errors.items()})
        for one in whole.layers
    )
    return replace(whole, layers=tuple(layers), bits=bits)


def others() -> dict[str, Plan]:
    """Plans of the same layers that a table of 2 to 8 bits, per channel, has no numbers of."""
    tensor, two_regions = table_of(mpq.Affine()), table_of(mpq.Piecewise(granularity="per_channel"))
    return {
        "tensor.json": mpq.MixQuant(qem=3.0)(tensor),
        "regions.json": mpq.PTILMPQ(alpha=0.5)(two_regions),
        "one.json": mpq.Uniform(bits=1)(table_of()),
        "inputs.json": mpq.Uniform(bits=8)(tensor).with_activations(mpq.Activations(8)),
    }


@pytest.mark.slow
def test_sizes_are_the_plans_own_and_errors_are_nobodys(opened: Open) -> None:
    given = others()
    page = opened(page_html(page_of_table(table_of(bits=tuple(range(2, 9))), "t.mpqt", given, title="t")))
    for place, (name, plan) in enumerate(given.items()):
        page.js("mpq.choose(arguments[0])", place)
        assert page.text("#plan-title").startswith(name)
        sizes = [plan.size().layers[layer.name].total for layer in plan.layers]
        assert page.js("return mpq.page.plan.bits.each") == sizes
        assert page.js("return mpq.page.columnOf(mpq.page.plan.choices[0])") is None
        assert page.js("return document.querySelectorAll('#details .chosen').length") == 0
        assert page.js("return document.getElementById('command-box').hidden")
        assert "no command" in page.text("#download-note")
        assert "another scheme" in page.text("#guard")


@pytest.mark.parametrize("edited", [False, True])
def test_a_command_is_shown_where_it_makes_just_that_plan(edited: bool) -> None:
    table = table_of()
    plan = mpq.MixQuant(qem=3.0)(table)
    if edited:
        layers = (plan.layers[0].model_copy(update={"bits": 8}), *plan.layers[1:])
        plan = plan.model_copy(update={"layers": layers})
    (point, *_) = page_of_table(table, "t.mpqt", {"p.json": plan}, title="t").points
    assert (point.command is None) == edited
    assert point.measured


def test_a_command_that_the_record_cannot_give_is_none() -> None:
    table = table_of()
    plan = mpq.Uniform()(table)
    for update in ({"name": "not-installed"}, {"parameters": {"nothing": 1}}, {"parameters": {"bits": 99}}):
        record = plan.allocator.model_copy(update=update)
        given = {"p.json": plan.model_copy(update={"allocator": record})}
        assert page_of_table(table, "t.mpqt", given, title="t").points[0].command is None


def test_plans_of_the_same_names_and_other_shapes_are_refused() -> None:
    table = table_of()
    other = mpq.Uniform()(synthetic_table([("a", (8, 32)), ("b", (16, 16)), ("c", (8, 64))]))
    with pytest.raises(SettingError, match=r"other\.json.*'b'"):
        page_of_table(table, "t.mpqt", {"other.json": other}, title="t")
    with pytest.raises(SettingError, match=r"other\.json.*'b'"):
        page_of_plans({"one.json": mpq.Uniform()(table), "other.json": other}, "t")


def test_plans_are_told_apart_by_what_was_set() -> None:
    table = table_of()
    assert label_of(mpq.Budget(size_bytes=900, parts=False)(table)) == "size bytes 900"
    assert label_of(mpq.Uniform(bits=8)(table)) == "bits 8"


def test_a_file_that_is_missing_is_named_as_missing(mpq: Mpq, tmp_path: Path) -> None:
    table = tmp_path / "t.mpqt"
    table_of().save(table)
    for files in ((table, "gone.json"), ("gone.json", table)):
        ran = mpq("report", *files, "-o", tmp_path / "page.html")
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "gone.json" in ran.err
        assert "No such file" in ran.err
