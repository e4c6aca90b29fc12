"""Taking turns, so that drift cancels in the ratio; and the row that comes of it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    """What of the project it is about."""
    name: str
    """What was measured."""
    value: float
    """Median over the repeats, in ``unit``."""
    unit: str
    baseline: str
    """What it is compared with."""
    baseline_value: float
    ratio: float
    """Median over the repeats of value / baseline, each of one turn."""
    low: float
    high: float
    repeats: int
    better: Literal["less", "more"]
    """Whether a smaller or a larger ratio is good."""


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


def time_row(part: str, name: str, seconds: np.ndarray, baseline: str, baseline_seconds: np.ndarray) -> Row:
    """A row of milliseconds: the ratio says how many times longer it takes."""
    return _row(part, name, seconds * 1e3, "ms", baseline, baseline_seconds * 1e3, "less")


def rate_row(
    part: str, name: str, size: float, seconds: np.ndarray, baseline: str, baseline_seconds: np.ndarray
) -> Row:
    """A row of MB/s over ``size`` bytes: the ratio says how many times faster it is."""
    return _row(part, name, size / seconds / 1e6, "MB/s", baseline, size / baseline_seconds / 1e6, "more")


def size_row(part: str, name: str, size: float, baseline: str, baseline_size: float) -> Row:
    """A row of MB, which needs no repeats: the ratio says how many times larger it is."""
    return _row(part, name, np.array([size / 1e6]), "MB", baseline, np.array([baseline_size / 1e6]), "less")


def _row(part: str, name: str, values: np.ndarray, unit: str, baseline: str, others: np.ndarray, better: str) -> Row:
    ratios = values / others
    middle = (float(np.median(numbers)) for numbers in (values, others, ratios))
    value, other, ratio = middle
    return Row(
        part, name, value, unit, baseline, other, ratio, float(ratios.min()), float(ratios.max()), len(ratios), better
    )
