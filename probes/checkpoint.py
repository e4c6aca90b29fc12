"""The checkpoint of a wave: every stack's weights and optimizer state, the curves, and the step."""

import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
from safetensors.torch import load_file, save_file

from probes.config import Recipe
from probes.learn import Job, Stack
from store.places import write_file
from store.plan import hash_json

FOLDER = "checkpoint"
STEP = "step.json"


class Checkpoint:
    """Where one wave of a run keeps how far it is; a run has one wave at a time, and so one checkpoint."""

    def __init__(self, config: Recipe, jobs: Sequence[Job]):
        self.folder, self.minutes, self.steps = config.out / FOLDER, config.checkpoint, config.steps
        named = [[asdict(job.spec), job.seed] for job in jobs]
        self.key = hash_json([named, config.settings, config.precision])
        self.saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time to save; the end is saved by itself."""
        return step < self.steps and time.monotonic() - self.saved > 60 * self.minutes

    def restore(self, stacks: Sequence[Stack]) -> tuple[int, list[dict[str, Any]]]:
        """Bring stacks to where the checkpoint was; the step they are at and the curves, or (0, []) without one."""
        if not (self.folder / STEP).exists():
            return 0, []
        told = json.loads((self.folder / STEP).read_text())
        if told["key"] != self.key:
            return 0, []
        for i, stack in enumerate(stacks):
            stack.restore(load_file(self.folder / f"{told['step']}-{i}.safetensors"))
        return told["step"], pl.read_parquet(self.folder / f"{told['step']}.parquet").to_dicts()

    def save(self, step: int, stacks: Sequence[Stack], curves: list[dict[str, Any]]) -> None:
        """Keep this step; the one before goes when this is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {STEP, f"{step}.parquet"}
        for i, stack in enumerate(stacks):
            names.add(f"{step}-{i}.safetensors")
            save_file(
                {name: value.contiguous() for name, value in stack.state().items()},
                self.folder / f"{step}-{i}.safetensors",
            )
        table = io.BytesIO()
        pl.DataFrame(curves, infer_schema_length=None).write_parquet(table)
        write_file(self.folder / f"{step}.parquet", table.getvalue())
        write_file(self.folder / STEP, json.dumps({"key": self.key, "step": step}).encode())
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()
        self.saved = time.monotonic()

    def remove(self) -> None:
        """The wave is done and its probes are on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
