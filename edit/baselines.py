"""Whole editors to compare with: their diffusers pipelines, called as their authors do, under one interface.

Every pipeline is the stock code with the guidance and steps of its documentation. Three things are decided here. The
picture is handed over at a size that the pipeline neither crops nor makes square, so that a pixel of the result is
about the same place as that pixel of the picture. Those that read Qwen2.5-VL can be given its 3-D positions
(``positions="mrope"``), which diffusers 0.42 with transformers 5.3 and later leaves out. A result that is not finite
is refused, where the pipelines would hand on black.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from store.errors import Refusal

MEND = "install diffusers 0.42"
OFFLOADS, POSITIONS = ("none", "model", "sequential"), ("stock", "mrope")
LIBRARIES = ("diffusers", "transformers", "torch")
MEGAPIXEL = 1024 * 1024
FLUX2_SIDE, FLUX2_RATIO, FLUX2_MULTIPLE = 64, 8, 16
"""The least side and most extreme ratio of sides that Flux2Pipeline takes, and what it crops sides to multiples of."""


def kontext_size(width: int, height: int) -> dict[str, int]:
    """The resolution that FluxKontextPipeline picks for a picture, for the result too, which it would make square."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    across, down = _nearest(PREFERRED_KONTEXT_RESOLUTIONS, width / height)
    return {"width": across, "height": down, "max_area": across * down}


