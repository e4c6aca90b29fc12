"""Two stages from one pass of the VLM: its states condition the editor, and the proxy finds the box in them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from edit.conditions import Conditioning, condition
from edit.editor import Editor
from edit.overlay import Overlay, rescaled
from edit.train import LORA_SETTINGS, LORA_WEIGHTS
from extract.encoder import Encoder
from extract.model import file_hash
from probes.trained import TrainedProbe
from store.errors import Refusal

ADAPTER = "overlay"


@dataclass(frozen=True)
class Edited:
    """An edited picture, and how it came about."""

    picture: Image.Image
    box: tuple[float, float, float, float] | None
    """x1, y1, x2, y2 in pixels of the picture; null if none was drawn."""
    read: str
    """What the VLM read as the instruction."""


@dataclass(frozen=True)
class TwoStage:
    """The VLM, the proxy, the editor with its LoRA.

    The VLM sees the clean picture; the autoencoder the one with the box on it.
    """

    encoder: Encoder
    editor: Editor
    conditioning: Conditioning = field(default_factory=Conditioning)
    proxy: TrainedProbe | None = None
    """Finds the box; null where none is drawn or boxes are given."""
    overlay: Overlay | None = None
    """As the LoRA was trained; null edits without a box."""
    lora: str | None = None
    """The sha256 (hex) of the LoRA's weights."""

    def with_lora(self, folder: Path) -> Self:
        """The same with the LoRA of a folder, and boxes drawn as it was trained to see them."""
        settings = lora_settings(folder)
        self.editor.pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS, adapter_name=ADAPTER)
        return replace(self, overlay=Overlay.of(settings["overlay"]), lora=file_hash(folder / LORA_WEIGHTS))

    @contextmanager
    def without_lora(self, without: bool = True) -> Iterator[None]:
        """The editor as it is, within; its LoRA counts again afterwards."""
        transformer = self.editor.pipeline.transformer
        if without and self.overlay is not None:
            transformer.disable_adapters()
        try:
            yield
        finally:
            if without and self.overlay is not None:
                transformer.enable_adapters()

    def __call__(
        self,
        picture: Image.Image,
        instruction: str,
        seed: int = 0,
        box: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> Edited:
        """Edit one picture.

        Parameters
        ----------
        picture
            RGB, upright.
        instruction
            What is to be edited, in words.
        seed
            Of the editor's noise.
        box
            To draw in place of the proxy's.
        steps
            Denoising steps; the editor's own number if not given.
        """
        asks = self.overlay is not None and box is None
        if asks and self.proxy is None:
            raise Refusal("there is nothing to find the box: give a proxy, or a box")
        made = condition(self.encoder, self.conditioning, picture, instruction, self.proxy.spec.layers if asks else ())
        if asks:
            states = made.seen.tokens(self.proxy.spec.layers, self.proxy.spec.tokens)
            mask = torch.ones(1, states.shape[1], dtype=torch.bool)
            share = self.proxy.predict_states(states[None], mask)[0]
            box = (share * torch.tensor(picture.size * 2)).tolist()
        seen = self.editor.resized(picture)
        if self.overlay is not None:
            seen = self.overlay.draw(seen, rescaled(box, picture.size, seen.size))
        drawn = None if self.overlay is None else tuple(float(value) for value in box)
        edited = self.editor.edit(seen, made.states, seed, steps)
        return Edited(edited.resize(picture.size, Image.Resampling.LANCZOS), drawn, made.read)


def lora_settings(folder: Path) -> dict[str, Any]:
    """How the LoRA in a folder was trained.

    Raises
    ------
    Refusal
        There is none, or it does not say how boxes are to be drawn.
    """
    if missing := [name for name in (LORA_WEIGHTS, LORA_SETTINGS) if not (folder / name).is_file()]:
        raise Refusal(f"{folder} has no {missing[0]}: give the --out of `python -m edit train`")
    try:
        settings = json.loads((folder / LORA_SETTINGS).read_text())
        Overlay.of(settings["overlay"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{folder / LORA_SETTINGS} is damaged ({error}): train again") from error
    return settings
