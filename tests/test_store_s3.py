"""A store on an object store, end to end: the same commit protocol, the same content, the same commands."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import xarray as xr
import zarr
from commands import run_here
from obstore.store import from_url
from s3 import uploads
from zarr.storage import ObjectStore

import store
from store.places import locate
from store.repair import repair
from store.synthetic import fill_store, synthetic_plan, synthetic_store

ROOT = Path(__file__).parents[1]
PLAN = {"seed": 8, "samples_per_block": 4, "attention": ("text_to_image",), "attention_layers": ("0",)}


def plan_of(n_samples=14, **changes):
    return synthetic_plan(n_samples, **PLAN | changes)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same store on a disk."""
    return synthetic_store(tmp_path_factory.mktemp("local") / "store", plan_of())


def files(path):
    """Every file and its bytes."""
    place = locate(path)
    with ThreadPoolExecutor(8) as pool:
        names = place.names()
        return dict(zip(names, pool.map(place.read, names), strict=True))


def by_stock(url):
    """A store at a URL as the ecosystem opens it, with nothing of ours."""
    options = {"client_options": {"allow_http": True}} if url.startswith("s3://") else {}
    return ObjectStore(from_url(url, **options), read_only=True)


def test_a_store_on_s3_has_the_bytes_of_the_one_on_disk(local, s3, s3_endpoint):
    synthetic_store(s3, plan_of())
    here, there = files(local), files(s3)
    assert sorted(here) == sorted(there)
    assert [name for name in here if here[name] != there[name]] == []
    assert store.verify(s3).as_dict() == store.verify(local).as_dict() and store.verify(s3).ok
    assert uploads(s3_endpoint, s3.split("/")[2]) == 0


def test_what_is_read_from_s3_is_what_is_read_from_disk(local, s3):
    synthetic_store(s3, plan_of())
    here, there = store.open(local), store.open(s3)
    assert here.samples.equals(there.samples) and here.tokens.collect().equals(there.tokens.collect())
    for first, second in ((here.hidden, there.hidden), (here.attention, there.attention)):
        xr.testing.assert_identical(first.compute(), second.compute())
    chosen = {"layers": ["final", "0"], "batch_size": 5, "shuffle": True, "seed": 3, "epochs": 2}
    for layout in ("padded", "ragged"):
        for one, other in zip(
            here.batches(**chosen, layout=layout), there.batches(**chosen, layout=layout), strict=True
        ):
            assert torch.equal(one.sample, other.sample)
            values = (one.states, other.states) if layout == "padded" else (one.values, other.values)
            assert torch.equal(*(tensor.view(torch.int16) for tensor in values))


def test_stock_zarr_and_xarray_read_a_store_on_s3(local, s3):
    synthetic_store(s3, plan_of())
    with xr.open_datatree(by_stock(s3), engine="zarr") as there, xr.open_datatree(local, engine="zarr") as here:
        xr.testing.assert_identical(here.compute(), there.compute())
    group = zarr.open_group(by_stock(s3), mode="r")
    np.testing.assert_array_equal(group["hidden/text"][:], zarr.open_group(local, mode="r")["hidden/text"][:])


@pytest.mark.slow
def test_worker_processes_read_from_s3(s3):
    opened = store.open(synthetic_store(s3, plan_of()))

    def samples(**loader):
        batches = opened.batches("0", "text", batch_size=3, shuffle=True, seed=1)
        loaded = torch.utils.data.DataLoader(batches, batch_size=None, **loader) if loader else batches
        return [(batch.sample.tolist(), batch.states.float().sum().item()) for batch in loaded]

    assert samples(num_workers=2, multiprocessing_context="spawn") == samples()


def test_a_store_grows_is_added_to_and_cut_on_s3_as_on_disk(tmp_path, s3):
    larger = plan_of(21, layers=("embed", "0", "1", "final"))
    found = []
    for path in (tmp_path / "store", s3):
        synthetic_store(path, plan_of())
        n = store.load_plan(path).n_samples
        with store.derive(path, "mass", ("sample", "head"), (n, 2)) as out:
            out.write(np.arange(2 * n).reshape(n, 2))
        store.grow(path, larger)
        for part in range(len(store.load_parts(path))):
            fill_store(path, part=part)
        report = store.verify(path)
        assert report.ok, report.problems
        mass = store.open(path).derived["mass"].values
        store.drop(path, "attention/text_to_image")
        store.drop(path, "derived/mass")
        cut = store.verify(path)
        assert cut.ok, cut.problems
        found.append((report.content_hash, cut.content_hash, mass.tobytes(), files(path)))
    at_once = synthetic_store(tmp_path / "at-once", larger)
    assert found[0][:3] == found[1][:3]
    assert found[0][0] != found[0][1]
    assert sorted(found[0][3]) == sorted(found[1][3])
    assert store.verify(at_once).planned == 21


