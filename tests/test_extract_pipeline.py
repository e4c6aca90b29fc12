"""The pipeline: what one stage does to the others, what is checked while it runs, what it says of itself."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import store
from extract.config import POCKET, PRESETS
from extract.loading import CHANGED, MOVED, planned_of, prepare, rows_at
from extract.moving import Mover
from extract.pipeline import Clock, batches_of
from extract.rows import Place, SetAside, Shards
from extract.run import begin, extract, fill, lay_out, make_extractor
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.workers import Rank
from extract.writing import Elsewhere, Here
from store.errors import Refusal


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=80, seed=11, difficulty="hard"))
    return folder


@pytest.fixture(scope="module")
def config(scenes, tmp_path_factory):
    return dataclasses.replace(
        PRESETS[POCKET], data=str(scenes), store=tmp_path_factory.mktemp("store") / "s.zarr", vlm_boxes=False, limit=70,
        batch_size=16, held_out=0.5, loaders=0,
    )  # fmt: skip


@pytest.fixture
def made(config, tmp_path):
    """What it takes to fill a store that is laid out and empty: extractor and loaders."""
    asked = dataclasses.replace(config, store=tmp_path / "s.zarr")
    planner, loaders = begin(asked, Rank())
    with loaders:
        lay_out(planner, loaders)
        yield make_extractor(planner, store.load_plan(asked.store), Clock()), loaders


def nothing(*_):
    """For callers that want no word."""


def test_batches_are_the_blocks_samples_by_length(made):
    plan = made[0].plan
    assert plan.n_blocks == 2
    for b in range(plan.n_blocks):
        batches = batches_of(plan, b, 16)
        assert sorted(n for batch in batches for n in batch) == list(plan.block(b))
        lengths = [(plan.samples["n_image"] + plan.samples["n_text"])[n] for batch in batches for n in batch]
        assert lengths == sorted(lengths)
        assert all(len(batch) == 16 for batch in batches[:-1])


def test_loader_processes_and_a_thread_prepare_the_same(made):
    extractor, thread = made
    plan = extractor.plan
    places = [Place(*row) for row in plan.samples.select("file", "row").iter_rows()][:5]
    rows = rows_at(Shards(extractor.config.data), places)
    given = prepare, planned_of(plan.samples)[:5], rows, ("edit",)
    planner, processes = begin(dataclasses.replace(extractor.config, loaders=2), Rank())
    with processes:
        (here, _), (there, _) = (one.result(one.submit(*given)) for one in (thread, processes))
    assert planner.kit().dtype == torch.bfloat16
    for one, other in zip(here, there, strict=True):
        one, other = one["edit"], other["edit"]
        assert one.pixels["pixel_values"].dtype == torch.bfloat16
        assert one.tokens.equals(other.tokens)
        for name in ("ids", "positions", "image", "text", "query"):
            assert getattr(one, name).equal(getattr(other, name))
        assert all(values.equal(other.pixels[name]) for name, values in one.pixels.items())


def test_pixels_in_the_models_dtype_give_the_same_states_bit_for_bit(made):
    extractor, loaders = made
    plan = extractor.plan
    rows = rows_at(Shards(extractor.config.data), [Place(*plan.samples.select("file", "row").row(0))])
    (found, _) = loaders.result(loaders.submit(prepare, planned_of(plan.samples)[:1], rows, ("edit",)))
    light = found[0]["edit"]
    sample = PlainSample(rows[0][1], plan.samples["instruction"][0])
    full = extractor.conditioner.prepare(sample.picture, sample.instruction)
    assert full.pixels["pixel_values"].dtype == torch.float32
    assert extractor.run([light])[0].hidden.equal(extractor.run([full])[0].hidden)


class PlainSample:
    """A row's picture and instruction, without the code under test."""

    def __init__(self, row, instruction):
        import io

        from PIL import Image

        self.picture = Image.open(io.BytesIO(row["src_img"]["bytes"])).convert("RGB")
        self.instruction = instruction


