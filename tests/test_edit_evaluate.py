"""The evaluation: every method on the same scenes, resumed, scored, and a table that says which box helps."""

import json

import polars as pl
import pytest
from commands import run_here
from planted_store import alone
from tiny_editor import tiny_editor, tiny_study

from edit.config import EvaluateConfig, TrainConfig
from edit.evaluate import METHODS, held_out, is_right
from edit.train import train
from probes.sweep import train as train_probe
from store.errors import Refusal


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    study = tiny_study(tmp_path_factory.mktemp("study"))
    editor = tiny_editor(study / "editor")
    train_probe(alone(study / "store.zarr", study / "probes", "3", "6", tokens="text", seeds=(0,), watch=4))
    proxy = next((study / "probes" / "proxies").iterdir())
    files = {"store": str(study / "store.zarr"), "data": str(study / "scenes"), "editor": str(editor)}
    train(TrainConfig(**files, out=study / "lora", steps=2, validation=1, threads=1))
    return ["edit", "evaluate", "--editor", editor, "--lora", study / "lora", "--proxy", proxy, "--steps", "1"]


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    run = run_here(*given, "--samples", "3", "--middle", "4", "--threads", "1", "--out", out)
    assert run.returncode == 0, run.stderr
    return out, run


def test_every_method_is_scored_on_every_scene(done):
    out, run = done
    frame = pl.read_parquet(out / "scores.parquet")
    assert set(frame["method"]) == {*METHODS, "standalone VLM"}
    names = {one.name for one in held_out(3, EvaluateConfig.seed, "hard")}
    for method in METHODS:
        own = frame.filter(method=method, metric="success")
        assert set(own["sample"]) == names and own["value"].is_in([0.0, 1.0]).all()
        assert len(list((out / "pictures" / method).glob("*.png"))) == 3
    unedited = frame.filter(method="unedited")
    assert unedited.filter(metric="unchanged")["value"].mean() == 1, "the autoencoder alone is no edit"
    boxes = frame.filter(metric="box on the right object")
    assert (
        boxes.filter(method="true-box")["value"].mean() == 1 and boxes.filter(method="wrong-box")["value"].mean() == 0
    )
    told = (out / "table.md").read_text()
    assert all(f"| {name} |" in told for name in METHODS) and "Holm" in told and "gap" in run.stdout
    seconds = frame.filter(metric="seconds")
    assert len(seconds) == 3 * len(METHODS) and seconds["value"].min() > 0


def test_it_ends_with_the_report_which_can_be_made_again_without_a_model(done):
    out, run = done
    page = out / "report.html"
    first = page.read_bytes()
    assert str(page) in run.stdout and first.count(b"data:image/webp") == 3 * (1 + len(METHODS))
    page.unlink()
    again = run_here("edit", "report", "--out", out)
    assert again.returncode == 0, again.stderr
    assert page.read_bytes() == first
    about = json.loads((out / "evaluation.json").read_text())
    assert about["peak_memory_bytes"] > 1 << 20 and about["settings"]["seed"] == EvaluateConfig.seed


def test_few_methods_are_evaluated_too(given, tmp_path):
    run = run_here(*given, "--samples", "2", "--threads", "1", "--methods", "plain", "unedited", "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Nothing is known of the gap" in run.stdout and (tmp_path / "report.html").is_file()


def test_it_goes_on_where_it_ended_and_gives_the_same_scores(given, done, tmp_path):
    out, _ = done
    before = pl.read_parquet(out / "scores.parquet").filter(pl.col("metric") != "seconds")
    gone = next((out / "pictures" / "our-box").glob("*.json"))
    gone.unlink()
    kept = next((out / "pictures" / "plain").glob("*.png")).stat().st_mtime_ns
    again = run_here(*given, "--samples", "3", "--middle", "4", "--threads", "1", "--out", out, "--json")
    assert again.returncode == 0, again.stderr
    after = pl.read_parquet(out / "scores.parquet").filter(pl.col("metric") != "seconds")
    assert after.equals(before) and gone.is_file()
    assert next((out / "pictures" / "plain").glob("*.png")).stat().st_mtime_ns == kept
    assert json.loads(again.stdout)["n"] == 3


def test_a_box_is_right_if_it_is_nearest_the_object_that_is_meant():
    (one,) = held_out(1, 7, "hard")
    assert is_right(one.row["box"], one.row) and not is_right(one.other_box, one.row)
    assert not is_right(None, one.row) and not is_right((-9, -9, -5, -5), one.row)


def test_held_out_scenes_are_those_of_their_seed_and_about_an_object():
    first, again = held_out(5, 3, "medium"), held_out(6, 3, "medium")
    assert [one.name for one in again[:5]] == [one.name for one in first]
    assert all(
        one.row["box"] is not None and one.row["task"] in ("swap", "removal", "attribute_modification") for one in again
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"methods": ("middle",)}, "--middle"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(Refusal, match=said):
        EvaluateConfig(**wrong)


def test_an_unknown_method_is_refused_by_name(given, tmp_path):
    run = run_here(*given, "--methods", "plain", "magic", "--out", tmp_path)
    assert run.returncode == 2 and "magic" in run.stderr and "norm-average" in run.stderr
