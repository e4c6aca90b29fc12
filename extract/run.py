"""The extraction itself: plan → one pass over every sample → verified store, with a bar, a summary and resumption."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime

import polars as pl
import torch

import store
from extract.cluster import fill_on_cluster
from extract.config import ExtractConfig
from extract.estimate import foresee
from extract.loading import Loaders, default_processes
from extract.model import find_checkpoint, find_device, model_for
from extract.pipeline import TOLERANCE, Clock, Extractor, Filling
from extract.planning import Planner, read_plan, selection
from extract.summary import print_plan, print_summary
from extract.workers import Progress, Rank, find_rank
from extract.writing import Elsewhere, Here, Job
from store.errors import Refusal

SELECTION = "selection"  # name of the note that says by what a store's samples were chosen


def extract(config: ExtractConfig) -> int:
    """Plan, extract, verify; the exit code is 0 only when every planned block is committed and sound."""
    began, clock, rank = time.perf_counter(), Clock(), find_rank()
    planner, loaders = begin(config, rank)
    with loaders:
        if config.dry_run or config.budget:
            return foresee(planner, loaders)
        with by_turns(config, rank):
            with clock("scenes"):
                planner.draw_own_scenes()
            with clock("plan"):
                lay_out(planner, loaders)
        extractor = None
        for part in store.load_parts(config.store):
            if not store.pending(config.store, part.part):
                continue
            if config.dask:
                fill_on_cluster(config, part, clock)
            else:
                extractor = extractor or make_extractor(planner, part, clock)
                fill_here(replace(extractor, plan=part, checks=[]), loaders, rank)
    # Of many, the first says what became of the store; on an object store it cannot know when the others end.
    if rank.rank:
        return 0
    with clock("verify"):
        report = store.verify(config.store)
    print_summary(config, clock, time.perf_counter() - began, loaders.processes, report)
    return 0 if report.ok else 1


def begin(config: ExtractConfig, rank: Rank) -> tuple[Planner, Loaders]:
    """What every process of an extraction has: the checkpoint and its device, and loaders (to be closed)."""
    device = find_device(config.device, rank.local)
    if config.threads:
        torch.set_num_threads(config.threads)
    planner = Planner(config, find_checkpoint(config.model, config.revision), device)
    return planner, Loaders(planner.kit(), loader_processes(config, device))


def loader_processes(config: ExtractConfig, device: torch.device) -> int:
    """How many loader processes there are to be."""
    if config.loaders is not None:
        return config.loaders
    # A worker of a cluster may be a daemon, which may have no children.
    if multiprocessing.current_process().daemon:
        return 0
    return default_processes(config.limit, device, torch.get_num_threads())


@contextmanager
def by_turns(config: ExtractConfig, rank: Rank) -> Iterator[None]:
    """One of several workers at a time: the first plans and lays the store out, the others find it there."""
    claim = None
    if rank.workers > 1:
        place = store.locate(config.store)
        while (claim := place.claim("planning")) is None:
            time.sleep(0.5)
    try:
        yield
    finally:
        if claim:
            claim.close()


def lay_out(planner: Planner, loaders: Loaders) -> None:
    """Lay out the store, or find it there; what it was planned with need not be read again."""
    config, place = planner.config, store.locate(planner.config.store)
    chosen = selection(config)
    samples, set_aside = (None, None) if config.grow else planned_before(config, chosen)
    if samples is None:
        samples, set_aside = read_plan(config, loaders)
    plan = planner.plan_of(samples)
    estimate = plan.bytes_estimate()
    print_plan(plan, set_aside, estimate, config.limit)
    there = sum(place.sizes("hidden").values()) + sum(place.sizes("attention").values())
    store.check_space(config.store, max(0, sum(estimate.values()) - there))
    if config.grow:
        store.grow(config.store, plan, set_aside)
    else:
        store.create(config.store, plan, set_aside)
    if {SELECTION: chosen} not in store.open(config.store).runs:
        store.note(place, SELECTION, {SELECTION: chosen})


def planned_before(config: ExtractConfig, chosen: dict) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    """The samples of a store that was planned with this selection, and what was set aside; nulls if there is none."""
    try:
        opened = store.open(config.store)
    except Refusal:  # it is not there, or not laid out to the end
        return None, None
    return (opened.plan.samples, opened.set_aside) if {SELECTION: chosen} in opened.runs else (None, None)


def make_extractor(planner: Planner, plan: store.Plan, clock: Clock) -> Extractor:
    """Load the model."""
    with clock("load"):
        model = model_for(planner.config, planner.folder, planner.device)
    return Extractor(planner.config, model, planner.conditioner, planner.grounder, plan, clock)


def fill_here(extractor: Extractor, loaders: Loaders, rank: Rank) -> None:
    """Fill what is left of the extractor's part, with the other workers."""
    config, plan = extractor.config, extractor.plan
    own = range(plan.n_blocks * rank.rank // rank.workers, plan.n_blocks * (rank.rank + 1) // rank.workers)
    described = "extract" if plan.part == 0 else f"extract part {plan.part}"
    with extractor.clock("fill"), Progress(config.store, plan, described, rank) as progress:
        fill(extractor, loaders, config.worker or str(rank.rank), progress, own)


def fill(
    extractor: Extractor,
    loaders: Loaders,
    worker: str,
    advance: Callable[[int], None],
    own: range | None = None,
    alone: bool = False,
) -> None:
    """Fill blocks of the extractor's part, its ``own`` first (and, if ``alone``, no others), and note how it went."""
    config, clock, began = extractor.config, extractor.clock, time.perf_counter()
    name = f"{worker}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"

    def tell() -> None:
        told = {
            "worker": worker,
            "part": extractor.plan.part,
            "settings": {key: str(value) for key, value in asdict(config).items() if value is not None},
            "checks": [asdict(check) for check in extractor.checks],
            "tolerance": TOLERANCE[extractor.model.dtype],
            "seconds": round(time.perf_counter() - began, 3),
            "busy": {stage: round(spent, 3) for stage, spent in clock.seconds.items()},
        }
        store.note(store.locate(config.store), name, told)

    job = Job(config.store, worker, extractor.plan.part, own, alone)
    # A GPU's thread seldom asks for the interpreter, and wide states would wait for the copy.
    elsewhere = loaders.processes and extractor.model.device.type == "cpu"
    with Elsewhere(job) if elsewhere else Here(job) as writing:
        try:
            Filling(extractor, loaders, writing, advance, tell).fill()
        finally:
            tell()
