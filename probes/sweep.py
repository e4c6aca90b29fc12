"""``python -m probes sweep`` and ``train``: many probes trained together from one read of the data.

Probes that see the same samples in the same order make a *wave*: every batch is read once, normalised once, and each
*stack* of the wave takes a step on it. A stack's bits do not depend on what else is in the wave. Waves that would not
fit into memory together take turns.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

import store
from probes import checkpoint, data, gathering, learn, memory, provenance, targets, trained
from probes.boxes import iou, loss
from probes.config import EvaluateConfig, Recipe, SweepConfig, TrainConfig
from probes.data import Feed, Read, Source, Split, Views
from probes.evaluate import evaluate
from probes.learn import ANSWERED, AT_ONCE, Job, Stack, layers_of, tokens_of
from probes.predictions import frame
from probes.specs import ORDINARY, Spec, specs
from probes.targets import Target
from store.errors import Refusal

GB = 1e9
BYTES_A_WEIGHT = 16
"""A weight, its gradient, and Adam's two means."""


@dataclass(frozen=True, eq=False)
class Study:
    """What a run works on: stores, samples and answers, the same for all its probes."""

    config: Recipe
    sources: dict[str, Source]
    split: Split
    targets: dict[str, Target]
    types: np.ndarray
    """Types of input for the control task, int64 (s,)."""
    device: str

    @property
    def store(self) -> Any:
        """The ordinary store."""
        return self.sources[ORDINARY].store

    def taught(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """What a probe is taught, and which samples it is scored on; see ``targets.taught``."""
        target, train = self.targets[job.spec.target], self.split.shared(job.spec.share)
        return targets.taught(target, job.spec.labels, train, self.types, job.seed)


def sweep(config: SweepConfig) -> None:
    """Train all probes of a sweep that are not on disk yet; then print the table.

    Raises
    ------
    Refusal
        When the store has no answers, a control store is of other samples, or ``config.out`` holds probes of another
        store or other settings.
    """
    controls = {"random-weights": config.random_weights, "shuffled-images": config.shuffled_images}
    opened = store.open(config.store)
    given = {name: store.open(path) for name, path in controls.items() if path}
    least = int(opened.samples["n_text"].min())
    wanted = specs(config, opened.layers, list(given), least)
    once = [spec.role in ("efficiency", "codelength") for spec in wanted]
    jobs = [
        Job(spec, seed)
        for spec, first in zip(wanted, once, strict=True)
        for seed in (config.seeds[:1] if first else config.seeds)
    ]
    run(config, opened, given, jobs)


def train(config: TrainConfig) -> None:
    """Train one probe, once per seed; see ``sweep``."""
    opened = store.open(config.store)
    unknown = [name for name in config.layers if name not in opened.layers]
    if unknown or not config.layers:
        raise Refusal(f"--layers {' '.join(unknown)}: the store holds {', '.join(opened.layers)}; name one or more")
    alone = len(config.layers) == 1 and config.labels == "true"
    name = f"{'layer' if alone else config.labels if config.labels != 'true' else 'joint'}-{'+'.join(config.layers)}"
    name += "" if config.tokens == "all" else f"-{config.tokens}"
    role = "layer" if alone else "control" if config.labels != "true" else "other"
    spec = Spec(name, role, tuple(config.layers), config.tokens, config.probe, config.target, config.labels)
    run(config, opened, {}, [Job(spec, seed) for seed in config.seeds])


def run(config: Recipe, opened: Any, controls: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Train what is not on disk, gather all tables, print them."""
    config = settled(config)
    study = make_study(config, opened, controls, jobs)
    provenance.begin(study, jobs)
    todo = [job for job in jobs if not provenance.finished(config.out, job)]
    plan = list(waves(study, todo))
    total = sum(len(job.spec.layers) for job in todo) * config.steps
    memory.keep()
    # Counted in layers × steps, so that the rate means the same for a wave of many and for one probe.
    with tqdm(total=total, unit="layer step", smoothing=0.05, disable=not total) as bar:
        told = [Wave(study, wave, bar).train() for wave in plan]
    if told:
        busy, waited = sum(one.busy for one in told), sum(one.waited for one in told)
        size = sum(one.nbytes for one in told) / GB
        print(
            f"read {size:.2f} GB of states, {size / max(busy, 1e-9):.2f} GB/s; training waited {waited:.1f} s for them"
        )
    gathering.begin(study)
    gathering.gather(config.out)
    evaluate(EvaluateConfig(config.out))


def settled(config: Recipe) -> Recipe:
    """The settings with ``auto`` decided: device, precision, threads, memory."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise Refusal("--device cuda: torch sees no CUDA device on this machine; --device cpu works everywhere")
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" else "float32"
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
        When there are none, or a control store lacks layers or has no sample of the store.
    """
    sources, table = data.sources_of(opened, controls), opened.samples
    usable = sources[ORDINARY].usable_s
    asked = {name: targets.make(name, table) for name in dict.fromkeys(job.spec.target for job in jobs)}
    for name, target in asked.items():
        if not target.known.any():
            wanted = "true box (x1, y1, x2, y2)" if name == "box" or name.startswith("cell-") else f"value of {name}"
            raise Refusal(f"the store holds no sample with a {wanted}: there is nothing to learn")
        usable = usable & target.known
    for name, source in sources.items():
        missing = [layer for layer in layers_of(jobs, name, opened.layers) if layer not in source.store.layers]
        if missing:
            raise Refusal(f"{source.store.place} ({name}) lacks layers {', '.join(missing)}: extract them, too")
        usable = usable & source.usable_s
        if not usable.any():
            raise Refusal(f"{source.store.place} ({name}) has none of the samples of {opened.place}")
        for tokens in dict.fromkeys(job.spec.tokens for job in jobs if job.spec.source == name):
            # A sample without such a token has nothing to be read.
            usable = usable & (source.slots(tokens)[1][source.position_s] > 0)
    found = data.split(table, usable, config.watch, config.order_seed)
    return Study(config, sources, found, asked, data.input_types(table), config.device)


def weights_of(study: Study, job: Job) -> int:
    """Weights of one probe."""
    config, spec = study.config, job.spec
    with torch.device("meta"):
        outputs = study.targets[spec.target].outputs
        sizes = config.sizes(spec.kind)
        model = learn.KINDS[spec.kind]([], len(spec.layers), study.store.plan.width, outputs, **sizes)
    return sum(int(np.prod(parameter.shape[1:])) for parameter in model.parameters())


def waves(study: Study, jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that are trained together: of one share of the samples, as many as memory holds, same layers together."""
    by_share: dict[float, list[Job]] = {}
    for job in jobs:
        by_share.setdefault(job.spec.share, []).append(job)
    weights: dict[tuple, int] = {}
    for group in by_share.values():
        wave, taken = [], 0
        # Probes of the same states stay together, so that no state is read for two waves.
        for job in sorted(group, key=lambda job: (job.spec.source, job.spec.layers[0])):
            if job.shape not in weights:
                weights[job.shape] = weights_of(study, job) * BYTES_A_WEIGHT
            if wave and taken + weights[job.shape] > study.config.memory * GB:
                yield wave
                wave, taken = [], 0
            wave.append(job)
            taken += weights[job.shape]
        yield wave


class Wave:
    """The training of some jobs together, from batch to batch; see the module."""

    def __init__(self, study: Study, jobs: Sequence[Job], bar: tqdm):
        self.study, self.config, self.jobs, self.bar = study, study.config, list(jobs), bar
        order = study.store.layers
        layers = {name: layers_of(jobs, name, order) for name in study.sources}
        self.feed = Feed(study.sources, {name: found for name, found in layers.items() if found}, tokens_of(jobs))
        taught = {(job.spec.target, job.spec.labels, job.seed): study.taught(job)[0] for job in jobs}
        self.stacks = [
            Stack(part, study.store.plan.width, study.targets[part[0].spec.target], taught, self.config, study.device)
            for part in learn.stacks_of(jobs, self._most())
        ]
        self.share = jobs[0].spec.share
        self.curves: list[dict] = []
        self.best = ""

    def _most(self) -> int:
        if self.study.device != "cpu":
            return 128
        # Every thread should have as much to do as the others.
        return max(1, min(AT_ONCE, -(-len(self.jobs) // self.config.threads)))

    @contextlib.contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        """Stacks take a thread each; where there are fewer stacks than threads, torch has the others."""
        workers = min(self.config.threads, len(self.stacks)) if self.study.device == "cpu" else 1
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, self.config.threads // workers))
        with ThreadPoolExecutor(workers, thread_name_prefix="stacks") as pool:
            try:
                yield pool
            finally:
                torch.set_num_threads(before)

    def views(self, read: Read) -> Views:
        """A batch as the stacks see it, prepared before they ask at the same time."""
        views = Views(self.feed, read, self.study.device, self.stacks[0].dtype)
        for stack in self.stacks:
            views.chosen(stack.spec.source, stack.spec.tokens)
        return views

    def train(self) -> data.Told:
        """Train to the end, with checkpoints; save every probe; returns what reading cost."""
        config, kept = self.config, checkpoint.Checkpoint(self.config, self.jobs)
        start, self.curves = kept.restore(self.stacks)
        step_layers = sum(len(job.spec.layers) for job in self.jobs)
        self.bar.update(start * step_layers)
        train = self.study.split.shared(self.share)
        batches = self.feed.batches(train, config.batch, steps=config.steps, seed=config.order_seed, start=start)
        with self._threads() as pool, contextlib.closing(batches):
            for step, read in enumerate(batches, start):
                if step % config.watch_every == 0:
                    self.watch(pool, step)
                views = self.views(read)
                list(pool.map(lambda stack: stack.train(views, step), self.stacks))  # noqa: B023
                self.bar.update(step_layers)
                if kept.due(step + 1):
                    kept.save(step + 1, self.stacks, self.curves)
            if start < config.steps:
                self.watch(pool, config.steps)
                kept.save(config.steps, self.stacks, self.curves)
            self.save(pool)
        kept.remove()
        return self.feed.told

    def answers(self, pool: ThreadPoolExecutor, samples: np.ndarray) -> dict[Job, Tensor]:
        """Raw outputs (n, o) of every probe for samples, in their order."""
        found: dict[Job, list[Tensor]] = {job: [] for job in self.jobs}
        with contextlib.closing(self.feed.batches(samples, ANSWERED)) as batches:
            for read in batches:
                views = self.views(read)
                for stack, raw_pbo in zip(self.stacks, pool.map(lambda s: s.answer(views), self.stacks), strict=True):  # noqa: B023
                    for job, raw_bo in zip(stack.jobs, raw_pbo, strict=True):
                        found[job].append(raw_bo)
        return {job: torch.cat(parts) for job, parts in found.items()}

    def watch(self, pool: ThreadPoolExecutor, step: int) -> None:
        """A point of every curve: the loss on watched samples against what is so."""
        samples = self.study.split.watch
        points = []
        for job, raw in self.answers(pool, samples).items():
            target = self.study.targets[job.spec.target]
            labels, counts = self.study.taught(job) if job.spec.labels == "control" else (target.labels, target.known)
            inside = counts[samples]
            if not inside.any():
                continue
            true = torch.from_numpy(labels[samples][inside])
            points += [
                {
                    "probe": job.spec.name,
                    "seed": job.seed,
                    "step": step,
                    "metric": metric,
                    "value": value,
                    "n": int(inside.sum()),
                }
                for metric, value in errors(target, raw[inside], true)
            ]
        self.curves += points
        told = {(p["probe"], p["seed"]): p["value"] for p in points if p["metric"] == "one_minus_iou"}
        best = min(
            told or {(p["probe"], p["seed"]): p["value"] for p in points}, key=lambda key: (told or {}).get(key, 0)
        )
        if told:
            self.bar.set_postfix_str(f"best IoU {1 - told[best]:.3f} {best[0]}")
        self.bar.set_description(f"{len(self.jobs)} probes")

    def save(self, pool: ThreadPoolExecutor) -> None:
        """Write every probe of the wave, with its predictions for the test split."""
        answers = {"test": (self.study.split.test, self.answers(pool, self.study.split.test))}
        if any(job.spec.role == "codelength" for job in self.jobs):
            coded = self.study.split.coded(self.share)
            answers["next"] = (coded, self.answers(pool, coded))
        curves = pl.DataFrame(self.curves, schema=CURVES)
        for stack in self.stacks:
            for p, job in enumerate(stack.jobs):
                if provenance.finished(self.config.out, job):
                    continue
                parts = [part for part in answers if part == "test" or job.spec.role == "codelength"]
                predictions = pl.concat(
                    [predicted(self.study, job, *answers[part][:1], answers[part][1][job], part) for part in parts]
                )
                curve = curves.filter(probe=job.spec.name, seed=job.seed)
                making = provenance.making(self.study, job)
                tables = {trained.CURVE: curve, trained.PREDICTIONS: predictions}
                trained.save(self.config.out, job, stack.take(p), making, tables)


CURVES = {
    "probe": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "n": pl.Int64,
}


def errors(target: Target, raw: Tensor, true: Tensor) -> Iterator[tuple[str, float]]:
    """Points of the curves: the full loss, whatever the step; for boxes also 1 − IoU."""
    if target.form == "box":
        said = targets.decode_box(raw).clamp(0, 1)
        yield "error", float(loss(said, true, step=1, l1_steps=0).mean())
        yield "one_minus_iou", float(1 - iou(said, true).mean())
    else:
        yield "error", float(target.loss(raw[None], true[None], 0, 0).mean())


def predicted(study: Study, job: Job, samples: np.ndarray, raw: Tensor, part: str) -> pl.DataFrame:
    """A probe's predictions for samples of the store, those that count; columns as ``probes`` says."""
    target = study.targets[job.spec.target]
    labels, counts = study.taught(job)
    if job.spec.labels == "permuted":
        labels = target.labels
    inside = counts[samples]
    answers = target.answers(raw[inside], labels[samples[inside]])
    return frame(job, study.store.samples, samples[inside], answers, part=part, watched=study.split.watch)
