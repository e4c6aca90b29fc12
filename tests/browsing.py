"""A real browser without a window, for tests of pages; they are skipped where there is none."""

import shutil
from contextlib import contextmanager

import pytest
from selenium import webdriver

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium with its driver: apt-get install chromium chromium-driver"
)
DESKTOP, PHONE = (1280, 800), (390, 844)


@contextmanager
def browsing(profile, *logs):
    """Start a browser with an empty profile folder; it keeps the log of the page's console, and those of ``logs``."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", dict.fromkeys(("browser", *logs), "ALL"))
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resize(browser, size):
    """Give the window's inside this width and height."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
