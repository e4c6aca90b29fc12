"""A function over blocks of samples of a lazy array: by threads here, or by the processes of a Dask cluster.

Results come in the order of the blocks, whoever worked them out and whenever: what is summed over them has the same
bits for any number of workers. Only a few blocks are in memory at a time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import dask.array as da
import numpy as np
import xarray as xr
from dask import optimize
from tqdm import tqdm

from probes.malloc import keep_freed
from store.errors import Refusal
from store.scheduler import Watch, connect, count_workers
from store.shards import CORES

if TYPE_CHECKING:
    from dask.distributed import Future

BLOCK_BYTES = 64 * 2**20
"""An array that is in memory, and has no chunks, is cut into blocks of about this much."""

AHEAD = 2
"""Blocks in hand for each worker: the one it is at, and one that is done or next."""

SOURCE = "source_array"
"""Attribute that names the array of the store that a lazy one is made of."""

RETRIES = 3
LOOK_SECONDS = 1.0

T = TypeVar("T")
Work = Callable[[np.ndarray, slice], T]
"""What is done to a block: its values ``[s, …]`` and which samples they are; can be pickled for a cluster."""


@dataclass(frozen=True)
class Block(Generic[T]):
    """One block, to be read and worked out by whoever calls it."""

    work: Work[T]
    lazy: da.Array
    samples: slice
    name: str
    """Of the array, for people."""

    def __call__(self) -> T:
        """What ``work`` makes of it."""
        keep_freed()  # blocks are as large as each other, and their pages are dear
        # Read by this very thread: blocks are what goes on side by side.
        try:
            values = self.lazy.compute(scheduler="synchronous")
        except (OSError, RuntimeError, ValueError) as failure:
            told = " ".join(str(failure).split())[:200]
            raise Refusal(
                f"samples {self.samples.start} to {self.samples.stop - 1} of {self.name} cannot be read ({told}): "
                "`python -m store verify` tells what is whole"
            ) from None
        return self.work(values, self.samples)


def over_blocks(
    work: Work[T],
    array: xr.DataArray,
    *,
    dask: str | None = None,
    threads: int | None = None,
    progress: bool = False,
    label: str = "reading",
) -> Iterator[tuple[slice, T]]:
    """Apply ``work`` to every block of samples of a lazy array.

    Parameters
    ----------
    work
        Takes the values of a block ``[s, …]`` and the slice of samples they are.
    array
        Lazy, its first axis samples; a block is a chunk along it, whole along the others.
    dask
        Address of a Dask scheduler, ``local`` or ``local:4``; here if not given.
    threads
        Threads here; as many as there are cores if not given. A cluster has its own.
    progress
        Show a bar, which says ``label``.

    Yields
    ------
    tuple of slice and what ``work`` gave
        In the order of samples.

    Raises
    ------
    Refusal
        When there is no cluster, or its workers die.
    """
    blocks = _blocks(work, array)
    results = _on_cluster(blocks, dask) if dask else _here(blocks, threads or CORES)
    with tqdm(total=array.shape[0], desc=label, unit="sample", disable=not progress) as bar:
        for samples, result in results:
            bar.update(samples.stop - samples.start)
            yield samples, result


def _blocks(work: Work[T], array: xr.DataArray) -> Iterator[Block[T]]:
    lazy = array.data
    if not isinstance(lazy, da.Array):
        together = max(1, BLOCK_BYTES // max(1, array.nbytes // max(1, len(array))))
        lazy = da.from_array(lazy, chunks=(together, *array.shape[1:]))
    ends = np.cumsum((0, *lazy.chunks[0])).tolist()
    for number, (start, stop) in enumerate(pairwise(ends)):
        # Without the tasks of all other blocks, which would be sent along.
        (one,) = optimize(lazy.blocks[number])
        yield Block(work, one, slice(start, stop), str(array.attrs.get(SOURCE, array.name)))


def _here(blocks: Iterator[Block[T]], threads: int) -> Iterator[tuple[slice, T]]:
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for block in blocks:
                waiting.append((block.samples, pool.submit(block)))
                if len(waiting) >= AHEAD * threads:
                    samples, future = waiting.popleft()
                    yield samples, future.result()
            while waiting:
                samples, future = waiting.popleft()
                yield samples, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _on_cluster(blocks: Iterator[Block[T]], address: str) -> Iterator[tuple[slice, T]]:
    waiting: deque = deque()
    with connect(address) as client:
        watch, most = Watch(client, address), AHEAD * count_workers(client)
        for block in blocks:
            waiting.append((block.samples, client.submit(block, pure=False, retries=RETRIES)))
            if len(waiting) >= most:
                samples, future = waiting.popleft()
                yield samples, _result(future, watch)
        while waiting:
            samples, future = waiting.popleft()
            yield samples, _result(future, watch)


def _result(future: "Future", watch: Watch) -> Any:
    from dask.distributed import KilledWorker, wait

    while not future.done():
        try:
            wait(future, timeout=LOOK_SECONDS)
        except TimeoutError:
            watch()
    try:
        return future.result()
    except KilledWorker:
        raise Refusal(
            f"--dask {watch.address}: workers died, one after the other, over the same block; have they memory enough?"
        ) from None
