"""The page of a review in a real browser: keys, mouse and finger make the verdicts that land on the disk."""

import time

import polars as pl
import pytest
from browsing import DESKTOP, PHONE, LivePage, browsing, needs_browser, resize
from reviewing import Review, lines, make_store
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_MOUSE, POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.keys import Keys

from extract.review import verdicts
from extract.scenes.shards import ScenesConfig, write_scenes

pytestmark = needs_browser
LYING = (740, 360)
BOLD = '<b>bold</b><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"> &amp; &lt;'
INSTRUCTIONS = [
    None,
    None,
    BOLD,
    "أزل الكرة الحمراء \u202e desrever \u2066 😀👩‍👩‍👧‍👦🏳️‍🌈",
    " ".join(f"word{n}" for n in range(10_000)),
    "x" * 50_000,
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=8, seed=3, difficulty="medium"))
    return folder


@pytest.fixture(scope="module")
def reviewed(scenes, tmp_path_factory):
    """Samples 1, 4 and 6 have no box; the picture of sample 7 is another one in the data than the store was made of."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    crc = pl.when(pl.int_range(pl.len()) == 7).then(0).otherwise(pl.col("image_crc32c"))
    return make_store(path, scenes, INSTRUCTIONS, image_crc32c=crc)


class Page(LivePage):
    """What a person sees of a review and does to it."""

    def __init__(self, browser, review, size):
        self.review, self.path = review, review.out
        self.earlier = len(lines(self.path))
        super().__init__(browser, review.url, size)
        self.until(lambda: self.number is not None and self.ready)

    @property
    def number(self):
        return self.js("sample && sample.place")

    @property
    def ready(self):
        return self.js("shown && !busy")

    @property
    def box(self):
        return self.js("box")

    def to(self, number, *keys):
        """Press keys after which that sample is shown."""
        self.keys(*keys)
        self.until(lambda: self.number == number and self.ready)

    @property
    def lines(self):
        return lines(self.path)[self.earlier :]

    def verdicts(self, count):
        self.until(lambda: len(self.lines) >= count)
        assert len(self.lines) == count
        return self.lines

    @property
    def frame(self):
        """Left, top, and CSS pixels a source pixel, of the picture on the screen."""
        left, top, width = self.js(
            "(r => [r.left, r.top, r.width])(document.getElementById('picture').getBoundingClientRect())"
        )
        return [left, top, width / self.js("sample.width")]

    def on_screen(self, x, y):
        left, top, scale = self.frame
        return round(left + x * scale), round(top + y * scale)

    def drag(self, start, *stops, kind=POINTER_MOUSE):
        """Press at a place of the screen, go to others, let go."""
        builder = ActionBuilder(self.browser, mouse=PointerInput(kind, f"one {kind}"), duration=0)
        pointer = builder.pointer_action
        pointer.move_to_location(*start)
        pointer.pointer_down()
        for stop in stops:
            pointer.move_to_location(*stop)
        pointer.pointer_up()
        builder.perform()


@pytest.fixture(scope="module")
def running(reviewed, scenes, tmp_path_factory):
    with Review("--store", reviewed, "--data", scenes, "--out", tmp_path_factory.mktemp("out") / "v.jsonl") as review:
        yield review


@pytest.fixture
def open_page(browser, running):
    """A function that opens the page of the review that all tests share, without the verdicts of other tests."""

    def make(size=DESKTOP, fresh=True):
        if fresh:
            running.withdraw_all()
        return Page(browser, running, size)

    yield make
    # Whatever was done, nothing else was blocked, missing or thrown.
    expected = ("ERR_CONNECTION_REFUSED", "/pictures/7 ")
    log = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in log if not any(word in message for word in expected)] == []


def test_enter_accepts_the_box_and_goes_to_the_next_sample(open_page):
    page = open_page()
    shown = page.box
    assert page.text("#counts").startswith("0 of 8")
    page.to(1, Keys.ENTER)
    (line,) = page.verdicts(1)
    assert (line["verdict"], line["sample_id"], line["box"]) == ("accepted", "scene_medium_3_0", shown)
    assert line["box"] == line["box_before"]
    assert page.text("#counts").startswith("1 of 8: ✓ 1 accepted")


def test_a_key_that_is_held_down_is_one_verdict(open_page):
    page = open_page()
    pressed = {"type": "keyDown", "key": "a", "code": "KeyA", "text": "a"}
    for repeat in (False, *[True] * 30):
        page.browser.execute_cdp_cmd("Input.dispatchKeyEvent", pressed | {"autoRepeat": repeat})
    page.until(lambda: page.number == 1 and page.ready)
    page.to(2, "s")
    assert len(page.verdicts(1)) == 1


@pytest.mark.parametrize("size", [DESKTOP, PHONE, LYING])
@pytest.mark.parametrize("kind", [POINTER_MOUSE, POINTER_TOUCH])
def test_a_dragged_corner_is_stored_in_source_pixels_whatever_the_windows_size(open_page, size, kind):
    page = open_page(size)
    x1, y1, x2, y2 = page.box
    scale = page.frame[2]
    start = page.on_screen(x2, y2)
    page.drag(start, (start[0] + 3, start[1] + 2), (start[0] + 21, start[1] - 13), kind=kind)
    assert page.text("#accept-text").endswith("Keep the fix")
    page.to(1, Keys.ENTER)
    (line,) = page.verdicts(1)
    assert line["verdict"] == "fixed"
    assert line["box"] == pytest.approx([x1, y1, x2 + 21 / scale, y2 - 13 / scale], abs=0.011)
    assert line["box_before"] == [x1, y1, x2, y2]


def test_an_edge_is_dragged_alone_and_the_inside_moves_the_box_as_far_as_the_picture_goes(open_page):
    page = open_page()
    x1, y1, x2, y2 = page.box
    scale = page.frame[2]
    left = page.on_screen(x1, (y1 + y2) / 2)
    page.drag(left, (left[0] - 30, left[1] + 40))
    assert page.box == pytest.approx([x1 - 30 / scale, y1, x2, y2], abs=0.011)
    page.keys("u")
    assert page.box == [x1, y1, x2, y2]
    middle = page.on_screen((x1 + x2) / 2, (y1 + y2) / 2)
    page.drag(middle, (middle[0] - 500, middle[1] - 7))
    assert page.box == pytest.approx([0, y1 - 7 / scale, x2 - x1, y2 - 7 / scale], abs=0.011)
    page.to(1, Keys.ENTER)
    assert page.verdicts(1)[0]["box"][0] == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_sample_without_a_box_is_accepted_only_after_one_was_drawn(open_page, size):
    page = open_page(size)
    page.to(1, "s")
    assert page.box is None and "no box yet" in page.text("#held")
    page.keys(Keys.ENTER, "a", Keys.ARROW_LEFT)
    time.sleep(0.2)
    assert page.number == 1 and page.lines == []
    left, top, scale = page.frame
    start = page.on_screen(150, 200)
    page.drag(start, (start[0] - 40, start[1] + 1), (start[0] - 50, start[1] - 60))
    assert page.frame == [left, top, scale]
    page.to(2, Keys.ENTER)
    (line,) = page.verdicts(1)
    x, y = (start[0] - left) / scale, (start[1] - top) / scale
    assert (line["verdict"], line["box_before"]) == ("fixed", None)
    assert line["box"] == pytest.approx([x - 50 / scale, y - 60 / scale, x, y], abs=0.011)


def test_a_new_box_is_drawn_over_the_old_one_and_a_click_draws_none(open_page):
    page = open_page()
    x1, y1, x2, y2 = page.box
    page.drag(page.on_screen(20, 20), page.on_screen(20, 20))
    assert page.box == [x1, y1, x2, y2]
    page.keys("n")
    inside = [(x1 + x2) / 2 - 8, (y1 + y2) / 2 - 9, (x1 + x2) / 2 + 8, (y1 + y2) / 2 + 9]
    page.drag(page.on_screen(*inside[:2]), page.on_screen(*inside[2:]))
    assert page.box == pytest.approx(inside, abs=0.6)
    page.drag(page.on_screen(30, 40), (DESKTOP[0] - 1, 300))  # leaves the picture
    assert page.box[2] == 320
    page.keys("z", held=Keys.CONTROL)
    page.keys("u")
    assert page.box == [x1, y1, x2, y2]


def test_arrows_move_the_box_and_with_shift_its_right_and_lower_edge(open_page):
    page = open_page()
    x1, y1, x2, y2 = page.box
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    page.keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN, held=Keys.SHIFT)
    assert page.box == [x1 + 2, y1 - 1, x2 + 1, y2]
    page.keys("uuuuu")
    assert page.box == [x1, y1, x2, y2]
    assert page.js("document.getElementById('undo').disabled")


def test_a_rejection_takes_its_reason_and_escape_takes_it_back(open_page):
    page = open_page()
    page.keys("r")
    page.keys("no", Keys.ESCAPE)
    page.keys("r")
    page.keys("the moon is cut off <b>", Keys.ENTER)
    page.until(lambda: page.number == 1 and page.ready)
    page.to(2, "r", Keys.ENTER)
    first, second = page.verdicts(2)
    assert (first["verdict"], first["box"], first["reason"]) == ("rejected", None, "the moon is cut off <b>")
    assert (second["verdict"], second["reason"]) == ("rejected", None)
    page.to(1, Keys.BACKSPACE)
    page.to(0, Keys.BACKSPACE)
    assert "rejected: the moon is cut off <b>" in page.text("#held")


def test_a_mind_is_changed_by_going_back(open_page):
    page = open_page()
    page.to(1, Keys.ENTER)
    page.to(0, Keys.BACKSPACE)
    assert "accepted" in page.text("#held")
    page.keys(Keys.ARROW_LEFT)
    page.to(1, Keys.ENTER)
    page.to(0, Keys.BACKSPACE)
    assert "fixed" in page.text("#held") and page.box == page.verdicts(2)[1]["box"]
    page.to(1, "r", Keys.ENTER)
    assert [line["verdict"] for line in page.verdicts(3)] == ["accepted", "fixed", "rejected"]
    assert page.text("#counts") == "1 of 8: ✓ 0 accepted, ✎ 0 fixed, ✕ 1 rejected"
    assert list(verdicts.read(page.path)["verdict"]) == ["rejected"]


def test_undo_takes_the_last_verdict_back_and_brings_the_one_before(open_page):
    page = open_page()
    page.to(1, Keys.ENTER)
    page.to(0, Keys.BACKSPACE)
    page.to(1, "r", Keys.ENTER)
    page.to(0, "u")
    assert "accepted" in page.text("#held") and list(verdicts.read(page.path)["verdict"]) == ["accepted"]
    page.keys("u")
    page.until(lambda: page.text("#counts").startswith("0 of 8") and page.ready)
    assert page.number == 0 and page.text("#held") == "" and len(verdicts.read(page.path)) == 0


def test_a_fix_that_has_no_verdict_yet_waits_while_other_samples_are_looked_at(open_page):
    page = open_page()
    page.keys(Keys.ARROW_LEFT)
    changed = page.box
    page.to(1, "s")
    page.to(0, Keys.BACKSPACE)
    assert page.box == changed and page.text("#accept-text").endswith("Keep the fix")


def test_skipped_samples_come_again_at_the_end(open_page):
    page = open_page()
    page.to(1, "s")
    for number in range(2, 8):
        page.keys("r")
        page.keys(Keys.ENTER)
        page.until(lambda n=number: page.number == n and (page.ready or n == 7))
    page.until(lambda: "another picture" in page.text("#notice"))
    page.keys("r")
    page.keys(Keys.ENTER)
    page.until(lambda: page.number == 0 and page.ready)
    page.keys(Keys.ENTER)
    page.until(lambda: "Every sample has a verdict" in page.text("#notice"))
    assert page.text("#counts").startswith("8 of 8")


def test_a_sample_whose_picture_is_missing_or_another_can_only_be_rejected_or_skipped(open_page):
    page = open_page()
    page.browser.get(page.review.url + "#8")
    page.until(lambda: "another picture under this id" in page.text("#notice"))
    page.keys(Keys.ENTER, "a", Keys.ARROW_LEFT, "n")
    time.sleep(0.2)
    assert page.lines == []
    page.keys("r")
    page.keys("picture lost", Keys.ENTER)
    assert page.verdicts(1)[0]["reason"] == "picture lost"


def test_a_kill_in_the_middle_loses_nothing_and_the_review_goes_on_after_a_restart(open_page, running):
    page = open_page()
    page.to(1, Keys.ENTER)
    page.to(2, "r", Keys.ENTER)
    kept = page.verdicts(2)
    running.kill()
    page.keys(Keys.ENTER)
    page.until(lambda: "does not answer" in page.text("#said"))
    assert page.number == 2 and page.verdicts(2) == kept
    running.start()
    again = open_page(fresh=False)
    assert again.number == 2 and again.text("#counts") == "2 of 8: ✓ 1 accepted, ✎ 0 fixed, ✕ 1 rejected"
    again.to(3, Keys.ENTER)
    assert page.verdicts(3)[:2] == kept


@pytest.mark.parametrize("size", [DESKTOP, PHONE, LYING])
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_hostile_instructions_are_shown_as_text_and_push_nothing_off_the_window(open_page, size, number):
    page = open_page(size)
    page.browser.get(f"{page.review.url}#{number + 1}")
    page.until(lambda: page.number == number and page.ready)
    assert page.js("document.getElementById('instruction').textContent") == INSTRUCTIONS[number]
    assert page.js("document.getElementById('instruction').childElementCount") == 0
    assert page.js("window.pwned") is None
    assert page.js("[document.body.scrollWidth, document.body.scrollHeight]") == list(size)
    for which in ("picture", "accept", "reject", "counts"):
        left, top, right, bottom = page.js(
            "(r => [r.left, r.top, r.right, r.bottom])(document.getElementById(arguments[0]).getBoundingClientRect())",
            which,
        )
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], which
        assert which != "picture" or bottom - top > 100


def test_the_keys_are_shown_on_request_and_every_key_has_a_button(open_page):
    page = open_page()
    page.keys("?")
    assert page.js("document.getElementById('keys-dialog').open")
    assert "reject the sample" in page.text("#keys-dialog")
    page.keys(Keys.ENTER)  # closes; accepts nothing
    assert not page.js("document.getElementById('keys-dialog').open")
    time.sleep(0.2)
    assert page.lines == []
    for button, number in (("skip", 1), ("back", 0), ("accept", 1)):
        page.browser.find_element("id", button).click()
        page.until(lambda n=number: page.number == n and page.ready)
    page.browser.find_element("id", "reject").click()
    page.browser.find_element("id", "reject-confirm").click()
    page.until(lambda: page.number == 2 and page.ready)
    page.to(3, Keys.ENTER)  # a button that was clicked does not take the Enter after it
    assert [line["verdict"] for line in page.verdicts(3)] == ["accepted", "rejected", "accepted"]


def test_the_window_may_change_its_size_in_the_middle(open_page):
    page = open_page()
    before = page.box
    for size in (PHONE, (1000, 400)):
        resize(page.browser, size)
        page.until(lambda size=size: page.js("innerWidth") == size[0])
        x1, y1, x2, y2 = page.box
        start = page.on_screen(x1, y1)
        scale = page.frame[2]
        page.drag(start, (start[0] + 4, start[1] + 6))
        assert page.box == pytest.approx([x1 + 4 / scale, y1 + 6 / scale, x2, y2], abs=0.011)
    page.keys("uu")
    assert page.box == before
