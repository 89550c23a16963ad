"""A browser for the page's tests: one for all of them, without a window."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.report.page.opened import Opened

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.fail("the page's tests need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


def console(browser: Any) -> list[str]:
    """What the console says, and has not said before."""
    return [entry["message"] for entry in browser.get_log("browser")]


@pytest.fixture
def opened(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Callable[[str], Opened]]:
    """`opened(html)` shows a page; whatever the console says until the test's end is an error."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def show(html: str) -> Opened:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        browser.get(file.as_uri())
        return Opened(browser)

    browser.get("about:blank")
    console(browser)  # what was said before
    yield show
    said = console(browser)
    browser.get("about:blank")
    assert said == []
