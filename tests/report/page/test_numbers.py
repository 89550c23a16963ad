"""Numbers of the page are the command line's to the last digit, those just between two digits too."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

import mpq_plugins as mpq
from mpq_plugins.allocation.objective import combined_curve
from mpq_plugins.report.page.document import page_of_table
from mpq_plugins.report.page.writer import page_html
from mpq_plugins.report.tables import bytes_text
from tests.helpers.synthetic_tables import many_layers, synthetic_table
from tests.report.page.nets import bare, bare_html
from tests.report.page.opened import Opened

pytestmark = pytest.mark.slow  # for the browser's sake
Open = Callable[[str], Opened]


@pytest.fixture
def page(opened: Open) -> Opened:
    return opened(bare_html(synthetic_table([("a", (64, 544))])))


def test_what_lies_between_two_goes_where_python_lets_it(page: Opened) -> None:
    drawn = random.Random(0)
    values = [drawn.randrange(1, 5000) / 2**power for power in range(1, 12) for _ in range(40)]
    values += [drawn.uniform(0, 1e6) for _ in range(200)] + [9.95, 99.5, 2.5, -2.5, 0.125, 25.0, 12345.5, 100125.0]
    asked = [(value, digits) for value in values for digits in range(1, 6)]
    said = page.js("return arguments[0].map(([v, n]) => [mpq.format.fixed(v, n), mpq.format.general(v, n)])", asked)
    assert said == [[f"{value:.{digits}f}", f"{value:.{digits}g}"] for value, digits in asked]


def test_sizes_are_said_as_the_command_line_says_them(page: Opened) -> None:
    drawn = random.Random(1)
    counts = [1125, 1135, 999, 1000, 2_125_000, 10**12] + [
        drawn.randrange(10 ** drawn.randrange(1, 12)) for _ in range(500)
    ]
    assert page.js("return arguments[0].map(mpq.format.bytesText)", counts) == list(map(bytes_text, counts))


def test_bits_a_weight_and_the_guards_word_are_the_librarys(page: Opened) -> None:
    table = synthetic_table([("a", (64, 544))])
    plan = mpq.MixQuant(qem=1e9)(table)
    wanted = mpq.compare(table, plan, "mse")
    assert wanted is not None
    assert wanted.average_bits == 2.0625  # a scale and a zero point of 2 bits for 544 weights
    assert "2.062 bits" in wanted.text()
    said = page.js("return mpq.decide({allocator: 'mixquant', qem: 1e9}).guard.text")
    assert said.startswith(wanted.text().split(", the best")[0])


def test_betas_that_the_library_refuses_are_refused_in_its_words(page: Opened) -> None:
    with pytest.raises(mpq.SettingError) as refused:
        mpq.PTILMPQ(beta_important=0.2, beta_other=1 / 3)
    setting = {"allocator": "ptilmpq", "betaImportant": 0.2, "betaOther": 1 / 3}
    assert page.js("return mpq.decide(arguments[0]).error", setting) == str(refused.value)
    page.js("mpq.change(arguments[0])", setting)
    assert page.text("#error") == str(refused.value)
    assert page.js("return document.getElementById('result').hidden")


def test_an_infinite_score_is_shown_and_not_drawn(opened: Open) -> None:
    table = synthetic_table([("a", (8, 8))])
    plans = {"good.json": mpq.Uniform(bits=8)(table), "bad.json": mpq.Uniform(bits=1)(table)}

    def evaluated(
        table: mpq.LayerTable, plans: Sequence[mpq.Plan], series: Sequence[str], judge: str | None
    ) -> list[mpq.SweepRow]:
        values = [float("inf") if plan.layers[0].bits == 1 else 2.0 for plan in plans]
        pairs = zip(series, values, strict=True)
        return [mpq.SweepRow("x", {}, 1.0, 1.0, 8, 8, {}, {"perplexity": one}, series=name) for name, one in pairs]

    document = page_of_table(table, "t.mpqt", plans, title="t", evaluated=evaluated)
    shown = opened(page_html(document))
    shown.js("mpq.choose(1)")
    assert "perplexityinf" in shown.text("#tiles")
    finite = [point for point in document.points if point.row.scores["perplexity"] == 2.0]
    assert shown.js("return document.querySelectorAll('#frontier circle:not(.mark)').length") == len(finite)


def test_costs_are_the_librarys_to_the_last_bit(opened: Open) -> None:
    table = with_sensitivity(synthetic_table([("a", (8, 7)), ("b", (5, 33)), ("c", (1, 1))], by_channel=True))
    document = bare(table, judge="kl*mse").document()["table"]["costs"]
    assert document["mse"] == {"errors": "mse", "times": "weights"}
    assert document["max_abs"] == {"errors": "max_abs", "times": 1}
    page = opened(page_html(bare(table, judge="kl*mse")))
    found = page.js("return Object.entries(mpq.page.table.costs).map(([n, rows]) => [n, rows.map((own) => [...own])])")
    assert [name for name, _ in found] == ["relative", "mse", "max_abs", "kl", "kl*mse"]
    for name, rows in found:
        assert rows == [combined_curve(table, layer, name).tolist() for layer in table.layers], name


def with_sensitivity(table: mpq.LayerTable) -> mpq.LayerTable:
    layers = (
        replace(
            one,
            errors={**one.errors, "max_abs": one.errors["relative"] / 3},
            sensitivities={"kl": one.errors["mse"] * (3 + place)},
        )
        for place, one in enumerate(table.layers)
    )
    return replace(table, layers=tuple(layers), metrics=(*table.metrics, "max_abs"))


def test_the_steepest_steps_come_first_and_equal_ones_as_they_are(opened: Open) -> None:
    same = synthetic_table([("a", (8, 32))]).layers[0]
    others = synthetic_table(many_layers(50), seed=4)
    twins = (replace(same, name="b"), same, replace(same, name="c"))
    page = opened(bare_html(replace(others, layers=(*twins, *others.layers))))
    steps = page.js(
        "const { steps } = [...mpq.page.table.problems.values()][0]; "
        "return [...steps.order].map((one) => [steps.slope[one], steps.place[one], one])"
    )
    assert len(steps) > 300
    assert [(-slope, step) for slope, _, step in steps] == sorted((-slope, step) for slope, _, step in steps)
    assert [place for _, place, _ in sorted(steps, key=lambda one: one[2])] == sorted(place for _, place, _ in steps)


def test_a_plan_that_loses_nothing_is_the_best_there_is(page: Opened) -> None:
    page.js("mpq.change({budget: 40}); mpq.pin(0, 32)")
    assert page.js("return mpq.page.plan.guard.cost") == 0
    assert "within 0 % of the best" in page.text("#tiles")
