"""Figure 1: its files, its title from the data, and labels that do not touch."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_probes import LAYERS, made_run, stock
from matplotlib.image import imread

from analysis.config import CurvesConfig
from analysis.curves import draw
from analysis.style import layer_colours, spread
from store.errors import Refusal


def made(folder, skill, **more):
    more.setdefault("rows", stock(extras=False))
    return made_run(skill=skill, **more).write(folder)


def test_the_figure_comes_with_its_numbers_and_how_it_was_made(tmp_path):
    run = made(tmp_path / "run", {"layer-3": 0.8, "mid-prompt": 0.85})
    png, svg, csv, about = draw(CurvesConfig(run, tmp_path / "figures"))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {p.name for p in (png, svg, csv, about)}
    picture = imread(png)
    assert picture.shape[0] > 900
    assert 0.01 < (picture[..., :3].mean(-1) < 0.9).mean() < 0.5  # drawn on, and not filled
    text = svg.read_text()
    for said in ("block 3 beats the last layer", "3 seeds", "random weights", "control task", "text only"):
        assert said in text
    numbers = pl.read_csv(csv)
    assert set(numbers["metric"].unique()) == {"error", "one_minus_iou", "iou"}
    assert set(numbers["layer"].unique()) >= set(LAYERS)
    assert numbers.filter(pl.col("probe") == "random-3")["value"].len() == 1
    made_of = json.loads(about.read_text())
    assert made_of["command"][:3] == ["python", "-m", "analysis"]
    assert made_of["verdict"]["layer"]["chosen"] == "layer-3"


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        ({"layer-2": 0.7}, "block 2 beats the last layer"),
        ({"layer-5": 0.7, "layer-final": 0.7}, "The last layer is better"),
        ({}, "No clear difference"),
        ({"layer-3": 0.7, "floor-text-only": 0.9}, "but not every floor"),
    ],
)
def test_the_title_says_what_the_numbers_say(tmp_path, skill, said):
    run = made(tmp_path / "run", skill)
    assert said in draw(CurvesConfig(run, tmp_path / "figures"))[1].read_text()


@pytest.mark.parametrize(
    ("rows", "seeds", "said"),
    [
        (stock(("3", "5"), controls=False, extras=False), (0,), "Of the layers trained"),
        (stock(target="cell-3x3", extras=False), (0, 1), "accuracy on held-out images"),
        (stock(controls=False, extras=False)[:1], (0,), "one seed"),
    ],
)
def test_a_figure_is_drawn_of_what_there_is(tmp_path, rows, seeds, said):
    run = made(tmp_path / "run", {}, rows=rows, seeds=seeds)
    assert said in draw(CurvesConfig(run, tmp_path / "figures"))[1].read_text()


def test_the_same_run_gives_the_same_picture(tmp_path):
    run = made(tmp_path / "run", {"layer-3": 0.8})
    pictures = [draw(CurvesConfig(run, tmp_path / name))[:2] for name in "ab"]
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"lacks results\.parquet"):
        draw(CurvesConfig(tmp_path, tmp_path / "figures"))


def test_a_run_without_a_layer_is_refused(tmp_path):
    run = made(tmp_path / "run", {}, rows=[row for row in stock(extras=False) if row["role"] == "floor"])
    with pytest.raises(Refusal, match="no proxy of a single layer"):
        draw(CurvesConfig(run, tmp_path / "figures"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_labels_keep_their_order_and_their_distance(wanted):
    heights = spread(wanted, gap=0.1)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(heights[order]) > 0.1 - 1e-9).all()


def test_layer_colours_grow_lighter_with_depth():
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in layer_colours(LAYERS).values()]
    assert (np.diff(lightness) > 0).all()
