"""A pipeline that draws the scene, and an editor that harmonizes its odd object."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image
from transformers import AutoConfig

from edit.editor import Editor
from edit.recipe.checkpoints import Checkpoint
from edit.recipe.stages import Given, Made, Work
from extract.capture import single_pass
from extract.families import family_of
from extract.model import load_model, load_processor
from extract.sequence import Conditioner, conditioner_for
from store.errors import Refusal

LAYER = "final"


@dataclass(frozen=True)
class DiffusionGenerator:
    """A diffusers text-to-image pipeline that draws the written scene."""

    found: Checkpoint
    side: int
    steps: int | None
    device: torch.device

    def describe(self) -> dict:
        """The pipeline's files, the size and the steps."""
        return {"model": self.found.identity, "side": self.side, "steps": self.steps}

    def load(self) -> Work:
        """The pipeline on its device.

        Raises
        ------
        Refusal
            Diffusers knows no text-to-image pipeline of that kind, or lacks files of it.
        """
        try:
            pipeline = AutoPipelineForText2Image.from_pretrained(
                self.found.folder, dtype=torch.bfloat16, use_safetensors=True
            ).to(self.device)
        except (ValueError, OSError, AttributeError) as error:
            raise Refusal(
                f"--generator {self.found.name!r} is no text-to-image pipeline that diffusers loads: {error}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        steps = {} if self.steps is None else {"num_inference_steps": self.steps}

        @torch.inference_mode()
        def draw(given: Given) -> Made:
            generator = torch.Generator("cpu").manual_seed(given.seed)
            size = {"width": self.side, "height": self.side}
            picture = pipeline(prompt=given.told["scene"], generator=generator, **size, **steps).images[0]
            return Made(pictures={"drawn": picture})

        return draw


@dataclass(frozen=True)
class EditorHarmonizer:
    """An editor that follows the written edit, conditioned on the last layer of a vision-language model."""

    found: Checkpoint
    conditioner: Checkpoint
    conditioning: Literal["native", "edit"]
    steps: int | None
    device: torch.device

    def describe(self) -> dict[str, Any]:
        """Both models' files, the prompt and the steps."""
        return {
            "model": self.found.identity,
            "conditioner": self.conditioner.identity,
            "conditioning": self.conditioning,
            "template": self._sequence().template,
            "steps": self.steps,
        }

    def _sequence(self) -> Conditioner:
        config = AutoConfig.from_pretrained(self.conditioner.folder)
        positions = family_of(config).own_positions
        return conditioner_for(load_processor(self.conditioner.folder), config, self.conditioning, positions)

    def load(self) -> Work:
        """Both models on the device (raises `Refusal` where the editor reads other states than the model gives)."""
        editor = Editor.load(self.found.folder, device=self.device)
        model, sequence = load_model(self.conditioner.folder, self.device), self._sequence()
        wanted = editor.pipeline.transformer.config.joint_attention_dim
        if wanted != (width := model.config.get_text_config().hidden_size):
            raise Refusal(
                f"--harmonizer {self.found.name!r} reads states of width {wanted}, --conditioner "
                f"{self.conditioner.name!r} gives {width}: name the model that the editor was trained with"
            )

        def harmonize(given: Given) -> Made:
            picture = given.picture("drawn")
            states_tw = states_of(model, sequence, picture, given.told["edit"])
            return Made(pictures={"harmonized": editor.edit(picture, states_tw, given.seed, self.steps)})

        return harmonize


@torch.inference_mode()
def states_of(model, sequence: Conditioner, picture: Image.Image, instruction: str) -> torch.Tensor:
    """The last layer's states ``[t, w]`` of all kept tokens, in the order of the sequence (raises `BadSample`)."""
    batch = sequence.batch([(picture, instruction)]).to(model.device)
    (kept,) = (batch.image_mask | batch.text_mask)[0].nonzero(as_tuple=True)
    return single_pass(model, batch.inputs, [LAYER], keep=kept).hidden[0]
