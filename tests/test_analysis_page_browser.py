"""The report page in a real browser: clicked, typed into, shared, printed, on a desk and on a phone."""

import base64
import json
import re
import time
import zlib

import polars as pl
import pytest
from browsing import DESKTOP, PHONE, browsing, needs_browser, resize
from made_report import HOSTILE, PROVENANCE, RIGHT_TO_LEFT, WORDS, draw, finding, hostile_samples, samples
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from analysis import page
from analysis.finding import Finding

pytestmark = needs_browser
CARDS = ".card:not([hidden])"
CONTRAST = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
  .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (parts(colour)[3] !== 0) return colour;
  }
};
return [...document.querySelectorAll("h1, h2, h3, p, a, td, th, dt, dd, figcaption, button, select, legend, .outcome")]
  .filter((element) => element.checkVisibility() && !element.disabled && !element.closest(".pictures, .plate"))
  .map((element) => {
    const a = light(getComputedStyle(element).color), b = light(ground(element));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), [...element.outerHTML].slice(0, 80).join("")];
  })"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser"), "performance") as driver:
        yield driver


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A usual report and one of hostile data."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("layers-curve", "words-bars"):
        draw(folder, name)
    usual = [finding("layers", 60, ["layers-curve", "words-bars"]), finding("words", figures=["words-bars"])]
    bad = [finding("layers", 40, ["layers-curve"], HOSTILE), finding("words", 40, (), RIGHT_TO_LEFT + "y" * 3_000)]
    columns = {f"share_of_the_first_rank_{number}": [1234.5678] * 40 for number in range(40)}
    bad.append(Finding("wide", "Q?", "A.", tables={"wide": pl.DataFrame(columns)}))
    return {
        "usual": page.write(folder / "usual", "Where does it keep the place?", usual, folder, samples(), PROVENANCE),
        "hostile": page.write(folder / "bad", HOSTILE, bad, folder, hostile_samples(), {HOSTILE: [WORDS, "z" * 9_000]}),
    }


class Opened:
    """What a person sees of the page and does to it."""

    def __init__(self, browser, path, size, view):
        self.browser, self.path = browser, path
        resize(browser, size)
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri() + view)

    def js(self, code, *given):
        return self.browser.execute_script(f"return {code}", *given)

    def all(self, which):
        return self.browser.find_elements(By.CSS_SELECTOR, which)

    def click(self, which):
        self.all(which)[0].click()

    def focus(self, which):
        self.js("document.querySelector(arguments[0]).focus()", which)

    def keys(self, *keys):
        ActionChains(self.browser, duration=0).send_keys(*keys).perform()

    def choose(self, name, value):
        Select(self.all(f"#filters [name={name}]")[0]).select_by_value(value)

    def type(self, name, text):
        self.all(f"#filters [name='{name}']")[0].send_keys(text)

    @property
    def shown(self):
        """Places of the cards that are shown, in their order."""
        return [int(place) for place in self.js(f"[...document.querySelectorAll('{CARDS}')].map(c => c.dataset.order)")]

    @property
    def count(self):
        return self.js("document.getElementById('count').textContent")

    def column(self, number):
        """Texts of a column of the first table."""
        rows = "[...document.querySelector('.numbers').tBodies[0].rows]"
        return self.js(f"{rows}.map(r => r.cells[arguments[0]].textContent)", number)

    def sorts(self):
        return self.js("[...document.querySelector('.numbers').tHead.rows[0].cells].map(h => h.ariaSort)")


@pytest.fixture
def opened(browser, reports):
    """A function that opens a report; whatever is done to it, its console stays empty and nothing is asked for."""

    def make(which="usual", size=DESKTOP, view=""):
        return Opened(browser, reports[which], size, view)

    yield make
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    allowed = {path.as_uri() for path in reports.values()}
    assert asked and {url for url in asked if not url.startswith("data:")} <= allowed


