"""A language model that writes prompts, and a vision-language model that says by position what was edited."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from edit.endpoints.config import EndpointSettings
from edit.endpoints.endpoint import Endpoint, Unanswered
from edit.endpoints.wire import URLS, Kind, Question, shown
from edit.recipe.checkpoints import Checkpoint
from edit.recipe.config import WRITER_TEMPERATURE
from edit.recipe.scenes import WORDS
from edit.recipe.stages import Given, Made, Work
from extract.decoding import END_OF_TURN
from extract.families import family_of
from extract.model import load_model, load_processor
from extract.omniedit import BadSample
from extract.scenes.language import NUMBERS
from extract.sequence import Conditioner

WRITER_SYSTEM = (
    "You write prompts for pictures that test how well an image editor finds one object among many alike. Answer with "
    'one JSON object with two texts and nothing else: {"scene": "...", "edit": "..."}.'
)
WRITER_ASK = (
    "The scene shows {count} objects of one kind, {layout}, all alike but one, which differs in a single attribute "
    'such as colour, material or pattern. "scene" describes this picture for a text-to-image model: the kind of '
    'object, how many, where they stand, the background, and which one is odd and how. "edit" is an instruction that '
    "makes the odd object just like the others and names it by what is odd about it. Choose an everyday kind of object."
)
WRITER_TASK = "attribute_modification"
CAPTIONER_SYSTEM = (
    "You see two pictures side by side: on the left before an edit, on the right after it. One object was changed. "
    "Write the instruction that leads from the left picture to the right one, in one sentence. Say which object is "
    'meant by its position alone, such as "the second cup from the left" or "the cup in the top right corner", never '
    "by its colour or any other attribute, and say what it becomes. Answer with the instruction only."
)
WRITER_SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("scene", "edit")},
    "required": ["scene", "edit"],
    "additionalProperties": False,
}
CAPTIONER_ASK = "Write the instruction."
LONGEST = 256  # tokens, for both; the captioner's settings are the paper's
LONGEST_THERE = 2048  # tokens of an endpoint's answer, with what a model thinks before it
CAPTIONER_TEMPERATURE, CAPTIONER_PENALTY = 0.1, 1.1
GAP = 8  # pixels between the two pictures
QUOTES = "\"'“”‘’"

NO_ANSWER = "the writer gave no answer"
NO_PAIR = "the writer gave no scene and edit as JSON"
NO_CAPTION, CUT_CAPTION = "the captioner said nothing", f"the caption is unfinished after {LONGEST} tokens"


Complete = Callable[[str, str, int], str]
"""The answer to a system prompt and a question, drawn by a seed."""


class TextEndpoint(Protocol):
    """Somebody who answers in words."""

    def describe(self) -> dict[str, Any]:
        """What decides the answers, JSON-able."""

    def open(self) -> Complete:
        """Ready to answer."""


@dataclass(frozen=True)
class LocalText:
    """A language model run here, sampling at temperature 0.9, in its own chat format where it has one."""

    found: Checkpoint
    device: torch.device

    def describe(self) -> dict[str, Any]:
        """Its files and how it is sampled."""
        return {"model": self.found.identity, "temperature": WRITER_TEMPERATURE, "longest": LONGEST}

    def open(self) -> Complete:
        """The model on its device."""
        tokenizer = AutoTokenizer.from_pretrained(self.found.folder)
        made = AutoModelForCausalLM.from_pretrained(self.found.folder, dtype=torch.bfloat16, use_safetensors=True)
        model = made.to(self.device).eval()

        def complete(system: str, user: str, seed: int) -> str:
            if tokenizer.chat_template:
                messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = tokenizer(f"{system}\n\n{user}\n\n", return_tensors="pt")
            return sample(model, dict(inputs), tokenizer, seed, WRITER_TEMPERATURE)[0]

        return complete


@dataclass(frozen=True)
class EndpointText:
    """A language model behind an OpenAI-compatible or Gemini endpoint."""

    kind: Kind
    name: str
    settings: EndpointSettings

    def describe(self) -> dict[str, Any]:
        """Where it is, its name and how it is sampled."""
        return {
            "kind": self.kind,
            "url": self.settings.url or URLS[self.kind],
            "model": self.name,
            "temperature": self.settings.temperature,
            "longest": LONGEST_THERE,
        }

    def open(self) -> "Correspondent":
        """Ready to be asked (raises `Refusal` where the URL, the name or the key cannot be used)."""
        return Correspondent(self.kind, self.name, self.settings, LONGEST_THERE)


class Correspondent(Endpoint):
    """An endpoint that completes."""

    def __call__(self, system: str, user: str, seed: int) -> str:
        """Its answer; seeds are whole numbers below 2³¹ to all of them.

        Raises
        ------
        BadSample
            There is none to this question.
        Closed
            There would be none to any other.
        """
        try:
            answer = self.ask(Question(user, WRITER_SCHEMA, system=system, seed=seed % 2**31))
        except Unanswered as unanswered:
            raise BadSample(NO_ANSWER, str(unanswered)) from unanswered
        if answer.ended:
            raise BadSample(NO_ANSWER, f"the model stopped ({shown(answer.ended)})")
        return answer.text


@dataclass(frozen=True)
class LanguageWriter:
    """Pairs of prompts by somebody who answers in words; how many objects and their layout are drawn for each.

    It tells ``scene``, ``edit`` and ``task``; an answer that is no such pair is a bad sample.
    """

    endpoint: TextEndpoint

    def describe(self) -> dict[str, Any]:
        """The endpoint and the question."""
        return {"endpoint": self.endpoint.describe(), "system": WRITER_SYSTEM, "ask": WRITER_ASK}

    def load(self) -> "Writing":
        """The endpoint, ready."""
        return Writing(self.endpoint.open())


@dataclass(frozen=True)
class Writing:
    """The work of a `LanguageWriter`."""

    complete: Complete

    def __call__(self, given: Given) -> Made:
        """Write one pair of prompts."""
        rng = np.random.default_rng(given.seed)
        count, layout = NUMBERS[rng.integers(4, 10)], list(WORDS.values())[rng.integers(len(WORDS))]
        answer = self.complete(WRITER_SYSTEM, WRITER_ASK.format(count=count, layout=layout), given.seed)
        return Made(pair_of(answer) | {"task": WRITER_TASK})

    @property
    def spent(self) -> float:
        """Money, of an endpoint."""
        return self.complete.spent if isinstance(self.complete, Endpoint) else 0.0

    def close(self) -> None:
        """End the connections of an endpoint."""
        if isinstance(self.complete, Endpoint):
            self.complete.close()


def pair_of(answer: str) -> dict[str, str]:
    """The first JSON object of an answer, which has the texts ``scene`` and ``edit`` (raises `BadSample`)."""
    try:
        found, _ = json.JSONDecoder().raw_decode(answer[answer.index("{") :])
        # Of half a character, which JSON allows, no file can be made.
        pair = {name: found[name].strip().encode().decode() for name in ("scene", "edit")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pair = {}
    if not pair or not all(pair.values()):
        raise BadSample(NO_PAIR, answer[:200])
    return pair


@dataclass(frozen=True)
class VisionCaptioner:
    """A vision-language model that sees source and target side by side; sampled as the paper does [ABP]."""

    found: Checkpoint
    device: torch.device

    def describe(self) -> dict[str, Any]:
        """Its files, the question, how it is sampled."""
        sampling = {"longest": LONGEST, "temperature": CAPTIONER_TEMPERATURE, "repetition_penalty": CAPTIONER_PENALTY}
        return {"model": self.found.identity, "system": CAPTIONER_SYSTEM, "ask": CAPTIONER_ASK, "gap": GAP, **sampling}

    def load(self) -> Work:
        """The model on its device."""
        config = AutoConfig.from_pretrained(self.found.folder)
        family = family_of(config)
        template = family.chat(CAPTIONER_SYSTEM)
        sequence = Conditioner(load_processor(self.found.folder), template, family.own_positions, config)
        model = load_model(self.found.folder, self.device)

        def caption(given: Given) -> Made:
            seen = side_by_side(given.picture("source"), given.picture("target"))
            # Without positions: generate counts them on by itself, 3-D ones from mm_token_type_ids.
            inputs = {
                name: value
                for name, value in sequence.batch([(seen, CAPTIONER_ASK)], "left").inputs.items()
                if name != "position_ids"
            }
            text, finished = sample(
                model, inputs, sequence.tokenizer, given.seed, CAPTIONER_TEMPERATURE, CAPTIONER_PENALTY
            )
            return Made({"instructions": [caption_of(text, finished)]})

        return caption


def caption_of(text: str, finished: bool) -> str:
    """The instruction in an answer: its first line, without quotes around it (raises `BadSample`)."""
    lines = [line.strip().strip(QUOTES).strip() for line in text.strip().splitlines()]
    if not finished and len(lines) < 2:
        raise BadSample(CUT_CAPTION, text[:200])
    if not lines or not lines[0]:
        raise BadSample(NO_CAPTION)
    return lines[0]


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one size in one, with a white gap between."""
    sheet = Image.new("RGB", (2 * left.width + GAP, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + GAP, 0))
    return sheet


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    tokenizer,
    seed: int,
    temperature: float,
    repetition_penalty: float = 1.0,
) -> tuple[str, bool]:
    """A sampled answer of at most `LONGEST` tokens, and whether it came to its end; the same for the same seed.

    The checkpoint's own sampling settings play no part.
    """
    ends = {tokenizer.get_added_vocab().get(END_OF_TURN, tokenizer.eos_token_id), tokenizer.eos_token_id}
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LONGEST,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends),
    )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), bool(ids) and ids[-1] in ends
