"""Training proxies at the paper's sizes on made-up states: a sweep, one proxy, and plain PyTorch; and their memory.

Each runs in a process of its own, for its memory. Where all layers do not fit into what is free, as many are trained at
once as do: the row says how many, and its rate is that of one full wave of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

import store
from bench.config import PaperSizes
from bench.measure import Row, figure_row, in_process, missing_row, own_memory, pace_row
from bench.reference import StatesFile, seconds_a_step
from bench.training import ONLY_TRAINING, states_file, study_of, train
from probes import malloc
from probes.config import SweepConfig
from probes.data import ALIGNED
from probes.learn import Job
from probes.study import GB, Study
from probes.wave import BYTES_A_WEIGHT, waves, weights_of
from store import bits
from store.synthetic import synthetic_plan

TAKEN = 0.8
"""Share of the free memory that a sweep may take."""
BASE = 2e9
"""Bytes of everything that does not grow with the layers."""
SWEEP, ALONE, PLAIN = "sweep", "one proxy, our code", "one proxy, plain PyTorch"
STEPS, PEAK = "{}, steps of a proxy", "{}, peak memory"


@dataclass(frozen=True)
class Took:
    """What a contender took in its process."""

    seconds: float
    """Of a step of one proxy."""
    peak: int
    """Bytes: of the process, or on a GPU of what was allocated there."""
    note: str


def measure(sizes: PaperSizes, repeats: int, threads: int, scratch: Path) -> list[Row]:
    """The rows of this machine's GPU, or of its CPU and that a GPU's were not measured."""
    cuda = torch.cuda.is_available()
    made_up(scratch / "paper.zarr", sizes)
    config = SweepConfig(
        store=str(scratch / "paper.zarr"),
        out=scratch / "paper",
        parts=("layers",),
        seeds=(0,),
        preset=sizes.preset,
        batch=sizes.batch,
        **ONLY_TRAINING,
        threads=threads,
    )
    study, _ = study_of(config)
    middle = len(study.store.layers) // 2
    file = states_file(study, scratch / "paper.bin", [middle])
    contenders: dict[str, Callable[[], Took]] = {
        PLAIN: lambda: in_process(_plain, config, file, middle, sizes.steps),
        ALONE: lambda: in_process(_ours, config, sizes.steps, middle),
        SWEEP: lambda: in_process(_ours, config, sizes.steps, None),
    }
    took: dict[str, list[Took]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            took[name].append(contenders[name]())
    rows = _rows(_part("GPU" if cuda else "CPU"), took)
    if not cuda:
        part, why = _part("GPU"), "not measured: no GPU"
        rows += [missing_row(part, form.format(name), PLAIN, why) for form in (STEPS, PEAK) for name in (SWEEP, ALONE)]
    return rows


def _part(device: str) -> str:
    return f"proxies, paper sizes, {device}"


def _rows(part: str, took: dict[str, list[Took]]) -> list[Row]:
    seconds = {name: np.array([one.seconds for one in of]) for name, of in took.items()}
    peaks = {name: max(one.peak for one in of) / 1e9 for name, of in took.items()}
    notes = {name: of[-1].note for name, of in took.items()}
    rows = [
        pace_row(part, STEPS.format(name), seconds[name], base, seconds[base], note=notes[name])
        for name, base in ((SWEEP, PLAIN), (SWEEP, ALONE), (ALONE, PLAIN))
    ]
    return rows + [
        figure_row(part, PEAK.format(name), peaks[name], "GB", PLAIN, peaks[PLAIN], "less", note=notes[name])
        for name in (SWEEP, ALONE)
    ]


def made_up(path: Path, sizes: PaperSizes) -> None:
    """A store of noise: speed does not depend on it, so that one sample's is made once and every other is a cut."""
    n = sizes.train + 2
    layers = tuple(map(str, range(sizes.layers)))
    plan = synthetic_plan(
        n, image=sizes.image, text=sizes.text, width=sizes.width, layers=layers, codec="none", text_codec="none"
    )
    places = np.random.default_rng(0).uniform(0, 0.5, (n, 2))
    corners = {"x1": places[:, 0], "y1": places[:, 1], "x2": places[:, 0] + 0.4, "y2": places[:, 1] + 0.3}
    samples = plan.samples.with_columns(
        pl.Series("split", ["train"] * sizes.train + ["test"] * 2),
        *(pl.Series(name, of) for name, of in corners.items()),
        *(pl.lit(1).alias(name) for name in ("width", "height")),
    )
    plan = replace(plan, samples=samples)
    shape = (sizes.layers, max(sizes.image[1], sizes.text[1]), sizes.width)
    states_ltw = bits.from_float32(np.random.default_rng(1).standard_normal(shape, np.float32))
    store.create(path, plan)
    with store.Writer(path) as writer:
        for b in range(plan.n_blocks):
            with writer.block(b) as block:
                for sample in block.samples:
                    n_image, n_text = samples.row(sample, named=True)["n_image"], samples["n_text"][sample]
                    kinds = ["image"] * n_image + ["instruction"] * n_text
                    tokens = pl.DataFrame({"position": range(len(kinds)), "kind": kinds})
                    cuts = {"image": states_ltw[:, :n_image].copy(), "text": states_ltw[:, -n_text:].copy()}
                    block.add(sample, tokens=tokens, **cuts)


