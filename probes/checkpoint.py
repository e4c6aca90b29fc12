"""Checkpoints: how far the training of some probes is, so that a run that was stopped goes on from there.

A *stand* is a folder with the weights and optimizer states of some jobs after one step. It appears under its name only
when all of it is written, with the checksums of its files. A probe is taken out of it by name, so a run with other
threads, other memory or fewer probes left goes on from it all the same.
"""

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes import provenance
from probes.learn import Job, Stack
from probes.study import Study
from store.places import as_refusal, crc32c_of
from store.plan import hash_json

FOLDER = "checkpoint"
STAND = "stand.json"
CURVES = "curves.parquet"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a file that is not whole may raise."""
DRAFT = ".draft"
"""Folder in which a stand is written before it gets its name."""


def key_of(study: Study) -> str:
    """What must be the same for weights to be trained on: settings, precision, store, samples, tokens left out."""
    return hash_json([study.config.settings, provenance.store_of(study), *study.left_out.values()])


def name_of(job: Job) -> str:
    """A name that is the job's own, whatever else it has in common with others."""
    return f"{job.name}-{hash_json([asdict(job.spec), job.seed])[:12]}"


@dataclass(frozen=True, eq=False)
class Stand:
    """Some probes after a step, on disk."""

    folder: Path
    step: int
    places: dict[str, tuple[str, int]]
    """Name of a job → its file, and its place in the stacked tensors there."""

    def holds(self, job: Job) -> bool:
        """Whether it has this probe."""
        return name_of(job) in self.places

    def state_of(self, jobs: Sequence[Job]) -> dict[str, Tensor]:
        """``Stack.state`` of a stack of these jobs."""
        parts: dict[str, list[Tensor]] = {}
        for job in jobs:
            file, p = self.places[name_of(job)]
            with safe_open(self.folder / file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no mapping
                    tensor = stored.get_slice(name)
                    parts.setdefault(name, []).append(
                        tensor[p : p + 1] if tensor.get_shape() else stored.get_tensor(name)
                    )
        return {name: torch.cat(values) if values[0].ndim else values[0] for name, values in parts.items()}

    def curves(self) -> list[dict[str, Any]]:
        """The points of its probes' curves until now."""
        return pl.read_parquet(self.folder / CURVES).to_dicts()


def find(study: Study) -> list[Stand]:
    """The whole stands of a run's folder, the furthest first; says which are damaged, and leaves them out."""
    found, key = [], key_of(study)
    for folder in sorted((study.config.out / FOLDER).glob("[!.]*")):
        try:
            told = json.loads((folder / STAND).read_text())
            for name, checksum in told["checksums"].items():
                if checksum_of(folder / name) != checksum:
                    raise ValueError(f"{name} fails its checksum")
            if told["key"] == key:
                places = {job: (file, p) for file, jobs in told["jobs"].items() for p, job in enumerate(jobs)}
                found.append(Stand(folder, told["step"], places))
        except (OSError, *DAMAGED) as damage:
            print(f"{folder} is damaged ({damage}): its probes are trained from the start", file=sys.stderr)
    return sorted(found, key=lambda stand: -stand.step)


def checksum_of(path: Path) -> str:
    """CRC-32C of a file, 8 hex digits."""
    return f"{crc32c_of(np.memmap(path, np.uint8, 'r')) if path.stat().st_size else 0:08x}"


def tidy(study: Study, found: Sequence[Stand]) -> None:
    """Remove what nothing can go on from any more: of all that is there, stands that hold an unfinished probe stay."""
    out = study.config.out
    done = {path.name for path in (out / "proxies").glob("*")}
    kept = {stand.folder for stand in found if {name.rpartition("-")[0] for name in stand.places} - done}
    for path in (out / FOLDER).glob("*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not empty, or was never there
        (out / FOLDER).rmdir()


class Checkpoint:
    """Where one wave keeps how far it is."""

    def __init__(self, study: Study, jobs: Sequence[Job]):
        self.folder, self.key = study.config.out / FOLDER, key_of(study)
        self.minutes, self.names = study.config.checkpoint, [name_of(job) for job in jobs]
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved > 60 * self.minutes

    def save(self, step: int, stacks: Sequence[Stack], curves: list[dict[str, Any]]) -> None:
        """Keep this step; stands of the same probes before it go when this is whole.

        Raises
        ------
        Refusal
            When the disk is full.
        """
        draft, target = self.folder / DRAFT, self.folder / f"{hash_json(self.names)[:12]}-{step}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            jobs = {}
            for i, stack in enumerate(stacks):
                jobs[f"{i}.safetensors"] = [name_of(job) for job in stack.jobs]
                state = {name: value.contiguous() for name, value in stack.state().items()}
                save_file(state, draft / f"{i}.safetensors")
            table = io.BytesIO()
            pl.DataFrame(curves, infer_schema_length=None).write_parquet(table)
            (draft / CURVES).write_bytes(table.getvalue())
            told = {"key": self.key, "step": step, "jobs": jobs}
            told["checksums"] = {name: checksum_of(draft / name) for name in (*jobs, CURVES)}
            (draft / STAND).write_text(json.dumps(told))
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
        except OSError as failure:
            raise as_refusal(failure, target) from failure
        self._drop(target)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """The probes of the wave are on disk."""
        self._drop(None)

    def _drop(self, keep: Path | None) -> None:
        """Remove stands that hold no other probes than the wave's."""
        for path in self.folder.glob(f"*/{STAND}"):
            with contextlib.suppress(OSError, *DAMAGED):  # what is damaged goes when the run is done
                held = {name for jobs in json.loads(path.read_text())["jobs"].values() for name in jobs}
                if path.parent != keep and held <= set(self.names):
                    shutil.rmtree(path.parent, ignore_errors=True)
