"""Scenes: OmniEdit's columns, exact boxes and masks, deterministic, and as hard as they say."""

import io

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image

from extract.scenes import DIFFICULTIES, OBJECT_TASKS, TASKS, draw_scene
from extract.scenes.language import by_position
from extract.scenes.layout import LAYOUTS
from extract.scenes.scene import bounding_box, masks_of, paint
from extract.scenes.shapes import KINDS, silhouette
from extract.scenes.shards import ScenesConfig, features, mask_of, row_of, run_lengths, write_scenes
from store.errors import Refusal


def pixels(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"), np.int16)


@pytest.fixture(scope="module")
def rows():
    return {difficulty: [row_of(draw_scene(11, i, difficulty)) for i in range(60)] for difficulty in DIFFICULTIES}


def test_a_scene_is_a_function_of_seed_index_and_difficulty():
    assert row_of(draw_scene(3, 7, "medium")) == row_of(draw_scene(3, 7, "medium"))
    assert row_of(draw_scene(3, 7, "medium")) != row_of(draw_scene(3, 8, "medium"))
    assert row_of(draw_scene(3, 7, "medium")) != row_of(draw_scene(4, 7, "medium"))


def test_boxes_are_the_tight_boxes_of_their_masks(rows):
    for row in (row for group in rows.values() for row in group):
        for thing in row["objects"]:
            mask = mask_of(thing["mask"])
            assert mask.shape == (row["height"], row["width"])
            assert thing["box"] == bounding_box(mask)


def test_masks_of_one_scene_do_not_overlap_and_hide_at_most_a_third():
    for index in range(60):
        scene = draw_scene(5, index, "medium")
        _, owner = paint(scene, scene.things, scene.background)
        for number, mask in enumerate(masks_of(owner, len(scene.things))):
            _, alone = paint(scene, scene.things[number : number + 1], scene.background)
            assert mask.sum() >= 2 / 3 * (alone == 0).sum()


def test_run_lengths_round_trip():
    rng = np.random.default_rng(0)
    for mask in (rng.random((7, 5)) > 0.5, np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        code = run_lengths(mask)
        assert sum(code["counts"]) == mask.size
        assert (mask_of(code) == mask).all()


def test_every_task_comes_and_whole_picture_tasks_have_no_box(rows):
    seen = {row["task"] for row in rows["medium"] + rows["easy"]}
    assert seen == set(TASKS)
    for row in rows["medium"] + rows["easy"]:
        assert (row["box"] is None) == (row["task"] in ("env", "style"))


def test_the_edit_changes_the_box_and_leaves_the_rest(rows):
    checked = 0
    for row in (row for group in rows.values() for row in group if row["task"] in OBJECT_TASKS):
        x1, y1, x2, y2 = row["box"]
        changed = np.abs(pixels(row["src_img"]) - pixels(row["edited_img"])).max(-1) > 24
        # Shadows fall a little outside, JPEG rings a few pixels around.
        grow = 10 + round(0.25 * max(x2 - x1, y2 - y1))
        inside = np.zeros_like(changed)
        inside[max(y1 - grow, 0) : y2 + grow, max(x1 - grow, 0) : x2 + grow] = True
        assert not changed[~inside].any(), row["omni_edit_id"]
        checked += changed.any()
    assert checked >= 100


def test_hard_scenes_show_four_to_nine_alike_told_by_position_alone(rows):
    for index in range(60):
        scene = draw_scene(11, index, "hard")
        assert 4 <= len(scene.things) <= 9
        assert len({(t.kind, t.colour, t.texture) for t in scene.things}) == 1
        assert scene.wish.task in OBJECT_TASKS
        assert scene.things[0].colour not in scene.reference
        assert all(len(text) > 8 for text in scene.instructions)


def test_named_scenes_tell_the_target_by_what_it_is_alone():
    for index in range(100):
        scene = draw_scene(11, index, "named")
        target = scene.things[scene.wish.target]
        fits = {f"the {t.colour} {t.kind}" for t in scene.things} | {f"the {t.kind}" for t in scene.things}
        assert scene.wish.task in OBJECT_TASKS and 3 <= len(scene.things) <= 9
        assert scene.reference in fits and scene.reference.endswith(target.kind)
        alike = [t for t in scene.things if scene.reference in (f"the {t.colour} {t.kind}", f"the {t.kind}")]
        assert alike == [target], "it fits one object"


def test_a_position_phrase_names_one_object_only():
    for index in range(300):
        scene = draw_scene(12, index, "hard")
        phrases = [p for i in range(len(scene.things)) for p in by_position(scene.arrangement, i, "thing")]
        assert len(phrases) == len(set(phrases)), phrases


def test_phrases_of_the_ends_agree_with_the_picture():
    """Independent of the ranks: the leftmost object's box starts (nearly) left of all others."""
    checked = 0
    for index in range(400):
        scene = draw_scene(13, index, "hard")
        if scene.arrangement.layout == "grid":
            continue
        x = np.array([t.x for t in scene.things])
        y = np.array([t.y for t in scene.things])
        for word, values in (("leftmost", x), ("rightmost", -x), ("topmost", y), ("bottommost", -y)):
            if f"the {word} " in scene.reference and "next to" not in scene.reference:
                assert values.argmin() == scene.wish.target
                checked += 1
    assert checked > 20


def test_every_kind_has_a_silhouette_that_fills_a_fair_share_of_its_square():
    for kind in KINDS:
        coverage = silhouette(kind, 60.0)
        assert 0.12 < coverage.sum() / 60**2 < 1.02, kind


def test_shards_have_omniedits_columns_and_stock_datasets_decodes_them(tmp_path):
    write_scenes(ScenesConfig(tmp_path / "scenes", samples=20, seed=2, difficulty="medium"))
    (path,) = (tmp_path / "scenes").glob("*.parquet")
    schema = pq.read_schema(path)
    omniedit = (
        "omni_edit_id task src_img edited_img edited_prompt_list width height sc_score_1 sc_score_2 sc_reasoning "
        "pq_score pq_reasoning o_score"
    ).split()
    assert set(omniedit) <= set(schema.names)
    assert schema.equals(features().arrow_schema)
    import datasets

    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["src_img"].size == (loaded[0]["width"], loaded[0]["height"])
    assert pl.read_parquet(path)["omni_edit_id"].n_unique() == 20


def test_the_same_command_completes_a_folder_and_another_is_refused(tmp_path):
    config = ScenesConfig(tmp_path / "scenes", samples=5, seed=2)
    write_scenes(config)
    (path,) = config.out.glob("*.parquet")
    first = path.read_bytes()
    path.unlink()
    write_scenes(config)
    assert path.read_bytes() == first
    with pytest.raises(Refusal, match="holds other scenes"):
        write_scenes(ScenesConfig(tmp_path / "scenes", samples=5, seed=3))
    assert path.read_bytes() == first


@pytest.mark.parametrize(("field", "value"), [("difficulty", "extreme"), ("samples", 0), ("seed", -1)])
def test_senseless_settings_are_refused(tmp_path, field, value):
    with pytest.raises(Refusal, match=str(value)):
        write_scenes(ScenesConfig(tmp_path / "scenes", **{field: value}))
    assert not (tmp_path / "scenes").exists()


def test_scenes_of_one_seed_are_never_those_of_another():
    """Neither by chance (what is in them, to the last digit of a place) nor by the pixels."""
    seen = {}
    for seed in (0, 1, 7, 8, 2**16, 2**32 - 1):
        for index in range(100):
            scene = draw_scene(seed, index, "hard")
            key = scene.width, scene.height, scene.background, scene.things
            assert seen.setdefault(key, (seed, index)) == (seed, index)
    assert len(seen) == 600
    drawn = [row_of(draw_scene(seed, index, "hard"))["src_img"]["bytes"] for seed in (0, 1, 7) for index in range(8)]
    assert len(set(drawn)) == 24


def test_a_seed_that_numpy_would_read_as_two_numbers_is_refused(tmp_path):
    """Such a seed may give the scenes of another: scene 1 of seed 5 is scene 0 of seed 5 + 2**32."""
    assert draw_scene(5, 1, "easy").things == draw_scene(5 + 2**32, 0, "easy").things
    with pytest.raises(Refusal, match=str(2**32 - 1)):
        write_scenes(ScenesConfig(tmp_path / "scenes", seed=2**32))


def test_a_row_says_how_its_objects_stand_and_by_what_words_one_is_meant(rows):
    for row in (row for group in rows.values() for row in group):
        assert row["layout"] in LAYOUTS
        assert (row["reference"] is None) == (row["task"] not in OBJECT_TASKS)
        if row["reference"]:
            assert all(row["reference"].lower() in text.lower() for text in row["edited_prompt_list"])


def test_an_edited_object_of_a_scene_is_found_by_its_box(rows):
    for row in (row for group in rows.values() for row in group if row["task"] in OBJECT_TASKS):
        assert [thing["box"] for thing in row["objects"]].count(row["box"]) == 1
