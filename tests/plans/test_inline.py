"""What notebooks show of plans and tables: areas that are sizes, and names that are only names."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

import mpq_plugins as mpq
from tests.helpers.synthetic_tables import many_layers, synthetic_table

HOSTILE = "</title><script>alert(1)</script>&\x1b"


def rectangles(shown: str) -> list[ET.Element]:
    return list(ET.fromstring(shown).iter("rect"))


def area(one: ET.Element) -> float:
    return float(one.attrib["width"]) * float(one.attrib["height"])


def test_a_layers_area_is_its_share_of_the_codes() -> None:
    table = synthetic_table([("a", (8, 8)), ("b", (16, 8)), ("c", (8, 40))])
    plan: Any = mpq.PTILMPQ(alpha=0.5, beta_important=0.5)(table)
    shown = rectangles(plan._repr_html_())
    assert len(shown) == 6
    codes = [bits * channels * layer.numel / layer.channels for layer in plan.layers for bits, channels in layer.widths]
    total = sum(map(area, shown))
    assert [area(one) / total for one in shown] == pytest.approx([one / sum(codes) for one in codes], rel=1e-3)
    assert f"{plan.size().total_average_bits:.3f}" in plan._repr_html_()


def test_a_table_has_a_cell_a_layer_and_width_dark_where_the_error_is_large() -> None:
    table: Any = synthetic_table([("a", (8, 8)), ("b", (16, 8))])
    shown = rectangles(table._repr_html_())
    assert len(shown) == 16
    red = [int(re.findall(r"\d+", one.attrib["fill"])[0]) for one in shown]
    assert red[:8] == sorted(red[:8])
    titles = [str(one.findtext("title")) for one in shown]
    assert titles[3] == f"a, 4 bits: {table.layers[0].errors['relative'][3]:.4g}"


def test_hostile_names_are_text() -> None:
    table: Any = synthetic_table([(HOSTILE, (4, 4))])
    plan: Any = mpq.Uniform(bits=16 // 4)(table)
    for shown in (table._repr_html_(), plan._repr_html_()):
        assert "<script" not in shown
        assert "\x1b" not in shown
        assert HOSTILE.replace("\x1b", "\\x1b") in str(rectangles(shown)[0].findtext("title"))


def test_ten_thousand_layers_are_drawn_in_a_few_thousand_shapes() -> None:
    table: Any = synthetic_table(many_layers(10_000))
    plan: Any = mpq.MixQuant(qem=3.0)(table)
    for shown in (table._repr_html_(), plan._repr_html_()):
        assert len(rectangles(shown)) <= 2_000
        assert len(shown) < 500_000


def test_nothing_to_show_is_shown() -> None:
    table: Any = synthetic_table([])
    plan: Any = mpq.Uniform(bits=4)(table)
    assert "0 layers" in table._repr_html_()
    assert "0 layers" in plan._repr_html_()
