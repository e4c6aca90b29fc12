"""How each editor is called: its pipeline, the guidance and steps of its documentation, the size that it works at."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MEGAPIXEL = 1024 * 1024
FLUX2_SIDE, FLUX2_MULTIPLE = 64, 16
"""The least side that Flux2Pipeline takes, and what it crops sides to multiples of."""


def kontext_size(width: int, height: int) -> dict[str, int]:
    """The resolution that FluxKontextPipeline picks for a picture, for the result too, which it would make square."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    across, down = _nearest(PREFERRED_KONTEXT_RESOLUTIONS, width / height)
    return {"width": across, "height": down, "max_area": across * down}


def flux2_size(width: int, height: int) -> dict[str, int]:
    """The picture's own size up to a million pixels, as Flux2Pipeline works, at sides that it need not crop."""
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