def test_data_that_changed_since_planning_are_set_aside_by_reason(made, tmp_path):
    extractor, loaders = made
    plan = extractor.plan
    places = [Place(*row) for row in plan.samples.select("file", "row").iter_rows()][:4]
    rows = rows_at(Shards(extractor.config.data), places)
    planned = planned_of(plan.samples)[:4]
    other = rows[2][1]["src_img"]["bytes"]
    given = [
        rows[0],
        (rows[1][0], rows[1][1] | {"src_img": {"bytes": other}}),
        (rows[2][0], rows[3][1]),
        SetAside(None, rows[3][0], "shard cannot be read", "it is gone"),
    ]
    found, _ = loaders.result(loaders.submit(prepare, planned, given, ("edit",)))
    assert set(found[0]) == {"edit"}
    assert found[1].startswith((CHANGED, "width/height disagree"))
    assert found[2] == MOVED
    assert found[3] == "shard cannot be read (it is gone)"


def test_a_resumed_run_does_not_read_the_data_again_to_plan(config, tmp_path, monkeypatch):
    import extract.run as run

    asked = dataclasses.replace(config, store=tmp_path / "s.zarr", limit=20)
    assert extract(asked) == 0
    before = store.verify(asked.store)
    monkeypatch.setattr(run, "read_plan", lambda *_: 1 / 0)
    assert extract(asked) == 0
    assert store.verify(asked.store) == before
    with pytest.raises(ZeroDivisionError):  # other samples are asked for
        extract(dataclasses.replace(asked, limit=21))


@pytest.mark.parametrize("when", ["read", "prepare", "pass", "hand over"])
def test_an_error_in_any_stage_ends_the_run_with_it_and_leaves_no_half_block(made, monkeypatch, when):
    extractor, loaders = made

    def fail(*_, **__):
        raise MemoryError(f"in {when}")

    if when == "read":
        monkeypatch.setattr(Shards, "rows", fail)
    elif when == "prepare":
        monkeypatch.setattr("extract.loading._prepared", fail)
    elif when == "pass":
        monkeypatch.setattr("extract.pipeline.single_pass", fail)
    else:
        monkeypatch.setattr("extract.writing.kept_arrays", fail)
    with pytest.raises(MemoryError, match=f"in {when}"):
        fill(extractor, loaders, "0", nothing)
    monkeypatch.undo()
    assert store.pending(extractor.config.store) == [0, 1]
    fill(extractor, loaders, "0", nothing)
    assert store.verify(extractor.config.store).ok


@pytest.mark.parametrize(
    ("poison", "says"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero throughout")]
)
def test_states_that_no_model_should_give_stop_the_run_by_name(made, poison, says):
    extractor, loaders = made
    layer = extractor.model.model.language_model.layers[3]
    hook = layer.register_forward_hook(lambda module, args, output: output.index_fill(1, torch.tensor([70]), poison))
    with pytest.raises(store.BadStates, match=says) as raised:
        fill(extractor, loaders, "0", nothing)
    hook.remove()
    # Threads look at kinds of tokens beside each other: what came of it later may be met first.
    assert re.search(r"'scene_\w+' at layer '([3-9]|1\d|final)'", str(raised.value))
    assert store.pending(extractor.config.store) == [0, 1]


def test_a_model_whose_states_depend_on_the_batch_stops_the_run(made):
    extractor, loaders = made
    layer = extractor.model.model.language_model.layers[5]
    hook = layer.register_forward_hook(lambda module, args, output: output * (1 + 0.1 * (len(output) > 1)))
    with pytest.raises(Refusal, match=r"sample 'scene_\w+' has other states at layer \w+ alone") as raised:
        fill(extractor, loaders, "0", nothing)
    hook.remove()
    assert "--batch-size 1" in str(raised.value)
    (run,) = (run for run in store.open(extractor.config.store).runs if "checks" in run)
    assert run["checks"][0]["difference"] > run["tolerance"]


def test_the_store_says_which_samples_were_run_alone_and_how_they_differed(made):
    extractor, loaders = made
    fill(extractor, loaders, "0", nothing)
    opened = store.open(extractor.config.store)
    (run,) = (run for run in opened.runs if "checks" in run)
    # Of five batches the first, the second and the fourth.
    assert len(run["checks"]) == 3
    for check in run["checks"]:
        assert check["sample_id"] in set(opened.samples["sample_id"]) and check["layer"] in opened.layers
        assert 0 <= check["difference"] <= run["tolerance"] == 0.05
    assert run["settings"]["batch_size"] == "16"
    assert set(run["busy"]) >= {"read", "prepare", "pass", "move", "hand over", "encode", "write", "sync"}


def test_a_dead_loader_is_a_clear_refusal_and_the_same_command_goes_on(config, tmp_path, monkeypatch):
    asked = dataclasses.replace(config, store=tmp_path / "s.zarr", loaders=1)
    planner, loaders = begin(asked, Rank())
    with loaders:
        lay_out(planner, loaders)
        extractor = make_extractor(planner, store.load_plan(asked.store), Clock())
        (process,) = loaders._pool._processes.values()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Refusal, match="--loaders"):
            fill(extractor, loaders, "0", nothing)
    assert extract(dataclasses.replace(asked, loaders=0)) == 0


