"""The page of a person who judges, in a real browser: keys, mouse and finger make the answers that land on the disk."""

import time

import polars as pl
import pytest
from browsing import DESKTOP, PHONE, LivePage, browsing, needs_browser
from judging import picture
from selenium.webdriver.common.keys import Keys
from serving import Serving

from edit.judges.questions import QUESTIONS

pytestmark = needs_browser
NARROW = (320, 640)
SIZES = ((48, 32), (40, 72), (64, 64), (48, 32), (48, 32))
HOSTILE = '<b>bold</b><script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"> &amp; \u202e desrever'
LONG = "x" * 20_000
ALL = {"edit": 4, "subject": 3, "leakage": 2}


def make_items(folder):
    """Five pairs, one of which cannot be shown; the second edited picture is larger than its source, the same shape."""
    rows = []
    for n, size in enumerate(SIZES):
        picture(n, size).save(folder / f"source{n}.png")
        picture(n + 10, size if n != 1 else (80, 144)).save(folder / f"secret{n}.png")
        told = {2: HOSTILE, 3: LONG}.get(n, f"make it {n}")
        files = {"source": f"source{n}.png", "edited": f"secret{n}.png" if n != 4 else "secret_gone.png"}
        box = {"x1": 12.0, "y1": 8.0, "x2": 24.0, "y2": 24.0}
        rows.append({"sample": f"s{n}", "method": "secret", "instruction": told} | files | box)
    pl.DataFrame(rows).write_parquet(folder / "items.parquet")
    return folder / "items.parquet"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    given = ("--items", make_items(folder), "--out", folder / "judged.parquet", "--cache", folder / "cache")
    with Serving("edit", "judge", "--judge", "human", "--rater", "Ada", "--show-box", *given) as serving:
        serving.out = folder / "judged.parquet"
        yield serving


class Page(LivePage):
    """What a person sees of the page and does to it."""

    def __init__(self, browser, serving, size):
        super().__init__(browser, serving.url, size)
        self.serving = serving
        self.until(lambda: self.ready)

    @property
    def place(self):
        return self.js("typeof pair === 'object' && pair && pair.place")

    @property
    def ready(self):
        return self.js("typeof shown === 'boolean' && shown && !busy")

    @property
    def current(self):
        return self.js("(document.querySelector('fieldset.current') ?? {}).id")

    def grades(self, place=None):
        """The answers that the server has kept."""
        return self.serving.ask(f"pairs/{self.place if place is None else place}")[1]["grades"]

    def to(self, place, *keys):
        """Press keys after which that pair is shown."""
        self.keys(*keys)
        self.until(lambda: self.place == place and (self.ready or self.text("#notice")))

    def at(self, place):
        self.browser.get(f"{self.serving.url}#{place + 1}")
        self.until(lambda: self.place == place and self.ready)

    def rect(self, which):
        return self.js(
            "(r => [r.left, r.top, r.right, r.bottom])(document.querySelector(arguments[0]).getBoundingClientRect())",
            which,
        )


def fine(serving):
    """Places of pairs that can be shown, in order, and of the one that cannot."""
    told = [serving.ask(f"pairs/{place}")[1] for place in range(len(SIZES))]
    (broken,) = [one["place"] for one in told if one["trouble"]]
    return [one["place"] for one in told if not one["trouble"]], broken


def by_instruction(serving, text):
    return next(n for n in range(len(SIZES)) if serving.ask(f"pairs/{n}")[1]["instruction"] == text)


@pytest.fixture
def open_page(browser, running):
    """A function that opens the page, without the answers of other tests."""

    def make(size=DESKTOP, fresh=True):
        if fresh:
            for place in fine(running)[0]:
                for question in running.ask(f"pairs/{place}")[1]["grades"]:
                    assert running.ask("answers", {"place": place, "question": question, "grade": None})[0] == 200
        return Page(browser, running, size)

    yield make
    # Whatever was done, nothing else was blocked, missing or thrown.
    expected = ("ERR_CONNECTION_REFUSED", "/pictures/")
    log = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in log if not any(word in message for word in expected)] == []


