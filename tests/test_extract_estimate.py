"""What is said before anything is written: sizes, files, time, and what to keep within a budget."""

import dataclasses
import re

import numpy as np
import polars as pl
import pytest
import torch

import store
from extract.config import ABOUT_PRESETS, PAPER, POCKET, PRESETS, ExtractConfig
from extract.estimate import UNITS, clock_time, files, parse_size, proposals
from extract.model import find_checkpoint
from extract.planning import Planner, wanted_layers
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes
from store.commandline import parse
from store.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=70, seed=31, difficulty="hard"))
    return folder


@pytest.fixture(scope="module")
def config(scenes):
    return dataclasses.replace(PRESETS[POCKET], data=str(scenes), limit=70, loaders=0, vlm_boxes=False, batch_size=16)


@pytest.fixture(scope="module")
def planner(config):
    return Planner(config, find_checkpoint(POCKET), CPU)


def samples_like(n, image, text, query, seed=0):
    """A samples table of drawn token counts."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {"sample_id": [str(i) for i in range(n)], "split": ["train"] * n}
        | {"n_image": rng.integers(*image, n), "n_text": rng.integers(*text, n), "n_query": rng.integers(*query, n)}
    )


def run(config, path, *more):
    """The command in this process: its exit code."""
    given = [
        "--data",
        config.data,
        "--store",
        str(path),
        "--limit",
        "70",
        "--batch-size",
        "16",
        "--loaders",
        "0",
        *more,
    ]
    return extract(parse(ExtractConfig, "extract", "", given, default=PRESETS[POCKET]))


def test_a_dry_run_says_samples_tokens_bytes_files_and_a_time_that_was_tried(config, tmp_path, capsys):
    assert run(config, tmp_path / "s.zarr", "--dry-run") == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert re.search(r"plan: 70 samples, \d+ image and \d+ prompt tokens", said)
    for name in ("hidden/image", "hidden/text", "attention/text_to_image", "attention/text_to_text", "total", "files"):
        assert name in said
    assert re.search(r"timed over 2 batches, seconds a sample: prepare [\d.]+, boxes and pass [\d.]+", said)
    assert re.search(r"time +about \d+ min \d+ s for one worker", said) and "limited by: " in said
    # What it foretells is what comes.
    path = tmp_path / "s.zarr"
    assert extract(dataclasses.replace(config, store=path)) == 0
    total = float(re.search(r"total +[\d.]+ GB raw, about +([\d.]+) GB", said)[1]) * 1e9
    sizes = store.disk_usage(path)
    assert 0.75 * total < sizes["total"]["disk"] < 1.1 * total
    foretold = int(re.search(r"files +([\d,]+)", said)[1].replace(",", ""))
    shards = [file for file in path.rglob("*") if file.is_file() and ("c" in file.parts or file.suffix == ".parquet")]
    shards = [file for file in shards if "samples" not in file.name and "set_aside" not in file.name]
    assert abs(len([file for file in shards if "coord" not in str(file)]) - foretold) <= 4


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.02])
def test_every_proposal_fits_and_says_what_it_leaves_out(planner, share):
    samples = samples_like(500, (36, 57), (15, 30), (4, 16))
    whole = sum(planner.plan_of(samples).bytes_estimate().values())
    found = proposals(planner, samples, int(whole * share))
    assert found
    for one in found:
        kept = samples.head(one.samples)
        size = sum(dataclasses.replace(planner, config=one.config).plan_of(kept).bytes_estimate().values())
        assert size <= whole * share * 1.05
        assert ("samples" in one.leaves_out) == (one.samples < 500)
        assert ("picture's tokens" in one.leaves_out) == (one.config.tokens == "text")
        assert ("attention" in one.leaves_out) == (one.config.attention == "none")
        assert ("layers" in one.leaves_out) == (one.config.layers != "all")
        assert ("exactness" in one.leaves_out) == (one.config.codec == "int8")
    # Those with all samples come first.
    whole_first = [one.samples == 500 for one in found]
    assert whole_first == sorted(whole_first, reverse=True)


def test_the_options_of_a_proposal_give_its_store(config, tmp_path, capsys):
    assert run(config, tmp_path / "s.zarr", "--budget", "14MB", "--no-vlm-boxes") == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    first = re.search(r"1\. (--.*)\n +([\d.]+) GB; leaves out: (.*)", said)
    assert first, said
    assert run(config, tmp_path / "s.zarr", *first[1].split(), "--no-vlm-boxes") == 0
    assert store.disk_usage(tmp_path / "s.zarr")["total"]["disk"] < 14.5e6


def test_what_is_asked_is_the_first_proposal_where_it_fits(planner):
    samples = samples_like(100, (36, 57), (15, 30), (4, 16))
    first = proposals(planner, samples, 10**12)[0]
    assert first.leaves_out == "nothing" and first.samples == 100 and first.config == planner.config


def test_the_paper_presets_default_fits_two_terabytes():
    """At the shapes of the 7B model and more tokens than OmniEdit's instructions have (20 on average)."""
    paper = PRESETS[PAPER]
    layers = wanted_layers(paper, 28)
    samples = samples_like(12_800, (1296, 1407), (21, 52), (12, 43))
    plan = store.Plan(
        layers=layers, width=3584, samples=samples, identity={}, kinds=(paper.tokens,), codec=paper.codec,
        attention=("text_to_image", "text_to_text"), attention_layers=layers[1:-1], text_codec=paper.text_codec,
    )  # fmt: skip
    assert paper.attention == "mean" and paper.keys == "all" and paper.tokens == "text" and paper.limit == 128_000
    assert 1e12 < 10 * sum(plan.bytes_estimate().values()) < 2e12


def test_the_help_says_that_it_fits():
    assert "fits a 2-TB disk" in " ".join(ABOUT_PRESETS.split())


@pytest.mark.parametrize(("text", "size"), [("2TB", 2 * 10**12), ("1.5 gb", 15 * 10**8), ("300MB", 3 * 10**8)])
def test_sizes_are_read_as_disks_are_sold(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["2", "TB", "-1GB", "0GB", "2 TiB", "nan GB", ""])
def test_a_size_that_is_none_is_refused_by_name(text):
    with pytest.raises(Refusal, match="--budget"):
        parse_size(text)
    assert set(UNITS) == {"MB", "GB", "TB", "PB"}


def test_times_are_said_as_people_do():
    assert clock_time(59.6) == "1 min 0 s"
    assert clock_time(3600 * 30 + 60 * 5 + 3) == "30 h 5 min"


def test_files_are_counted_by_shard(planner):
    plan = planner.plan_of(samples_like(130, (36, 57), (15, 30), (4, 16)))
    assert files(plan) == 3 * 4 + 3 * 2
