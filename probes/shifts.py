"""Trained probes are asked about other stores: fresh scenes, paraphrased instructions, other data, lossy states."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import store
from probes import gathering, learn, targets, trained
from probes.data import Feed, Source, Views
from probes.learn import ANSWERED, AT_ONCE, Job, layers_of, tokens_of
from probes.panel import HELD_OUT, joined
from probes.predictions import frame
from probes.specs import ORDINARY
from store.errors import Refusal

ROOM = 4e9
"""Bytes of weights of probes that are asked together."""


def asked(on: str) -> tuple[str, str]:
    """Name and store of ``NAME=STORE``.

    Raises
    ------
    Refusal
        When it is not of that form, or the name is the held-out split's or no name for a file.
    """
    name, equals, place = on.partition("=")
    if not equals or not place or not re.fullmatch(r"[\w.-]+", name) or name == HELD_OUT:
        raise Refusal(f"--on {on!r}: give NAME=STORE, e.g. fresh=data/fresh.zarr (letters, digits and - _ . in NAME)")
    return name, place


def ask(out: Path, on: str) -> None:
    """Let the probes of a run answer for another store, and keep their answers and its samples in the run's folder.

    Asked are probes that were taught true or permuted answers. A control store (random weights, shuffled pictures) is
    asked of the probes of that control, and joins the ordinary store of its name, whose samples it must hold. Samples
    that probes were trained on are left out.

    Raises
    ------
    Refusal
        When the store lacks their layers or answers, or holds no other sample.
    """
    name, place = asked(on)
    opened = store.open(place)
    control = opened.identity.get("control", {}).get("name", ORDINARY)
    jobs = [
        job
        for job in gathering.jobs_of(out)
        if job.spec.source == control and job.spec.labels != "control" and job.spec.role != "codelength"
    ]
    if not jobs:
        raise Refusal(f"{out} holds no probe of {control} states with true answers: nothing can be asked about {place}")
    folders = {job: trained.folder_of(out, job) for job in jobs}
    making = {job: trained.read_job(folder)[1] for job, folder in folders.items()}
    first = making[jobs[0]]
    missing = [layer for job in jobs for layer in job.spec.layers if layer not in opened.layers]
    if missing:
        raise Refusal(f"{place} lacks layers {', '.join(dict.fromkeys(missing))} that probes of {out} read")
    if opened.plan.width != first["width"]:
        raise Refusal(f"states of {place} are {opened.plan.width} wide; the probes of {out} read {first['width']}")
    source, table = Source(opened, opened), opened.samples
    known_as = out / gathering.DATA / f"{name}-samples.parquet"
    if control != ORDINARY and not (
        known_as.exists() and pl.read_parquet(known_as)["sample_id"].equals(table["sample_id"], check_names=False)
    ):
        raise Refusal(
            f"--on {on}: {place} is a control; first give {name}=STORE with the ordinary store of its samples"
        )
    known = {job.spec.target: targets.make(job.spec.target, table, making[job]["target"]) for job in jobs}
    usable = source.usable_s & ~table["sample_id"].is_in(trained_on(out).to_list()).to_numpy()
    for target in known.values():
        usable &= target.known
    for tokens, without in dict.fromkeys((job.spec.tokens, job.spec.without) for job in jobs):
        usable &= source.slots(tokens, without)[1] > 0
    samples = np.flatnonzero(usable)
    if not len(samples):
        raise Refusal(f"{place} has no sample with states and an answer that the probes were not trained on")
    answers: dict[Job, torch.Tensor] = {}
    for part in portions(jobs, folders):
        answers |= answers_for(part, making, folders, source, samples)
    frames = []
    for job, raw in answers.items():
        target = known[job.spec.target]
        frames.append(frame(job, table, samples, target.answers(raw, target.labels[samples]), data=name))
    if control != ORDINARY:
        gathering.write(out / gathering.DATA / f"{name}+{control}.parquet", joined(frames))
        return
    gathering.write(out / gathering.DATA / f"{name}.parquet", joined([*frames, *floors_for(out, table, samples, name)]))
    gathering.write(known_as, gathering.plain(table))


def floors_for(out: Path, table: pl.DataFrame, samples: np.ndarray, name: str) -> Iterator[pl.DataFrame]:
    """The same boxes that the floors without training say of the run's own test split."""
    true_s4, known_s = targets.unit_boxes(table)
    floors = pl.read_parquet(out / gathering.FLOORS).filter(target="box")
    if not floors.is_empty() and known_s[samples].all():
        for row in floors.unique("probe", keep="first", maintain_order=True).iter_rows(named=True):
            answers = {side: np.full(len(samples), row[side]) for side in targets.BOX}
            answers |= {f"true_{side}": true_s4[samples, i] for i, side in enumerate(targets.BOX)}
            yield frame(gathering.floor_of(row["probe"], "box"), table, samples, answers, data=name)


def portions(jobs: Sequence[Job], folders: dict[Job, Path]) -> Iterator[list[Job]]:
    """Probes that are asked together: as many as there is room for."""
    part: list[Job] = []
    taken = 0
    for job in jobs:
        size = (folders[job] / trained.WEIGHTS).stat().st_size
        if part and taken + size > ROOM:
            yield part
            part, taken = [], 0
        part.append(job)
        taken += size
    yield part


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a trained probe."""
    try:
        return load_file(folder / trained.WEIGHTS)
    except (OSError, SafetensorError) as damage:
        raise Refusal(f"{folder / trained.WEIGHTS} is damaged ({damage}): remove {folder} and train it again") from None


def trained_on(out: Path) -> pl.Series:
    """Ids of the samples of the run's own train split."""
    samples = pl.read_parquet(out / gathering.DATA / f"{HELD_OUT}-samples.parquet")
    return samples.filter(split="train")["sample_id"]


def answers_for(
    jobs: Sequence[Job], making: dict[Job, dict], folders: dict[Job, Path], source: Source, samples: np.ndarray
) -> dict[Job, torch.Tensor]:
    """Raw outputs (n, o) of trained probes, each state read once."""
    of = jobs[0].spec.source
    feed = Feed({of: source}, {of: layers_of(jobs, of, source.store.layers)}, tokens_of(jobs))
    stacks = []
    for part in learn.stacks_of(jobs, AT_ONCE):
        spec, told = part[0].spec, making[part[0]]
        model = learn.make(
            spec.kind,
            told["sizes"],
            [job.seed for job in part],
            len(spec.layers),
            told["width"],
            told["target"]["outputs"],
        )
        model.load_state_dict(learn.stack([weights_of(folders[job]) for job in part]))
        stacks.append((part, list(dict.fromkeys(job.spec.layers for job in part)), model.eval()))
    found: dict[Job, list[torch.Tensor]] = {job: [] for job in jobs}
    bar = tqdm(total=len(samples), unit="sample", desc=f"{len(jobs)} probes")
    with bar, torch.inference_mode(), contextlib.closing(feed.batches(samples, ANSWERED)) as batches:
        for read in batches:
            views = Views(feed, read, "cpu", torch.float32)
            for part, groups, model in stacks:
                spec = part[0].spec
                raw_pbo = model(views.view(of, spec.tokens, groups, spec.keys, spec.without))
                for job, raw_bo in zip(part, raw_pbo, strict=True):
                    found[job].append(raw_bo)
            bar.update(len(read.samples))
    return {job: torch.cat(parts) for job, parts in found.items()}
