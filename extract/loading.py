"""Rows made into model inputs by processes of their own: they never ask the one that runs the model for anything."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import polars as pl
import torch

from extract.boxes import Box
from extract.control import SHOWN
from extract.omniedit import BadSample, Checks, crc_of, judged
from extract.processes import FEW_SAMPLES, follow_parent, loader_context
from extract.rows import Place, SetAside, Shards
from extract.sequence import Conditioner, Prepared
from store.errors import Refusal

MOVED = "the data no longer hold it where it was planned"
CHANGED = "the data changed since it was planned"
MOST_PROCESSES = 8


Row = tuple[Place, Mapping[str, Any]] | SetAside
"""A row with its place, or why it cannot be had."""


class Planned(NamedTuple):
    """What the plan says of a sample: by this, a row is known to be the one that was planned."""

    sample_id: str
    instruction: str
    width: int
    height: int
    image_crc32c: int
    shown: str
    """The sample whose picture it is shown: itself, but in a control."""


@dataclass(frozen=True)
class Kit:
    """What it takes to turn a row into model inputs; sent to every loader once."""

    checks: Checks
    conditioners: Mapping[str, Conditioner]
    """By purpose; all see the picture at the same size."""
    dtype: torch.dtype = torch.float32
    """Of pixels: the model casts them to its own, so they may as well travel in it."""
    boxes: Mapping[str, Box | None] = field(default_factory=dict)
    """The true boxes where the data's do not count, by sample id; null: a person rejected it."""
    listed: bool = False
    """Whether samples without such a box are left out."""


class Loaders:
    """Loader processes (or a thread of this one), given work in order.

    Parameters
    ----------
    kit
        What they work with.
    processes
        How many; with none, a thread of this process does the work.
    """

    def __init__(self, kit: Kit, processes: int):
        self.processes = processes
        if processes:
            self._pool = ProcessPoolExecutor(processes, loader_context(), _begin, (kit, dict(os.environ)))
            self._kit = None
        else:
            self._pool = ThreadPoolExecutor(1, "load")
            self._kit = kit

    def submit(self, work: Callable[..., Any], *given: Any) -> "Future[tuple[Any, float]]":
        """Have ``work(kit, *given)`` done: its result and the seconds it took."""
        with _loss():
            return self._pool.submit(_timed, work, self._kit, given)

    def result(self, future: "Future[tuple[Any, float]]") -> tuple[Any, float]:
        """What a future gives, or a Refusal where a loader process died."""
        with _loss():
            return future.result()

    def close(self) -> None:
        """End the processes; work that has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _loss() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise Refusal(
            "a loader process died, most likely for want of memory: give fewer --loaders or a smaller --batch-size"
        ) from None


def default_processes(samples: int | None, device: torch.device, threads: int) -> int:
    """Loader processes for so many samples (null: unknown, many): what cores the model leaves, and one at least."""
    if samples is not None and samples < FEW_SAMPLES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_PROCESSES, cores - (threads if device.type == "cpu" else 1)))


_KIT: Kit | None = None


def _begin(kit: Kit, environment: dict[str, str]) -> None:
    """Set up a loader process: one thread, the kit, and an end when its parent ends, however that happens."""
    global _KIT
    _KIT = kit
    os.environ.update(environment)
    os.environ["POLARS_MAX_THREADS"] = "1"
    torch.set_num_threads(1)
    follow_parent()


def _timed(work: Callable[..., Any], kit: Kit | None, given: Sequence[Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work(_KIT if kit is None else kit, *given)
    return result, time.perf_counter() - began


def prepare(
    kit: Kit, planned: Sequence[Planned], rows: Sequence[Row], purposes: Sequence[str]
) -> list[dict[str, Prepared] | str]:
    """Planned samples as model inputs by purpose, or the reason why one cannot be had any more; done by a loader."""
    conditioners = {purpose: kit.conditioners[purpose] for purpose in purposes}
    return [_prepared(kit, conditioners, one, row) for one, row in zip(planned, rows, strict=True)]


def _prepared(
    kit: Kit, conditioners: Mapping[str, Conditioner], planned: Planned, row: Row
) -> dict[str, Prepared] | str:
    try:
        sample = row if isinstance(row, SetAside) else judged(row[1], row[0], kit.checks)
        if isinstance(sample, SetAside):
            raise BadSample(sample.reason, sample.detail)
        if sample.sample_id != planned.shown:
            raise BadSample(MOVED)
        own = planned.shown == planned.sample_id
        instruction = sample.instruction if own else planned.instruction
        picture = sample.width, sample.height, crc_of(sample.source), planned.shown
        found = Planned(planned.sample_id, instruction, *picture)
        if found != planned:
            raise BadSample(CHANGED)
        made, pixels = {}, None
        for purpose, conditioner in conditioners.items():
            made[purpose] = conditioner.prepare(sample.image, instruction, planned.sample_id, pixels)
            # All are asked of the same picture, which travels once.
            pixels = made[purpose].pixels
        return {
            purpose: _lighter(one, conditioners[purpose], kit.dtype, not number)
            for number, (purpose, one) in enumerate(made.items())
        }
    except BadSample as bad:
        return str(bad)


def _lighter(prepared: Prepared, conditioner: Conditioner, dtype: torch.dtype, with_pixels: bool) -> Prepared:
    """The same with pixels in the model's dtype and none of them twice, or without them."""
    if not with_pixels:
        return replace(prepared, pixels={n: v for n, v in prepared.pixels.items() if n != "pixel_values"})
    thin = conditioner.family.thinned(conditioner.processor, prepared.pixels)
    return replace(prepared, pixels={n: v.to(dtype) if v.is_floating_point() else v for n, v in thin.items()})


def planned_of(samples: pl.DataFrame) -> list[Planned]:
    """What a plan's samples table says of each sample."""
    own = {} if SHOWN in samples.columns else {SHOWN: pl.col("sample_id")}
    return [Planned(*row) for row in samples.with_columns(**own).select(Planned._fields).iter_rows()]


def rows_at(shards: Shards, places: Sequence[Place]) -> list[Row]:
    """The rows at ``places``, in this order, or why one cannot be had."""
    found = zip(places, shards.rows(places), strict=True)
    return [row if isinstance(row, SetAside) else (place, row) for place, row in found]
