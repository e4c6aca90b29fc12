"""Figure 1: its files, its title from the data, and labels that do not touch."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from analysis.config import CurvesConfig
from analysis.curves import draw
from analysis.style import layer_colours, spread
from probes.specs import Spec
from probes.train import RESULTS, curve_point, summary
from store.errors import Refusal

LAYERS = ("embed", *map(str, range(6)), "final")


def made_up_run(folder, skill):
    """A finished run without training: a proxy of skill 1 knows the box, one of skill 0 guesses."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (80, 2, 2)), axis=1).reshape(80, 4)
    true_n4 = torch.from_numpy(corners).float()
    noise_n4 = true_n4[torch.from_numpy(rng.permutation(80))]
    specs = [Spec(f"layer-{name}", "layer", (name,), "all") for name in LAYERS]
    specs += [Spec("mid-prompt", "prompt", ("2", "3"), "text"), Spec("floor-permuted", "floor", ("3",), "all")]
    results, predictions = [], []
    weights_rn = np.full((2, 80), 1 / 80, np.float32)
    for spec in specs:
        known = skill.get(spec.name, 0.2)
        for step in (0, 50, 100):
            share = known * step / 100
            guess_n4 = share * true_n4 + (1 - share) * noise_n4
            results += curve_point(spec, 0, step, guess_n4, true_n4, weights_rn)
        iou_n = known + rng.uniform(-0.1, 0.1, 80)
        columns = {"probe": [spec.name] * 80, "seed": [0] * 80, "sample": range(80), "watched": np.arange(80) < 40}
        five = {name: iou_n for name in ("iou", "giou", "centre_distance", "truth_inside", "inside_truth")}
        predictions.append(pl.DataFrame(columns | five))
        results += summary(predictions[-1], spec, 100)
    folder.mkdir()
    pl.DataFrame(results, schema=RESULTS).write_parquet(folder / "results.parquet")
    pl.concat(predictions).write_parquet(folder / "predictions.parquet")
    (folder / "probes.json").write_text('{"settings": {}}')
    return folder


def test_the_figure_comes_with_its_numbers_and_how_it_was_made(tmp_path):
    run = made_up_run(tmp_path / "run", {"layer-3": 0.8, "mid-prompt": 0.85})
    png, svg, csv, about = draw(CurvesConfig(run, tmp_path / "figures"))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {p.name for p in (png, svg, csv, about)}
    picture = imread(png)
    assert picture.shape[0] > 900
    assert 0.01 < (picture[..., :3].mean(-1) < 0.9).mean() < 0.5  # drawn on, and not filled
    assert "block 3 beats the last layer" in svg.read_text()
    numbers = pl.read_csv(csv)
    assert set(numbers["metric"].unique()) == {"error", "one_minus_iou", "iou"}
    assert set(numbers["layer"].unique()) >= set(LAYERS)
    made = json.loads(about.read_text())
    assert made["command"][:3] == ["python", "-m", "analysis"]
    assert made["verdict"]["chosen"] == "layer-3"


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        ({"layer-2": 0.7}, "block 2 beats the last layer"),
        ({"layer-5": 0.7, "layer-final": 0.7}, "The last layer is better"),
        ({}, "No clear difference"),
        ({"layer-3": 0.7, "floor-permuted": 0.9}, "but not every floor"),
    ],
)
def test_the_title_says_what_the_numbers_say(tmp_path, skill, said):
    run = made_up_run(tmp_path / "run", skill)
    assert said in draw(CurvesConfig(run, tmp_path / "figures"))[1].read_text()


def test_the_same_run_gives_the_same_picture(tmp_path):
    run = made_up_run(tmp_path / "run", {"layer-3": 0.8})
    pictures = [draw(CurvesConfig(run, tmp_path / name))[:2] for name in "ab"]
    for one, other in zip(*pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"lacks results\.parquet"):
        draw(CurvesConfig(tmp_path, tmp_path / "figures"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_labels_keep_their_order_and_their_distance(wanted):
    heights = spread(wanted, gap=0.1)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(heights[order]) > 0.1 - 1e-9).all()


def test_layer_colours_grow_lighter_with_depth():
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in layer_colours(LAYERS).values()]
    assert (np.diff(lightness) > 0).all()
