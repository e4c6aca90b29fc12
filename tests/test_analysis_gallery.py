"""Thumbnails: small JPEG files, drawn by the seed, with the boxes that are known."""

from io import BytesIO

import numpy as np
import polars as pl
import pytest
from looking import HEIGHT, WIDTH, Looking, top_words, votes_for
from PIL import Image, ImageDraw

import store
from analysis.maps.gallery import GUESSED, MOST_BYTES, SIDE, gallery, guessed_boxes, jpeg, outline
from analysis.maps.scores import STAR, maps


class Painted:
    """Pictures at hand; sample 3's is lost."""

    def picture(self, sample, side):
        return None if sample == 3 else Image.new("RGB", (side, side * 3 // 4), (sample, 100, 200))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Looking(boxless=(1,)).write(tmp_path_factory.mktemp("gallery") / "s.zarr")


@pytest.fixture(scope="module")
def found(opened):
    return maps(opened, votes_for(opened), top_words(opened), samples=np.arange(12), tokens=2)


def picture_of(data):
    return Image.open(BytesIO(data))


def test_a_row_says_what_the_sample_is_and_how_its_map_does(opened, found):
    table = gallery(opened, found, Painted(), votes=votes_for(opened).with_columns(iou=pl.lit(0.5)))
    assert table["sample"].to_list() == [0, *range(2, 12)]
    assert set(table.columns) == {
        *("sample", "sample_id", "instruction", "task", "split", "area", "l_star", "words", "hit", "energy"),
        *("chance_hit", "chance_energy", "iou", "picture", "overlay"),
    }
    row = table.row(4, named=True)
    assert row["sample_id"] == "look5" and row["words"] == ["w1", "w2"] and row["iou"] == 0.5
    assert row["instruction"] == opened.samples["instruction"][5]
    np.testing.assert_allclose([row["hit"], row["energy"]], found.scores[STAR][:, 4])
    np.testing.assert_allclose([row["chance_hit"], row["chance_energy"]], found.chance_mn[:, 4])


def test_thumbnails_are_jpeg_of_a_side_and_few_bytes(opened, found):
    table = gallery(opened, found, Painted(), count=5)
    for column in ("picture", "overlay"):
        for data in table[column].drop_nulls():
            assert len(data) <= MOST_BYTES
            assert picture_of(data).format == "JPEG"
            assert picture_of(data).size == (SIDE, SIDE * HEIGHT // WIDTH)


def test_a_lost_picture_is_null_and_its_map_is_drawn_all_the_same(opened, found):
    table = gallery(opened, found, Painted())
    assert table.filter(pl.col("picture").is_null())["sample"].to_list() == [3]
    assert table["overlay"].null_count() == 0
    bare = gallery(opened, found, None, count=2)
    assert bare["picture"].null_count() == 2 and bare["overlay"].null_count() == 0


def test_samples_are_drawn_by_the_seed(opened, found):
    first, again, other = (gallery(opened, found, None, count=4, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again)
    assert first["sample"].to_list() != other["sample"].to_list()


def test_the_true_box_and_the_guessed_one_are_outlined(opened, found):
    at = {"sample": [0], "x1": [40.0], "y1": [30.0], "x2": [200.0], "y2": [150.0]}
    plain, boxed = (gallery(opened, found, None, count=12, boxes=b) for b in (None, pl.DataFrame(at)))
    one, two = (np.asarray(picture_of(table["overlay"][0]), int) for table in (plain, boxed))
    changed = np.argwhere(np.abs(one - two).max(-1) > 60)
    scale = SIDE / WIDTH
    assert changed.min(0) == pytest.approx([30 * scale, 40 * scale], abs=4)
    assert changed.max(0) == pytest.approx([150 * scale, 200 * scale], abs=4)
    assert (plain["overlay"][1:] == boxed["overlay"][1:]).all()


def test_dashes_leave_gaps_and_a_solid_outline_none():
    drawn = {}
    for dashed in (False, True):
        picture = Image.new("RGB", (100, 100), "#808080")
        outline(ImageDraw.Draw(picture), (10, 20, 90, 80), GUESSED, dashed=dashed)
        drawn[dashed] = np.asarray(picture, int)[20, 15:85]
    bare = [(line == 128).all(-1).mean() for line in (drawn[False], drawn[True])]
    assert bare[0] == 0 and 0.2 < bare[1] < 0.6


def test_the_models_own_answers_are_the_guess_where_none_is_given(tmp_path):
    made = Looking(n=4)
    corners = dict(zip(("vlm_x1", "vlm_y1", "vlm_x2", "vlm_y2"), (1.0, 2.0, 30.0, 40.0), strict=True))
    told = {name: pl.Series([value, None, value, value]) for name, value in corners.items()}
    made.table = lambda: Looking(n=4).table().with_columns(**told)
    opened = made.write(tmp_path / "s.zarr")
    assert guessed_boxes(opened, None) == {sample: (1.0, 2.0, 30.0, 40.0) for sample in (0, 2, 3)}
    assert guessed_boxes(store.open(tmp_path / "s.zarr"), pl.DataFrame({"sample": [1], "x1": [0.0], "y1": [0.0],
                         "x2": [9.0], "y2": [float("nan")]})) == {}  # fmt: skip


def test_a_picture_of_noise_is_made_small_enough():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    assert len(jpeg(Image.fromarray(noise))) <= MOST_BYTES
