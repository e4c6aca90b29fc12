"""The VLM's own answer: the box it gives when it is asked to speak, greedily decoded and brought to source pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from extract.families import Box, Frame
from extract.sequence import Conditioner

# Digits are bounded: a model that rambles writes numbers that no float holds.
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{0,9})?)\s*"
_FOUR = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"[\])]")
_NAMED = re.compile(r"bbox_2d[\"']?\s*[:=]\s*" + _FOUR.pattern)


@dataclass(frozen=True)
class Answer:
    """What the model said about one sample: its words, and the box in source pixels (null: no box in the words)."""

    text: str
    box: Box | None


def parse_box(text: str, frame: Frame, source_size: tuple[int, int]) -> Box | None:
    """The box in ``text`` as ``xyxy`` in pixels of the source picture, ordered and inside it.

    Parameters
    ----------
    text
        The model's answer. The first four numbers named ``bbox_2d`` count, else the last list of four.
    frame
        The numbers in which the model speaks (`Conditioner.frame`).
    source_size
        ``(width, height)`` of the source picture.

    Returns
    -------
    The box, or null where the text has no list of four numbers. A box that lies outside the picture, or has no
    extent, is clamped to its edge and may have no area: the model did answer, badly.
    """
    named = _NAMED.search(text)
    lists = [named.groups()] if named else _FOUR.findall(text)
    if not lists:
        return None
    x1, y1, x2, y2 = map(float, lists[-1])

    def side(first: float, second: float, axis: int) -> tuple[float, float]:
        start, end, source = frame.view[axis], frame.view[axis + 2], float(source_size[axis])
        scale = (end - start) / frame.extent[axis]
        low, high = (min(max(start + value * scale, 0.0), source) for value in sorted((first, second)))
        return low, high

    left, right = side(x1, x2, 0)
    top, bottom = side(y1, y2, 1)
    return left, top, right, bottom


class _Complete(StoppingCriteria):
    """Ends a sample's decoding as soon as its answer holds what was asked for."""

    def __init__(self, tokenizer, prompt_length: int, complete: re.Pattern):
        self.tokenizer, self.prompt_length, self.complete = tokenizer, prompt_length, complete

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        said = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([bool(self.complete.search(text)) for text in said], device=input_ids.device)


@torch.no_grad()
def generate(
    model: nn.Module,
    conditioner: Conditioner,
    samples: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int,
    complete: re.Pattern | None = None,
) -> list[str]:
    """The model's greedy answers to one batch of samples.

    Parameters
    ----------
    model
        The model, with its head, in evaluation mode.
    conditioner
        Around the prompt to answer, with ``model``. Decoding always uses the model's own 3-D positions.
    samples
        RGB picture and instruction.
    max_new_tokens
        Longest answer.
    complete
        An answer in which this is found is long enough; otherwise it goes on to the end of the turn.

    Raises
    ------
    BadSample
        An instruction cannot be encoded.
    """
    batch = conditioner.batch(samples, padding_side="left").to(model.device)
    # Positions are left to `generate`, which has to go on counting from them; it needs the token types to do so.
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}
    length = inputs["input_ids"].shape[1]
    tokenizer = conditioner.tokenizer
    stop = StoppingCriteriaList([] if complete is None else [_Complete(tokenizer, length, complete)])
    own = model.generation_config
    # `generate` fills what a configuration leaves open from the checkpoint's, so that one has to be put aside.
    model.generation_config = greedy(tokenizer, max_new_tokens)
    try:
        said = model.generate(**inputs, stopping_criteria=stop)[:, length:]
    finally:
        model.generation_config = own
    return tokenizer.batch_decode(said, skip_special_tokens=True)


def generate_boxes(
    model: nn.Module,
    conditioner: Conditioner,
    samples: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int = 400,
) -> list[Answer]:
    """Ask the model for the boxes of one batch of samples; see `generate`.

    ``conditioner`` is one around ``extract.prompts.GROUND_TEMPLATE``. [ABP] allows 400 tokens; decoding stops as soon
    as every sample's box is complete.
    """
    texts = generate(model, conditioner, samples, max_new_tokens, _NAMED)
    sizes = [picture.size for picture, _ in samples]
    return [
        Answer(text, parse_box(text, conditioner.frame(*size), size)) for text, size in zip(texts, sizes, strict=True)
    ]


def greedy(tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding up to the end of the turn."""
    ends = {tokenizer.get_added_vocab().get("<|im_end|>", tokenizer.eos_token_id), tokenizer.eos_token_id}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
