"""A sweep of probes over the pocket store beside training them one by one, and what its reading and memory cost.

All of it runs in processes of their own: a sweep tells the C library to keep freed memory, which would make everything
that is measured after it faster. What is measured beside it has the same from it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import store
from bench import reference
from bench.config import Sizes
from bench.measure import Row, Turns, figure_row, in_process, pace_row, rate_row, time_row
from bench.pocket import Pocket
from bench.training import ONLY_TRAINING, Trained, peak_of_training, states_file, study_of, train, whole_epochs
from extract.config import ExtractConfig
from extract.pipeline import Clock
from extract.run import begin, make_extractor
from extract.workers import Rank
from probes import malloc
from probes.config import SweepConfig

PART = "proxies"
PLAIN_GOAL = 8.0
"""A sweep over its probes one by one in plain PyTorch."""
VLM_GOAL = 50.0
"""A sweep over its probes one by one with a forward of the VLM for each batch of each probe, as in the paper."""


def measure(asked: ExtractConfig, sizes: Sizes, turns: Turns, scratch: Path) -> list[Row]:
    """All rows of a pocket store that ``asked`` has filled."""
    config = SweepConfig(
        store=str(asked.store),
        out=scratch / "swept",
        parts=("layers", "permuted", "control-task"),
        seeds=sizes.seeds,
        depth=sizes.proxy_depth,
        batch=sizes.batch,
        **ONLY_TRAINING,
        # All that train here have the whole machine, as a researcher's run has.
        threads=len(os.sched_getaffinity(0)),
        device="cpu",
    )
    rows = in_process(_timed, config, asked, sizes.epochs_trained, turns, scratch / "swept.bin")
    whole, alone = (in_process(peak_of_training, config, sizes.epochs_trained, several) for several in (True, False))
    baseline, note = "one probe, its whole process", f"{alone[1] / 1e6:.0f} MB of it before any training"
    row = figure_row(
        PART, "peak memory of the sweep", whole[0] / 1e6, "MB", baseline, alone[0] / 1e6, "less", note=note
    )
    return [*rows, row]


def _forward(asked: ExtractConfig) -> Callable[[], float]:
    """A call that gives the seconds of the VLM's bare forward of a batch; preparing it is not counted."""
    with open_pocket(asked) as pocket:
        batches, core = pocket.batches(), pocket.extractor.model.model
    # The last batch of a block may be a short one.
    most = max(len(one.inputs["input_ids"]) for one in batches)
    full = [one for one in batches if len(one.inputs["input_ids"]) == most]

    @torch.no_grad()
    def work() -> float:
        began = time.perf_counter()
        for one in full:
            core(**one.inputs, use_cache=False)
        return (time.perf_counter() - began) / len(full)

    return work


@contextlib.contextmanager
def open_pocket(asked: ExtractConfig) -> Iterator[Pocket]:
    """The extraction that has filled a store, once more."""
    # Inputs are prepared once: a process that prepares would cost more than it saves.
    planner, loaders = begin(replace(asked, loaders=0), Rank())
    extractor = make_extractor(planner, store.load_plan(asked.store), Clock())
    with loaders:
        yield Pocket(asked, extractor, loaders, "")


def _timed(config: SweepConfig, asked: ExtractConfig, epochs: int, turns: Turns, path: Path) -> list[Row]:
    torch.set_num_threads(config.threads)
    malloc.keep_freed()
    study, jobs = study_of(config)
    opened, steps, count = study.store, whole_epochs(study, epochs), len(jobs)
    middle = len(opened.layers) // 2
    one = next(job for job in jobs if job.spec.layers == (opened.layers[middle],))
    file = states_file(study, path)
    plain_sizes = config.sizes("qformer")
    found: list[Trained] = []
    batches = opened.batches(
        opened.layers,
        "all",
        min(config.batch, len(study.split.train)),
        True,
        config.order_seed,
        samples=study.split.train,
        epochs=epochs,
        drop_last=True,
    )
    read: list[float] = []

    def plain(workers: int) -> float:
        return reference.seconds_a_step(file, [middle], plain_sizes, config.batch, steps, workers, "cpu")

    def swept() -> float:
        found.append(train(study, jobs, steps))
        return found[-1].step / count

    def reading() -> float:
        before = batches.busy
        nbytes = sum(given.states.nbytes for given in batches)
        read.append((batches.busy - before) / nbytes)
        return read[-1]

    # Loading in processes beside the training pays for some machines and sizes only: the baseline takes what pays.
    workers = min((0, 2), key=lambda workers: plain(workers))
    contenders = {
        "sweep": swept,
        "plain": lambda: plain(workers),
        "alone": lambda: train(study, [one], steps).step,
        "forward": _forward(asked),
        "reading": reading,
    }
    seconds = Turns(turns.repeats, 0).take(contenders)
    found, read = found[1:], read[1:]
    name = f"sweep of {count} probes, steps of a probe"
    note = f"products in {study.config.precision}, plain in float32; memory map, DataLoader of {workers} workers"
    again = seconds["forward"] + seconds["alone"]
    rows = [
        pace_row(
            PART, name, seconds["sweep"], "plain PyTorch, one by one", seconds["plain"], goal=PLAIN_GOAL, note=note
        ),
        pace_row(PART, name, seconds["sweep"], "our code, one by one", seconds["alone"]),
        pace_row(
            PART, name, seconds["sweep"], "VLM again for each batch", again, goal=VLM_GOAL, note="pictures prepared"
        ),
    ]
    spent = np.array([one.busy / one.nbytes for one in found])
    rows.append(rate_row(PART, "reading while it trains", 1.0, spent, "reading alone", np.array(read)))
    waiting, step = (np.array([getattr(one, name) for one in found]) for name in ("waiting", "step"))
    shown = "a step of the whole sweep"
    rows.append(time_row(PART, "… in which it waits for states", np.maximum(waiting, 1e-9), shown, step))
    return rows
