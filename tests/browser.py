"""A real browser for tests of pages: Debian's Chromium without a window, driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,1000",
)  # fmt: skip
_SECONDS = 60  # that a page may take to be ready on a machine with much to do


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A browser with a fresh profile; the test is skipped, and says why, where there is none."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="needs selenium (pip install 'lungkit[test]')"
    )
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, found in programs.items():
        if found is None:
            pytest.skip(f"needs a browser: no {name} on the path (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


def opened(driver: Any, page: Path) -> Any:
    """Open a page from its file and wait until its viewer, where it has one, is ready; its console must be silent."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get_log("browser")  # what other pages said
    driver.get(page.as_uri())
    WebDriverWait(driver, _SECONDS, poll_frequency=0.05).until(
        lambda one: one.execute_script(
            "const viewer = document.querySelector('.viewer');"
            "return document.readyState === 'complete' && (!viewer || viewer.dataset.ready && viewer.dataset.cross)"
        )
    )
    assert driver.get_log("browser") == []
    return driver