def test_processes_that_load_and_write_give_the_store_of_one_process(config, tmp_path):
    hashes = set()
    for loaders in (0, 2):
        asked = dataclasses.replace(config, store=tmp_path / f"{loaders}.zarr", loaders=loaders)
        assert extract(asked) == 0
        hashes.add(store.verify(asked.store).content_hash)
    assert len(hashes) == 1


@pytest.fixture
def processes(config, tmp_path):
    """Extractor and loaders of a laid-out store, with a loader process and so a writing one."""
    asked = dataclasses.replace(config, store=tmp_path / "p.zarr", loaders=1)
    planner, loaders = begin(asked, Rank())
    with loaders:
        lay_out(planner, loaders)
        yield make_extractor(planner, store.load_plan(asked.store), Clock()), loaders


def test_a_writing_process_that_dies_is_a_clear_refusal_and_the_run_goes_on_from_there(processes, monkeypatch):
    extractor, loaders = processes
    taken = []
    take = Elsewhere.take

    def die(writing, *given):
        taken.append(1)
        if len(taken) == 3:
            os.kill(writing._process.pid, signal.SIGKILL)
        return take(writing, *given)

    monkeypatch.setattr(Elsewhere, "take", die)
    with pytest.raises(Refusal, match="the writing process died"):
        fill(extractor, loaders, "0", nothing)
    monkeypatch.undo()
    fill(extractor, loaders, "0", nothing)
    assert store.verify(extractor.config.store).ok


def test_what_a_writing_process_refuses_is_raised_here_by_name(processes):
    extractor, loaders = processes
    layer = extractor.model.model.language_model.layers[3]
    hook = layer.register_forward_hook(lambda module, args, output: output.index_fill(1, torch.tensor([70]), np.nan))
    with pytest.raises(store.BadStates, match="is not finite"):
        fill(extractor, loaders, "0", nothing)
    hook.remove()
    assert store.pending(extractor.config.store) == [0, 1]


def test_a_worker_of_the_same_name_that_is_at_work_is_waited_for_and_then_refused(made, monkeypatch):
    monkeypatch.setattr("extract.writing.PATIENCE", 0.3)
    extractor, loaders = made
    with store.Writer(extractor.config.store, "0"), pytest.raises(Refusal, match="writer named '0' is at work"):
        fill(extractor, loaders, "0", nothing)
    fill(extractor, loaders, "0", nothing)


def test_asking_for_boxes_changes_no_state(config, tmp_path):
    """The vision tower runs once for both questions."""
    hidden = []
    for boxes in (False, True):
        asked = dataclasses.replace(config, store=tmp_path / f"{boxes}.zarr", limit=20, vlm_boxes=boxes)
        assert extract(asked) == 0
        opened = store.open(asked.store)
        hidden.append(opened.read(range(20), ["embed", "5", "final"], "all")[0])
        assert ("vlm_answer" in opened.samples.columns) == boxes
    assert hidden[0].view(torch.int16).equal(hidden[1].view(torch.int16))


def test_the_vision_tower_runs_once_a_batch(config, tmp_path):
    asked = dataclasses.replace(config, store=tmp_path / "s.zarr", limit=20, vlm_boxes=True)
    planner, loaders = begin(asked, Rank())
    with loaders:
        lay_out(planner, loaders)
        extractor, ran = make_extractor(planner, store.load_plan(asked.store), Clock()), []
        extractor.model.model.visual.register_forward_pre_hook(lambda *_: ran.append(1))
        fill(extractor, loaders, "0", nothing)
    # Two batches, and the sample that is run alone in the first.
    assert len(ran) == 2 + len(store.open(asked.store).runs[0]["checks"])


