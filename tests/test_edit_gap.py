"""The localization gap: where a picture was edited, told from its pixels, against what the VLM says."""

import io
import json

import numpy as np
import polars as pl
import pytest
import torch
from commands import run_here
from PIL import Image, ImageFilter
from tiny_editor import tiny_editor, tiny_study
from torchvision.ops import box_iou

from edit.config import GapConfig
from edit.evaluate import held_out
from edit.gap import edited_region, sentence, summary
from store.errors import Refusal


def target(one):
    return Image.open(io.BytesIO(one.row["edited_img"]["bytes"])).convert("RGB")


def iou(a, b):
    return float(box_iou(torch.tensor([list(map(float, a))]), torch.tensor([list(map(float, b))]))[0, 0])


@pytest.mark.parametrize("blur", [0, 1.5])
def test_the_region_of_a_true_edit_is_where_its_object_is(blur):
    found = []
    for one in held_out(40, 11, "hard"):
        made = target(one).filter(ImageFilter.GaussianBlur(blur)) if blur else target(one)
        region = edited_region(one.picture, made, one.row["box"])
        x, y = (region[0] + region[2]) / 2, (region[1] + region[3]) / 2
        x1, y1, x2, y2 = one.row["box"]
        found.append((x1 <= x <= x2 and y1 <= y <= y2, iou(region, one.row["box"])))
    within, ious = np.array(found).T
    assert within.mean() >= 0.95 and ious.mean() > 0.6


def test_a_picture_that_was_only_moved_has_no_region():
    (one,) = held_out(1, 12, "hard")
    assert edited_region(one.picture, one.picture, one.row["box"]) is None
    moved = one.picture.transform(
        one.picture.size, Image.Transform.AFFINE, (1, 0, 3, 0, 1, -2), Image.Resampling.BICUBIC
    )
    assert edited_region(one.picture, moved, one.row["box"]) is None
    worn = one.picture.filter(ImageFilter.GaussianBlur(1))
    assert edited_region(one.picture, worn, one.row["box"]) is None


def rows(said, edited):
    n = len(said)
    boxes = {"name": [str(i) for i in range(n)], "box": [[0, 0, 10, 10]] * n}
    for kind, within in (("said", said), ("edited", edited)):
        boxes |= {f"{kind}_within": within, f"{kind}_iou": [0.5] * n, f"{kind}_box": [None, *[[0, 0, 1, 1]] * (n - 1)]}
    return pl.DataFrame(boxes)


def test_the_gap_is_paired_by_numpy():
    said, edited = np.array([1] * 9 + [0]) > 0, np.array([1] * 4 + [0] * 5 + [1]) > 0
    told = summary(rows(said.tolist(), edited.tolist()))
    assert told["n"] == 10 and told["said"]["share"] == 0.9 and told["edited"]["share"] == 0.5
    assert told["gap"]["difference"] == pytest.approx(0.4) and told["said"]["nothing"] == 1
    # Five pairs side with what was said and one with what was edited: 2 · P(at most one of six heads).
    assert told["gap"]["p"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert "+40.0%" in sentence(told) and "n = 10" in sentence(told)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    study = tiny_study(tmp_path_factory.mktemp("study"))
    editor = tiny_editor(study / "editor")
    return study, ["edit", "gap", "--editor", editor, "--store", study / "store.zarr", "--steps", "1", "--threads", "1"]


def test_scenes_are_drawn_edited_and_compared_and_nothing_is_done_twice(given, tmp_path):
    _, command = given
    done = run_here(*command, "--samples", "3", "--max-new-tokens", "40", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["n"] == 3 and 0 <= told["edited"]["share"] <= 1 and told["said"]["mean_iou"] > 0.3
    assert len(pl.read_parquet(tmp_path / "gap.parquet")) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    again = run_here(*command, "--samples", "3", "--max-new-tokens", "40", "--out", tmp_path, "--json")
    assert json.loads(again.stdout) == told and {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")} == before


def test_data_are_compared_as_scenes_are(given, tmp_path):
    study, command = given
    more = ["--data", study / "scenes", "--samples", "2", "--max-new-tokens", "40", "--out", tmp_path]
    done = run_here(*command, *more)
    assert done.returncode == 0, done.stderr
    assert "n = 2" in done.stdout and "asked for the box" in done.stdout


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(Refusal, match="--max-new-tokens 0"):
        GapConfig(max_new_tokens=0)
