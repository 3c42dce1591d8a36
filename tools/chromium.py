"""A headless Chromium for the tests of the page, driven through selenium.

with open_browser() as browser:
    browser.get(url)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tools.server import ServerFailed

__all__ = ["Chromium", "ChromiumNotFound", "find_chromium", "open_browser"]

INSTALL: Final = "install it: sudo apt-get install chromium chromium-driver (Debian), brew install chromedriver (macOS)"
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class ChromiumNotFound(ServerFailed):
    """No Chromium to run; the text says what to install."""


class Chromium(NamedTuple):
    """A browser, and the program that drives it."""

    browser: Path
    driver: Path

    def __str__(self) -> str:
        return f"{self.browser}, {self.driver}"


def find_chromium() -> Chromium:
    """Find a Chromium or Chrome, and its driver, on the PATH or where macOS has them.

    Raises:
        ChromiumNotFound: One of them is missing.
    """
    places = [shutil.which(name) for name in BROWSERS]
    places.append("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    browser = next((place for place in places if place and Path(place).exists()), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise ChromiumNotFound(f"No Chromium with its driver (chromedriver) found here; {INSTALL}")
    return Chromium(Path(browser), Path(driver))


@contextmanager
def open_browser() -> Generator[Any]:
    """Start a browser that logs what pages and the network do; end it after the block."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    found = find_chromium()
    options = ChromeOptions()
    options.binary_location = str(found.browser)
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium starts for root in no other way
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(str(found.driver)))
    try:
        yield browser
    finally:
        browser.quit()
