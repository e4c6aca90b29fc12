"""What a run works on: stores, samples and answers, the same for all its probes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from probes import data, marked, targets
from probes.config import Recipe
from probes.data import Source, Split
from probes.learn import Job, layers_of
from probes.specs import ORDINARY
from probes.targets import Target
from store.errors import Refusal

GB = 1e9


@dataclass(frozen=True, eq=False)
class Study:
    """What a run works on."""

    config: Recipe
    sources: dict[str, Source]
    split: Split
    targets: dict[str, Target]
    """By name; the one that the settings name first."""
    types: np.ndarray
    """Types of input for the control task, int64 (s,)."""
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the derived arrays are whose tokens some probes do without, JSON-able, by name."""

    @property
    def store(self) -> Any:
        """The ordinary store."""
        return self.sources[ORDINARY].store

    @property
    def device(self) -> str:
        """Where probes are trained, ``auto`` decided."""
        return self.config.device

    def taught(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """What a probe is taught, and which samples it is scored on; see ``targets.taught``."""
        target, train = self.targets[job.spec.target], self.split.shared(job.spec.share)
        return targets.taught(target, job.spec.labels, train, self.types, job.seed)

    def possible(self, job: Job) -> bool:
        """Whether the share of the train split that a probe is to see has the two samples that training takes."""
        return round(job.spec.share * len(self.split.train)) >= 2


def settled(config: Recipe) -> Recipe:
    """The settings with ``auto`` decided: device, precision, threads, memory.

    Raises
    ------
    Refusal
        When CUDA is asked for and not there.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise Refusal("--device cuda: torch sees no CUDA device on this machine; --device cpu works everywhere")
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    precision = config.precision
    if precision == "auto":
        native = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        precision = "bfloat16" if native else "float32"
    room = 8.0
    if device == "cuda" and config.memory is None:
        room = 0.6 * torch.cuda.mem_get_info()[0] / GB
    threads = config.threads or len(os.sched_getaffinity(0))
    return replace(config, device=device, precision=precision, threads=threads, memory=config.memory or room)


def make_study(config: Recipe, opened: Any, controls: dict[str, Any], jobs: Sequence[Job]) -> Study:
    """Find the usable samples and their answers.

    Raises
    ------
    Refusal
        When there are none or fewer than a batch, or a control store lacks layers or has no sample of the store.
    """
    sources, table = data.sources_of(opened, controls), opened.samples
    usable = sources[ORDINARY].usable_s
    asked = {name: targets.make(name, table) for name in dict.fromkeys([config.target, *(j.spec.target for j in jobs)])}
    for name, target in asked.items():
        if not target.known.any():
            wanted = "true box (x1, y1, x2, y2)" if name == "box" or name.startswith("cell-") else f"value of {name}"
            raise Refusal(f"{opened.place} holds no sample with a {wanted}: there is nothing to learn")
        usable = usable & target.known
    for name, source in sources.items():
        missing = [layer for layer in layers_of(jobs, name, opened.layers) if layer not in source.store.layers]
        if missing:
            raise Refusal(f"{source.store.place} ({name}) lacks layers {', '.join(missing)}: extract them, too")
        usable = usable & source.usable_s
        if not usable.any():
            raise Refusal(f"{source.store.place} ({name}) has none of the samples of {opened.place} that can be used")
        for tokens, without in dict.fromkeys((j.spec.tokens, j.spec.without) for j in jobs if j.spec.source == name):
            # A sample without such a token has nothing to be read.
            usable = usable & (source.slots(tokens, without)[1][source.position_s] > 0)
    found = data.split(table, usable, config.watch, config.order_seed, opened.place)
    if config.batch > len(found.train):
        raise Refusal(
            f"--batch {config.batch} is more than the {len(found.train)} train samples of {opened.place} that can be "
            f"used: give --batch {len(found.train)} or less"
        )
    marks = dict.fromkeys(job.spec.without for job in jobs if job.spec.without)
    described = {name: marked.describe(opened, name) for name in marks}
    return Study(config, sources, found, asked, data.input_types(table), described)
