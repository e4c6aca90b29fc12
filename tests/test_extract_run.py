"""Extraction end to end: from shards to a verified store, through kills, full disks, wrong inputs and bad rows."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
from commands import run_here

import store
from extract.capture import layer_names
from extract.config import PAPER, POCKET, PRESETS, choose_preset
from extract.model import load_model, load_processor
from extract.omniedit import decode
from extract.prompts import editing_template
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.sequence import Conditioner
from store.errors import Refusal

SAMPLES = 70  # two blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor, tiny_model):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=SAMPLES, seed=4, difficulty="medium"))
    return folder


@pytest.fixture(scope="module")
def config(checkpoint, scenes):
    return dataclasses.replace(
        PRESETS[POCKET], model=str(checkpoint), data=str(scenes), vlm_boxes=False, batch_size=16, held_out=0.5
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "whole.zarr"
    assert extract(dataclasses.replace(config, store=path)) == 0
    return path


def command(config, path, *more):
    given = ["--preset", "pocket", "--model", config.model, "--data", config.data, "--store", str(path)]
    return [sys.executable, "-m", "extract", *given, "--no-vlm-boxes", "--batch-size", "16", "--held-out", "0.5", *more]


def refused(config, path, *more):
    """Run the command, which must say one clear line, fail and change nothing; the line."""
    before = sorted(str(p) for p in path.parent.rglob("*"))
    done = run_here(*command(config, path, "--loaders", "0", *more)[2:])
    assert done.returncode != 0
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert "Traceback" not in done.stderr
    assert sorted(str(p) for p in path.parent.rglob("*")) == before
    return line


def test_a_store_on_an_object_store_has_the_content_of_one_on_disk(config, whole, s3):
    assert extract(dataclasses.replace(config, store=s3)) == 0
    found, expected = store.verify(s3), store.verify(whole)
    assert found.ok and found.content_hash == expected.content_hash and found.identity_hash == expected.identity_hash


def test_a_store_holds_what_the_stock_class_computes(config, whole):
    """Independent of the capture code: stock forward of one sample alone, with output_hidden_states."""
    model = load_model(Path(config.model), torch.device("cpu"))
    processor = load_processor(Path(config.model))
    opened = store.open(whole)
    rows = pl.concat([pl.read_parquet(p) for p in sorted(Path(config.data).glob("*.parquet"))])
    sources = dict(zip(rows["omni_edit_id"], rows["src_img"], strict=True))
    conditioner = Conditioner(processor, editing_template(), "mrope", model.config)
    for index in (0, 37):
        row = opened.samples.row(index, named=True)
        batch = conditioner.batch([(decode(sources[row["sample_id"]]["bytes"]), row["instruction"])])
        with torch.no_grad():
            stock = model(**batch.inputs, output_hidden_states=True).hidden_states
        for name, states in zip([n for n in layer_names(model) if n != layer_names(model)[-2]], stock, strict=True):
            for kind, mask in (("image", batch.image_mask), ("text", batch.text_mask)):
                kept, real = opened.read([index], name, kind, dtype="float32")
                expected = states[0][mask[0]].float()
                scale = expected.abs().max()
                # bfloat16, and a batch of sixteen against one: a few units in the last place.
                assert (kept[0, 0][real[0]] - expected).abs().max() <= 0.03 * scale, (index, name, kind)


def test_a_store_opens_with_stock_xarray_and_says_what_it_is(whole, config):
    opened = store.open(whole)
    hidden = xr.open_zarr(whole, group="hidden")
    assert hidden["text"].dims == ("sample", "layer", "token", "width")
    assert hidden["layer"].values.tolist()[0] == "embed"
    assert hidden["layer"].values.tolist()[-1] == "final"
    assert set(xr.open_datatree(whole).children) >= {"hidden", "attention"}
    identity = opened.identity
    assert identity["template"] == editing_template()
    assert set(identity["weights"]) == {"config.json", "model.safetensors"}
    assert {"torch", "transformers"} <= set(identity["libraries"])
    tokens = opened.tokens.filter(pl.col("sample") == 0).collect()
    text = "".join(tokens.filter(pl.col("kind") == "instruction")["text"])
    assert text == opened.samples["instruction"][0]
    assert tokens["text"][0] == "<|im_start|>"  # of the user's turn: the system prompt is dropped


def test_attention_rows_are_shares(whole):
    attention = store.open(whole).attention
    total = attention["text_to_image"].sum("token") + attention["text_to_text"].sum("token")
    values = total.values
    real = values[values > 0]
    # The rest of each row's mass lies on the dropped system prompt.
    assert real.size > 100
    assert (real <= 1.001).all()


def test_whole_picture_tasks_have_no_box_and_are_set_aside_by_reason(whole, scenes):
    opened = store.open(whole)
    rows = pl.read_parquet(scenes / "*.parquet")
    boxless = rows.filter(pl.col("box").is_null()).height
    assert opened.set_aside.group_by("reason").agg(pl.col("rows").sum()).rows() == [("no box", boxless)]
    assert opened.samples.height == SAMPLES - boxless
    assert set(opened.samples["split"]) == {"train", "test"}
    truth = dict(zip(rows["omni_edit_id"], rows["box"].to_list(), strict=True))
    for row in opened.samples.iter_rows(named=True):
        assert [row[name] for name in ("x1", "y1", "x2", "y2")] == truth[row["sample_id"]]


def test_a_run_that_is_killed_goes_on_and_gives_the_same_store(config, whole, tmp_path):
    path = tmp_path / "killed.zarr"
    process = subprocess.Popen(
        command(config, path, "--loaders", "0"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = path / "record" / "commits"
    deadline = time.time() + 120
    while not (log.exists() and any(f.stat().st_size for f in log.iterdir())) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.is_dir()
    assert extract(dataclasses.replace(config, store=path)) == 0
    assert store.verify(path).content_hash == store.verify(whole).content_hash


def test_running_again_changes_nothing(config, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and "commits" not in p.parts}
    assert extract(dataclasses.replace(config, store=whole)) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_boxes_of_the_model_stand_beside_the_true_ones(config, tmp_path):
    path = tmp_path / "boxes.zarr"
    assert extract(dataclasses.replace(config, store=path, vlm_boxes=True, max_new_tokens=4, limit=20)) == 0
    samples = store.open(path).samples
    assert {"vlm_x1", "vlm_y1", "vlm_x2", "vlm_y2"} <= set(samples.columns)
    # A random model answers with no box: what has one in the data keeps it, the rest is set aside with its reason.
    assert samples.filter("valid")["x1"].null_count() == 0
    reasons = set(samples.filter(~pl.col("valid"))["set_aside"])
    assert reasons <= {"the model gave no box"}


def test_prompt_states_alone_and_chosen_layers(config, tmp_path):
    path = tmp_path / "text.zarr"
    settings = {"tokens": "text", "layers": "embed,1,final", "attention": "heads", "limit": 20}
    assert extract(dataclasses.replace(config, store=path, **settings)) == 0
    opened = store.open(path)
    assert opened.layers == ("embed", "1", "final")
    assert set(opened.hidden.data_vars) == {"text"}
    assert opened.attention["text_to_image"].dims == ("sample", "layer", "head", "query", "token")
    with pytest.raises(Refusal, match="image"):
        opened.read([0], "1", "all")


def test_bad_rows_are_set_aside_by_reason_and_the_run_goes_on(config, scenes, tmp_path):
    rows = pl.read_parquet(scenes / "*.parquet").filter(pl.col("box").is_not_null()).head(12).to_dicts()
    rows[1]["src_img"]["bytes"] = rows[1]["src_img"]["bytes"][:700]
    rows[3]["edited_prompt_list"] = ["  "]
    rows[5]["edited_prompt_list"] = ["remove <|image_pad|> it"]
    rows[7]["src_img"]["bytes"] = b"not a picture"
    rows[9]["omni_edit_id"] = rows[8]["omni_edit_id"]
    rows[10]["edited_prompt_list"] = ["remove the ball " * 600]
    data = tmp_path / "data"
    data.mkdir()
    schema = pq.read_schema(next(iter(scenes.glob("*.parquet"))))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), data / "train-00000.parquet")
    path = tmp_path / "rest.zarr"
    assert extract(dataclasses.replace(config, data=str(data), store=path)) == 0
    opened = store.open(path)
    assert opened.samples.height == 6
    assert opened.set_aside["rows"].sum() == 6
    assert opened.set_aside["reason"].n_unique() == 6


def test_a_picture_that_decays_after_planning_is_set_aside_not_mixed_in(config, scenes, tmp_path, monkeypatch):
    import extract.run as run

    shutil.copytree(scenes, data := tmp_path / "data")
    (shard,) = data.glob("*.parquet")

    def plan_then_decay(*given):
        planned = real(*given)
        table = pq.read_table(shard)
        rows = table.to_pylist()
        for row in rows:
            if row["omni_edit_id"].endswith("_3"):
                row["src_img"]["bytes"] = row["src_img"]["bytes"][:-300]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
        return planned

    real = run.read_plan
    monkeypatch.setattr(run, "read_plan", plan_then_decay)
    path = tmp_path / "decay.zarr"
    assert extract(dataclasses.replace(config, data=str(data), store=path, limit=10)) == 0
    opened = store.open(path)
    row = opened.samples.with_row_index().filter(pl.col("sample_id").str.ends_with("_3")).row(0, named=True)
    assert not row["valid"] and opened.valid.sum() == 9
    assert row["set_aside"] == "the data changed since it was planned"
    assert np.isnan(opened.hidden["text"].isel(sample=row["index"], layer=0).values).all()


def test_unknown_model(config, tmp_path):
    line = refused(config, tmp_path / "s.zarr", "--model", "nobody/no-such-model")
    assert "nobody/no-such-model" in line


def test_a_url_is_refused_until_object_stores_come(config, tmp_path):
    with pytest.raises(Refusal, match="s3://bucket"):
        extract(dataclasses.replace(config, store="s3://bucket/s.zarr"))


def test_unreadable_data(config, tmp_path):
    assert "nowhere" in refused(config, tmp_path / "s.zarr", "--data", "/nowhere/at/all")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in refused(config, tmp_path / "s.zarr", "--data", str(empty))


def test_a_store_of_other_settings(config, whole):
    line = refused(config, whole, "--positions", "sequential")
    assert "positions" in line
    assert "mrope" in line
    assert store.verify(whole).ok


def test_no_room_for_the_plan_is_said_before_any_work(config, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refusal, match="estimated"):
        extract(dataclasses.replace(config, store=tmp_path / "s.zarr"))
    assert not list(tmp_path.iterdir())


def test_unknown_layers_and_devices(config, tmp_path):
    with pytest.raises(Refusal, match="'99'"):
        extract(dataclasses.replace(config, store=tmp_path / "s.zarr", layers="embed,99"))
    if not torch.cuda.is_available():
        with pytest.raises(Refusal, match="cuda"):
            extract(dataclasses.replace(config, store=tmp_path / "s.zarr", device="cuda"))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_the_sizes_and_writes_nothing(config, tmp_path):
    done = run_here(*command(config, tmp_path / "s.zarr", "--loaders", "0", "--dry-run")[2:])
    assert done.returncode == 0, done.stderr
    assert "hidden/image" in done.stdout
    assert not list(tmp_path.iterdir())


def test_presets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_preset([]) == (
        PRESETS[POCKET],
        "preset pocket: this machine has no CUDA device; PRESET=paper overrides",
    )
    assert choose_preset(["--preset", "paper"])[0] is PRESETS[PAPER]
    assert choose_preset(["--preset=paper"])[0] is PRESETS[PAPER]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert choose_preset(["--preset", "auto"])[0] is PRESETS[PAPER]
    assert PRESETS[PAPER].limit == 128_000


def test_verify_prints_json(whole):
    given = [sys.executable, "-m", "store", "verify", str(whole), "--json"]
    report = json.loads(subprocess.run(given, capture_output=True, text=True, check=True).stdout)
    assert report["ok"]
    assert report["problems"] == []
    assert len(report["content_hash"]) == 64
    assert (whole / "zarr.json").stat().st_size


def test_growing_adds_the_layers_and_samples_that_a_store_lacks(config, whole, tmp_path):
    path = tmp_path / "grown.zarr"
    part = dataclasses.replace(config, store=path, layers="embed,1", attention="none")
    assert extract(part) == 0
    before = {p: p.read_bytes() for p in path.glob("hidden/*/c/**/*") if p.is_file() and p.parts[-2] != "c"}
    assert before
    assert extract(dataclasses.replace(config, store=path, grow=True)) == 0
    report = store.verify(path)
    assert report.ok and report.content_hash == store.verify(whole).content_hash
    assert all(p.read_bytes() == data for p, data in before.items())

    other = tmp_path / "more.zarr"
    assert extract(dataclasses.replace(config, store=other, limit=30)) == 0
    assert extract(dataclasses.replace(config, store=other, limit=45, grow=True)) == 0
    opened = store.open(other)
    assert store.verify(other).ok and opened.valid.sum() == opened.plan.n_samples == 45
    assert opened.plan.generations == (30, 15)
    ids = store.open(whole).samples["sample_id"].to_list()
    (there,), (here,) = (
        of.read([places.index(ids[40])], "final", "text")[0] for of, places in ((store.open(whole), ids), (opened, ids))
    )
    torch.testing.assert_close(here.float(), there.float(), rtol=0.02, atol=0.02)
    with pytest.raises(Refusal, match=r"identity.positions"):
        extract(dataclasses.replace(config, store=other, grow=True, positions="sequential"))


def test_two_processes_fill_one_store_and_share_its_blocks(config, whole, tmp_path):
    path = tmp_path / "shared.zarr"
    commands = [command(config, path, "--worker", name, "--threads", "1", "--loaders", "0") for name in "ab"]
    workers = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    report = store.verify(path)
    assert report.ok and report.samples == store.verify(whole).samples
    lines = [len((path / f"record/commits/{name}.jsonl").read_bytes().splitlines()) for name in "ab"]
    assert sum(lines) == report.blocks
