"""What a reader sees and does: sliders, the frontier, the table of layers, hostile names, ten thousand layers."""

import json
from collections.abc import Callable

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import mpq_plugins as mpq
from mpq_plugins.cli.demo.net import digit_net
from mpq_plugins.report.page.distribution import distributions
from mpq_plugins.report.page.document import PageDocument, page_of_plans, page_of_table
from mpq_plugins.report.page.writer import page_html
from tests.helpers.synthetic_tables import many_layers, synthetic_table
from tests.report.page.nets import bare_html, demo_table
from tests.report.page.opened import Opened

pytestmark = pytest.mark.slow  # for the browser's sake
Open = Callable[[str], Opened]
ALERT = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script><!--"
SLIDE = """const [id, value] = arguments; const slider = document.getElementById(id); slider.value = value;
slider.dispatchEvent(new Event("input"));"""
DRAWN = "return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def page() -> PageDocument:
    table = demo_table()
    given = {"mine.json": mpq.MixQuant(qem=3.0)(table)}
    return page_of_table(table, "net.mpqt", given, title="net", weights=distributions(digit_net(), table))


def test_sliders_move_the_plan_and_its_numbers_are_the_librarys(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    table = demo_table()
    for tab, slides, title in (
        ("mixquant", {"qem": 1.0986122886681098}, "MixQuant, QEM 3"),
        ("ptilmpq", {"alpha": 0.25, "beta-important": 0.75, "beta-other": 0.5}, "PTILMPQ, alpha 0.25"),
        ("budget", {"budget": 3.25}, "Budget per layer, 3.25"),
    ):
        shown.browser.find_element(By.ID, f"tab-{tab}").click()
        for name, value in slides.items():
            shown.js(SLIDE, name, value)
        shown.js(DRAWN)
        assert shown.text("#plan-title").startswith(title)
    shown.js("mpq.change({allocator: 'ptilmpq'})")
    made = mpq.PTILMPQ(alpha=0.25, beta_important=0.75, beta_other=0.5)(table)
    size = made.size()
    tiles = shown.text("#tiles")
    for said in (f"{size.total_average_bits:.3f} bits a weight", f"{size.average_bits:.3f} bits a weight"):
        assert said in tiles
    assert f"{size.against_fp32:.2f}x" in tiles
    assert shown.js("return mpq.file(mpq.page.plan)") == made.to_json()


def test_a_plan_that_is_given_is_shown_first_and_any_other_can_be_chosen(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    assert shown.text("#plan-title").startswith("mine.json")
    names = [point.row.name for point in page.points]
    for place in (names.index("budget per channel"), names.index("uniform")):
        shown.js("const list = document.getElementById('points'); list.value = arguments[0]; "
                 "list.dispatchEvent(new Event('change'))", str(place))  # fmt: skip
        point = page.points[place]
        assert f"{point.row.total_average_bits:.3f} bits" in shown.text("#tiles")
        assert shown.text("#command") == point.command
        assert str(point.guard) in shown.text("#guard")
        sizes = shown.js("return mpq.page.plan.bits.each")
        assert sizes == [point.plan.size().layers[layer.name].total for layer in point.plan.layers]


def test_the_frontier_says_chooses_and_zooms(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    shown.wide(1280)
    dots = shown.js(
        """const svg = document.querySelector('#frontier svg'); const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("g[aria-label='dot'] circle")].map((dot) => {
          const own = dot.getBoundingClientRect(); return [own.x + own.width / 2, own.y + own.height / 2]; })"""
    )
    assert len(dots) == len(page.points)
    frontier = shown.browser.find_element(By.ID, "frontier")
    box = frontier.rect
    x, y = dots[-1]
    at = (int(x - box["x"] - box["width"] / 2), int(y - box["y"] - box["height"] / 2))
    ActionChains(shown.browser, 0).move_to_element_with_offset(frontier, *at).click().perform()
    assert shown.js("return document.querySelector('.tip').hidden") is False
    assert shown.js("return mpq.page.point") is not None
    assert shown.js("return document.querySelector('#frontier .mark') !== null")
    ActionChains(shown.browser, 0).move_to_element_with_offset(frontier, -200, -80).click_and_hold().move_by_offset(
        150, 100
    ).release().perform()
    assert shown.js("return document.getElementById('reset').hidden") is False
    shown.browser.find_element(By.ID, "reset").click()
    assert shown.js("return document.getElementById('reset').hidden") is True
    before = shown.js("return mpq.page.point")
    frontier.send_keys(Keys.ARROW_RIGHT)
    frontier.send_keys(Keys.ARROW_RIGHT)
    assert shown.js("return mpq.page.point") != before


def test_layers_are_pinned_skipped_and_sorted_by_keyboard(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    shown.browser.find_element(By.ID, "tab-budget").click()
    shown.js(DRAWN)
    shown.browser.find_element(By.CSS_SELECTOR, "[aria-label='skip head']").send_keys(Keys.ENTER)
    assert shown.js("return mpq.page.plan.choices.at(-1)") == 32
    shown.browser.find_element(By.CSS_SELECTOR, "[aria-label='pin stem.0']").send_keys(Keys.ENTER)
    assert "--pin stem.0=" in shown.text("#command")
    weights = shown.browser.find_element(By.XPATH, "//th/button[text()='weights']")
    weights.send_keys(Keys.ENTER)
    numels = [layer.numel for layer in demo_table().layers]
    order = shown.js("return mpq.rows.order()")
    assert [numels[place] for place in order] == sorted(numels, reverse=True)
    weights.send_keys(Keys.ENTER)
    assert [numels[place] for place in shown.js("return mpq.rows.order()")] == sorted(numels)
    bars = shown.browser.find_element(By.ID, "bars")
    bars.send_keys(Keys.ARROW_RIGHT)
    assert shown.text("#details h3") == demo_table().layers[1].name
    assert "levels" in shown.text("#details")
    shown.browser.find_element(By.ID, "unpin").click()
    assert "--pin" not in shown.text("#command")


def test_hostile_names_are_only_names(opened: Open) -> None:
    table = synthetic_table([(ALERT, (4, 4)), ("constructor", (4, 4)), ("__proto__", (4, 4)), ("a\u202eb", (4, 4))])
    shown = opened(page_html(page_of_table(table, ALERT, {ALERT: mpq.Uniform()(table)}, title=ALERT)))
    assert shown.browser.title != "run"
    assert shown.js("return document.querySelectorAll('img').length") == 0
    assert shown.text("#details h3") == ALERT
    shown.js("mpq.pin(0, 8); mpq.select(2)")
    assert shown.text("#details h3") == "__proto__"


def test_ten_thousand_layers(opened: Open) -> None:
    shown = opened(bare_html(synthetic_table(many_layers(10_000))))
    assert shown.js("return mpq.page.plan.choices.length") == 10_000
    assert shown.js("return document.querySelectorAll('#rows tbody tr').length") < 60
    assert shown.js("return document.querySelectorAll('#bars rect').length") <= 2_000
    shown.js("const box = document.getElementById('rows'); box.scrollTop = box.scrollHeight")
    shown.js(DRAWN)
    assert "blocks.2499.part3" in shown.text("#rows")


def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    for width, dark in ((390, False), (390, True), (1280, True), (320, False)):
        shown.wide(width, dark=dark)
        assert shown.js("return document.documentElement.scrollWidth") <= width


def test_a_page_opens_within_a_second(opened: Open, page: PageDocument) -> None:
    times = [
        opened(page_html(page)).js("return performance.getEntriesByType('navigation')[0].loadEventEnd") for _ in "12345"
    ]
    assert 0 < min(times) < 1000, times


def test_a_page_of_plans_alone(opened: Open) -> None:
    table = synthetic_table([("a", (8, 4)), ("b", (8, 4))])
    plans = {"one.json": mpq.PTILMPQ(alpha=0.5)(table), "two.json": mpq.Uniform(bits=3)(table)}
    shown = opened(page_html(page_of_plans(plans, "plans")))
    assert shown.js("return document.getElementById('controls').hidden")
    assert "mpq measure" in shown.text("#lacking")
    assert f"{plans['one.json'].size().total_average_bits:.3f}" in shown.text("#tiles")
    assert "3x4 4x4" in shown.text("#rows") + shown.text("#details") or "4x4 5x4" in shown.text("#rows")


def test_views_say_what_to_measure_where_a_table_lacks_it(opened: Open) -> None:
    table = mpq.measure(digit_net(), bits=(2, 8), metrics=("mse",))
    shown = opened(page_html(page_of_table(table, "t.mpqt", {}, title="t")))
    shown.browser.find_element(By.ID, "tab-ptilmpq").click()
    shown.js(DRAWN)
    assert "--bits 1-8" in shown.text("#panel-ptilmpq")
    assert "three widths" in shown.text("#error")
    assert "--model" in shown.text("#details")
    assert "--granularity per_channel" in shown.text("#left-out")


def test_every_image_and_button_has_a_name(opened: Open, page: PageDocument) -> None:
    shown = opened(page_html(page))
    unnamed = shown.js(
        """const named = (one) => one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length;
        const all = document.querySelectorAll("button, select, input, [role='img']");
        return [...all].filter((one) => !named(one)).map((one) => one.outerHTML)"""
    )
    assert json.dumps(unnamed) == "[]"
