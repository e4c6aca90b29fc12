"""The two prompts around (image, instruction): the editing pipeline's own template, and the one that asks for a box."""

from extract.editors import EDIT, pipeline_template
from extract.families import Family, Qwen25VL

# How a family is asked for a box, by the numbers in which it speaks.
GROUND_SYSTEMS = {
    "pixels": (
        "Locate the object that the instruction is about and answer with its box in pixels as JSON: "
        '{"bbox_2d": [x1, y1, x2, y2]}.'
    ),
    "thousandths": (
        "Locate the object that the instruction is about and answer with its box, in thousandths of the picture's "
        'width and height (0 to 1000), as JSON: {"bbox_2d": [x1, y1, x2, y2]}.'
    ),
    "shares": (
        "Locate the object that the instruction is about and answer with its box, in shares of the picture's width "
        'and height (0 to 1), as JSON: {"bbox_2d": [x1, y1, x2, y2]}.'
    ),
}


def ground_template(family: Family) -> str:
    """The chat text that asks a model of ``family`` for a box, with ``{}`` for the instruction.

    Braces of the system prompt are text, not fields: templates are filled by `fill`, never by ``str.format``.
    """
    return family.chat(GROUND_SYSTEMS[family.speaks])


GROUND_TEMPLATE = ground_template(Qwen25VL())


def editing_template() -> str:
    """The template that the installed diffusers puts around an editing instruction, with ``{}`` in its place.

    Read from ``QwenImageEditPipeline`` itself, so that a diffusers that words it differently is followed (and
    changes the store's identity) instead of being contradicted by a copy kept here (raises `Refusal`).
    """
    return pipeline_template(EDIT)


def native_template(family: Family) -> str:
    """The editor's system prompt in the chat format of ``family``; for Qwen2.5-VL this is `editing_template`."""
    system = editing_template().removeprefix("<|im_start|>system\n")
    return family.chat(system[: system.index("<|im_end|>")])


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
