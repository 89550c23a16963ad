"""What the page decides is what the library decides: the same files to the byte, the same numbers."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpq_plugins as mpq
from mpq_plugins import LayerTable
from tests.helpers.synthetic_tables import many_layers, synthetic_table
from tests.helpers.tables import norms_table
from tests.report.page.nets import bare_html, demo_table, resnet_table
from tests.report.page.opened import Opened

pytestmark = pytest.mark.slow  # for the browser's sake
Open = Callable[[str], Opened]
QEMS = [float(q) for q in np.unique(np.concatenate([np.geomspace(0.5, 300, 150), np.linspace(1, 4, 53)]))][:200]
BOTH = """return arguments[0].map((one) => {
  const plan = mpq.decide(one);
  return [plan.error ?? mpq.file(plan), plan.bits?.total];
})"""
NETS = ("demo", "resnet20", "resnet56")


@pytest.fixture(autouse=True)
def uncompared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of plans, of which nothing is said: the guard takes most of the time of one."""
    monkeypatch.setattr("mpq_plugins.allocation.guard.warn_if_worse", lambda table, plan: None)


@pytest.fixture(params=NETS)
def table(request: pytest.FixtureRequest) -> LayerTable:
    if request.param == "demo":
        return demo_table()
    zoo: Path = request.getfixturevalue("zoo")
    return resnet_table(int(request.param.removeprefix("resnet")), zoo)


def compared(page: Opened, settings: list[dict[str, object]], plans: list[mpq.Plan]) -> None:
    made = page.js(BOTH, settings)
    for setting, (text, total), plan in zip(settings, made, plans, strict=True):
        assert text == plan.to_json(), setting
        assert total == plan.size().total_bits, setting


def test_mixquant_is_the_librarys_for_every_qem(opened: Open, table: LayerTable) -> None:
    assert len(QEMS) == 200
    page = opened(bare_html(table))
    ratios = table.errors("relative", (5,)) / table.errors("relative", (8,))
    qems = [*QEMS, *map(float, np.unique(ratios)[:5])]  # where a layer is just within, to the last bit
    settings: list[dict[str, object]] = [{"allocator": "mixquant", "qem": q, "metric": "relative"} for q in qems]
    compared(page, settings, [mpq.MixQuant(qem=q)(table) for q in qems])
    compared(
        page, [{"allocator": "mixquant", "qem": 20.0, "metric": "mse"}], [mpq.MixQuant(qem=20, metric="mse")(table)]
    )


def test_ptilmpq_is_the_librarys_for_a_hundred_settings(opened: Open, table: LayerTable) -> None:
    drawn = random.Random(3)
    settings: list[dict[str, object]] = []
    plans = []
    for number in range(100):
        alpha = drawn.choice([0.0, 0.07, 0.5, 1.0, drawn.random()])
        other, important = sorted(drawn.choice([0.0, 0.07, 0.29, 1.0, drawn.random()]) for _ in "ab")
        middle = drawn.choice([3, 4, 6]) if number else 4
        settings.append(
            {"allocator": "ptilmpq", "alpha": alpha, "betaImportant": important, "betaOther": other, "middle": middle}
        )
        allocator = mpq.PTILMPQ(
            alpha=alpha, beta_important=important, beta_other=other, important_bits=(middle + 1, middle),
            other_bits=(middle, middle - 1),
        )  # fmt: skip
        plans.append(allocator(table))
    compared(opened(bare_html(table)), settings, plans)


@pytest.mark.parametrize(
    "scheme",
    [
        mpq.Piecewise(granularity="per_channel"),
        mpq.Piecewise(),
        mpq.Affine(granularity="per_group", group_size=32, scale_dtype="float16"),
        mpq.Affine(granularity="per_channel", symmetric=True, range="percentile"),
        mpq.Affine(granularity="per_channel", stochastic=7),
        mpq.EntropyCoded(),
    ],
    ids=str,
)
def test_plans_under_other_schemes_are_the_librarys_too(opened: Open, scheme: Any) -> None:
    shapes = [("tied", (12, 32)), ("odd", (10, 7)), ("conv", (8, 16, 3, 3)), ("one", (1, 32)), ("wide", (300, 64))]
    made = synthetic_table(shapes, scheme=scheme)
    tied = replace(made.layers[0], tied=("head", "層"), kind="embedding")
    table = replace(made, layers=(tied, *made.layers[1:]), skipped=("left",), left_alone=(("x.weight", "a table"),))
    page = opened(bare_html(table))
    for qem in (1.5, 8.0):
        compared(page, [{"allocator": "mixquant", "qem": qem}], [mpq.MixQuant(qem=qem)(table)])
    setting = {"allocator": "ptilmpq", "alpha": 0.6, "betaImportant": 0.3, "betaOther": 0.1, "middle": 4}
    compared(page, [setting], [mpq.PTILMPQ(alpha=0.6, beta_important=0.3, beta_other=0.1)(table)])