def flux2_size(width: int, height: int) -> dict[str, int]:
    """The picture's own size up to a million pixels, as Flux2Pipeline works, at sides that it need not crop."""
    if max(width / height, height / width) > FLUX2_RATIO:
        raise Refusal(f"a picture of {width} x {height} is longer than {FLUX2_RATIO} to 1, which Flux2Pipeline refuses")
    scale = min(1.0, math.sqrt(MEGAPIXEL / (width * height)))
    across, down = (max(FLUX2_SIDE, int(side * scale) // FLUX2_MULTIPLE * FLUX2_MULTIPLE) for side in (width, height))
    return {"width": across, "height": down}


def fibo_size(width: int, height: int) -> dict[str, int]:
    """The resolution that BriaFiboEditPipeline picks for the result, for the picture too."""
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import PREFERRED_RESOLUTION

    across, down = _nearest(PREFERRED_RESOLUTION[MEGAPIXEL], width / height)
    return {"width": across, "height": down}


def _nearest(sizes: list[tuple[int, int]], ratio: float) -> tuple[int, int]:
    return min(sizes, key=lambda size: abs(size[0] / size[1] - ratio))


def fibo_prompt(instruction: str) -> str:
    """The JSON that BriaFiboEditPipeline takes: the instruction's own, or one that holds nothing but it."""
    try:
        given = json.loads(instruction)
    except ValueError:
        given = None
    known = isinstance(given, dict) and "edit_instruction" in given
    return instruction if known else json.dumps({"edit_instruction": instruction}, ensure_ascii=False)


@dataclass(frozen=True)
class Recipe:
    """How one editor is called; all take the picture as ``image``, the text as ``prompt``, and a ``generator``."""

    pipeline: str
    """Its class in diffusers."""
    hub_id: str
    """Where its authors keep it."""
    steps: int
    """Denoising steps that they give it."""
    guides: str
    """Keyword of its guidance."""
    guidance: float
    """Guidance that they give it."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """What else they give it."""
    size: Callable[[int, int], dict[str, int]] | None = None
    """Keywords of the size that it works at, of a picture's width and height; none where it has no say in it (Qwen's
    resize to a million pixels of the picture's proportions)."""
    prompt: Callable[[str], str] = str
    """What it is given for an instruction."""
    positions: bool = False
    """Whether it reads a Qwen2.5-VL that can be given its 3-D positions."""


def _qwen(pipeline: str, hub_id: str, steps: int) -> Recipe:
    # Without a negative prompt the pipelines leave their guidance off.
    return Recipe(pipeline, hub_id, steps, "true_cfg_scale", 4.0, {"negative_prompt": " "}, positions=True)


BASELINES: dict[str, Recipe] = {
    "qwen-image-edit": _qwen("QwenImageEditPipeline", "Qwen/Qwen-Image-Edit", 50),
    "qwen-image-edit-2509": _qwen("QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509", 40),
    "qwen-image-edit-2511": _qwen("QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2511", 40),
    "flux-kontext": Recipe(
        "FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev", 28, "guidance_scale", 2.5, size=kontext_size
    ),
    "flux2": Recipe("Flux2Pipeline", "black-forest-labs/FLUX.2-dev", 50, "guidance_scale", 4.0, size=flux2_size),
    "fibo-edit": Recipe(
        "BriaFiboEditPipeline", "briaai/Fibo-Edit", 50, "guidance_scale", 5.0, size=fibo_size, prompt=fibo_prompt
    ),
}


@dataclass(frozen=True)
class Baseline:
    """An editor as its authors ship it."""

    name: str
    pipeline: Any
    settings: dict[str, Any]
    """Everything that its pictures follow from beside picture, instruction, seed and steps, for JSON; ``steps`` is
    the number that it takes where none is asked for."""

    @classmethod
    def load(
        cls,
        name: str,
        source: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "auto",
        offload: Literal["none", "model", "sequential"] = "none",
        positions: Literal["stock", "mrope"] = "stock",
        revision: str | None = None,
    ) -> Self:
        """The baseline of a name in `BASELINES`; safetensors alone are read, and no code that comes with them.

        Parameters
        ----------
        source
            A folder of its pipeline, or a hub id; its authors' if not given.
        dtype
            Of all its weights.
        device
            Where it runs: auto, cuda or cpu.
        offload
            What waits in main memory: none; model, all but the part at work; sequential, all but the layer at work,
            for the smallest cards.
        positions
            Of the tokens of Qwen2.5-VL: stock, as the installed libraries have them; mrope, in three dimensions.
        revision
            Branch, tag or commit at the hub.

        Raises
        ------
        Refusal
            There is no such baseline, the installed diffusers lacks its pipeline, or ``source`` is not one of it.
        """
        recipe = _checked(name, offload, positions)
        source = str(source or recipe.hub_id)
        import diffusers

        from extract.model import find_device

        where = find_device(device)
        if offload != "none" and where.type == "cpu":
            raise Refusal(f"offload {offload} is from a GPU to main memory: give device cuda, or offload none")
        pipeline = getattr(diffusers, recipe.pipeline, None)
        if pipeline is None:
            raise Refusal(f"{name}: the installed diffusers {diffusers.__version__} has no {recipe.pipeline}; {MEND}")
        diffusers.utils.logging.disable_progress_bar()
        try:
            index, commit = pipeline.load_config(source, revision=revision, return_commit_hash=True)
            _check_index(name, source, recipe, index)
            made = pipeline.from_pretrained(
                source, revision=commit or revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(
                f"{name}: {source!r} is not a folder or hub id of a whole {recipe.pipeline} in safetensors: {reason}"
            ) from error
        made.set_progress_bar_config(disable=True)
        if positions == "mrope":
            made.text_encoder.register_forward_pre_hook(_with_token_types, with_kwargs=True)
        if offload == "none":
            made.to(where)
        else:
            getattr(made, f"enable_{offload}_cpu_offload")(device=where)
        settings = {
            "name": name,
            "pipeline": recipe.pipeline,
            "id": source,
            "revision": commit or revision,
            "steps": recipe.steps,
            recipe.guides: recipe.guidance,
            **recipe.also,
            "prompt": "the instruction" if recipe.prompt is str else recipe.prompt("{instruction}"),
            "positions": positions,
            "dtype": str(dtype).removeprefix("torch."),
            "device": where.type,
            "offload": offload,
            "libraries": {library: version(library) for library in LIBRARIES},
        }
        return cls(name, made, settings)

    def edit(self, picture: Image.Image, instruction: str, seed: int = 0, steps: int | None = None) -> Image.Image:
        """The edited picture, RGB of the size of ``picture``.

        Parameters
        ----------
        picture
            RGB.
        instruction
            What to change. FIBO-Edit also takes the JSON of its own prompt writers.
        seed
            Of the noise that it begins with, drawn on the CPU: the same on every device.
        steps
            Denoising steps, 2 or more; as its authors have it if not given.

        Raises
        ------
        Refusal
            The input is none that it can be given, or the result is not finite.
        """
        recipe = BASELINES[self.name]
        steps = recipe.steps if steps is None else steps
        self._check(picture, instruction, steps)
        given = recipe.size(*picture.size) if recipe.size else {}
        seen = picture.resize((given["width"], given["height"]), Image.Resampling.LANCZOS) if given else picture
        made = self.pipeline(
            image=seen,
            prompt=recipe.prompt(instruction),
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            **{recipe.guides: recipe.guidance},
            **recipe.also,
            **given,
        ).images
        if not np.isfinite(made).all():
            raise Refusal(
                f"{self.name} made a picture that is not finite of {instruction!r} with seed {seed}: load it in "
                "float32 or bfloat16, or take another number of steps"
            )
        return self.pipeline.image_processor.numpy_to_pil(made)[0].resize(picture.size, Image.Resampling.LANCZOS)

    def _check(self, picture: Image.Image, instruction: str, steps: int) -> None:
        if picture.mode != "RGB":
            raise Refusal(f"{self.name} was given a picture of mode {picture.mode}: convert it to RGB")
        if not instruction.strip():
            raise Refusal(f"{self.name} was given an empty instruction: say what to change")
        if steps < 2:
            raise Refusal(
                f"{self.name} was asked for {steps} steps, of which its schedule is not finite: give 2 or more"
            )
        for part in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(self.pipeline, part, None)
            added = getattr(tokenizer, "tokenizer", tokenizer).get_added_vocab() if tokenizer else {}
            if special := [token for token in added if token.strip() and token in instruction]:
                raise Refusal(f"the instruction {instruction!r} holds {special[0]!r}, a special token of {self.name}")


def _checked(name: str, offload: str, positions: str) -> Recipe:
    if name not in BASELINES:
        raise Refusal(f"there is no baseline {name!r}: give one of {', '.join(BASELINES)}")
    if offload not in OFFLOADS:
        raise Refusal(f"offload {offload!r} is not known: give {', '.join(OFFLOADS)}")
    if positions not in POSITIONS:
        raise Refusal(f"positions {positions!r} are not known: give {' or '.join(POSITIONS)}")
    recipe = BASELINES[name]
    if positions == "mrope" and not recipe.positions:
        raise Refusal(f"positions mrope are those of Qwen2.5-VL, which {name} does not read: give stock")
    return recipe


def _check_index(name: str, source: str, recipe: Recipe, index: Mapping[str, Any]) -> None:
    found = index.get("_class_name")
    if found != recipe.pipeline:
        others = ", ".join(other for other, one in BASELINES.items() if one.pipeline == found)
        mend = f"that is {others}" if others else f"give a folder or hub id such as {recipe.hub_id}"
        raise Refusal(f"{name} is a {recipe.pipeline}, and {source!r} holds a {found}: {mend}")
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        if library not in (None, "diffusers", "transformers"):
            raise Refusal(
                f"{name}: the {part} of {source!r} is from {library!r}, code that is never run here: give a folder "
                "whose parts are all of diffusers and transformers"
            )


def _with_token_types(encoder: torch.nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Name the tokens of pictures, which is what Qwen2.5-VL places tokens in three dimensions by."""
    return args, given | {"mm_token_type_ids": (given["input_ids"] == encoder.config.image_token_id).int()}
