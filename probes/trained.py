"""A trained probe on disk: a folder with its weights (safetensors), how it was made (JSON), and its results."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from probes import learn, targets
from probes.learn import Job
from probes.specs import Spec
from probes.stacked import Stacked, View
from store.errors import Refusal

WEIGHTS = "probe.safetensors"
MAKING = "probe.json"
CURVE = "curve.parquet"
PREDICTIONS = "predictions.parquet"
PARTIAL = ".partial"
"""Folder of a run where files are written before they are renamed into place."""


@dataclass(frozen=True, eq=False)
class TrainedProbe:
    """A probe that answers: states in, boxes (or classes, or numbers) out."""

    folder: Path
    spec: Spec
    """Which layers and tokens it reads, and what it was taught."""
    seed: int
    model: Stacked
    """A stack of one, in evaluation mode."""
    making: dict[str, Any]
    """Everything that made it: store identity, samples, settings, code, versions."""

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of its weights file: what ties derived arrays to it."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()

    def view(self, states_sltw: Tensor, mask_st: Tensor) -> View:
        """States as ``Store.read`` gives them, as the model reads them.

        Raises
        ------
        Refusal
            When the states have another number of layers or another width than the probe was trained on, or a sample
            has no token.
        """
        layers, width = len(self.spec.layers), self.making["width"]
        if states_sltw.ndim != 4 or states_sltw.shape[1] != layers or states_sltw.shape[3] != width:
            raise Refusal(
                f"probe {self.spec.name} reads states (sample, {layers} layers {', '.join(self.spec.layers)}, token, "
                f"{width}) and was given {tuple(states_sltw.shape)}"
            )
        if not mask_st.any(1).all():
            raise Refusal(f"sample {int((~mask_st.any(1)).nonzero()[0])} has no token of kind {self.spec.tokens!r}")
        device = next(self.model.parameters()).device
        states = functional.layer_norm(states_sltw.to(device).float(), (width,)).transpose(0, 1)[None]
        closed = torch.zeros(mask_st.shape).masked_fill_(~mask_st.cpu(), -torch.inf).to(device)
        return View(states, closed.expand(1, layers, -1, -1))

    @torch.inference_mode()
    def predict_states(self, states_sltw: Tensor, mask_st: Tensor, *, attention: bool = False) -> Any:
        """Answers for samples whose states are given.

        Parameters
        ----------
        states_sltw : Tensor
            States at ``spec.layers``, in that order, any float dtype: (sample, VLM layer, token, width).
        mask_st : Tensor, bool
            True at the tokens that it may read: those of kind ``spec.tokens``.
        attention : bool
            Also return the cross-attention a[h, q, l, i] of every sample, float32 (s, h, q, l, t), h = (proxy layer,
            head) with the layer outermost. Only a Q-Former has one.

        Returns
        -------
        For a box: float32 (s, 4), corners in [0, 1] of the image. For classes: a list of s strings. For a number:
        float64 (s,). And the attention if asked for.

        Raises
        ------
        Refusal
            When the states are not what the probe reads, or it has no attention to show.
        """
        if attention and self.spec.kind != "qformer":
            raise Refusal(f"probe {self.spec.name} is of kind {self.spec.kind}: only a qformer has cross-attention")
        view = self.view(states_sltw, mask_st)
        found = self.model(view, attention=True) if attention else self.model(view)
        raw = (found[0] if attention else found)[0].cpu()
        answers = targets.read(self.making["target"], raw)
        return (answers, found[1][0].cpu()) if attention else answers


def folder_of(out: Path, job: Job) -> Path:
    """Where the probe of this spec and seed is kept."""
    return out / "proxies" / job.name


def save(
    out: Path, job: Job, weights: dict[str, Tensor], making: dict[str, Any], tables: dict[str, pl.DataFrame]
) -> Path:
    """Write one probe whole: its folder appears under its name only when all files are in it."""
    folder = folder_of(out, job)
    draft = out / PARTIAL / job.name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(weights, draft / WEIGHTS)
    (draft / MAKING).write_text(json.dumps({"spec": asdict(job.spec), "seed": job.seed} | making, indent=1))
    for name, table in tables.items():
        table.write_parquet(draft / name)
    folder.parent.mkdir(exist_ok=True)
    draft.rename(folder)
    return folder


def read_job(folder: Path) -> tuple[Job, dict[str, Any]]:
    """Which probe a folder holds, and how it was made.

    Raises
    ------
    Refusal
        When it holds none.
    """
    if not (folder / MAKING).exists():
        raise Refusal(f"{folder} holds no trained probe: it lacks {MAKING}")
    making = json.loads((folder / MAKING).read_text())
    spec = Spec(**(making.pop("spec")))
    return Job(Spec(**asdict(spec) | {"layers": tuple(spec.layers)}), making.pop("seed")), making


def load(path: str | Path, device: str = "cpu") -> TrainedProbe:
    """The probe in folder ``path``, e.g. ``runs/probes/proxies/mid-prompt-seed0``.

    Raises
    ------
    Refusal
        When the folder holds none.
    """
    folder = Path(path)
    job, making = read_job(folder)
    model = learn.make(
        job.spec.kind, making["sizes"], [job.seed], len(job.spec.layers), making["width"], making["target"]["outputs"]
    )
    model.load_state_dict(load_file(folder / WEIGHTS, device="cpu"))
    return TrainedProbe(folder, job.spec, job.seed, model.eval().to(device), making)
