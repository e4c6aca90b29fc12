"""A trained proxy on disk: a folder with its weights (safetensors), how it was made (JSON), and its results."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.qformer import QFormer
from probes.specs import Spec
from store.errors import Refusal

WEIGHTS = "proxy.safetensors"
MAKING = "proxy.json"
PARTIAL = ".partial"
"""Folder of a run where files are written before they are renamed into place."""


@dataclass(frozen=True, eq=False)
class TrainedProxy:
    """A proxy that answers: states in, boxes out."""

    spec: Spec
    """Which layers and tokens it reads."""
    seed: int
    model: QFormer
    """P = 1, in evaluation mode."""
    making: dict[str, Any]
    """Everything that made it: store identity, samples, settings."""

    @torch.no_grad()
    def predict_states(self, states_sltw: Tensor, mask_st: Tensor, *, attention: bool = False):
        """Boxes of samples whose states are given.

        Parameters
        ----------
        states_sltw : Tensor
            States at ``spec.layers``, in that order, any float dtype: (sample, VLM layer, token, width).
        mask_st : Tensor, bool
            True at the tokens that it may read: those of kind ``spec.tokens``.
        attention : bool
            Also return the cross-attention a[h, q, l, i] of every sample: (s, h, q, l, t), h = (proxy layer, head).

        Returns
        -------
        boxes_s4 : Tensor, float32
            Corners in [0, 1] of the image; and the attention if asked for.

        Raises
        ------
        Refusal
            When the states have another number of layers or another width than the proxy was trained on.
        """
        layers, width = self.model.norms.gain.shape[1:]
        if states_sltw.ndim != 4 or states_sltw.shape[1] != layers or states_sltw.shape[3] != width:
            raise Refusal(
                f"proxy {self.spec.name} reads states (sample, {layers} layers {', '.join(self.spec.layers)}, token, "
                f"{width}) and was given {tuple(states_sltw.shape)}"
            )
        answer = self.model(states_sltw.float()[None], mask_st[None], attention=attention)
        if not attention:
            return answer[0].clamp(0, 1)
        return answer[0][0].clamp(0, 1), answer[1][0]


def folder_of(out: Path, spec: Spec, seed: int) -> Path:
    """Where the proxy of this spec and seed is kept."""
    return out / "proxies" / f"{spec.name}-seed{seed}"


def save(
    out: Path,
    spec: Spec,
    seed: int,
    weights: dict[str, Tensor],
    making: dict[str, Any],
    tables: dict[str, pl.DataFrame],
) -> Path:
    """Write one proxy whole: its folder appears under its name only when all files are in it."""
    folder = folder_of(out, spec, seed)
    draft = out / PARTIAL / folder.name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(weights, draft / WEIGHTS)
    (draft / MAKING).write_text(json.dumps({"spec": asdict(spec), "seed": seed} | making, indent=1))
    for name, table in tables.items():
        table.write_parquet(draft / f"{name}.parquet")
    folder.parent.mkdir(exist_ok=True)
    draft.rename(folder)
    return folder


def load(path: str | Path, device: str = "cpu") -> TrainedProxy:
    """The proxy in folder ``path``, e.g. ``runs/probes/proxies/mid-prompt-seed0``.

    Raises
    ------
    Refusal
        When there is no proxy.
    """
    path = Path(path)
    if not (path / MAKING).exists():
        raise Refusal(
            f"{path} holds no {MAKING}: give the folder of one proxy, like runs/probes/proxies/mid-prompt-seed0"
        )
    making = json.loads((path / MAKING).read_text())
    spec = Spec(**making["spec"] | {"layers": tuple(making["spec"]["layers"])})
    weights = load_file(path / WEIGHTS, device=device)
    vlm_width = weights["norms.gain"].shape[-1]
    model = QFormer(1, len(spec.layers), vlm_width, **making["sizes"], seed=making["seed"])
    model.load_state_dict(weights)
    return TrainedProxy(spec, making["seed"], model.to(device).eval(), making)
