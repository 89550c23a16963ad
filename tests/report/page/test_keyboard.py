"""The page without a pointer: what has the keyboard keeps it, and what is to be read can be."""

from collections.abc import Callable, Iterator

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from mpq_plugins.report.page.document import PageDocument, page_of_table
from mpq_plugins.report.page.writer import page_html
from tests.helpers.synthetic_tables import synthetic_table
from tests.report.page.opened import Opened

pytestmark = pytest.mark.slow  # for the browser's sake
Open = Callable[[str], Opened]
FOCUSED = "const one = document.activeElement; return one.id || one.getAttribute('aria-label') || one.textContent"
UNREADABLE = """
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (c) => { const [r, g, b] = c.map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const parsed = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [[r, g, b], a]; };
const over = (c, a, ground) => c.map((v, i) => v * a + ground[i] * (1 - a));
const groundOf = (one) => { if (one === null) return [255, 255, 255];
  const [c, a] = parsed(getComputedStyle(one).backgroundColor);
  return a === 1 ? c : over(c, a, groundOf(one.parentElement)); };
const found = [];
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !one.getClientRects().length || one.closest("[disabled]")) continue;
  const text = getComputedStyle(one)[one.closest("svg") ? "fill" : "color"];
  if (!text.startsWith("rgb")) continue;
  let [colour, clear] = parsed(text);
  for (let node = one; node; node = node.parentElement) clear *= Number(getComputedStyle(node).opacity);
  const ground = groundOf(one.closest("svg")?.parentElement ?? one);
  const [a, b] = [light(over(colour, clear, ground)), light(ground)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${one.tagName} ${one.className} ${one.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
}
return found"""


@pytest.fixture(scope="module")
def document() -> PageDocument:
    return page_of_table(synthetic_table([("a", (8, 32)), ("b", (16, 32))], by_channel=True), "t.mpqt", {}, title="t")


@pytest.fixture
def page(opened: Open, document: PageDocument) -> Iterator[Opened]:
    shown = opened(page_html(document))
    yield shown
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def press(page: Opened, selector: str, key: str = Keys.ENTER) -> str:
    """What has the keyboard after a key on an element."""
    page.js("document.querySelector(arguments[0]).focus()", selector)
    ActionChains(page.browser, 0).send_keys(key).perform()
    return str(page.js(FOCUSED))


def test_a_button_that_is_pressed_keeps_the_keyboard(page: Opened) -> None:
    assert press(page, "#details .buttons button:nth-of-type(3)") == "3"
    assert page.js("return [...mpq.page.state.pins]") == [[0, 3]]
    assert press(page, "#details .buttons button:last-of-type") == "skip"
    assert press(page, "[aria-label='skip b']") == "skip b"
    assert press(page, "#rows thead button") == "#"


def test_a_button_that_goes_away_leaves_the_keyboard_near(page: Opened) -> None:
    page.js("mpq.pin(0, 3)")
    assert press(page, "#unpin") == "tab-budget"
    page.js("document.getElementById('reset').hidden = false")
    assert press(page, "#reset") == "frontier"


def test_arrows_go_on_from_the_plan_that_is_chosen(page: Opened) -> None:
    sizes = page.js("return mpq.page.doc.points.map((point) => point.total_bits)")
    order = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    page.js("mpq.choose(arguments[0])", order[5])
    press(page, "#frontier", Keys.ARROW_RIGHT)
    assert page.js("return mpq.page.point") == order[6]
    press(page, "#frontier", Keys.ARROW_LEFT)
    assert page.js("return mpq.page.point") == order[5]


def test_hiding_every_series_says_so(page: Opened) -> None:
    page.js("document.querySelectorAll('#legend button').forEach((one) => one.click())")
    assert "hidden" in page.text("#frontier")
    page.js("document.querySelector('#legend button').click()")
    assert page.js("return document.querySelectorAll('#frontier circle').length") > 0


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_their_ground(page: Opened, dark: bool) -> None:
    page.wide(1280, dark=dark)
    page.js("document.querySelector('#legend button').click(); mpq.change({allocator: 'mixquant'})")
    assert page.js(UNREADABLE) == []


def test_it_is_printed_on_white(page: Opened) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    colours = page.js(
        "return ['body', 'section'].map((name) => getComputedStyle(document.querySelector(name)).backgroundColor)"
    )
    assert colours == ["rgb(255, 255, 255)"] * 2
    assert page.js(UNREADABLE) == []


def test_sliders_say_the_number_that_they_mean(page: Opened) -> None:
    page.js("mpq.change({allocator: 'mixquant', qem: 3.5})")
    assert page.js("return document.getElementById('qem').getAttribute('aria-valuetext')") == "3.5"
    page.js("const one = document.getElementById('qem-number'); one.value = 0; one.dispatchEvent(new Event('change'))")
    assert page.js("const one = document.getElementById('qem-number'); return [one.value, one.title]") == [
        "3.5", "0.5 to 200",
    ]  # fmt: skip
