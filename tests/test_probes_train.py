"""A whole run on a small real store in whose middle the box is planted: what is learned, kept, resumed and refused."""

import dataclasses
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch

import probes
import store
from probes.config import EvaluateConfig, ProbeConfig
from probes.data import scenes
from probes.evaluate import evaluate, final_table, read_run, verdict
from probes.specs import Spec, middle_third, specs
from probes.train import stacks, train
from store.bits import from_float32

LAYERS = ("embed", "0", "1", "2", "final")
PLANTED = "1"
SMALL = dict(width=16, heads=2, depth=2, queries=4, lr=5e-3, batch=32, steps=160, warm_up=20, l1_steps=20, watch=64)


def planted_store(folder, n=480, boxes=True):
    """A store whose instruction tokens spell the box, linearly and under noise, at layer 1 and nowhere else."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.15, 0.4, (n, 2))
    centre = size / 2 + rng.uniform(0, 1, (n, 2)) * (1 - size)
    unit = np.concatenate([centre - size / 2, centre + size / 2], 1)
    columns = {
        "sample_id": [f"s{i}" for i in range(n)],
        "width": [200] * n,
        "height": [100] * n,
        "n_image": rng.integers(3, 6, n),
        "n_text": rng.integers(3, 7, n),
        "split": ["test" if i % 3 == 0 else "train" for i in range(n)],
    }
    for i, name in enumerate(("x1", "y1", "x2", "y2")):
        columns[name] = unit[:, i] * (200 if i % 2 == 0 else 100) if boxes else [None] * n
    samples = pl.DataFrame(columns, schema_overrides=dict.fromkeys(("x1", "y1", "x2", "y2"), pl.Float64))
    plan = store.Plan(LAYERS, 16, samples, {"planted": PLANTED})
    store.create(folder, plan)
    spelled = rng.normal(size=(4, 16))
    with store.Writer(folder) as writer:
        for b in range(plan.n_blocks):
            with writer.block(b) as block:
                for s in plan.block(b):
                    counts = [int(samples[name][s]) for name in ("n_image", "n_text")]
                    image, text = (rng.normal(size=(len(LAYERS), k, 16)).astype(np.float32) for k in counts)
                    text[LAYERS.index(PLANTED), 1:] += ((unit[s] - 0.5) * 6 @ spelled).astype(np.float32)
                    kinds = ["image"] * counts[0] + ["template"] + ["instruction"] * (counts[1] - 1)
                    tokens = pl.DataFrame({"position": range(sum(counts)), "kind": kinds})
                    block.add(s, image=from_float32(image), text=from_float32(text), tokens=tokens)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("planted") / "store")


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    """Settings of a run that has been trained to its end."""
    config = ProbeConfig(str(planted), tmp_path_factory.mktemp("runs") / "probes", **SMALL)
    train(config)
    return config


def ious(out):
    return {row["probe"]: row for row in final_table(*read_run(out)).to_dicts()}


def test_the_planted_box_is_found_where_it_was_planted_and_nowhere_else(run):
    found = ious(run.out)
    floors = max(row["iou"] for row in found.values() if row["role"] == "floor")
    assert found["layer-1"]["iou_low"] > floors + 0.1
    assert found["mid-prompt"]["iou_low"] > floors + 0.1
    for name in ("layer-embed", "layer-0", "layer-2", "layer-final"):
        assert found[name]["iou"] < floors + 0.05


def test_permuted_labels_teach_nothing_even_at_the_planted_layer(run):
    found = ious(run.out)
    assert found["floor-permuted"]["layer"] == PLANTED
    assert found["floor-permuted"]["iou"] < found["layer-1"]["iou_low"]


def test_the_verdict_names_the_planted_layer_on_images_that_did_not_choose_it(run):
    answer = verdict(*read_run(run.out))
    assert (answer["answer"], answer["chosen"], answer["n"]) == (True, "layer-1", 160 - 64)
    assert answer["sentence"].startswith("Yes")
    assert {"layer-2", "layer-final", "floor-mean-box"} <= {entry["opponent"] for entry in answer["differences"]}


def test_the_verdict_says_no_when_the_mid_layer_is_no_better(run):
    results, predictions = read_run(run.out)
    alike = predictions.filter(pl.col("probe") == "layer-0").with_columns(probe=pl.lit("layer-1"))
    answer = verdict(results, pl.concat([predictions.filter(pl.col("probe") != "layer-1"), alike]))
    assert answer["answer"] is False
    assert "does not clearly beat" in answer["sentence"]


def test_results_are_tidy_and_intervals_hold_their_means(run):
    results, predictions = read_run(run.out)
    assert results.columns[-4:] == ["value", "low", "high", "n"]
    assert results.filter((pl.col("low") > pl.col("value")) | (pl.col("high") < pl.col("value"))).is_empty()
    steps = results.filter((pl.col("probe") == "layer-1") & (pl.col("metric") == "error"))["step"].to_list()
    assert steps == [0, 50, 100, 150, 160]
    assert predictions.group_by("probe").len()["len"].unique().to_list() == [160]
    making = json.loads((run.out / "probes.json").read_text())
    assert making["store"]["identity"] == {"planted": PLANTED}
    assert making["settings"]["steps"] == SMALL["steps"]


def test_a_loaded_proxy_answers_as_it_did_in_training(run, planted):
    proxy = probes.load(run.out / "proxies" / "mid-prompt-seed0")
    told = read_run(run.out)[1].filter(pl.col("probe") == "mid-prompt").head(9)
    states, mask = store.open(planted).read(told["sample"].to_numpy(), list(proxy.spec.layers), proxy.spec.tokens)
    boxes, attention = proxy.predict_states(states, mask, attention=True)
    np.testing.assert_allclose(boxes.numpy(), told.select("x1", "y1", "x2", "y2").to_numpy(), atol=1e-5)
    torch.testing.assert_close(attention.sum((-1, -2)), torch.ones(attention.shape[:-2]))
    with pytest.raises(store.Refusal, match="1 layers 1"):
        proxy.predict_states(states.repeat(1, 2, 1, 1), mask)


def test_a_rerun_trains_only_what_is_missing_and_gets_the_same(run, tmp_path):
    out = tmp_path / "probes"
    shutil.copytree(run.out, out)
    before = read_run(out)[1]
    shutil.rmtree(out / "proxies" / "layer-0-seed0")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("proxies/*/proxy.safetensors")}
    train(dataclasses.replace(run, out=out))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    after = read_run(out)[1]
    assert after["probe"].to_list() == before["probe"].to_list()
    again = after["probe"].to_numpy() == "layer-0"
    np.testing.assert_array_equal(after["iou"].to_numpy()[~again], before["iou"].to_numpy()[~again])
    # Alone now, not in a stack: the same proxy up to rounding, which Adam amplifies.
    assert abs(after["iou"].to_numpy()[again].mean() - before["iou"].to_numpy()[again].mean()) < 0.02


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    monkeypatch.setattr("probes.train.train_stack", None)
    train(run)


def test_states_that_do_not_fit_in_memory_are_read_in_groups_or_batch_by_batch(planted, tmp_path):
    opened = store.open(planted)
    found = scenes(opened, 64)
    short = SMALL | {"steps": 6, "layers": ("0", "1", "final"), "prompt_layers": ("1", "2")}
    two_layers = 2.5 * 480 * (5 + 6) * 16 * 2 / 1e9
    answers = []
    for memory, groups in ((1.0, 2), (two_layers, 3), (1e-9, 2)):
        config = ProbeConfig(str(planted), tmp_path / str(memory), memory=memory, **short)
        assert len(list(stacks(specs(config, opened.layers), config, opened, found))) == groups
        train(config)
        answers.append(read_run(config.out)[1]["iou"].to_numpy())
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-3)


def test_a_store_without_boxes_is_refused(tmp_path):
    empty = planted_store(tmp_path / "store", n=8, boxes=False)
    with pytest.raises(store.Refusal, match="no sample with a true box"):
        train(ProbeConfig(str(empty), tmp_path / "probes", **SMALL))
    assert not (tmp_path / "probes").exists()


def test_a_folder_of_other_settings_is_refused_by_their_name(run):
    with pytest.raises(store.Refusal, match="settings steps = 160, and 161 is asked"):
        train(dataclasses.replace(run, steps=161))


def test_a_layer_that_the_store_does_not_hold_is_refused(run):
    with pytest.raises(store.Refusal, match=r"--layers names 77; the store holds embed, 0, 1, 2, final"):
        train(dataclasses.replace(run, layers=("77",)))


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(store.Refusal, match="not a multiple"):
        ProbeConfig("unused", width=30, heads=4)


def test_the_presets_are_complete_and_the_paper_one_is_the_papers():
    paper = ProbeConfig("unused", preset="paper")
    assert (paper.width, paper.heads, paper.depth, paper.queries, paper.lr) == (512, 8, 6, 16, 1e-4)
    assert (paper.batch, paper.steps, paper.warm_up, paper.l1_steps) == (64, 2000, 100, 100)
    assert None not in ProbeConfig("unused").settings.values()
    assert ProbeConfig("unused", preset="paper", steps=7).steps == 7


def test_a_run_of_blocks_is_told_from_a_choice_of_layers():
    labels = [
        Spec("any", "prompt", layers, "text").layer for layers in (("3",), ("4", "5", "6"), ("2", "9"), ("embed", "0"))
    ]
    assert labels == ["3", "4–6", "2,9", "embed,0"]


def test_the_middle_third_counts_blocks_only():
    assert middle_third(("embed", *map(str, range(12)), "final")) == ("4", "5", "6", "7")
    assert middle_third(LAYERS) == ("1",)


def test_evaluate_prints_a_row_per_proxy_and_the_verdict(run, capsys):
    evaluate(EvaluateConfig(run.out))
    text = capsys.readouterr().out
    assert text.count(" 160 ") == 11
    assert "Does the best mid layer beat the last layer" in text
    evaluate(EvaluateConfig(run.out, json=True))
    told = json.loads(capsys.readouterr().out)
    assert len(told["probes"]) == 11
    assert told["verdict"]["answer"] is True


def test_evaluate_before_training_is_refused(tmp_path):
    with pytest.raises(store.Refusal, match="run `python -m probes train"):
        evaluate(EvaluateConfig(tmp_path))
