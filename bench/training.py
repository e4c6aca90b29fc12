"""Training steps of a sweep as it takes them, timed: no point of a curve, no checkpoint, nothing saved.

What is imported here is small, for processes whose memory is measured.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import store
from bench import reference
from bench.measure import own_memory
from probes import malloc
from probes.config import SweepConfig
from probes.data import Told
from probes.learn import Job
from probes.specs import specs
from probes.study import Study, make_study, settled
from probes.targets import unit_boxes
from probes.wave import Wave

NEVER = 10**9
"""Steps between points of the error curve, and minutes between checkpoints."""
ONLY_TRAINING: dict[str, Any] = dict(l1_steps=0, watch=1, watch_every=NEVER, checkpoint=NEVER)
"""Settings of a sweep that is timed: what is timed is training, with the whole loss from the first step."""


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """All steps that were to be timed are done."""


@dataclass
class Ticks:
    """Stands in for a sweep's bar, which hears of every step: notes when it was, and ends the training."""

    steps: int
    told: Told = field(default_factory=Told)
    done: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def update(self, layers: int) -> None:
        """A step is done; 0 ``layers`` are told before the first."""
        if not layers:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.done.append(time.perf_counter())
        self.waited.append(self.told.waited)
        if len(self.done) == self.steps:
            raise Enough

    def set_description(self, text: str) -> None:
        """Nobody looks."""

    set_postfix_str = set_description


@dataclass(frozen=True)
class Trained:
    """What some steps of a wave took."""

    step: float
    """Seconds of a step."""
    waiting: float
    """Of these, seconds that the training waited for states."""
    nbytes: int
    """Bytes of states handed out."""
    busy: float
    """Seconds that reading them took, mostly beside the training."""


def train(study: Study, jobs: Sequence[Job], steps: int) -> Trained:
    """Train jobs as one wave, from untrained ones, for ``steps`` after one that is not counted."""
    ticks = Ticks(steps + 1)
    wave = Wave(study, jobs, None, ticks)  # type: ignore[arg-type]
    ticks.told = wave.feed.told
    with contextlib.suppress(Enough):
        wave.train()
    if len(ticks.done) != steps + 1:
        raise RuntimeError(f"a sweep that was to be measured took {len(ticks.done)} of {steps + 1} steps")
    step, waiting = ((of[-1] - of[0]) / steps for of in (ticks.done, ticks.waited))
    return Trained(step, waiting, ticks.told.nbytes, ticks.told.busy)


def study_of(config: SweepConfig) -> tuple[Study, list[Job]]:
    """What a sweep works on, and all its probes."""
    config, opened = settled(config), store.open(config.store)
    wanted = specs(config, opened.layers, [], int(opened.samples["n_text"].min()))
    jobs = [Job(spec, seed) for spec in wanted for seed in config.seeds]
    return make_study(config, opened, {}, jobs), jobs


def states_file(study: Study, path: Path, only: Sequence[int] | None = None) -> reference.StatesFile:
    """A store's states in a plain file, of all layers or ``only`` some; what is not written takes no disk."""
    opened = study.store
    lengths = opened.samples["n_image"].to_numpy().astype(np.int64) + opened.samples["n_text"].to_numpy()
    layers = range(len(opened.layers)) if only is None else only
    shape = (opened.plan.n_samples, len(opened.layers), int(lengths.max()), opened.plan.width)
    file = reference.StatesFile(path, shape, lengths, unit_boxes(opened.samples)[0], study.split.train)
    out = file.map("w+")
    for sample in study.split.train.tolist():
        states, _mask = opened.read([sample], [opened.layers[place] for place in layers], "all")
        out[sample, list(layers), : lengths[sample]] = states[0].view(torch.uint16).numpy()
    out.flush()
    return file


def whole_epochs(study: Study, epochs: int) -> int:
    """Steps that are timed: with the one that is not, whole epochs, or a batch would be read ahead for nobody."""
    samples = len(study.split.train)
    return max(2, epochs * (samples // min(study.config.batch, samples))) - 1


def peak_of_training(config: SweepConfig, epochs: int, several: bool) -> tuple[int, int]:
    """Most bytes of this process while it trains all probes or, without ``several``, one; and what it had before."""
    torch.set_num_threads(config.threads)
    malloc.keep_freed()
    study, jobs = study_of(config)
    before = own_memory("VmRSS")
    train(study, jobs if several else jobs[:1], whole_epochs(study, epochs))
    return own_memory("VmHWM"), before
