"""Wrong inputs of the probes' commands: each is refused in one line that names the value, the place and the mend."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from planted_store import LAYERS, PLANTED, Planted, alone, quick, weights_of

from probes import learn
from probes.config import EvaluateConfig, Recipe, SweepConfig
from probes.evaluate import evaluate, read_run
from probes.sweep import sweep, train
from store.bits import from_float32
from store.errors import Refusal


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted().write(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    """Settings of a run that has been trained to its end."""
    config = quick(planted, tmp_path_factory.mktemp("run") / "run", parts=("layers",), layers=("0", "1"), steps=4)
    sweep(config)
    return config


def refused(words, command, config):
    """The message of the refusal: one line, with these words."""
    with pytest.raises(Refusal) as refusal:
        command(config)
    message = str(refusal.value)
    assert words in message, message
    assert "\n" not in message
    return message


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 30, "heads": 4}, "--width 30 is not a multiple of --heads 4"),
        ({"seeds": ()}, "--seeds () must name at least one seed"),
        ({"seeds": (1, 1)}, "--seeds (1, 1)"),
        ({"seeds": (-1,)}, "--seeds (-1,)"),
        ({"batch": 0}, "--batch 0 is no use"),
        ({"lr": float("nan")}, "--lr nan is no use"),
        ({"lr": float("inf")}, "--lr inf is no use"),
        ({"steps": -3}, "--steps -3"),
        ({"watch_every": 0}, "--watch-every 0"),
        ({"threads": 0}, "--threads 0"),
        ({"memory": 0.0}, "--memory 0.0"),
        ({"checkpoint": -1.0}, "--checkpoint -1.0"),
    ],
)
def test_settings_that_are_no_use_are_refused_by_name(changes, words):
    refused(words, lambda changes: Recipe("unused", **changes), changes)


def test_the_presets_are_complete_and_the_paper_one_is_the_papers():
    paper = SweepConfig("unused", preset="paper")
    assert (paper.width, paper.heads, paper.depth, paper.queries, paper.lr) == (512, 8, 6, 16, 1e-4)
    assert (paper.batch, paper.steps, paper.warm_up, paper.l1_steps) == (64, 2000, 100, 100)
    assert None not in SweepConfig("unused").settings.values()
    assert SweepConfig("unused", preset="paper", steps=7).steps == 7


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ("77",)}, "--layers names 77; the store holds embed, 0, 1, 2, final"),
        ({"prompt_layers": ("1", "77")}, "--prompt-layers names 77"),
        ({"layers": ("1", "1")}, "name each layer once"),
        ({"target": "colour"}, "--target 'colour' is no column: give box, cell-3x3 or one of sample_id"),
        ({"target": "task"}, "--target task"),
        ({"target": "cell-9x9"}, "a grid has 2 to 64 cells"),
        ({"tokens": "verbs"}, "--tokens verbs: no token of"),
        ({"batch": 65}, "--batch 65 is more than the 64 train samples"),
        ({"parts": ()}, "nothing of that can be trained"),
        ({"parts": ("matched",)}, "nothing of that can be trained"),
    ],
)
def test_what_a_store_does_not_hold_is_refused_and_nothing_is_written(tmp_path, planted, changes, words):
    path = planted
    if changes.get("target") == "task":
        path = Planted(more={"task": ["swap"] * 96}).write(tmp_path / "store")
    refused(words, sweep, quick(path, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_store_without_boxes_is_refused(tmp_path):
    path = Planted(n=8, boxes=False).write(tmp_path / "store")
    refused("holds no sample with a true box", sweep, quick(path, tmp_path / "run", batch=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("test", "name"), [(1, "train"), (1000, "test")])
def test_a_store_of_one_split_is_refused(tmp_path, test, name):
    path = Planted(n=12, test=test).write(tmp_path / "store")
    refused(f"are in split '{name}'", sweep, quick(path, tmp_path / "run", batch=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 8}, "are 8 wide"),
        ({"ids": "other"}, "has none of the samples of"),
        ({"layers": ("embed", "0")}, "(random-weights) lacks layers 1, 2, final: extract them, too"),
    ],
)
def test_a_control_store_that_does_not_fit_is_refused(planted, tmp_path, changes, words):
    other = Planted(planted=None, **changes).write(tmp_path / "other")
    refused(words, sweep, quick(planted, tmp_path / "run", parts=("layers",), random_weights=other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_are_found_and_named(tmp_path, value):
    # A writer takes no such states: they come by damage of the disk, or by another hand.
    marked = 1.5e30
    path = Path(Planted(spoiled={(7, "1"): marked}).write(tmp_path / "store"))
    found, put = (from_float32(np.float32([number])).tobytes() for number in (marked, value))
    for shard in path.glob("hidden/text/**/c/**/*"):
        if shard.is_file() and found in (data := shard.read_bytes()):
            shard.write_bytes(data.replace(found, put))
    message = refused("are not finite at layer 1 of 1 samples, e.g. s7", sweep, quick(path, tmp_path / "run"))
    assert "python -m store verify" in message
    assert weights_of(tmp_path / "run") == {}


@pytest.mark.parametrize("kind", ["truncated", "no index", "lost"])
def test_a_damaged_shard_is_refused_with_what_verifies_a_store(tmp_path, kind):
    path = Path(Planted().write(tmp_path / "store"))
    for shard in path.glob("hidden/text/**/c/**/*"):
        if shard.is_file():
            data = shard.read_bytes()
            shard.unlink()
            if kind != "lost":
                shard.write_bytes(data[: len(data) // 2] if kind == "truncated" else data[:-4] + bytes(4))
    message = refused("python -m store verify", sweep, quick(path, tmp_path / "run", parts=("layers",)))
    assert str(path) in message


def test_a_loss_that_is_not_finite_stops_the_run_by_probe_step_and_samples(planted, tmp_path, monkeypatch):
    loss = learn.Stack.train

    def diverging(self, views, step):
        found = loss(self, views, step).clone()
        if step == 7:
            found[1, 2] = torch.nan
        return found

    monkeypatch.setattr(learn.Stack, "train", diverging)
    config = quick(planted, tmp_path, parts=("layers",), checkpoint=0)
    message = refused("the loss of probe layer-0, seed 1, is not finite at step 7 for 1 of 16 samples", sweep, config)
    assert "--lr" in message
    assert weights_of(tmp_path) == {}
    # What was before is kept, and nothing of what came after.
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("checkpoint/[!.]*")] == ["7"]


def test_a_probe_whose_answers_are_not_finite_is_not_saved(planted, tmp_path):
    message = refused("is not finite", sweep, quick(planted, tmp_path, parts=("layers",), lr=1e38, warm_up=0))
    assert "give a lower --lr than 1e+38" in message
    assert weights_of(tmp_path) == {}


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_other_settings_is_refused_by_their_name(run):
    before = (run.out / "sweep.json").read_bytes()
    refused("settings steps = 4, and 5 is asked: give another --out", sweep, dataclasses.replace(run, steps=5))
    refused('settings target = "box"', sweep, dataclasses.replace(run, target="object_kind"))
    refused("has kind qformer, and linear is asked", sweep, dataclasses.replace(run, probe="linear"))
    assert (run.out / "sweep.json").read_bytes() == before


def test_a_folder_of_another_store_or_other_samples_is_refused(run, tmp_path):
    other = Planted(planted="0").write(tmp_path / "other")
    refused("holds probes of store identity_hash", sweep, dataclasses.replace(run, store=other))
    fewer = Planted(samples=range(90)).write(tmp_path / "fewer")
    refused("holds probes of store ", sweep, dataclasses.replace(run, store=fewer))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}'])
def test_a_folder_whose_record_is_damaged_is_refused(run, tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    refused("is damaged", sweep, dataclasses.replace(run, out=tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot be written", sweep, dataclasses.replace(run, out=tmp_path / "file" / "run"))


@pytest.mark.parametrize("on", ["fresh", "=store", "fresh=", "a/b=store", "held-out=store"])
def test_other_data_without_a_name_or_a_place_is_refused(run, on):
    refused(f"--on {on!r}: give NAME=STORE", evaluate, EvaluateConfig(run.out, on=(on,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ("embed", "0")}, "lacks layers 1 that probes of"),
        ({"width": 8}, "are 8 wide; the probes of"),
        ({"boxes": False}, "has no sample with states and an answer"),
        ({"samples": [1, 2, 4]}, "that the probes were not trained on"),
    ],
)
def test_other_data_that_the_probes_cannot_read_is_refused(run, tmp_path, changes, words):
    other = Planted(planted=None, **changes).write(tmp_path / "other")
    refused(words, evaluate, EvaluateConfig(run.out, on=(f"fresh={other}",)))
    assert not list(run.out.glob("data/fresh*"))


def test_damaged_weights_are_refused_by_their_file(run, tmp_path):
    out = shutil.copytree(run.out, tmp_path / "run")
    file = out / "proxies/layer-0-seed1/probe.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    message = refused("layer-0-seed1", evaluate, EvaluateConfig(out, on=(f"same={run.store}",)))
    assert "train it again" in message


def test_evaluate_of_a_folder_without_tables_is_refused(tmp_path):
    refused("lacks results.parquet", evaluate, EvaluateConfig(tmp_path))


def test_a_store_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refusal, match="nowhere"):
        sweep(quick(tmp_path / "nowhere", tmp_path / "run"))


# -- small and odd stores ----------------------------------------------------------------------------------------------


def test_a_sample_without_a_token_of_the_kind_is_left_out_and_counted(tmp_path, capsys):
    table = Planted().table()
    # A prompt of one token has a template token only.
    counts = [1 if i in (1, 2, 3) else n for i, n in enumerate(table["n_text"])]
    path = Planted(more={"n_text": counts}, spelled=()).write(tmp_path / "store")
    train(alone(path, tmp_path / "run", "1", tokens="instruction", steps=2))
    told = capsys.readouterr().out
    assert "62 train and 31 test samples" in told
    assert "3 samples are left out" in told
    assert 3 not in read_run(tmp_path / "run").predictions["sample"].to_list()


def test_two_train_and_two_test_samples_are_enough(tmp_path, capsys):
    split = ["train", "train", "test", "test"]
    path = Planted(n=4, more={"split": split}).write(tmp_path / "store")
    sweep(quick(path, tmp_path / "run", batch=2, steps=3))
    told = capsys.readouterr().out
    assert "2 train and 2 test samples (1 of them watched)" in told
    assert "probes are left out: their share of the 2 train samples is less than two" in told


@pytest.mark.parametrize("parts", [("control-task",), ("layers", "control-task")])
def test_a_control_task_without_a_type_that_was_seen_ends_without_its_rows(tmp_path, parts):
    texts = [f"remove thing{i}" for i in range(96)]
    path = Planted(more={"instruction": texts}).write(tmp_path / "store")
    sweep(quick(path, tmp_path / "run", parts=parts, layers=("0", "1"), steps=3))
    run = read_run(tmp_path / "run")
    assert not run.predictions["probe"].str.starts_with("control").any()


def test_a_class_that_is_only_in_the_test_split_counts_as_wrong(tmp_path):
    kinds = ["ring" if i % 3 == 0 and i < 20 else ("cube", "ball")[i % 2] for i in range(96)]
    path = Planted(more={"object_kind": kinds}).write(tmp_path / "store")
    sweep(quick(path, tmp_path / "run", parts=("layers", "permuted"), target="object_kind", layers=("1",)))
    told = read_run(tmp_path / "run").predictions.filter(probe="layer-1")
    assert told.filter(true="ring").height == 7 * 2
    assert told["nll"].is_finite().all()


def test_a_class_with_one_example_is_learned_with_the_others(tmp_path):
    kinds = ["ring" if i == 1 else ("cube", "ball")[i % 2] for i in range(96)]
    path = Planted(more={"object_kind": kinds}).write(tmp_path / "store")
    sweep(quick(path, tmp_path / "run", parts=("layers",), target="object_kind", layers=("1",), steps=3))
    assert set(read_run(tmp_path / "run").predictions["true"]) == {"cube", "ball"}


def test_the_split_does_not_depend_on_what_is_asked_where_every_sample_has_an_answer(planted, tmp_path):
    samples = []
    for target in ("box", "object_kind"):
        out = tmp_path / target
        sweep(quick(planted, out, parts=("layers",), target=target, layers=("1",), steps=1))
        samples.append(
            read_run(out).predictions.filter(probe="layer-1").select("sample", "watched").unique().sort("sample")
        )
    assert samples[0].equals(samples[1])


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_refusal_of_a_command_is_one_line_and_exit_code_2(planted, tmp_path):
    argv = ["-m", "probes", "sweep", "--store", planted, "--out", str(tmp_path / "run"), "--layers", "77"]
    done = subprocess.run(
        [sys.executable, *argv], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --layers names 77; the store holds embed, 0, 1, 2, final\n"


def test_evaluate_prints_one_json_object_after_it_asked_about_other_data(run, tmp_path, capsys):
    fresh = Planted(n=30, ids="new", planted=PLANTED, seed=3).write(tmp_path / "store")
    capsys.readouterr()
    evaluate(EvaluateConfig(run.out, on=(f"fresh={fresh}",), json=True))
    told = json.loads(capsys.readouterr().out)
    assert {row["data"] for row in told["probes"]} == {"held-out", "fresh"}
    assert len(told["probes"]) == 2 * (2 + 2)
    assert np.isfinite([row["iou"] for row in told["probes"]]).all()
    assert set(pl.read_parquet(run.out / "predictions.parquet")["data"]) == {"held-out", "fresh"}
    assert set(LAYERS) > {row["layer"] for row in told["probes"] if row["role"] == "layer"}
