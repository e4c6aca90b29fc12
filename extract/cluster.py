"""The blocks of a store over a Dask cluster: the scheduler hands runs of blocks to workers, the store keeps them apart.

A worker process keeps its model between runs. One that is lost gives back the blocks it held; the scheduler gives its
run to another, which does what is not committed.
"""

import re
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import store
from extract.config import ExtractConfig
from extract.loading import Loaders
from extract.pipeline import Clock, Extractor
from extract.workers import Progress, Rank
from store.errors import Refusal
from store.scheduler import Watch, connect, count_workers

RUNS_PER_WORKER = 4
"""Runs of blocks for each worker: few, for at its end the pipeline runs empty; several, so that all end alike."""

RETRIES = 3
LOOK_SECONDS = 1.0

_HELD: dict[str, Any] = {}
_ONE_AT_A_TIME = threading.Lock()


def fill_on_cluster(config: ExtractConfig, plan: store.Plan, clock: Clock) -> None:
    """Fill what is left of a part on the cluster that ``--dask`` names, with one bar here and tasks on its dashboard.

    Raises
    ------
    Refusal
        There is no scheduler at the address, it has no workers, or a run of blocks failed again and again.
    """
    # As one of two, so that the bar looks at what others have committed.
    watching = Progress(config.store, plan, "extract", Rank(0, 2))
    with clock("fill"), connect(config.dask) as client, watching as progress:
        if client.dashboard_link:
            print(f"dashboard: {client.dashboard_link}")
        settings = replace(config, dask=None)
        futures = [
            client.submit(
                fill_run,
                settings,
                plan.part,
                run,
                key=f"blocks {run.start}-{run.stop - 1}",
                retries=RETRIES,
                pure=False,
            )
            for run in runs_of(store.pending(config.store, plan.part), RUNS_PER_WORKER * count_workers(client))
        ]
        watch = Watch(client, config.dask)
        while any(future.status == "pending" for future in futures):
            time.sleep(LOOK_SECONDS)
            progress(0)
            watch()
            if failed := [future for future in futures if future.status == "error"]:
                failure = failed[0].exception()
                raise failure if isinstance(failure, Refusal) else Refusal(f"{failed[0].key} failed: {failure}")
        for future in futures:
            for stage, seconds in future.result().items():
                clock.add(stage, seconds)


def runs_of(blocks: list[int], most: int) -> list[range]:
    """``blocks`` as at most so many runs of alike length; a run may reach over blocks that are not among them."""
    most = max(1, min(most, len(blocks)))
    cuts = [len(blocks) * number // most for number in range(most + 1)]
    return [range(blocks[first], blocks[end - 1] + 1) for first, end in pairwise(cuts)]


def fill_run(config: ExtractConfig, part: int, run: range) -> dict[str, float]:
    """Fill a run of blocks in a worker process of the cluster: seconds by stage."""
    from dask.distributed import get_worker

    from extract.run import fill

    # A worker with several threads has one model all the same.
    with _ONE_AT_A_TIME:
        loaders, extractor = held(config, part)
        clock = Clock()
        name = "dask-" + re.sub(r"[^A-Za-z0-9]+", "-", get_worker().address)
        fill(replace(extractor, clock=clock, checks=[]), loaders, name, lambda samples: None, run, alone=True)
        return dict(clock.seconds)


def held(config: ExtractConfig, part: int) -> tuple[Loaders, Extractor]:
    """What this process keeps between runs; made when it is first needed.

    Raises
    ------
    Refusal
        This machine would compute other states than those of the store: other weights, libraries …
    """
    from dask.distributed import get_worker

    from extract.run import begin, make_extractor

    if _HELD.get("key") != (config, part):
        if "loaders" in _HELD:
            _HELD.pop("loaders").close()
        planner, loaders = begin(config, Rank())
        plan = store.load_parts(config.store)[part]
        here, there = planner.identity, dict(plan.identity)
        if other := [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]:
            raise Refusal(f"{get_worker().address} differs from the store in {', '.join(sorted(other))}")
        _HELD.update(key=(config, part), loaders=loaders, extractor=make_extractor(planner, plan, Clock()))
    return _HELD["loaders"], _HELD["extractor"]
