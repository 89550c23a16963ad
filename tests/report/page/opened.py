"""A page in a browser, as tests look at it."""

from dataclasses import dataclass
from typing import Any

from selenium import webdriver


@dataclass(frozen=True)
class Opened:
    """What a browser shows."""

    browser: webdriver.Chrome

    def js(self, body: str, *arguments: Any) -> Any:
        """What a function of these arguments returns, `mpq` being the page's own."""
        return self.browser.execute_script(f"const mpq = window.mpq;\n{body}", *arguments)

    def text(self, selector: str) -> str:
        """What an element holds."""
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def wide(self, width: int, *, dark: bool = False) -> None:
        """Show it in a window of this width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