def test_digits_answer_the_questions_in_turn_and_enter_goes_on(open_page, running):
    (first, second, *_), _ = fine(running)
    page = open_page()
    assert page.place == first and page.current == "question-edit"
    page.keys("4")
    page.until(lambda: page.current == "question-subject")
    assert page.grades() == {"edit": 4}
    page.keys("32")
    page.until(lambda: page.grades() == ALL and page.ready)
    assert page.current is None and "All three" in page.text("#said")
    assert page.text("#counts").startswith("1 of 4 judged, 1 set aside")
    page.to(second, Keys.ENTER)
    assert page.current == "question-edit" and page.grades() == {}


def test_keys_that_are_typed_fast_are_all_kept_in_their_order(open_page, running):
    (first, second, *_), _ = fine(running)
    page = open_page()
    page.to(second, "4", "3", "2", Keys.ENTER)
    assert page.grades(first) == ALL and page.grades(second) == {}


def test_a_key_that_is_held_down_is_one_answer(open_page):
    page = open_page()
    pressed = {"type": "keyDown", "key": "4", "code": "Digit4", "text": "4"}
    for repeat in (False, *[True] * 20):
        page.browser.execute_cdp_cmd("Input.dispatchKeyEvent", pressed | {"autoRepeat": repeat})
    page.until(lambda: page.current == "question-subject" and page.ready)
    time.sleep(0.1)
    assert page.grades() == {"edit": 4}


def test_enter_without_all_answers_stays_and_digits_that_are_no_grade_do_nothing(open_page):
    page = open_page()
    place = page.place
    page.keys("4", "5", "9", Keys.ENTER)
    page.until(lambda: "no answer yet" in page.text("#said"))
    assert page.place == place and page.current == "question-subject" and page.grades() == {"edit": 4}
    assert page.js("document.getElementById('next').disabled")


def test_arrows_go_on_and_back_and_choose_the_question(open_page, running):
    (first, *_), _ = fine(running)
    page = open_page()
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, "1")
    page.until(lambda: page.grades() == {"leakage": 1} and page.current == "question-edit")
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_UP, "2")
    page.until(lambda: page.grades() == {"leakage": 1, "edit": 2} and page.ready)
    page.to(first + 1, Keys.ARROW_RIGHT)
    page.to(first, Keys.ARROW_LEFT)
    assert page.current == "question-subject"
    assert page.js("document.querySelector('input[name=leakage]:checked').value") == "1"


def test_undo_takes_answers_back_one_by_one_also_on_the_pair_before(open_page, running):
    (first, second, *_), _ = fine(running)
    page = open_page()
    page.keys("432")
    page.until(lambda: page.grades() == ALL)
    page.keys(Keys.ARROW_UP, "0")  # a change of the last answer
    page.until(lambda: page.grades() == ALL | {"leakage": 0})
    page.to(second, Keys.ENTER)
    page.to(first, "u")
    page.until(lambda: page.grades() == ALL and page.current == "question-leakage")
    assert "the answer is 2 as before" in page.text("#said")
    page.keys("z", held=Keys.CONTROL)
    page.keys(Keys.BACKSPACE)
    page.until(lambda: page.grades() == {"edit": 4} and page.ready)
    assert page.current == "question-subject"
    page.keys("u")
    page.until(lambda: page.grades() == {} and page.js("document.getElementById('undo').disabled"))


