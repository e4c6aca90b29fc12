"""Taking turns, so that drift cancels in the ratio; the row that comes of it; what is in memory, and what is not."""

import contextlib
import ctypes
import io
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

import store
from store import bits

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    """What of the project it is about."""
    name: str
    """What was measured."""
    value: float | None
    """Median over the repeats, in ``unit``; null where nothing could be measured, and ``note`` says why."""
    unit: str
    baseline: str
    """What it is compared with."""
    baseline_value: float | None
    ratio: float | None
    """Median over the repeats of value / baseline, each of one turn."""
    low: float | None
    high: float | None
    repeats: int
    better: Literal["less", "more"]
    """Whether a smaller or a larger ratio is good."""
    goal: float | None = None
    """The ratio that this project promises, where it promises one."""
    note: str = ""
    """How it was measured, where there was a choice, or why it was not."""

    @property
    def met(self) -> bool | None:
        """Whether the promise was kept; None where there is none, or nothing to tell it from."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.better == "more" else self.ratio <= self.goal


@dataclass(frozen=True)
class Turns:
    """How contenders take turns."""

    repeats: int
    least_seconds: float
    """Shorter work is repeated within a turn until it takes about this long."""

    def take(self, contenders: Mapping[str, Work]) -> dict[str, np.ndarray]:
        """Seconds of one call of each contender, float64 ``[repeats]`` by name, after one call that is not counted.

        Every repeat runs all of them, every second one in the opposite order. A contender that has to set up first
        may return its own seconds (a float) instead of being timed as a whole.
        """
        first = {name: max(_seconds(work), 1e-9) for name, work in contenders.items()}
        loops = {name: max(1, math.ceil(self.least_seconds / took)) for name, took in first.items()}
        seconds = {name: np.empty(self.repeats) for name in contenders}
        for turn in range(self.repeats):
            for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
                seconds[name][turn] = np.mean([_seconds(contenders[name]) for _ in range(loops[name])])
        return seconds


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    own = work()
    return own if isinstance(own, float) else time.perf_counter() - began


def time_row(
    part: str, name: str, seconds: np.ndarray, baseline: str, baseline_seconds: np.ndarray, **more: object
) -> Row:
    """A row of milliseconds: the ratio says how many times longer it takes."""
    return _row(part, name, seconds * 1e3, "ms", baseline, baseline_seconds * 1e3, "less", **more)


def rate_row(
    part: str, name: str, size: float, seconds: np.ndarray, baseline: str, baseline_seconds: np.ndarray, **more: object
) -> Row:
    """A row of MB/s over ``size`` bytes: the ratio says how many times faster it is."""
    return _row(part, name, size / seconds / 1e6, "MB/s", baseline, size / baseline_seconds / 1e6, "more", **more)


def pace_row(
    part: str, name: str, seconds: np.ndarray, baseline: str, baseline_seconds: np.ndarray, **more: object
) -> Row:
    """A row of steps a second, from seconds a step: the ratio says how many times faster it is."""
    return _row(part, name, 1 / seconds, "steps/s", baseline, 1 / baseline_seconds, "more", **more)


def size_row(part: str, name: str, size: float, baseline: str, baseline_size: float, **more: object) -> Row:
    """A row of MB, which needs no repeats: the ratio says how many times larger it is."""
    return figure_row(part, name, size / 1e6, "MB", baseline, baseline_size / 1e6, "less", **more)


def figure_row(
    part: str, name: str, value: float, unit: str, baseline: str, other: float, better: str, **more: object
) -> Row:
    """A row of a figure that needs no repeats."""
    return _row(part, name, np.array([value]), unit, baseline, np.array([other]), better, **more)


def missing_row(part: str, name: str, baseline: str, note: str) -> Row:
    """A row of what could not be measured here, and why."""
    return Row(part, name, None, "", baseline, None, None, None, None, 0, "more", note=note)


def _row(
    part: str,
    name: str,
    values: np.ndarray,
    unit: str,
    baseline: str,
    others: np.ndarray,
    better: str,
    goal: float | None = None,
    note: str = "",
) -> Row:
    ratios = values / others
    value, other, ratio = (float(np.median(numbers)) for numbers in (values, others, ratios))
    low, high = float(ratios.min()), float(ratios.max())
    return Row(part, name, value, unit, baseline, other, ratio, low, high, len(ratios), better, goal, note)


class StillWarm(RuntimeError):  # noqa: N818 - the files are what is wrong
    """Files that were to be read cold stay in memory on this system."""


def drop_from_memory(paths: Iterable[Path]) -> None:
    """Have the system forget the pages of files, which nobody may have mapped and touched.

    Raises
    ------
    StillWarm
        When more than a hundredth of their pages stay, or the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise StillWarm("no posix_fadvise here")
    kept = pages = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what waits to be written is kept
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        here, of = _pages_in_memory(path)
        kept, pages = kept + here, pages + of
    if kept > max(8, pages // 100):
        raise StillWarm(f"{kept} of {pages} pages stay in memory")


def _pages_in_memory(path: Path) -> tuple[int, int]:
    """How many of a file's pages are in memory, and how many it has."""
    if not (size := path.stat().st_size):
        return 0, 0
    mapped = np.memmap(path, np.uint8, "r")
    there = np.zeros(-(-size // os.sysconf("SC_PAGE_SIZE")), np.uint8)
    address = ctypes.c_void_p(mapped.ctypes.data)
    if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data)):
        raise StillWarm(f"mincore says {os.strerror(ctypes.get_errno())}")
    return int((there & 1).sum()), len(there)


def peak_of_writing(path: Path, plan: store.Plan) -> int | None:
    """Bytes that this process grows by, at most, while it writes a block; None where the system does not tell.

    To be called in a process of its own; it is here because what is imported here is small.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    store.create(path, plan)
    noise = np.random.default_rng(0)
    counts = {kind: plan.counts(f"hidden/{kind}")["token"] for kind in plan.kinds}
    # Made once; every sample is a cut of it in memory of its own, as samples come one by one from a model.
    shape = (len(plan.layers), max(int(n.max()) for n in counts.values()), plan.width)
    states_ltw = bits.from_float32(noise.standard_normal(shape, np.float32))
    with store.Writer(path) as writer, writer.block(0) as block:
        before = own_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        for sample in block.samples:
            n_image, n_text = (int(plan.samples[name][sample]) for name in ("n_image", "n_text"))
            kinds = ["image"] * n_image + ["instruction"] * n_text
            tokens = pl.DataFrame({"position": range(len(kinds)), "kind": kinds})
            cuts = {kind: states_ltw[:, : n[sample]].copy() for kind, n in counts.items()}
            block.add(sample, tokens=tokens, **cuts)
    return own_memory("VmHWM") - before


def own_memory(field: str) -> int:
    """Bytes that the system says this process has (``VmRSS``) or had at most (``VmHWM``)."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(found.split()[1]) * 1024


def in_process(work: Callable[..., Any], *given: Any) -> Any:
    """What ``work`` gives in a process of its own, whose memory nobody else has filled; both can be pickled.

    Raises
    ------
    RuntimeError
        When the process fails, or is killed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(False)
    process = context.Process(target=_sent, args=(there, work, given))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"the process of {work.__name__} that was to be measured failed") from None
    finally:
        process.join()


def _sent(answer: Any, work: Callable[..., Any], given: tuple) -> None:
    with quiet():
        answer.send(work(*given))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and summaries of what is measured out of the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
