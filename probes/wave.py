"""Probes that are trained together: every batch is read once, normalised once, and each stack takes a step on it.

Probes that see the same samples in the same order make a *wave*. A stack's bits do not depend on what else is in the
wave. Waves that would not fit into memory together take turns.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from probes import checkpoint, data, learn, provenance, targets, trained
from probes.boxes import iou, loss
from probes.checkpoint import Stand
from probes.data import Feed, Read, Views
from probes.learn import ANSWERED, AT_ONCE, Job, Stack, layers_of, tokens_of
from probes.predictions import frame
from probes.study import GB, Study
from probes.targets import Target
from store.errors import Refusal

LARGE = 2**18
"""Entries of a key projection from which on a probe is large for a CPU: stacks of one on all threads are twice as fast
as stacks of six at the paper's 2**21; at the pocket's 2**12 a second thread takes twice the time of one."""
BYTES_A_WEIGHT = 16
"""A weight, its gradient, and Adam's two means."""


def weights_of(study: Study, job: Job) -> int:
    """Weights of one probe."""
    config, spec = study.config, job.spec
    with torch.device("meta"):
        outputs = study.targets[spec.target].outputs
        sizes = config.sizes(spec.kind)
        model = learn.KINDS[spec.kind]([], len(spec.layers), study.store.plan.width, outputs, **sizes)
    return sum(int(np.prod(parameter.shape[1:])) for parameter in model.parameters())


def waves(study: Study, jobs: Sequence[Job], stands: Sequence[Stand] = ()) -> Iterator[tuple[list[Job], Stand | None]]:
    """Jobs that are trained together, and the checkpoint that all of them go on from, None for the start.

    They are of one share of the samples, as many as memory holds, same layers together; first those that were begun.
    """
    alike: dict[tuple, list[Job]] = {}
    for job in jobs:
        begun = next((i for i, stand in enumerate(stands) if stand.holds(job)), len(stands))
        alike.setdefault((begun, job.spec.share), []).append(job)
    weights: dict[tuple, int] = {}
    for (begun, _), group in sorted(alike.items(), key=lambda item: item[0][0]):
        stand = stands[begun] if begun < len(stands) else None
        wave, taken = [], 0
        # Probes of the same states stay together, so that no state is read for two waves.
        for job in sorted(group, key=lambda job: (job.spec.source, job.spec.layers[0])):
            if job.shape not in weights:
                weights[job.shape] = weights_of(study, job) * BYTES_A_WEIGHT
            if wave and taken + weights[job.shape] > study.config.memory * GB:
                yield wave, stand
                wave, taken = [], 0
            wave.append(job)
            taken += weights[job.shape]
        yield wave, stand


