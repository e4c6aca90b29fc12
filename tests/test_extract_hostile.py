"""A data set damaged in every way we know goes through the real command: every row is kept and right, or set aside."""

import secrets
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import run_here
from hostile import Hostile, Row, write_shards
from hostile_shards import write_odd_shards
from PIL import Image

import store
from extract.capture import layer_names
from extract.config import POCKET, PRESETS
from extract.model import load_model, load_processor
from extract.omniedit import decode
from extract.pocket.build import WEIGHTS
from extract.prompts import editing_template
from extract.run import extract
from extract.sequence import Conditioner

# Pillow says on the way what it finds odd in EXIF.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@dataclass(frozen=True)
class Run:
    """An extraction of hostile data: what the data are, and the store that came out."""

    seed: int
    data: Path
    rows: list[Row]
    path: Path

    @property
    def kept(self) -> dict[str, Row]:
        return {row.sample_id: row for row in self.rows if row.reason is None}


def extract_here(data, path):
    """What the command of `run_of` does, without a new process."""
    config = replace(PRESETS[POCKET], data=str(data), store=str(path), vlm_boxes=False, batch_size=16)
    assert extract(config) == 0


def run_of(folder, count):
    seed = secrets.randbits(32)
    print(f"hostile seed {seed}")
    hostile = Hostile(np.random.default_rng(seed))
    rows = write_shards(folder / "data", hostile.rows(count), shards=max(2, count // 70))
    rows += write_odd_shards(folder / "data", hostile)
    given = ["--preset", "pocket", "--data", folder / "data", "--store", folder / "store.zarr"]
    given += ["--no-vlm-boxes", "--batch-size", "16"]
    done = run_here("extract", *given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Run(seed, folder / "data", rows, folder / "store.zarr")


@pytest.fixture(
    scope="module", params=[200, pytest.param(1000, marks=pytest.mark.slow)], ids=["few rows", "a thousand rows"]
)
def run(request, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("hostile"), request.param)


def test_every_row_is_kept_or_set_aside_for_the_reason_it_gives(run):
    opened = store.open(run.path)
    found = {(row["file"], row["row"]): row for row in opened.set_aside.iter_rows(named=True)}
    assert len(found) == opened.set_aside.height, "a row was set aside twice"
    expected = {(row.shard, row.number): row for row in run.rows if row.reason is not None}
    reasons = {place: row.reason for place, row in expected.items()}
    assert {place: row["reason"] for place, row in found.items()} == reasons
    assert {place: row["sample_id"] for place, row in found.items()} == {
        place: row.sample_id for place, row in expected.items()
    }
    assert opened.samples["sample_id"].to_list() == [row.sample_id for row in in_reading_order(run.rows)]
    assert opened.valid.all()
    assert opened.samples.height + opened.set_aside["rows"].sum() == len(run.rows)


def in_reading_order(rows):
    return sorted((row for row in rows if row.reason is None), key=lambda row: (row.shard, row.number))


def test_every_picture_that_was_kept_is_the_one_that_was_meant(run):
    samples = store.open(run.path).samples
    sizes = dict(zip(samples["sample_id"], samples.select("width", "height").rows(), strict=True))
    for sample_id, row in run.kept.items():
        cell = row.cells["src_img"]
        decoded = np.asarray(decode(cell if isinstance(cell, bytes) else cell["bytes"]))
        assert decoded.shape == row.truth.shape, (run.seed, row.kind)
        assert sizes[sample_id] == decoded.shape[1::-1], (run.seed, row.kind)
        off = np.abs(decoded.astype(int) - row.truth).mean()
        assert off <= row.tolerance, (run.seed, row.kind, off)


def test_the_instructions_tokens_spell_it(run):
    opened = store.open(run.path)
    tokenizer = load_processor(WEIGHTS).tokenizer
    tokens = opened.tokens.filter(kind="instruction").collect()
    spelt = dict(tokens.group_by("sample").agg("token_id").iter_rows())
    for index, row in enumerate(opened.samples.iter_rows(named=True)):
        said = run.kept[row["sample_id"]].instruction
        assert row["instruction"] == said
        # Qwen's tokenizers compose characters before they look at them.
        assert tokenizer.decode(spelt[index]) == unicodedata.normalize("NFC", said), (run.seed, said)


def test_states_are_those_of_the_sample_alone(run):
    """Stock class, one sample, the truth instead of what was decoded."""
    model = load_model(WEIGHTS, torch.device("cpu"))
    conditioner = Conditioner(load_processor(WEIGHTS), editing_template(), "mrope", model.config)
    opened = store.open(run.path)
    exact = [index for index, name in enumerate(opened.samples["sample_id"]) if run.kept[name].tolerance == 0]
    names = layer_names(model)
    for index in np.random.default_rng(run.seed).choice(exact, 12, replace=False).tolist():
        row = run.kept[opened.samples["sample_id"][index]]
        batch = conditioner.batch([(Image.fromarray(row.truth), row.instruction)])
        with torch.no_grad():
            stock = model(**batch.inputs, output_hidden_states=True).hidden_states
        for name, states in zip([n for n in names if n != names[-2]], stock, strict=True):
            for kind, mask in (("image", batch.image_mask), ("text", batch.text_mask)):
                kept, real = opened.read([index], name, kind, dtype="float32")
                expected = states[0][mask[0]].float()
                # bfloat16, and a batch of sixteen against one: a few units in the last place.
                off = (kept[0, 0][real[0]] - expected).abs().max()
                assert off <= 0.03 * expected.abs().max(), (run.seed, row.kind, name, kind)


def test_the_store_is_whole_and_a_second_run_changes_nothing(run):
    report = store.verify(run.path)
    assert report.ok, report.problems
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and "commits" not in p.parts}
    extract_here(run.data, run.path)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert store.verify(run.path).content_hash == report.content_hash


def test_another_order_and_number_of_shards_changes_no_verdict(run, tmp_path):
    rows = [row for row in run.rows if "odd" not in row.shard]
    twice = {name for name, times in Counter(row.sample_id for row in rows).items() if times > 1}
    order = np.random.default_rng(run.seed).permutation(len(rows))
    again = write_shards(tmp_path / "data", [rows[number] for number in order], shards=3, group_size=40)
    extract_here(tmp_path / "data", tmp_path / "store.zarr")

    def verdicts(opened, places):
        kept = [(name, None) for name in opened.samples["sample_id"]]
        aside = opened.set_aside.filter(pl.col("file").is_in(places)).select("sample_id", "reason").rows()
        return Counter(one for one in kept + aside if one[0] not in twice)

    first = verdicts(store.open(run.path), sorted({row.shard for row in rows}))
    odd = {row.sample_id for row in run.rows if "odd" in row.shard}
    second = verdicts(store.open(tmp_path / "store.zarr"), sorted({row.shard for row in again}))
    assert Counter({one: times for one, times in first.items() if one[0] is None or one[0] not in odd}) == second
