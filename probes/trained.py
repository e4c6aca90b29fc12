"""A trained probe on disk: a folder with its weights (safetensors), how it was made (JSON), and its results."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from probes import learn, targets
from probes.learn import Job
from probes.specs import Spec
from probes.stacked import Stacked, View
from store.errors import Refusal

if TYPE_CHECKING:
    from extract.encoder import Encoder, Picture

WEIGHTS = "probe.safetensors"
MAKING = "probe.json"
CURVE = "curve.parquet"
PREDICTIONS = "predictions.parquet"
AGAIN = "remove the probe's folder and run the command that trained it again"
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
    _encoders: dict[str | None, "Encoder"] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of its weights file: what ties derived arrays to it."""
        return _sha256((self.folder / WEIGHTS).read_bytes())

    def view(self, states_sltw: Tensor, mask: Tensor) -> View:
        """States as ``Store.read`` gives them, as the model reads them; ``mask`` as of ``predict_states``.

        Raises
        ------
        Refusal
            When the states have another number of layers or another width than the probe was trained on, the mask is
            not of their shape, or a sample has no token.
        """
        layers, width = len(self.spec.layers), self.making["width"]
        if states_sltw.ndim != 4 or states_sltw.shape[1] != layers or states_sltw.shape[3] != width:
            raise Refusal(
                f"probe {self.spec.name} reads states (sample, {layers} layers {', '.join(self.spec.layers)}, token, "
                f"{width}) and was given {tuple(states_sltw.shape)}"
            )
        closed_glbt = self.closed(mask, states_sltw.shape[:3])
        device = closed_glbt.device
        return View(functional.layer_norm(states_sltw.to(device).float(), (width,)).transpose(0, 1)[None], closed_glbt)

    def closed(self, mask: Tensor, shape_slt: Sequence[int]) -> Tensor:
        """A mask over states of ``shape_slt`` as a ``View`` has it: 0 where it is True, else −inf, (1, l, s, t).

        Raises
        ------
        Refusal
            When the mask is not of that shape, or closes all of a sample.
        """
        s, layers, t = shape_slt
        if mask.shape not in ((s, t), (s, layers, t)):
            raise Refusal(
                f"a mask of {tuple(mask.shape)} is none of states {tuple(shape_slt)}: give (sample, token) or (sample, "
                "layer, token)"
            )
        open_s = mask.flatten(1).any(1)
        if not open_s.all():
            raise Refusal(f"sample {int((~open_s).nonzero()[0])} has no token of kind {self.spec.tokens!r}")
        closed = torch.zeros(mask.shape).masked_fill_(~mask.cpu(), -torch.inf).to(next(self.model.parameters()).device)
        return closed.expand(1, layers, -1, -1) if mask.ndim == 2 else closed.transpose(0, 1)[None]

    @torch.inference_mode()
    def predict_states(self, states_sltw: Tensor, mask: Tensor, *, attention: bool = False) -> Any:
        """Answers for samples whose states are given.

        Parameters
        ----------
        states_sltw : Tensor
            States at ``spec.layers``, in that order, any float dtype: (sample, VLM layer, token, width).
        mask : Tensor, bool
            True at the tokens that it may read, those of kind ``spec.tokens``: (s, t), or (s, l, t) where they differ
            between layers. What is closed gets no attention, which goes elsewhere.
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
        return self.answer(self.view(states_sltw, mask), attention=attention)

    @torch.inference_mode()
    def answer(self, view: View, *, attention: bool = False) -> Any:
        """Answers to what ``view`` shows, as of ``predict_states``; for who asks again with other tokens closed."""
        found = self.model(view, attention=True) if attention else self.model(view)
        raw = (found[0] if attention else found)[0].cpu()
        answers = targets.read(self.making["target"], raw)
        return (answers, found[1][0].cpu()) if attention else answers

    def predict(
        self,
        image: "Picture",
        instruction: str,
        *,
        vlm: "Encoder | str | os.PathLike | None" = None,
        attention: bool = False,
    ) -> Any:
        """Answer for one picture and instruction: the VLM reads them once, as for a store, and the probe its states.

        Parameters
        ----------
        image
            A Pillow picture, the path of a file, or an encoded picture as bytes; it is turned upright by its EXIF.
        instruction
            What is to be edited, in words.
        vlm
            What reads the picture: an ``extract.Encoder``, or where its checkpoint lies (a folder or a hub id), or
            None: where the identity of the probe's store says. A checkpoint must be the very one of the store. It is
            loaded by the first call and kept.
        attention
            Also return the cross-attention float32 (h, q, l, t), as of ``predict_states``.

        Returns
        -------
        For a box: float32 (4,), x1, y1, x2, y2 in pixels of the upright picture, not rounded. For classes: a string.
        For a number: a float. And the attention if asked for.

        Raises
        ------
        Refusal
            When the picture or the instruction cannot be used, the VLM is not found, is another one or lacks layers,
            or the probe reads drawn tokens of stored samples.

        Examples
        --------
        >>> x1, y1, x2, y2 = probes.load(path).predict("picture.png", "Remove the leftmost ball.")    # doctest: +SKIP
        """
        from extract.encoder import upright_size

        self.refuse_drawn("answer for a picture")
        read = self.encoder(vlm).read(image, instruction, self.spec.layers, self.spec.tokens)
        found = self.predict_states(*read, attention=attention)
        answer = (found[0] if attention else found)[0]
        form = self.making["target"]["form"]
        if form == "box":
            answer = answer * torch.tensor(upright_size(image) * 2)
        elif form == "number":
            answer = float(answer)
        return (answer, found[1][0]) if attention else answer

    def refuse_drawn(self, what: str) -> None:
        """Refuse to do ``what`` with a probe that reads a matched number of drawn tokens, or does without marked ones.

        Raises
        ------
        Refusal
            When ``spec.keys`` or ``spec.without`` is set: which tokens are read is known for the samples of its own
            store only.
        """
        if self.spec.without is not None:
            raise Refusal(
                f"probe {self.spec.name} does without the tokens that derived/{self.spec.without} marks in its store "
                f"and cannot {what}: take one that reads all of them"
            )
        if self.spec.keys is not None:
            raise Refusal(
                f"probe {self.spec.name} reads {self.spec.keys} keys drawn from the tokens of its store's samples and "
                f"cannot {what}: take one that reads all of them, such as layer-{self.spec.layers[0]} or mid-prompt"
            )

    def encoder(self, vlm: "Encoder | str | os.PathLike | None" = None) -> "Encoder":
        """What reads pictures for it, loaded once; ``vlm`` and errors as of `predict`."""
        from extract.encoder import Encoder

        if isinstance(vlm, Encoder):
            return vlm
        if not (vlm is None or isinstance(vlm, str | os.PathLike)):
            raise Refusal(f"vlm={vlm!r} reads no picture: give an extract.Encoder, a folder, a hub id, or nothing")
        where = None if vlm is None else os.fspath(vlm)
        if where not in self._encoders:
            self._encoders[where] = Encoder.of(self.making["store"]["identity"], model=where)
        return self._encoders[where]


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
    told = {"spec": asdict(job.spec), "seed": job.seed, "weights": _sha256((draft / WEIGHTS).read_bytes())}
    (draft / MAKING).write_text(json.dumps(told | making, indent=1))
    for name, table in tables.items():
        table.write_parquet(draft / name)
    folder.parent.mkdir(exist_ok=True)
    draft.rename(folder)
    return folder


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_job(folder: Path) -> tuple[Job, dict[str, Any]]:
    """Which probe a folder holds, and how it was made.

    Raises
    ------
    Refusal
        When it holds none, or what it says of it is damaged.
    """
    if not (folder / MAKING).is_file():
        raise Refusal(f"{folder} holds no trained probe: {_mend(folder)}")
    try:
        making = json.loads((folder / MAKING).read_text())
        spec = making.pop("spec")
        return Job(Spec(**spec | {"layers": tuple(spec["layers"])}), making.pop("seed")), making
    except (ValueError, TypeError, KeyError, AttributeError) as failure:
        raise Refusal(f"{folder / MAKING} is damaged ({_brief(failure)}): {AGAIN}") from None


def _mend(folder: Path) -> str:
    """What to give instead of a folder without a probe."""
    if not folder.is_dir():
        return "there is no such folder; `python -m probes sweep` makes them, as OUT/proxies/NAME-seedK"
    for proxies in (folder / "proxies", folder):
        if inside := sorted(path.parent for path in proxies.glob(f"*/{MAKING}")):
            return f"it has {len(inside)} of them, give one, e.g. {inside[0]}"
    return f"it lacks {MAKING}; give one of a run, e.g. runs/probes/proxies/mid-prompt-seed0"


def _brief(failure: Exception) -> str:
    """An exception for one line of text."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def load(path: str | Path, device: str = "cpu") -> TrainedProbe:
    """The probe in folder ``path``, e.g. ``runs/probes/proxies/mid-prompt-seed0``.

    Raises
    ------
    Refusal
        When the folder holds none, or its weights are missing, damaged, or not those that it says.
    """
    folder = Path(path)
    job, making = read_job(folder)
    try:
        model = learn.make(
            job.spec.kind,
            making["sizes"],
            [job.seed],
            len(job.spec.layers),
            making["width"],
            making["target"]["outputs"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as failure:
        raise Refusal(f"{folder / MAKING} describes no probe ({_brief(failure)}): {AGAIN}") from None
    try:
        data = (folder / WEIGHTS).read_bytes()
        if _sha256(data) != making.get("weights", _sha256(data)):
            raise ValueError(f"its sha256 is not the one that {MAKING} has")
        model.load_state_dict(load_weights(data))
    except (OSError, SafetensorError, RuntimeError, ValueError) as failure:
        raise Refusal(f"{folder / WEIGHTS} is not of this probe or damaged ({_brief(failure)}): {AGAIN}") from None
    return TrainedProbe(folder, job.spec, job.seed, model.eval().to(device), making)
