"""Reading ahead of a GPU."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job, Result = TypeVar("Job"), TypeVar("Result")


def read_ahead(
    read: Callable[[Job], Result], jobs: Iterable[Job], depth: int, device: torch.device
) -> Iterator[Result]:
    """What ``read`` gives of each job, in order; while a GPU is at work so many are read before they are asked for.

    On a CPU each is read when it is asked for: a thread that reads would take turns with those that compute, which wait
    for each other, and all would take several times as long.
    """
    if device.type == "cpu":
        yield from map(read, jobs)
        return
    with ThreadPoolExecutor(2, "ahead") as pool:
        coming = deque()
        for job in jobs:
            coming.append(pool.submit(read, job))
            if len(coming) > depth:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
