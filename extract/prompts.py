"""The two prompts around (image, instruction): the editing pipeline's own template, and the one that asks for a box."""

from functools import lru_cache

from store.errors import Refusal

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

GROUND_SYSTEM = (
    "Locate the object that the instruction is about and answer with its box in pixels as JSON: "
    '{"bbox_2d": [x1, y1, x2, y2]}.'
)

# Braces of the system prompt are text, not fields: templates are filled by `fill`, never by str.format.
GROUND_TEMPLATE = (
    f"<|im_start|>system\n{GROUND_SYSTEM}<|im_end|>\n<|im_start|>user\n{IMAGE}{{}}<|im_end|>\n<|im_start|>assistant\n"
)


@lru_cache(maxsize=1)
def editing_template() -> str:
    """The template that the installed diffusers puts around an editing instruction, with ``{}`` in its place.

    Read from ``QwenImageEditPipeline`` itself, so that a diffusers that words it differently is followed (and
    changes the store's identity) instead of being contradicted by a copy kept here. No weights are involved.

    Raises
    ------
    Refusal
        The installed diffusers has no such pipeline, or its template is not the kind this project understands.
    """
    try:
        from diffusers import QwenImageEditPipeline

        parts = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
        template = QwenImageEditPipeline(**dict.fromkeys(parts)).prompt_template_encode
    except Exception as error:  # whatever a different diffusers raises, the reader needs the same mend
        raise Refusal(
            f"the installed diffusers does not give its editing template ({type(error).__name__}: {error}); "
            "install diffusers 0.42"
        ) from error
    if not isinstance(template, str) or template.count("{}") != 1 or template.count(IMAGE + "{}") != 1:
        raise Refusal(
            f"diffusers' editing template is not one image followed by one instruction: {template!r}; "
            "install diffusers 0.42"
        )
    return template


def fill(template: str, instruction: str) -> str:
    """``template`` with ``instruction`` in the place of its only ``{}``."""
    before, after = template.split("{}")
    return before + instruction + after


def editing_text(instruction: str) -> str:
    """The full chat text that conditions the editor on ``instruction`` (one image placeholder, not yet expanded)."""
    return fill(editing_template(), instruction)


def ground_text(instruction: str) -> str:
    """The full chat text that asks for the box of the object that ``instruction`` is about."""
    return fill(GROUND_TEMPLATE, instruction)