def test_a_pair_that_cannot_be_shown_says_why_and_is_gone_past(open_page, running):
    _, broken = fine(running)
    page = open_page()
    page.browser.get(f"{running.url}#{broken + 1}")
    page.until(lambda: "set aside" in page.text("#notice"))
    assert "No such file or directory" in page.text("#notice") and "secret" not in page.text("body")
    page.keys("4")
    page.keys(Keys.ENTER)
    page.until(lambda: page.place != broken)
    assert page.grades(broken) == {}


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_both_pictures_have_one_scale_and_flicker_in_one_place(open_page, running, size):
    page = open_page(size)
    page.at(by_instruction(running, "make it 1"))  # the edited picture is larger
    source, edited = page.rect("#source"), page.rect("#edited")
    assert source[2] < edited[0] and source[1] == edited[1]
    assert [source[2] - source[0], source[3] - source[1]] == pytest.approx(
        [edited[2] - edited[0], edited[3] - edited[1]]
    )
    assert (source[2] - source[0]) / (source[3] - source[1]) == pytest.approx(40 / 72, abs=0.01)
    seen = []
    for _ in range(3):
        page.keys(" ")
        page.until(lambda: page.js("one") and "is shown" in page.text("#said"))
        seen.append(
            [page.js(f"getComputedStyle(document.getElementById('{s}')).visibility") for s in ("source", "edited")]
        )
        assert page.rect("#source") == page.rect("#edited")
        time.sleep(0.05)
    assert seen == [["visible", "hidden"], ["hidden", "visible"], ["visible", "hidden"]]
    large = page.rect("#source")
    assert large[2] - large[0] >= source[2] - source[0]
    page.keys("b")
    page.until(lambda: page.rect("#source") == source)
    page.browser.find_element("id", "edited").click()  # a finger on a picture flickers, too
    page.until(lambda: page.js("one"))
    page.keys("4")
    page.until(lambda: page.grades() == {"edit": 4})


def test_the_box_is_drawn_where_the_meant_subject_lies(open_page, running):
    page = open_page()
    page.at(by_instruction(running, "make it 0"))
    left, top, right, bottom = page.rect("#source")
    x, y = (right - left) / 48, (bottom - top) / 32
    assert page.rect("#box") == pytest.approx([left + 12 * x, top + 8 * y, left + 24 * x, top + 24 * y], abs=1)


def test_an_answer_is_given_by_mouse_and_finger(open_page):
    page = open_page(PHONE)
    for question, grade in ALL.items():
        option = page.browser.find_element("css selector", f"#question-{question} input[value='{grade}']")
        page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", option)
        option.find_element("xpath", ".." if question != "subject" else ".").click()
        page.until(lambda question=question: question in page.grades() and page.ready)
    assert page.grades() == ALL
    page.browser.find_element("id", "next").click()
    page.until(lambda: page.ready and page.grades() == {})


def test_the_page_works_by_tab_and_arrows_alone_with_a_focus_that_is_seen(open_page):
    page = open_page()
    page.keys(Keys.TAB)
    assert page.js("document.activeElement.name") == "edit"
    assert page.js("getComputedStyle(document.activeElement.parentElement).outlineStyle") == "solid"
    page.keys(" ")
    page.until(lambda: page.grades() == {"edit": 0} and page.ready)
    page.keys(Keys.ARROW_DOWN)
    page.until(lambda: page.grades() == {"edit": 1} and page.ready)
    assert page.js("document.activeElement.value") == "1"  # who walks through the answers stays
    stops = []
    for _ in range(7):
        page.keys(Keys.TAB)
        stops.append(page.js("document.activeElement.name || document.activeElement.id"))
        outlined = "n => getComputedStyle(n).outlineStyle === 'solid'"
        seen = page.js(f"[document.activeElement, document.activeElement.parentElement].some({outlined})")
        assert seen, stops
    assert stops == ["subject", "leakage", "skip", "undo", "flicker", "both", "keys"]


def test_every_control_has_a_name_and_every_question_is_a_group(open_page):
    page = open_page()
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if not n.get("ignored")]
    groups = [name for role, name in named if role == "group"]
    assert groups == [
        "▸ 1. Is what the instruction asks for done?",
        "2. Is the thing that was changed the one that the instruction means?",
        "3. Is everything else as it was?",
    ]
    assert len([name for role, name in named if role == "radio"]) == 15
    assert all(name for role, name in named if role in ("radio", "button", "image", "progressbar"))
    assert "4 done fully, and it looks right" in " ".join(name for role, name in named if role == "radio")