def bytes_a_layer(study: Study, job: Job) -> int:
    """Host memory of a layer's probe in a sweep on the CPU: weights and Adam, states, what a step keeps."""
    config, plan = study.config, study.store.plan
    longest = int((plan.samples["n_image"] + plan.samples["n_text"]).max())
    # As stored, in hand, being read and free; normalised, before and after the tokens are padded.
    states = config.batch * plan.width * longest * (3 * 2 + 4) + config.batch * plan.width * (longest + ALIGNED) * 4
    # What the queries of all heads read in each proxy layer is kept for the way back; a few more are on the way.
    read = 4 * config.batch * plan.width * config.heads * config.queries * (config.depth + 4)
    return weights_of(study, job) * BYTES_A_WEIGHT + states + read


def free_memory() -> float:
    """Bytes that the system could give; infinite where it does not tell."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _begin(config: SweepConfig) -> None:
    torch.set_num_threads(config.threads)
    malloc.keep_freed()
    # Where the free memory was misjudged, this process is to be killed, and no other.
    if (score := Path("/proc/self/oom_score_adj")).exists() and os.access(score, os.W_OK):
        score.write_text("1000")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else own_memory("VmHWM")


def _ours(config: SweepConfig, steps: int, only: int | None) -> Took:
    _begin(config)
    study, jobs = study_of(config)
    total = len(jobs)
    if only is not None:
        jobs = jobs[only : only + 1]
    elif study.device == "cpu":
        fit = int((TAKEN * free_memory() - BASE) / bytes_a_layer(study, jobs[0])) if free_memory() < 1e15 else total
        if fit < 1:
            raise RuntimeError(f"{free_memory() / 1e9:.1f} GB are free: one proxy of this size does not fit")
        room = (min(fit, total) + 0.5) * weights_of(study, jobs[0]) * BYTES_A_WEIGHT / GB
        study = replace(study, config=replace(study.config, memory=room))
    parts = [part for part, _ in waves(study, jobs)]
    took = train(study, parts[0], steps)
    note = f"{len(parts[0])} of {total} layers at once, {len(parts)} waves" if len(parts) > 1 else ""
    if only is None and not note:
        note = f"{total} layers at once"
    waited = f"waits {took.waiting / took.step:.1%} of the time for states"
    return Took(took.step / len(parts[0]), _peak(study.device), "; ".join(filter(None, (note, waited))))


def _plain(config: SweepConfig, file: StatesFile, layer: int, steps: int) -> Took:
    _begin(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A step takes seconds on a CPU, and its loading a tenth of one; a GPU would wait for it.
    workers = 2 if device == "cuda" else 0
    seconds = seconds_a_step(file, [layer], config.sizes("qformer"), config.batch, steps, workers, device)
    return Took(seconds, _peak(device), f"{workers} workers")
