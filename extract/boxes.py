"""The VLM's own answer: the box it gives when it is asked to speak, greedily decoded and brought to source pixels."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from extract.decoding import Said, ask
from extract.families import Box, Frame
from extract.omniedit import BOX_COLUMNS
from extract.sequence import Conditioner, Prepared

KEPT_CHARACTERS = 500  # of an answer, beside its sample

# Digits are bounded: a model that rambles writes numbers that no float holds.
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{0,9})?)\s*"
_FOUR = re.compile(r"[\[(]" + ",".join([_NUMBER] * 4) + r"[\])]")
_NAMED = re.compile(r"bbox_2d[\"']?\s*[:=]\s*" + _FOUR.pattern)


class Problem(StrEnum):
    """Why an answer is no usable box."""

    NO_NUMBERS = "no list of four numbers"
    UNFINISHED = "unfinished at the longest answer"
    DEGENERATE = "box without area in the picture"


@dataclass(frozen=True)
class Answer:
    """What the model said about one sample: its words, and the box in source pixels (null: no box in the words).

    Attributes
    ----------
    problem
        Why there is no box, or that it has no area or lies outside the picture (``box`` is then its part on the
        picture's edge); null where nothing is wrong.
    tokens
        How many tokens were decoded.
    """

    text: str
    box: Box | None
    problem: Problem | None
    tokens: int

    def columns(self) -> dict[str, float | str | None]:
        """The answer as columns of a table: the box, the first 500 characters, the problem."""
        said = {"answer": self.text[:KEPT_CHARACTERS], "problem": None if self.problem is None else str(self.problem)}
        return dict(zip(BOX_COLUMNS, self.box or (None,) * 4, strict=True)) | said


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


def ask_boxes(
    model: nn.Module,
    prepared: Sequence[Prepared],
    conditioner: Conditioner,
    max_new_tokens: int = 400,
    features: BaseModelOutputWithPooling | None = None,
) -> list[Answer]:
    """Ask the model for the boxes of several samples at once.

    Parameters
    ----------
    model, features
        As `extract.decoding.ask` takes them.
    prepared, conditioner
        The samples, and what prepared them: one around ``extract.prompts.GROUND_TEMPLATE``.
    max_new_tokens
        Longest answer; [ABP] allows 400 tokens. An answer ends as soon as its box is complete.
    """
    batch = conditioner.collate(prepared, padding_side="left").to(model.device)
    said = ask(model, batch, conditioner.tokenizer, max_new_tokens, _NAMED, features)
    sizes = [one.source_size for one in prepared]
    return [read_answer(one, conditioner.frame(*size), size) for one, size in zip(said, sizes, strict=True)]


def generate_boxes(
    model: nn.Module,
    conditioner: Conditioner,
    samples: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int = 400,
) -> list[Answer]:
    """`ask_boxes` of (RGB picture, instruction); raises `BadSample` for what cannot be encoded."""
    return ask_boxes(model, [conditioner.prepare(*sample) for sample in samples], conditioner, max_new_tokens)


def read_answer(said: Said, frame: Frame, source_size: tuple[int, int]) -> Answer:
    """What was said as a box, or as the problem with it; ``frame`` and size as in `parse_box`."""
    box = parse_box(said.text, frame, source_size)
    if box is None:
        problem = Problem.NO_NUMBERS if said.finished else Problem.UNFINISHED
    else:
        problem = None if box[0] < box[2] and box[1] < box[3] else Problem.DEGENERATE
    return Answer(said.text, box, problem, said.tokens)


def count_problems(problems: Iterable[str | None]) -> dict[str, int]:
    """How often each problem occurs, the most frequent first; null is none."""
    return dict(Counter(problem for problem in problems if problem is not None).most_common())
