"""Pictures of samples for the analysis, and maps laid over them."""

import numpy as np
import polars as pl
import pytest
from PIL import Image
from reviewing import make_store

import store
from analysis.maps.pictures import SamplePictures, blank, find_pictures, lay_over, resized
from extract.scenes.shards import ScenesConfig, write_scenes
from store.errors import Refusal
from store.synthetic import synthetic_plan, synthetic_store

SAMPLES = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=SAMPLES, seed=3, difficulty="medium"))
    return folder


@pytest.fixture(scope="module")
def opened(scenes, tmp_path_factory):
    return store.open(make_store(tmp_path_factory.mktemp("store") / "s.zarr", scenes))


def test_a_picture_is_the_samples_own_and_shrunk_to_a_side(opened, scenes):
    pictures = SamplePictures(opened, str(scenes))
    for sample in range(SAMPLES):
        width, height = opened.samples.select("width", "height").row(sample)
        assert pictures.picture(sample, side=10_000).size == (width, height)
        assert max(pictures.picture(sample, side=64).size) == 64
    assert pictures.missing == {}


def test_a_picture_that_cannot_be_had_is_null_and_its_reason_is_kept(scenes, tmp_path):
    other = store.open(make_store(tmp_path / "s.zarr", scenes, image_crc32c=pl.lit(7, pl.UInt32)))
    pictures = SamplePictures(other, str(scenes))
    assert pictures.picture(2) is None
    assert "another picture" in pictures.missing[2]


def test_a_sample_that_was_shown_anothers_picture_has_that_one(opened, scenes, tmp_path):
    # As stores of shuffled images are: the place and checksum are the shown picture's, the id is the sample's own.
    turned = [1, 2, 3, 0]
    shown = {name: opened.samples[name].gather(turned) for name in ("width", "height", "image_crc32c", "file", "row")}
    shown["shown"] = opened.samples["sample_id"].gather(turned)
    other = store.open(make_store(tmp_path / "s.zarr", scenes, **shown))
    pictures, own = SamplePictures(other, str(scenes)), SamplePictures(opened, str(scenes))
    np.testing.assert_array_equal(np.asarray(pictures.picture(0)), np.asarray(own.picture(1)))


def test_data_that_are_not_there_are_said_in_one_line(opened, tmp_path):
    pictures, reason = find_pictures(opened, str(tmp_path / "nowhere"))
    assert pictures is None
    assert "nowhere" in reason and "--data" in reason and "\n" not in reason


def test_a_store_that_does_not_say_where_its_pictures_lie_is_refused(scenes, tmp_path):
    made = store.open(synthetic_store(tmp_path / "s.zarr", synthetic_plan(8)))
    with pytest.raises(Refusal, match="no column 'file'"):
        SamplePictures(made, str(scenes))


def test_pictures_are_shrunk_and_never_blown_up():
    assert resized(Image.new("RGB", (4000, 10)), 100).size == (100, 1)
    assert resized(Image.new("RGB", (30, 20)), 100).size == (30, 20)
    assert blank(400, 300, 200).size == (200, 150)


def test_the_strongest_cell_is_the_brightest_and_cells_are_where_their_pixels_are():
    # Two cells side by side on a picture of 200 × 100 that is drawn at half its size.
    cells = np.array([[0, 0, 100, 100], [100, 0, 200, 100.0]])
    laid = np.asarray(lay_over(Image.new("RGB", (100, 50), "#808080"), np.array([0.2, 0.8]), cells, (200, 100)))
    left, right = laid[:, :50].astype(int).sum(-1), laid[:, 50:].astype(int).sum(-1)
    assert left.max() < right.min()
    assert left.min() == left.max()


def test_tokens_off_the_picture_and_maps_without_mass_leave_it_dim():
    cells = np.array([[0, 0, 100, 100], [np.nan] * 4])
    grey = Image.new("RGB", (100, 50), "#808080")
    dim = np.asarray(lay_over(grey, np.array([0.0, 0.0]), cells, (200, 100)))
    np.testing.assert_array_equal(np.asarray(lay_over(grey, np.array([np.nan, np.nan]), cells, (200, 100))), dim)
    assert dim.max() == 64
