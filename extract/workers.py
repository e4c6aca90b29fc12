"""Many processes on one store: which one this is, and one bar for all of them."""

import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Self

from tqdm import tqdm

import store
from store.errors import Refusal

LOOK_SECONDS = 2.0  # how often the bar looks at what others have committed


class Rank(NamedTuple):
    """Which of several processes this is: ``rank`` of ``workers``, and ``local`` of those on its machine."""

    rank: int = 0
    workers: int = 1
    local: int = 0


def find_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that a launcher gave this process.

    ``torchrun`` and its like set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` SLURM_PROCID, SLURM_NTASKS and
    SLURM_LOCALID; a Slurm array SLURM_ARRAY_TASK_ID, _MIN and _COUNT, each task with a GPU of its own.

    Raises
    ------
    Refusal
        They are no numbers, or the rank is not below the number of workers.
    """
    forms = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", None),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    )
    for rank_name, workers_name, local_name in forms:
        if rank_name not in environment or workers_name not in environment:
            continue
        try:
            rank, workers = int(environment[rank_name]), int(environment[workers_name])
            local = int(environment.get(local_name, 0)) if local_name else 0
            if rank_name == "SLURM_ARRAY_TASK_ID":
                # Of an array with gaps the ids say no rank: workers then begin at places of their own all the same.
                rank = (rank - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))) % workers
        except ValueError:
            rank, workers, local = -1, 0, 0
        if not 0 <= rank < workers:
            given = f"{rank_name}={environment[rank_name]} {workers_name}={environment[workers_name]}"
            raise Refusal(f"{given}: give a rank from 0 up to, not including, the number of workers")
        return Rank(rank, workers, local)
    return Rank()


class Progress:
    """One bar for the whole job: what this process has done, and what others have committed meanwhile.

    Only the first process of a machine draws it.
    """

    def __init__(self, path: str, plan: store.Plan, described: str, rank: Rank):
        self._path, self._plan, self._alone = path, plan, rank.workers == 1
        self._lock, self._looked = threading.Lock(), time.monotonic()
        self._own = self._committed()
        self._bar = tqdm(total=plan.n_samples, initial=self._own, desc=described, unit="sample", disable=rank.local > 0)

    def __call__(self, samples: int) -> None:
        """So many samples more went to this process's writer; look at the others now and then."""
        with self._lock:
            self._own += samples
            now = self._own
            if time.monotonic() - self._looked > LOOK_SECONDS and not self._alone:
                self._looked = time.monotonic()
                now = max(now, self._committed())
            if now > self._bar.n:
                self._bar.update(now - self._bar.n)

    def _committed(self) -> int:
        left = sum(len(self._plan.block(b)) for b in store.pending(self._path, self._plan.part))
        return self._plan.n_samples - left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._own = self._committed()
            self._bar.update(self._own - self._bar.n)
            self._bar.close()
