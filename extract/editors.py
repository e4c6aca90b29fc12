"""How the image editors condition on their vision-language model: asked of the installed diffusers, never copied.

``edit`` is Qwen-Image-Edit, ``edit-plus`` Qwen-Image-Edit-Plus (2509, 2511). Both resize the picture before the
processor does, to sides that are multiples of 32; and drop the system prompt and the opening of the user's turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import torch
from PIL import Image

from extract.families import Family, Qwen25VL
from store.errors import Refusal

EDIT, EDIT_PLUS = "edit", "edit-plus"
PIPELINES = {EDIT: "QwenImageEditPipeline", EDIT_PLUS: "QwenImageEditPlusPipeline"}
IMAGE = Qwen25VL.image
OPENING = "<|im_start|>user\n"
MEND = "install diffusers 0.42"


class _Seen(Exception):  # noqa: N818 - it ends a pipeline's call early, nothing is wrong
    """What a pipeline was about to hand on."""


class _Blank:
    """Stands where a pipeline expects a picture of a size, and where it resizes one; ends the call there."""

    def __init__(self, size: tuple[int, int] = (1, 1)):
        self.size = size

    def resize(self, picture, height: int, width: int) -> NoReturn:
        """As ``VaeImageProcessor.resize`` is called."""
        raise _Seen((width, height))

    def __call__(self, text: list[str], **given) -> NoReturn:
        """As a processor is called."""
        raise _Seen(text[0])


@lru_cache
def _pipeline(name: str) -> tuple:
    """A pipeline without weights that ends where it would encode or resize, and the resizer that it had."""
    import diffusers

    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    pipeline = getattr(diffusers, PIPELINES[name])(**dict.fromkeys(parts), processor=_Blank())
    resizer, pipeline.image_processor = pipeline.image_processor, _Blank()
    return pipeline, resizer


def _ask(name: str, question: Callable):
    """What a pipeline was about to hand on when it was asked; whatever another diffusers raises has the same mend."""
    try:
        question(_pipeline(name)[0])
    except _Seen as seen:
        return seen.args[0]
    except Exception as error:
        raise Refusal(
            f"the installed diffusers does not say how its {PIPELINES[name]} conditions "
            f"({type(error).__name__}: {error}); {MEND}"
        ) from error
    raise Refusal(f"the installed diffusers' {PIPELINES[name]} conditions in a way that is not known here; {MEND}")


@lru_cache
def pipeline_template(name: str) -> str:
    """The text that a pipeline puts around one picture and an instruction, with ``{}`` in the instruction's place.

    Raises
    ------
    Refusal
        The installed diffusers has no such pipeline, or its template is not the kind this project understands.
    """
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    template = _ask(name, lambda pipeline: pipeline._get_qwen_prompt_embeds(["{}"], [_Blank()], **cpu))
    if template.count("{}") != 1 or template.count(IMAGE + "{}") != 1 or template.count(OPENING) != 1:
        raise Refusal(f"diffusers' editing template is not one image followed by one instruction: {template!r}; {MEND}")
    return template


@lru_cache(maxsize=65536)
def _resized(name: str, width: int, height: int) -> tuple[int, int]:
    return _ask(name, lambda pipeline: pipeline(image=_Blank((width, height)), prompt=""))


@dataclass(frozen=True)
class Editor:
    """One editing pipeline's way to condition, ``edit`` or ``edit-plus``; pickles."""

    name: str

    @property
    def template(self) -> str:
        """Its text around picture and instruction (`pipeline_template`)."""
        return pipeline_template(self.name)

    @property
    def start_index(self) -> int:
        """How many tokens it drops: those of its template, with Qwen's tokenizer, up to and with `OPENING`."""
        return _pipeline(self.name)[0].prompt_template_encode_start_idx

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` to which it resizes a picture before the processor gets it."""
        return _resized(self.name, width, height)

    def resize(self, picture: Image.Image) -> Image.Image:
        """The RGB picture as it hands it to the processor."""
        width, height = self.resized(*picture.size)
        return _pipeline(self.name)[1].resize(picture, height, width)


def editor_of(name: str, family: Family) -> Editor:
    """The editor of a name.

    Raises
    ------
    Refusal
        It conditions on another family of models.
    """
    if family.model_type != "qwen2_5_vl":
        raise Refusal(f"--conditioning {name}: that editor reads a qwen2_5_vl, not a {family.model_type}; give native")
    return Editor(name)