class Wave:
    """The training of some jobs together, from batch to batch; see the module."""

    def __init__(self, study: Study, jobs: Sequence[Job], stand: Stand | None, bar: tqdm):
        self.study, self.config, self.jobs, self.bar = study, study.config, list(jobs), bar
        self.start: int = 0
        self.curves: list[dict[str, Any]] = []
        order = study.store.layers
        layers = {name: layers_of(jobs, name, order) for name in study.sources}
        self.feed = Feed(study.sources, {name: found for name, found in layers.items() if found}, tokens_of(jobs))
        taught = {(job.spec.target, job.spec.labels, job.seed): study.taught(job)[0] for job in jobs}
        self.stacks = [
            Stack(part, study.store.plan.width, study.targets[part[0].spec.target], taught, self.config, study.device)
            for part in learn.stacks_of(jobs, self._most())
        ]
        self.share = jobs[0].spec.share
        self.losses: list[tuple[int, np.ndarray, list[Tensor]]] = []
        """Step, samples and losses (p, b) of every stack, of the steps that were not looked at yet."""
        if stand:
            own = {(job.spec.name, job.seed) for job in self.jobs}
            self.start = stand.step
            self.curves = [point for point in stand.curves() if (point["probe"], point["seed"]) in own]
            for stack in self.stacks:
                stack.restore(stand.state_of(stack.jobs))

    @property
    def _large(self) -> bool:
        """Whether one probe alone gives a CPU enough to do, and fills its caches."""
        return self.config.width * self.study.store.plan.width >= LARGE

    def _most(self) -> int:
        if self.study.device != "cpu":
            return 128
        if self._large:
            return 1
        # Every thread should have as much to do as the others.
        return max(1, min(AT_ONCE, -(-len(self.jobs) // self.config.threads)))

    @contextlib.contextmanager
    def _threads(self) -> Iterator[ThreadPoolExecutor]:
        """Small stacks take a thread each; large ones go one after the other, on all threads that torch may have."""
        cpu = self.study.device == "cpu"
        workers = min(self.config.threads, len(self.stacks)) if cpu and not self._large else 1
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.threads if self._large else 1)
        with ThreadPoolExecutor(workers, thread_name_prefix="stacks") as pool:
            try:
                yield pool
            finally:
                torch.set_num_threads(before)

    def views(self, read: Read) -> Views:
        """A batch as the stacks see it, prepared before they ask at the same time."""
        views = Views(self.feed, read, self.study.device, self.stacks[0].dtype)
        for stack in self.stacks:
            views.chosen(stack.spec.source, stack.spec.tokens, stack.spec.without)
        return views

    def train(self) -> data.Told:
        """Train to the end, with checkpoints; save every probe; returns what reading cost.

        Raises
        ------
        Refusal
            When a loss is not finite, before any of it is saved.
        """
        config, kept = self.config, checkpoint.Checkpoint(self.study, self.jobs)
        step_layers = sum(len(job.spec.layers) for job in self.jobs)
        self.bar.set_description(f"{len(self.jobs)} probes")
        self.bar.update(self.start * step_layers)
        train = self.study.split.shared(self.share)
        batches = self.feed.batches(train, config.batch, steps=config.steps, seed=config.order_seed, start=self.start)
        with self._threads() as pool, contextlib.closing(batches):
            for step, read in enumerate(batches, self.start):
                if step % config.watch_every == 0:
                    self.watch(pool, step)
                views = self.views(read)
                losses = list(pool.map(lambda stack: stack.train(views, step), self.stacks))  # noqa: B023
                self.losses.append((step, read.samples, losses))
                self.bar.update(step_layers)
                if step + 1 < config.steps and kept.due():
                    self.check()
                    kept.save(step + 1, self.stacks, self.curves)
            if self.start < config.steps:
                self.watch(pool, config.steps)
                kept.save(config.steps, self.stacks, self.curves)
            self.save(pool)
        kept.remove()
        return self.feed.told

    def check(self) -> None:
        """Refuse to go on where a loss is not finite. Not looked at after each step: a GPU would have to wait."""
        for step, samples, losses in self.losses:
            for stack, loss_pb in zip(self.stacks, losses, strict=True):
                wrong_pb = ~loss_pb.isfinite().cpu().numpy()
                for job, wrong_b in zip(stack.jobs, wrong_pb, strict=True):
                    if wrong_b.any():
                        self._diverged(job, step, samples[wrong_b], len(samples))
        self.losses.clear()

    def _diverged(self, job: Job, step: int, samples: np.ndarray, batch: int) -> NoReturn:
        names = self.study.store.plan.samples["sample_id"][samples].to_list()
        which = f"all {batch} samples" if len(names) == batch else f"{len(names)} of {batch} samples"
        some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        raise Refusal(
            f"the loss of probe {job.spec.name}, seed {job.seed}, is not finite at step {step} for {which} ({some}): "
            f"give a lower --lr than {self.config.lr} and another --out; nothing of it was saved"
        )

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
        self.check()
        samples = self.study.split.watch
        points = []
        for job, raw in self.answers(pool, samples).items():
            target = self.study.targets[job.spec.target]
            labels, counts = self.study.taught(job) if job.spec.labels == "control" else (target.labels, target.known)
            inside = counts[samples]
            if not inside.any():
                continue
            true = torch.from_numpy(labels[samples][inside])
            common = {"probe": job.spec.name, "seed": job.seed, "step": step, "n": int(inside.sum())}
            points += [
                common | {"metric": metric, "value": value} for metric, value in errors(target, raw[inside], true)
            ]
        self.curves += points
        self.show(points)

    def show(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Tell the bar the best probe of the moment, of those that were taught true answers."""
        honest = {job.spec.name for job in self.jobs if job.spec.labels == "true"}
        for metric, told in (("one_minus_iou", "IoU {:.3f}"), ("error", "error {:.3f}")):
            values = [(p["value"], p["probe"]) for p in points if p["metric"] == metric and p["probe"] in honest]
            if values:
                value, probe = min(values)
                shown = told.format(1 - value if metric == "one_minus_iou" else value)
                self.bar.set_postfix_str(f"best {shown} {probe}")
                return

    def save(self, pool: ThreadPoolExecutor) -> None:
        """Write every probe of the wave, with its predictions for the test split."""
        answers = {"test": (self.study.split.test, self.answers(pool, self.study.split.test))}
        if any(job.spec.role == "codelength" for job in self.jobs):
            coded = self.study.split.coded(self.share)
            answers["next"] = (coded, self.answers(pool, coded))
        for samples, of_part in answers.values():
            for job, raw_no in of_part.items():
                wrong_n = ~raw_no.isfinite().all(1).numpy()
                if wrong_n.any():
                    self._diverged(job, self.config.steps, samples[wrong_n], len(samples))
        curves = pl.DataFrame(self.curves, schema=CURVES)
        for stack in self.stacks:
            for p, job in enumerate(stack.jobs):
                predictions = pl.concat(
                    predicted(self.study, job, samples, of_part[job], part)
                    for part, (samples, of_part) in answers.items()
                    if part == "test" or job.spec.role == "codelength"
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
