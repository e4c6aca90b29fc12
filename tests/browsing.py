"""A real browser without a window, for tests of pages; they are skipped where there is none."""

import shutil
import time
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains

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


class LivePage:
    """A page of a running command: what a person sees of it, and does to it."""

    def __init__(self, browser, url, size):
        self.browser = browser
        resize(browser, size)
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(url)

    def js(self, code, *given):
        return self.browser.execute_script(f"return {code}", *given)

    def until(self, holds):
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, f"the page stays at: {self.text('body')}"
            time.sleep(0.02)

    def text(self, which):
        return self.js("document.querySelector(arguments[0]).innerText", which)

    def keys(self, *keys, held=None):
        pressed = ActionChains(self.browser, duration=0)
        if held:
            pressed.key_down(held)
        pressed.send_keys(*keys)
        if held:
            pressed.key_up(held)
        pressed.perform()
