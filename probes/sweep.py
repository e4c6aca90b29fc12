"""``python -m probes sweep`` and ``train``: which probes are wanted, what is there of them, and the tables."""

import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from tqdm import tqdm

import store
from probes import checkpoint, gathering, malloc, provenance, trained
from probes.config import EvaluateConfig, Recipe, SweepConfig, TrainConfig
from probes.evaluate import evaluate
from probes.learn import Job
from probes.specs import left_out, one, specs
from probes.study import GB, Study, make_study, settled
from probes.wave import Wave, waves
from store.errors import Refusal
from store.places import readable


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
    for line in left_out(config, opened.layers, least):
        print(line)
    once = [spec.role in ("efficiency", "codelength") for spec in wanted]
    jobs = [
        Job(spec, seed)
        for spec, first in zip(wanted, once, strict=True)
        for seed in (config.seeds[:1] if first else config.seeds)
    ]
    if not jobs:
        raise Refusal(f"--parts {' '.join(config.parts)}: nothing of that can be trained on {opened.place}")
    run(config, opened, given, jobs)


def train(config: TrainConfig) -> None:
    """Train one probe, once per seed; see ``sweep``."""
    opened = store.open(config.store)
    spec = one(config, opened.layers)
    run(config, opened, {}, [Job(spec, seed) for seed in config.seeds])


def run(config: Recipe, opened: Any, controls: dict[str, Any], jobs: Sequence[Job]) -> None:
    """Train what is not on disk, gather all tables, print them."""
    study = make_study(settled(config), opened, controls, jobs)
    jobs = possible(study, jobs)
    provenance.begin(study, jobs)
    train_all(study, jobs)
    shutil.rmtree(config.out / trained.PARTIAL, ignore_errors=True)
    gathering.begin(study)
    for path, size in gathering.gather(config.out).items():
        print(f"{path}  {readable(size)}")
    evaluate(EvaluateConfig(config.out))


def possible(study: Study, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose share of the train split is large enough; says how many are not, and what is trained on."""
    kept = [job for job in jobs if study.possible(job)]
    if not kept:
        raise Refusal(f"{len(study.split.train)} train samples are too few for shares of them: extract more")
    if kept != list(jobs):
        print(
            f"{len(jobs) - len(kept)} probes are left out: their share of the {len(study.split.train)} train samples "
            "is less than two"
        )
    test, watched = len(study.split.test), len(study.split.watch)
    used = len(study.split.train) + test
    print(f"{len(kept)} probes, {len(study.split.train)} train and {test} test samples ({watched} of them watched)")
    if lost := study.store.plan.n_samples - used:
        print(f"{lost} samples are left out: without states, answer, split or token of some probe")
    return kept


def train_all(study: Study, jobs: Sequence[Job]) -> None:
    """Train probes wave by wave, each from its checkpoint if there is one."""
    config = study.config
    todo = [job for job in jobs if not provenance.finished(config.out, job)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} probes are finished already")
    stands = checkpoint.find(study)
    total = sum(len(job.spec.layers) for job in todo) * config.steps
    malloc.keep_freed()
    began = time.perf_counter()
    # Counted in layers × steps, so that the rate means the same for a wave of many and for one probe.
    with tqdm(total=total, unit="layer step", smoothing=0.05, disable=not total) as bar:
        told = [Wave(study, wave, stand, bar).train() for wave, stand in waves(study, todo, stands)]
    checkpoint.tidy(study, stands)
    if told:
        busy, waited = sum(cost.busy for cost in told), sum(cost.waited for cost in told)
        size = sum(cost.nbytes for cost in told) / GB
        print(
            f"{len(todo)} probes in {timedelta(seconds=round(time.perf_counter() - began))}: read {size:.2f} GB of "
            f"states, {size / max(busy, 1e-9):.2f} GB/s; training waited {waited:.1f} s for them"
        )