@pytest.mark.slow
def test_loaders_end_when_the_process_that_started_them_is_killed(config, tmp_path):
    command = [sys.executable, "-m", "extract", "--preset", "pocket", "--data", config.data, "--no-vlm-boxes"]
    command += ["--store", str(tmp_path / "s.zarr"), "--loaders", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(children := children_of(process.pid)) < 4 and time.time() < deadline:
        time.sleep(0.05)
    assert len(children) >= 4  # the server that forks loaders, the tracker of its resources, two loaders
    process.kill()
    process.wait()
    while any(alive(child) for child in children) and time.time() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if alive(child)]


def children_of(pid):
    """All processes below one."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in found.read_text().split()] if found.exists() else []
    return [*children, *(below for child in children for below in children_of(child))]


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_waits_is_bounded_while_the_disk_is_slow(made, monkeypatch):
    extractor, loaders = made
    ran, handed = [], []
    slow = Here.take

    def take(writing, ran_batch, *given):
        time.sleep(0.2)
        handed.append(len(ran_batch.samples))
        return slow(writing, ran_batch, *given)

    run = type(extractor).run
    monkeypatch.setattr(Here, "take", take)
    ahead = []

    def counted(self, ready, *features):
        ran.append(len(ready))
        ahead.append(len(ran) - len(handed))
        return run(self, ready, *features)

    monkeypatch.setattr(type(extractor), "run", counted)
    monkeypatch.setattr("extract.pipeline.Extractor.check", nothing)
    fill(extractor, loaders, "0", nothing)
    # Two wait, one is being handed over, one has run.
    assert len(ran) == 5 and max(ahead) <= 4


def test_selection_of_layers_kinds_rows_and_dtype(config, tmp_path):
    asked = dataclasses.replace(
        config, store=tmp_path / "s.zarr", limit=10, layers="embed-1,5,10-final", tokens="image", keys="image",
        queries="prompt", dtype="float32",
    )  # fmt: skip
    assert extract(asked) == 0
    opened = store.open(asked.store)
    assert opened.layers == ("embed", "0", "1", "5", "10", "11", "final")
    assert set(opened.hidden.data_vars) == {"image"} and set(opened.attention.data_vars) == {"text_to_image"}
    assert opened.plan.dtype == "float32"
    assert (opened.samples["n_query"] == opened.samples["n_text"]).all()
    rows = opened.attention["text_to_image"].isel(sample=0, layer=0).values
    assert np.isfinite(rows).sum() == opened.samples["n_text"][0] * opened.samples["n_image"][0]
    # Template tokens before the picture see none of it.
    first = opened.tokens.filter(sample=0).collect().filter(pl.col("kind") != "image")
    before = (first["position"] < opened.tokens.filter(sample=0, kind="image").collect()["position"].min()).sum()
    assert before and (rows[:before][np.isfinite(rows[:before])] == 0).all() and (rows[before] > 0).any()


@pytest.mark.parametrize("layers", ["99", "3-1", "0-99", "final-embed", "a-b", ""])
def test_layers_that_a_model_does_not_have_are_refused_by_name(config, tmp_path, layers):
    with pytest.raises(Refusal, match=r"--layers names .*embed, 0"):
        extract(dataclasses.replace(config, store=tmp_path / "s.zarr", layers=layers))


def test_moving_on_a_cpu_gives_the_values_at_once():
    tensor = torch.randn(3, 4).to(torch.bfloat16)
    moving = Mover(torch.device("cpu")).move({"hidden": tensor}, nothing)
    assert (moving.arrays()["hidden"] == tensor.view(torch.uint16).numpy()).all()
    moving.release()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moving_from_a_gpu_gives_the_values_and_uses_its_buffers_again():
    import queue

    mover = Mover(torch.device("cuda"))
    for size in (10, 1000, 7):
        tensor = torch.randn(size, 4, device="cuda").to(torch.bfloat16)
        moving = mover.move({"hidden": tensor, "rows": tensor.half()}, queue.Queue.get)
        assert (moving.arrays()["hidden"] == tensor.cpu().view(torch.uint16).numpy()).all()
        assert (moving.arrays()["rows"] == tensor.half().cpu().numpy()).all()
        moving.release()


def test_a_default_of_loaders_leaves_the_model_its_cores():
    from extract.loading import default_processes
    from extract.processes import FEW_SAMPLES

    assert default_processes(FEW_SAMPLES - 1, torch.device("cpu"), 1) == 0
    assert default_processes(None, torch.device("cpu"), 10_000) == 1
    assert 1 <= default_processes(100_000, torch.device("cuda"), 10_000) <= 8