def test_a_store_is_copied_to_s3_and_back(local, tmp_path, s3):
    store.copy(local, s3, samples=[0, 3, 9], layers=["final"], codec="planes")
    store.copy(s3, tmp_path / "back", codec="zstd")
    first, second = store.verify(s3), store.verify(tmp_path / "back")
    assert first.ok and second.ok and first.content_hash == second.content_hash
    (original, _), (copied, _) = store.open(local).read([3], "final"), store.open(tmp_path / "back").read([1], "final")
    assert torch.equal(copied.view(torch.int16), original.view(torch.int16))


WRITER = """
import sys, time
import store
from store.synthetic import synthetic_sample
path, worker, first, step, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
try:
    with store.Writer(path, worker) as writer:
        print("begun", flush=True)
        for b in [b for b in store.pending(path) if b % step == first]:
            with writer.block(b) as block:
                for sample in block.samples:
                    block.add(sample, **synthetic_sample(writer.plan, sample))
                    time.sleep(pause)
except store.Refusal as refusal:
    sys.exit(f"error: {refusal}")
"""


def writer(path, worker="0", first=0, step=1, pause=0.0):
    """A writer process that does every ``step``-th block from ``first`` on."""
    command = [sys.executable, "-c", WRITER, path, worker, str(first), str(step), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begun(process):
    """Wait until a writer has its log."""
    assert process.stdout.readline() == "begun\n", process.communicate()[1]
    return process


def check_whole_samples(path, local):
    """Of a store in the making, every sample that is said to be there is there, to the last bit."""
    opened, whole = store.open(path), store.open(local)
    there = np.flatnonzero(opened.valid)
    for layer in opened.layers if there.size else ():
        (found, real), (expected, _) = (one.read(there, layer) for one in (opened, whole))
        assert real.any() and torch.equal(found.view(torch.int16), expected.view(torch.int16))
    absent = np.flatnonzero(~opened.valid)
    assert np.isnan(opened.hidden.text.values[absent]).all()
    assert opened.tokens.filter(pl.col("sample").is_in(absent)).collect().is_empty()
    return there.size


def test_killed_at_any_moment_a_store_on_s3_resumes_to_the_same_content(local, s3):
    store.create(s3, plan_of())
    rng, seen = np.random.default_rng(0), []
    for _ in range(4):
        victim = begun(writer(s3, pause=0.02))
        time.sleep(rng.uniform(0, 0.35))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        seen.append(check_whole_samples(s3, local))
    assert seen == sorted(seen)
    last = writer(s3)
    assert last.communicate() and last.returncode == 0
    assert store.verify(s3).content_hash == store.verify(local).content_hash
    assert [name for name in locate(s3)._list(None) if "partial" in name] == []


def test_two_writers_fill_one_store_on_s3(local, s3):
    store.create(s3, plan_of())
    both = [writer(s3, str(n), n, 2, 0.01) for n in range(2)]
    while any(one.poll() is None for one in both):
        check_whole_samples(s3, local)
    assert [one.communicate()[1] for one in both] == ["", ""]
    assert store.verify(s3).ok and store.verify(s3).content_hash == store.verify(local).content_hash


def test_of_two_writers_of_one_name_one_is_refused_and_nothing_is_lost(local, s3):
    store.create(s3, plan_of())
    both = [writer(s3, "same", first, 2, 0.1) for first in range(2)]
    said = sorted(one.communicate()[1] for one in both)
    assert said[0] == "" and "a writer named 'same' is at work" in said[1]
    assert check_whole_samples(s3, local)
    fill_store(s3)
    report = store.verify(s3)
    assert report.ok and report.content_hash == store.verify(local).content_hash


@pytest.mark.parametrize(
    "name", ["hidden/image/c/1/0/0/0", "record/tokens/00002.parquet", "record/plan.json", "zarr.json"]
)
@pytest.mark.parametrize("gone", [False, True])
def test_damage_on_s3_is_found_named_and_mended(local, s3, name, gone):
    synthetic_store(s3, plan_of())
    place = locate(s3)
    data = bytearray(place.read(name))
    data[len(data) // 3] ^= 4
    if gone:
        place.remove(name)
    else:
        place.write_whole(name, [bytes(data)])
    report = store.verify(s3)
    assert not report.ok and name in "\n".join(report.problems)
    repair(s3)
    assert len(store.pending(s3)) == ("hidden" in name or "tokens" in name)
    fill_store(s3)
    report = store.verify(s3)
    assert report.ok and report.content_hash == store.verify(local).content_hash


def test_the_commands_take_urls(local, s3, tmp_path):
    synthetic_store(s3, plan_of())

    def run(*arguments):
        done = run_here("store", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    content = store.verify(local).content_hash
    assert content in run("verify", s3)
    assert "4 of 4 blocks are whole" in run("repair", s3)
    assert "made-8-00002" in run("inspect", s3, "--sample", "2")
    assert "hidden/text" in run("du", s3, "--by-layer")
    run("copy", s3, str(tmp_path / "copied"))
    assert content in run("verify", str(tmp_path / "copied"))
