"""``python -m extract`` between laying out and verifying, over the bare forward of its batches; and its workers."""

import multiprocessing
import os
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import store
from bench.measure import Row, Turns, figure_row, in_process, missing_row, own_memory, quiet, time_row
from bench.pocket import Pocket
from extract.config import ExtractConfig
from extract.pipeline import Clock
from extract.run import begin, fill, make_extractor
from extract.workers import Rank

STAGES = {
    "read": "reading rows",
    "prepare": "pictures, inputs, token tables",
    "wait for inputs": "the model waiting for them",
    "pass": "the pass that keeps",
    "hand over": "handing over to the writer",
    "encode": "encoding",
    "write": "writing",
    "sync": "syncing",
}


@torch.no_grad()
def measure(pocket: Pocket, turns: Turns) -> list[Row]:
    """The pipeline, then where its time goes: stages work beside each other, so they add up to more than it takes."""
    core, batches, spent = pocket.extractor.model.model, pocket.batches(), defaultdict(list)

    def pipeline() -> float:
        pocket.new_store()
        began = time.perf_counter()
        pocket.fill_store()
        took = time.perf_counter() - began
        for stage in STAGES:
            spent[stage].append(pocket.extractor.clock.seconds[stage])
        return took

    def forward() -> None:
        for batch in batches:
            core(**batch.inputs, use_cache=False)

    bare, whole = "bare forward of the batches", "everything kept, written"
    seconds = turns.take({bare: forward, whole: pipeline})
    rows = [
        time_row(
            "extraction", whole, seconds[whole], bare, seconds[bare], goal=1.15, note=f"n = {pocket.plan.n_samples}"
        )
    ]
    # Where the pipeline is repeated within a turn, its stages are as well; the first call is not counted.
    for stage, times in spent.items():
        own = np.maximum(np.reshape(times[1:], (turns.repeats, -1)).mean(1), 1e-9)
        rows.append(time_row("extraction", f"… {STAGES[stage]}", own, bare, seconds[bare]))
    return rows


def memory(pocket: Pocket) -> list[Row]:
    """Peak memory of a process that extracts, over what it has when its model is loaded."""
    peak, before = in_process(_peak, pocket.config)
    note = "one process; n = 512 of a store of any size: what waits is bounded"
    return [
        figure_row(
            "extraction", "peak memory while filling", peak / 1e6, "MB", "model loaded", before / 1e6, "less", note=note
        )
    ]


def workers(pocket: Pocket, repeats: int) -> list[Row]:
    """Two workers beside one, each with a core of its own; the time in which they load is not counted."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return [missing_row("extraction", "2 workers", "1 worker", "this machine has one core, or does not tell")]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(repeats):
        for count in (1, 2) if turn % 2 == 0 else (2, 1):
            pocket.new_store()
            seconds[count].append(_race(pocket.config, cores[:count]))
    one, two = (np.array(seconds[count]) for count in (1, 2))
    ratio = one / two
    return [
        Row(
            "extraction", "2 workers, samples/s", pocket.plan.n_samples / float(np.median(two)), "", "1 worker",
            pocket.plan.n_samples / float(np.median(one)), float(np.median(ratio)), float(ratio.min()),
            float(ratio.max()), repeats, "more", 1.8, f"a core each, loader included; {len(cores)} cores here",
        )
    ]  # fmt: skip


def _race(config: ExtractConfig, cores: list[int]) -> float:
    """Seconds from the moment when all workers are ready until the store is full."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(cores) + 1)
    racing = [
        context.Process(target=_worker, args=(config, Rank(rank, len(cores), rank), core, barrier))
        for rank, core in enumerate(cores)
    ]
    for process in racing:
        process.start()
    barrier.wait(300)
    began = time.perf_counter()
    for process in racing:
        process.join()
    took = time.perf_counter() - began
    if any(process.exitcode for process in racing) or store.pending(config.store):
        raise RuntimeError("a worker that was to be measured failed")
    return took


def _worker(config: ExtractConfig, rank: Rank, core: int, barrier: Any) -> None:
    os.sched_setaffinity(0, {core})
    with quiet():
        planner, loaders = begin(replace(config, loaders=0), rank)
        plan = store.load_plan(config.store)
        extractor = make_extractor(planner, plan, Clock())
        own = range(plan.n_blocks * rank.rank // rank.workers, plan.n_blocks * (rank.rank + 1) // rank.workers)
        with loaders:
            barrier.wait(300)
            fill(extractor, loaders, str(rank.rank), lambda samples: None, own)


def _peak(config: ExtractConfig) -> tuple[int, int]:
    config = replace(config, store=f"{config.store}-memory", loaders=0)
    planner, loaders = begin(config, Rank())
    plan = store.load_plan(str(config.store).removesuffix("-memory"))
    store.create(config.store, plan)
    extractor = make_extractor(planner, plan, Clock())
    before = own_memory("VmRSS")
    with loaders:
        fill(extractor, loaders, "0", lambda samples: None)
    shutil.rmtree(config.store)
    return own_memory("VmHWM"), before