@pytest.mark.parametrize("size", [DESKTOP, (800, 600), PHONE, NARROW])
@pytest.mark.parametrize("told", [HOSTILE, LONG])
def test_hostile_instructions_are_text_and_push_nothing_off_the_window(open_page, running, size, told):
    page = open_page(size)
    page.at(by_instruction(running, told))
    assert page.js("document.getElementById('instruction').textContent") == told
    assert page.js("document.getElementById('instruction').childElementCount") == 0
    assert page.js("window.pwned") is None
    assert page.js("document.documentElement.scrollWidth") <= page.js("document.documentElement.clientWidth")
    for which in ("#source", "#edited", "#counts", "#next", "#flicker", "#questions"):
        left, top, right, bottom = page.rect(which)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom, which
        assert bottom <= max(size[1], page.js("document.documentElement.scrollHeight"))
        assert which not in ("#source", "#edited") or right - left > 50
    assert size[1] <= 640 or page.js("document.documentElement.scrollHeight") == size[1]


def test_dark_and_light_follow_the_system_and_both_are_readable(open_page):
    page = open_page()
    lightness = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for which in ("background-color", "color"):
            value = page.js("getComputedStyle(document.body).getPropertyValue(arguments[0])", which)
            lightness[scheme, which] = sum(int(one) for one in value[4:-1].split(","))
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert lightness["light", "background-color"] - lightness["light", "color"] > 400
    assert lightness["dark", "color"] - lightness["dark", "background-color"] > 400


def test_the_keys_are_shown_on_request(open_page):
    page = open_page()
    page.keys("?")
    page.until(lambda: page.js("document.getElementById('keys-dialog').open"))
    assert "take the last answer back" in page.text("#keys-dialog")
    page.keys("4", Keys.ESCAPE)
    page.until(lambda: not page.js("document.getElementById('keys-dialog').open"))
    assert page.grades() == {}


def test_a_kill_in_the_middle_loses_nothing_and_the_page_says_so(open_page, running):
    (first, second, *_), _ = fine(running)
    page = open_page()
    page.to(second, "432", Keys.ENTER)
    page.keys("1")
    page.until(lambda: page.grades() == {"edit": 1} and page.ready)
    running.kill()
    page.keys("3")
    page.until(lambda: "does not answer" in page.text("#said"))
    running.start()
    again = open_page(fresh=False)
    assert again.place == second and again.current == "question-subject"
    assert again.grades(first) == ALL and again.grades(second) == {"edit": 1}


def test_skipped_pairs_come_again_at_the_end_and_finishing_writes_the_table(open_page, running):
    places, _ = fine(running)
    page = open_page()
    page.to(places[0] + 1, "s")
    for place in places[1:]:
        page.until(lambda place=place: page.place == place and page.ready)
        assert "min left" not in page.text("#counts")
        page.keys("432", Keys.ENTER)
    page.until(lambda: page.place == places[0] and page.ready)
    assert "s each, about 1 min left" in page.text("#counts")
    page.keys("000", Keys.ENTER)
    page.until(lambda: "Every pair is judged" in page.text("#notice"))
    assert "1 could not be shown" in page.text("#notice") and page.text("#next-text") == "Finish"
    page.keys(Keys.ENTER)
    page.until(lambda: "Finished" in page.text("#notice"))
    said = running.wait()
    running.start()
    rows = pl.read_parquet(running.out)
    assert sorted(rows.drop_nulls("edit").select(QUESTIONS).rows()) == [(0, 0, 0), *[(4, 3, 2)] * 3]
    assert rows["failed"].null_count() == 4 and "secret: n = 4, 1 set aside" in said