def test_a_scale_of_the_layer_counts_as_the_library_counts_it(opened: Open) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 32))
    table = mpq.measure(net, mpq.Minifloat(format="nvfp4"), (4,))
    setting = {"allocator": "budget", "budget": 20, "counted": "total", "sensitivity": "mse"}
    total = opened(bare_html(table)).js("return mpq.decide(arguments[0]).bits.total", setting)
    assert total == mpq.Uniform(bits=4)(table).size().total_bits


def test_a_width_that_a_layer_cannot_have_is_refused_as_the_library_refuses_it(opened: Open) -> None:
    table = synthetic_table([("large", (40, 32)), ("small", (10, 7))], scheme=mpq.Codebook())
    page = opened(bare_html(table))
    with pytest.raises(mpq.SettingError, match="small"):
        mpq.MixQuant(qem=1.0)(table)
    assert "small" in page.js("return mpq.decide({allocator: 'mixquant', qem: 1}).error")
    assert "codebook" in page.js("return mpq.decide({allocator: 'ptilmpq'}).error")
    fits = mpq.MixQuant(qem=30.0)(table)
    compared(page, [{"allocator": "mixquant", "qem": 30.0}], [fits])


def test_more_channels_than_a_page_has_room_for_are_left_to_the_command(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq_plugins.report.page.measured.MOST_ORDERED", 10)
    page = opened(bare_html(synthetic_table([("a", (8, 4)), ("b", (8, 4))])))
    assert "mpq plan" in page.js("return mpq.decide({allocator: 'ptilmpq'}).error")
    assert page.js("return mpq.decide({allocator: 'mixquant'}).error") is None


def test_equal_importances_go_by_the_tables_order(opened: Open) -> None:
    table = norms_table([2.0, 2.0, 1.0, 2.0], [[1.0, 3.0, 1.0, 1.0]] * 4)
    page = opened(bare_html(table))
    setting = {"allocator": "ptilmpq", "alpha": 0.5, "betaImportant": 0.5, "betaOther": 0.25, "middle": 4}
    compared(page, [setting], [mpq.PTILMPQ(alpha=0.5, beta_important=0.5, beta_other=0.25)(table)])


def test_a_share_is_rounded_as_the_library_rounds_it(opened: Open) -> None:
    from mpq_plugins.allocation.ptilmpq import _share

    drawn = random.Random(1)
    pairs = [(k / 100, n) for k in range(101) for n in (1, 7, 100, 1024)] + [(drawn.random(), 3000) for _ in range(300)]
    page = opened(bare_html(many_by_channels()))
    found = page.js(
        "return arguments[0].map(([share, place]) => mpq.decide({allocator: 'ptilmpq', alpha: 0, betaOther: share, "
        "betaImportant: share}).choices[place].important ?? null)",
        [(fraction, CHANNELS.index(count)) for fraction, count in pairs],
    )
    wanted = [_share(fraction, count) for fraction, count in pairs]
    wanted_or_none = [None if k in (0, n) else k for k, (_, n) in zip(wanted, pairs, strict=True)]
    assert found == wanted_or_none


CHANNELS = [1, 7, 100, 1024, 3000]


def many_by_channels() -> LayerTable:
    return synthetic_table([(f"l{n}", (n, 4)) for n in CHANNELS])


@pytest.mark.parametrize("counted", ["codes", "total"])
def test_budget_is_within_its_bound_of_the_exact_one(opened: Open, counted: str) -> None:
    table = demo_table()
    page = opened(bare_html(table))
    field = {"codes": "average_bits", "total": "total_average_bits"}[counted]
    for average in (2.5, 3.3, 5.0):
        exact = mpq.Budget(**{field: average}, parts=False).solve(table)  # type: ignore[arg-type]
        plan = page.js(
            "const plan = mpq.decide(arguments[0]); return {cost: plan.found.cost, bound: plan.found.bound, bits: "
            "plan.bits[arguments[1]], total: plan.bits.total}",
            {"allocator": "budget", "budget": average, "counted": counted, "sensitivity": "mse"}, counted,
        )  # fmt: skip
        assert plan["bits"] <= average * sum(layer.numel for layer in table.layers)
        assert plan["bound"] <= exact.objective * (1 + 1e-9)
        assert exact.objective * (1 - 1e-9) <= plan["cost"] <= 1.05 * exact.objective


def test_pins_and_the_command_of_a_budget(opened: Open) -> None:
    table = synthetic_table([("a", (8, 8)), ("b[0]", (8, 8)), ("c d", (8, 8))])
    page = opened(bare_html(table))
    page.js("mpq.change({budget: 20}); mpq.pin(0, 8); mpq.pin(1, 3); mpq.pin(2, 32)")
    assert page.js("return mpq.page.plan.choices") == [8, 3, 32]
    command = page.text("#command")
    assert "--pin a=8" in command
    assert r"--pin 're:b\[0\]=3'" in command
    assert "--pin 'c d=32'" in command
    total = page.js("return mpq.page.plan.bits.total")
    pinned = mpq.Budget(average_bits=64, pin=("a=8", r"re:b\[0\]=3", "c d=32"), parts=False)(table)
    assert total == pinned.size().total_bits


def test_a_budget_that_cannot_be_met_says_the_least(opened: Open) -> None:
    page = opened(bare_html(synthetic_table([("a", (8, 8))])))
    page.js("mpq.change({allocator: 'budget', counted: 'total', budget: 1})")
    assert "cannot be reached: the least is" in page.text("#error")
    page.js("mpq.change({budget: 12})")
    assert page.js("return document.getElementById('error').hidden")


def test_the_guard_says_what_the_librarys_says(opened: Open) -> None:
    table = demo_table()
    page = opened(bare_html(table))
    for setting, plan in (
        ({"allocator": "mixquant", "qem": 3.0}, mpq.MixQuant(qem=3)(table)),
        ({"allocator": "ptilmpq", "alpha": 0.5}, mpq.PTILMPQ(alpha=0.5)(table)),
    ):
        wanted = mpq.compare(table, plan, "mse")
        assert wanted is not None
        assert wanted.uniform is not None
        said = page.js("return mpq.decide(arguments[0]).guard", setting)
        assert said["cost"] == pytest.approx(wanted.plan, rel=1e-12)
        assert said["text"].startswith(wanted.text().split(", the best")[0])


def test_numbers_are_written_as_python_writes_them(opened: Open) -> None:
    drawn = random.Random(0)
    bits = [struct.unpack("<d", struct.pack("<Q", drawn.getrandbits(64)))[0] for _ in range(2000)]
    values = [v for v in bits if np.isfinite(v)] + [drawn.uniform(-10, 10) for _ in range(500)]
    values += [0.0, 1.0, 1e15, 1e16, 1e17, 123456789012345680.0, 1e-4, 1e-5, 0.1, 5e-324, 1.7976931348623157e308, 2.5]
    page = opened(bare_html(demo_table()))
    assert page.js("return arguments[0].map(mpq.format.pythonFloat)", values) == list(map(repr, values))
    drawn_text = page.js("return arguments[0].map((v) => mpq.format.general(v))", values)
    assert drawn_text == [f"{value:.4g}" for value in values]


def test_names_in_every_script_are_written_and_sealed(opened: Open) -> None:
    names = ["层.0", "😀", 'q"uo\\te', "tab\there", "\x7f", "\u2028", "a" * 300, "</script><script>alert(1)</script>"]
    table = synthetic_table([(name, (4, 8)) for name in names])
    plan = mpq.MixQuant(qem=2.0)(table)
    compared(opened(bare_html(table)), [{"allocator": "mixquant", "qem": 2.0}], [plan])
    assert mpq.Plan.model_validate_json(plan.to_json()) == plan


def test_replanning_five_hundred_layers_takes_less_than_a_frame_of_patience(opened: Open) -> None:
    page = opened(bare_html(synthetic_table(many_layers(500))))
    times = page.js(
        """return ["budget", "mixquant", "ptilmpq"].map((allocator) => Math.min(...Array.from({length: 30}, (_, i) => {
          const start = performance.now();
          mpq.change({allocator, budget: 2.5 + i / 10, qem: 1.1 + i / 12, alpha: i / 30});
          return performance.now() - start;
        })))"""
    )
    assert max(times) < 50, times
