"""Many workers on one store: by rank, on a Dask cluster, with one of them killed; nothing lost, nothing done twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import store
from extract.cluster import runs_of
from extract.config import POCKET, PRESETS
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.workers import Rank, find_rank
from store.errors import Refusal

BLOCKS = 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=64 * BLOCKS + 40, seed=21, difficulty="hard"))
    return folder


@pytest.fixture(scope="module")
def config(scenes):
    return dataclasses.replace(
        PRESETS[POCKET], data=str(scenes), vlm_boxes=False, limit=64 * BLOCKS, loaders=0, layers="embed,5,final"
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The report of the store that one worker makes."""
    path = tmp_path_factory.mktemp("alone") / "s.zarr"
    assert extract(dataclasses.replace(config, store=path)) == 0
    return store.verify(path)


def start(config, path, *more, **environment):
    """The command in a process of its own, with a rank in its environment."""
    command = [sys.executable, "-m", "extract", "--preset", "pocket", "--data", config.data, "--store", str(path)]
    command += ["--no-vlm-boxes", "--limit", str(config.limit), "--loaders", "0", "--layers", config.layers, *more]
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(path):
    """Which worker committed which block, from the logs themselves."""
    logs = sorted(Path(path).glob("record/commits/*.jsonl"))
    return {log.stem: [json.loads(line)["block"] for line in log.read_text().splitlines()] for log in logs}


def wait_for(what, seconds=180):
    deadline = time.time() + seconds
    while not what():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_two_ranks_of_torchrun_share_the_blocks_and_give_the_store_of_one(config, alone, tmp_path):
    path = tmp_path / "s.zarr"
    ranks = [start(config, path, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r)) for r in range(2)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    report = store.verify(path)
    assert report.ok and report.content_hash == alone.content_hash
    done = committed(path)
    assert set(done) == {"0", "1"}
    assert Counter(block for blocks in done.values() for block in blocks) == dict.fromkeys(range(BLOCKS), 1)
    # Each began with its own half.
    assert done["0"][0] == 0 and done["1"][0] == BLOCKS // 2
    # One bar for the whole job; the second rank of a machine draws none.
    assert f"{config.limit}/{config.limit}" in said[0][1] and "extract:" not in said[1][1]


@pytest.mark.slow
def test_of_three_slurm_tasks_one_is_killed_and_the_others_do_its_blocks(config, alone, tmp_path):
    path = tmp_path / "s.zarr"
    ranks = [start(config, path, SLURM_PROCID=str(r), SLURM_NTASKS="3", SLURM_LOCALID=str(r)) for r in range(3)]
    wait_for(lambda: committed(path).get("1") or any(rank.poll() is not None for rank in ranks))
    ranks[1].send_signal(signal.SIGKILL)
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL, 0], said
    report = store.verify(path)
    assert report.ok and report.content_hash == alone.content_hash
    assert Counter(block for blocks in committed(path).values() for block in blocks) == dict.fromkeys(range(BLOCKS), 1)


@pytest.mark.slow
def test_ranks_plan_once(config, tmp_path):
    path = tmp_path / "s.zarr"
    ranks = [start(config, path, "--limit", "64", RANK=str(r), WORLD_SIZE="3") for r in range(3)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert sum("plan: 100%" in errors for _, errors in said) == 1


@pytest.mark.slow
def test_a_dask_cluster_of_processes_gives_the_store_of_one(config, alone, tmp_path):
    path = tmp_path / "s.zarr"
    process = start(config, path, "--dask", "local:2")
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    report = store.verify(path)
    assert report.ok and report.content_hash == alone.content_hash
    done = committed(path)
    assert len(done) == 2 and all(name.startswith("dask-") for name in done)
    assert Counter(block for blocks in done.values() for block in blocks) == dict.fromkeys(range(BLOCKS), 1)
    assert f"{config.limit}/{config.limit}" in said[1]
    assert "pass" in said[0]


@pytest.mark.slow
def test_a_dask_worker_that_is_killed_loses_nothing_and_what_is_refused_is_said(config, alone, tmp_path):
    path, contact = tmp_path / "s.zarr", tmp_path / "scheduler.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    run = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    scheduler = subprocess.Popen([*run, "--scheduler-file", str(contact)], **quiet)
    workers = []
    try:
        wait_for(contact.exists)
        address = json.loads(contact.read_text())["address"]
        with pytest.raises(Refusal, match="no workers"):
            extract(dataclasses.replace(config, store=path, dask=address))
        run = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
        workers = [subprocess.Popen([*run, "--no-dashboard"], **quiet) for _ in range(2)]
        process = start(config, path, "--dask", address)
        wait_for(lambda: committed(path) or process.poll() is not None)
        workers[0].kill()
        said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    finally:
        for one in (*workers, scheduler):
            one.kill()
            one.wait()
    report = store.verify(path)
    assert report.ok and report.content_hash == alone.content_hash
    assert Counter(block for blocks in committed(path).values() for block in blocks) == dict.fromkeys(range(BLOCKS), 1)


def test_no_scheduler_at_an_address_is_a_clear_refusal(config, tmp_path, monkeypatch):
    monkeypatch.setattr("store.scheduler.PATIENCE", "1s")
    with pytest.raises(Refusal, match=r"--dask tcp://127.0.0.1:1: no scheduler answers"):
        extract(dataclasses.replace(config, store=tmp_path / "s.zarr", dask="tcp://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "5", "SLURM_NTASKS": "9"}, Rank(0, 1, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "9", "SLURM_LOCALID": "2"}, Rank(5, 9, 2)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "4",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_PROCID": "0",
            }
            | {"SLURM_NTASKS": "1"},
            Rank(3, 4, 0),
        ),
    ],
)
def test_a_launchers_rank_is_found(environment, rank):
    assert find_rank(environment) == rank


@pytest.mark.parametrize(("rank", "workers"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_a_rank_that_makes_no_sense_is_refused_by_name(rank, workers):
    with pytest.raises(Refusal, match=f"RANK={rank} WORLD_SIZE={workers}"):
        find_rank({"RANK": rank, "WORLD_SIZE": workers})


def test_runs_of_blocks_cover_all_and_do_not_meet():
    for blocks in ([0], [0, 1, 2, 3, 4, 5, 6], [3, 4, 9, 12, 13, 40]):
        for most in (1, 2, 3, 100):
            runs = runs_of(blocks, most)
            assert len(runs) <= most
            assert [b for run in runs for b in run if b in blocks] == blocks
            assert all(first.stop <= second.start for first, second in pairwise(runs))
