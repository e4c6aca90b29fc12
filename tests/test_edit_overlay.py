"""One rendering of a box, that shows on any background and at every edge."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edit.overlay import Overlay, rescaled
from store.errors import Refusal

STYLES = ("frame", "corners", "tint")
colours = st.tuples(*[st.integers(0, 255)] * 3)


def plain(colour, size=(96, 64)):
    return Image.new("RGB", size, tuple(colour))


@given(colours, colours, st.sampled_from(STYLES))
def test_on_any_background_one_tone_of_the_frame_shows(background, colour, style):
    drawn = np.asarray(Overlay(colour=colour, style=style).draw(plain(background), (20, 10, 60, 40))).astype(float)
    away = np.linalg.norm(drawn - np.array(background), axis=2)
    # Black or white is at least half of the cube's diagonal from the colour, so one of both is a quarter of it away.
    assert (away > 255 * np.sqrt(3) / 4 - 1).sum() >= 40


@given(
    st.tuples(st.floats(-50, 120), st.floats(-50, 90), st.floats(0.01, 150), st.floats(0.01, 150)),
    st.sampled_from(STYLES),
    st.floats(0.001, 0.1),
)
def test_wherever_a_box_is_all_four_sides_are_within_the_picture(box, style, width):
    x, y, across, down = box
    whole = (x, y, x + across, y + down)
    picture, overlay = plain((90, 90, 90)), Overlay(style=style, width=width)
    if whole[2] <= 0 or whole[3] <= 0 or x >= 96 or y >= 64:
        with pytest.raises(Refusal, match="outside the picture"):
            overlay.draw(picture, whole)
        return
    drawn = np.asarray(overlay.draw(picture, whole))
    changed = (drawn != 90).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    stroke = max(2, round(width * 64))
    rim = stroke + max(1, stroke // 2)
    assert rows[-1] - rows[0] + 1 >= 2 * rim + 1 and columns[-1] - columns[0] + 1 >= 2 * rim + 1
    # Each corner of the frame is whole: casing outside, stroke within.
    for row in (rows[0], rows[-1]):
        for column in (columns[0], columns[-1]):
            assert tuple(drawn[row, column]) == overlay.casing


def test_a_frame_hides_nothing_of_what_is_in_the_box():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for style in ("frame", "corners"):
        drawn = np.asarray(Overlay(style=style).draw(Image.fromarray(pixels), (20.4, 10.6, 60.2, 40.9)))
        assert (drawn[10:41, 20:61] == pixels[10:41, 20:61]).all()
        changed = (drawn != pixels).any(2)
        assert changed.any() and not changed[:7].any() and not changed[:, :17].any()


def test_the_given_picture_is_left_as_it_was_and_the_same_box_gives_the_same_bytes():
    picture = plain((10, 200, 30))
    first = Overlay().draw(picture, (5, 5, 30, 30))
    assert picture.getcolors() == [(96 * 64, (10, 200, 30))]
    assert first.tobytes() == Overlay().draw(picture, (5, 5, 30, 30)).tobytes()


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((1, 2, 3), "not four numbers"),
        ("abcd", "not four numbers"),
        (None, "not four numbers"),
        ((5, 5, 5, 9), "x1 < x2"),
        ((9, 5, 5, 9), "x1 < x2"),
        ((float("nan"), 0, 5, 5), "x1 < x2"),
        ((0, 0, float("inf"), 5), "x1 < x2"),
        ((200, 5, 300, 9), "outside the picture of 96×64"),
    ],
)
def test_what_is_no_box_is_refused_by_name(box, said):
    with pytest.raises(Refusal, match=said):
        Overlay().draw(plain((0, 0, 0)), box)


def test_pictures_that_cannot_be_drawn_on_are_refused():
    for picture in (Image.new("L", (96, 64)), Image.new("RGBA", (96, 64)), Image.new("RGB", (96, 8))):
        with pytest.raises(Refusal, match="at least 16 pixels"):
            Overlay().draw(picture, (1, 1, 5, 5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": (0, 0)},
        {"colour": (0, 0, 256)},
        {"colour": (0, 0, 1.5)},
        {"width": 0},
        {"width": 0.2},
        {"style": "x"},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(Refusal, match=next(iter(wrong))):
        Overlay(**wrong)


def test_settings_go_through_json_and_unknown_ones_are_refused():
    overlay = Overlay(colour=(1, 2, 3), width=0.03, style="tint")
    assert Overlay.of(json.loads(json.dumps(overlay.as_dict()))) == overlay
    with pytest.raises(Refusal, match="no setting 'colours'"):
        Overlay.of({"colours": (1, 2, 3)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        overlay.width = 1


def test_a_box_goes_along_when_its_picture_is_resized():
    assert rescaled((10, 20, 30, 40), (100, 200), (50, 400)) == (5, 40, 15, 80)
