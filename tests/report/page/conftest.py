"""A browser for the page's tests: one for all of them, without a window."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from tests.report.page.browsers import started
from tests.report.page.opened import Opened


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    with started() as one:
        yield one


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