def test_every_picture_is_drawn_and_the_drawing_can_be_saved(opened, browser, tmp_path):
    page = opened()
    assert page.js("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.js("document.querySelectorAll('figure img').length") == 3
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    for name in ("layers-curve.svg", "layers-summary.csv"):
        page.click(f"[download='{name}']")
        end = time.monotonic() + 20
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, f"{name} was not saved"
    assert (tmp_path / "layers-summary.csv").read_text().startswith("layer,mean_iou")
    assert b"<svg" in (tmp_path / "layers-curve.svg").read_bytes()[:1000]


@pytest.mark.parametrize("which", ["usual", "hostile"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 568)])
def test_the_page_is_never_wider_than_the_window(opened, which, size):
    page = opened(which, size)
    for summary in page.all("summary"):
        page.js("arguments[0].parentElement.open = true", summary)
    wide = page.js("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1] <= size[0]
    beyond = page.js("""[...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() && !element.closest(".scroll, .skip, dialog, .which, .instruction") &&
        element.getBoundingClientRect().right > innerWidth + 1).map((element) => element.outerHTML.slice(0, 80))""")
    assert beyond == []
    assert page.js("window.pwned") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["usual", "hostile"])
def test_text_can_be_read_by_day_and_by_night(opened, browser, scheme, which):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page = opened(which)
        ratios = browser.execute_script(CONTRAST)
        assert len(ratios) > 100 and [text for ratio, text in ratios if ratio < 4.5] == []
        ground = {"light": "rgb(252, 251, 249)", "dark": "rgb(22, 22, 21)"}[scheme]
        assert page.js("getComputedStyle(document.body).backgroundColor") == ground
        assert page.js("getComputedStyle(document.querySelector('.plate')).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_each_filter_leaves_what_fits_and_the_count_says_how_many(opened):
    page, rows = opened(), list(enumerate(samples().to_dicts()))
    assert page.count == "30 of 30 shown"
    for name, value, fits in (
        ("task", "removal", lambda row: row["task"] == "removal"),
        ("l", "7", lambda row: row["l_star"] == "7"),
        ("split", "train", lambda row: row["split"] == "train"),
        ("outcome", "miss", lambda row: not row["hit"]),
    ):
        page.choose(name, value)
        wanted = [place for place, row in rows if fits(row)]
        assert page.shown == wanted and page.count == f"{len(wanted)} of 30 shown"
        page.choose(name, "")
    for name, value, fits in (
        ("area-from", "20", lambda row: row["area"] >= 0.2),
        ("area-to", "5.5", lambda row: row["area"] <= 0.055),
        ("error-from", "0.5", lambda row: 1 - row["iou"] >= 0.5),
        ("error-to", "0.25", lambda row: 1 - row["iou"] <= 0.25),
        ("text", "LEFTMOST", lambda row: "leftmost" in row["instruction"]),
    ):
        page.type(name, value)
        assert page.shown == [place for place, row in rows if fits(row)], name
        page.click("#filters button")
        assert page.count == "30 of 30 shown"


def test_filters_hold_together_and_when_nothing_fits_the_page_says_so(opened):
    page = opened()
    page.choose("task", "removal")
    page.choose("outcome", "hit")
    page.type("text", "second")
    assert page.shown == [1, 9, 13, 17, 21, 29]
    assert page.all("#none-fits")[0].text == ""
    page.type("text", " sun")
    assert page.shown == [] and page.count == "0 of 30 shown"
    assert page.all("#none-fits")[0].text == "No sample fits these filters."
    page.focus("#filters button")  # the page is short now and may scroll away under a pointer
    page.keys(Keys.ENTER)
    assert len(page.shown) == 30 and page.js("location.hash") == "#samples"


def test_a_sample_of_unknown_area_fits_no_range_and_comes_last(opened):
    page = opened("hostile")
    page.choose("sort", "area")
    assert page.shown == [0, 1, 2, 3, 4]
    page.choose("sort", "-area")
    assert page.shown == [3, 2, 1, 0, 4]
    page.type("area-from", "0")
    assert page.shown == [3, 2, 1, 0]


def test_cards_are_sorted_by_error_and_area(opened):
    page, errors = opened(), {place: 1 - iou for place, iou in enumerate(samples()["iou"])}
    page.choose("sort", "-error")
    assert [errors[place] for place in page.shown] == sorted(errors.values(), reverse=True)
    page.choose("sort", "error")
    assert [errors[place] for place in page.shown] == sorted(errors.values())
    page.choose("sort", "order")
    assert page.shown == list(range(30))


def test_a_view_is_kept_in_the_address_and_comes_back_from_it(opened):
    page = opened()
    page.choose("task", "swap")
    page.type("area-to", "20")
    page.type("text", "moon 1 & 2=%?")
    page.all("[name=text]")[0].clear()
    page.type("text", "moon")
    page.choose("sort", "-error")
    shown, view = page.shown, page.js("location.hash")
    assert len(shown) == 5 and view == "#task=swap&area-to=20&text=moon&sort=-error"
    again = opened(view=view)
    assert again.shown == shown and again.count == "5 of 30 shown"
    assert again.js("document.querySelector('[name=text]').value") == "moon"
    assert again.js("document.getElementById('samples').getBoundingClientRect().top") < DESKTOP[1]
    again.js("location.hash = 'task=removal&l=nowhere'")
    again.browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(again.shown) == 8 and again.js("document.querySelector('[name=sort]').value") == "order"


def test_a_table_is_sorted_by_click_and_by_key_and_tells_who_listens(opened):
    page = opened()
    original = page.column(1)
    value = ".numbers th:nth-child(2) button"
    page.click(value)
    numbers = [float(text) for text in page.column(1)[:-1]]
    assert numbers == sorted(numbers) and page.column(1)[-1] == "–"
    assert page.sorts() == [None, "ascending", None, None]
    page.focus(value)
    page.keys(Keys.ENTER)
    assert [float(text) for text in page.column(1)[:-1]] == sorted(numbers, reverse=True)
    assert page.column(1)[-1] == "–" and page.sorts()[1] == "descending"
    page.keys(Keys.SPACE)
    assert page.column(1) == original and page.sorts() == [None] * 4
    page.click(".numbers th:nth-child(1) button")
    layers = list(dict.fromkeys(page.column(0)))
    assert layers == [*map(str, range(12)), "embed", "final"]
    assert page.js("[document.querySelectorAll('.numbers')[1].tBodies[0].rows[0].cells[0].textContent]") == ["embed"]


@pytest.mark.parametrize("key", [None, Keys.ENTER, Keys.SPACE])
def test_a_picture_changes_between_plain_and_its_map(opened, key):
    page = opened()

    def press():
        if key is None:
            page.click(".card .face")
        else:
            page.focus(".card .face")
            page.keys(key)

    overlay, plain = page.all(".card .overlay")[0], page.all(".card .plain")[0]
    assert overlay.is_displayed() and not plain.is_displayed()
    press()
    assert plain.is_displayed() and not overlay.is_displayed()
    assert page.js("document.querySelector('.card .face').ariaPressed") == "false"
    press()
    assert overlay.is_displayed() and page.js("document.querySelector('.card .face').ariaPressed") == "true"


def test_a_sample_is_enlarged_its_neighbours_follow_and_escape_gives_the_focus_back(opened):
    page = opened()
    page.choose("task", "removal")
    page.focus(f"{CARDS} .enlarge")
    page.keys(Keys.ENTER)
    assert page.js("document.getElementById('lightbox').open")
    said = page.all("#lightbox-text")[0]
    assert said.text == "Remove the second moon 1." and not page.all("#earlier")[0].is_enabled()
    page.keys(Keys.ARROW_RIGHT)
    assert said.text == "Remove the second moon 5."
    page.click("#later")
    page.click("#earlier")
    page.click("#swap")
    assert page.js("document.querySelector('.stage img').alt").endswith("the plain picture")
    page.keys(Keys.ESCAPE)
    assert not page.js("document.getElementById('lightbox').open")
    assert page.js("document.activeElement.closest('.card').dataset.order") == "5"
    assert page.js("document.activeElement.className") == "enlarge"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_figure_is_enlarged_and_put_away(opened, size):
    page = opened(size=size)
    page.click("#figure-layers-curve button")
    box = page.all("#lightbox")[0]
    assert box.is_displayed() and page.js("document.querySelector('.stage img').naturalWidth > 0")
    assert not page.all("#earlier")[0].is_displayed()
    assert page.js("document.querySelector('.stage img').getBoundingClientRect().width") >= 700
    assert box.rect["width"] <= size[0] and box.rect["height"] <= size[1]
    page.keys(Keys.ARROW_RIGHT)
    page.click("#close")
    assert not box.is_displayed()
    assert page.js("document.activeElement.closest('figure').id") == "figure-layers-curve"


def test_hostile_instructions_are_shown_as_text_whole_on_demand_and_enlarged(opened):
    page = opened("hostile")
    assert page.js("window.pwned") is None
    long = page.all(".card details")
    assert [len(each.text) < 200 for each in long] == [True] * len(long)
    page.click(".card summary")
    assert page.js("document.querySelector('.card details p').innerText") == WORDS
    assert not page.all(".card .clip")[0].is_displayed()
    page.all(".card .enlarge")[2].click()
    assert page.js("document.getElementById('lightbox-text').textContent") == WORDS
    box = page.all("#lightbox")[0].rect
    assert box["height"] <= DESKTOP[1] and page.js("document.querySelector('.stage img').height") > 200
    page.keys(Keys.ESCAPE)
    page.type("text", "الكرة")
    assert page.shown == [1]
    last = page.all(".card")[-1]
    assert page.js("arguments[0].querySelector('.enlarge')", last) is None


def printed(browser):
    """The page on A4: its PDF."""
    given = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    return base64.b64decode(given["data"])


def test_on_paper_every_page_has_something_and_no_page_is_another_size_than_a4(opened, browser):
    opened()
    pdf = printed(browser)
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert 4 <= len(boxes) <= 9 and len(set(boxes)) == 1
    assert [float(side) for side in boxes[0]] == pytest.approx([595, 842], abs=1.5)
    streams = [
        zlib.decompress(raw) for raw in re.findall(rb"/FlateDecode[^>]*>> stream\r?\n(.*?)\r?\nendstream", pdf, re.S)
    ]
    pages = [stream for stream in streams if b" Tj" in stream or b" TJ" in stream]
    assert len(pages) >= len(boxes) and min(map(len, pages)) > 400
    assert pdf.count(b"/Subtype /Image") >= 12


@pytest.mark.parametrize("which", ["usual", "hostile"])
def test_on_paper_there_are_no_controls_and_nothing_is_cut(opened, browser, which):
    page = opened(which, (690, 1000))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        for control in ("nav", "#filters", "#count", ".get", ".enlarge", "details.further", "dialog"):
            assert not any(element.is_displayed() for element in page.all(control)), control
        assert len([card for card in page.all(".card") if card.is_displayed()]) == min(12, len(page.shown))
        rows = page.js(
            "[...document.querySelector('.numbers').tBodies[0].rows].filter(r => r.checkVisibility()).length"
        )
        assert rows == 30
        # Chromium leaves buttons out of a head that it repeats on the next page.
        assert page.js("getComputedStyle(document.querySelector('th button')).display") == "contents"
        for whole in ("figure", ".card", "tr"):
            assert page.js(f"getComputedStyle(document.querySelector('{whole}')).breakInside") == "avoid"
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_on_paper_are_the_samples_that_were_chosen(opened, browser):
    page = opened()
    page.choose("sort", "-area")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        visible = [card.get_attribute("data-order") for card in page.all(".card") if card.is_displayed()]
        assert visible == [str(place) for place in range(29, 17, -1)]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_without_its_script_everything_can_still_be_read(opened, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = opened()
        assert not page.all("html.js") and not page.all("#filters")[0].is_displayed()
        assert page.all(".card .overlay")[0].is_displayed() and page.all(".card .plain")[0].is_displayed()
        assert "Remove the leftmost moon 0." in page.all(".card")[0].text
        assert page.all("figure img")[0].is_displayed() and page.all(".numbers")[0].is_displayed()
        summary = page.all("summary")[0]
        summary.click()
        assert page.all("details .numbers")[0].is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
