"""A judge on this machine: a vision-language model that is shown both pictures and answers greedily."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel

from edit.endpoints.wire import Answer, shown
from edit.judges.cache import AnswerCache
from edit.judges.judge import answer_for, verdict_of
from edit.judges.questions import Failure, Verdict, prompt_for
from extract.model import CHECKPOINT_FILES, file_hash, find_checkpoint, find_device, load_model, load_processor
from store.errors import Refusal


class LocalJudge:
    """A checkpoint of any family that is extracted from, as a `edit.judges.judge.Judge`.

    Parameters
    ----------
    model
        A folder with a checkpoint in safetensors, a hub id, or ``pocket``.
    cache
        Without one every picture is asked about.
    device
        ``auto``, ``cuda`` or ``cpu``.
    max_pixels
        Area above which pictures are shrunk; the checkpoint's own setting where not given.
    max_tokens
        Longest answer.

    Raises
    ------
    Refusal
        There is no such checkpoint, or it has no chat template, by which alone it can be shown two pictures.
    """

    concurrency = 1
    spent = 0.0

    def __init__(
        self,
        model: str,
        cache: AnswerCache | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        max_pixels: int | None = None,
        max_tokens: int = 2048,
    ):
        self.name, self.folder = model, find_checkpoint(model)
        self.device = find_device(device)
        self.cache, self.max_pixels, self.max_tokens = cache, max_pixels, max_tokens
        self.processor = load_processor(self.folder, max_pixels)
        if not self.processor.chat_template:
            raise Refusal(f"--model {model!r} has no chat template, by which a judge is shown two pictures")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded for the first picture that has no answer yet."""
        model = load_model(self.folder, self.device)
        tokenizer = self.processor.tokenizer
        ends = model.generation_config.eos_token_id
        # A checkpoint's own settings may sample, or punish repetition.
        model.generation_config = GenerationConfig(
            max_new_tokens=self.max_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        return model

    def judge(
        self, source: Image.Image, edited: Image.Image, instruction: str, box: Sequence[float] | None = None
    ) -> Verdict | Failure:
        """The model's verdict; see `edit.judges.judge.Judge`."""
        prompt = prompt_for(instruction, box, source.size)
        asked = {"prompt": prompt, **self._described}
        try:
            answer = answer_for(self.cache, asked, source, edited, lambda: self._ask(prompt, source, edited))
        except torch.OutOfMemoryError as error:
            return Failure(f"the pictures do not fit into memory, give --max-pixels: {shown(str(error))}")
        except ValueError as error:
            return Failure(f"the model cannot take the pictures: {shown(str(error))}")
        return verdict_of(answer)

    def stop(self) -> None:
        """Nothing is tried twice."""

    @cached_property
    def _described(self) -> dict:
        """All that determines an answer beside prompt and pictures."""
        files = sorted({path for pattern in CHECKPOINT_FILES for path in self.folder.glob(pattern)}, key=_name)
        return {
            "checkpoint": {path.name: file_hash(path) for path in files},
            "max_pixels": self.max_pixels,
            "max_tokens": self.max_tokens,
            "device": self.device.type,
        }

    @torch.no_grad()
    def _ask(self, prompt: str, source: Image.Image, edited: Image.Image) -> Answer:
        content = [{"type": "image", "image": source}, {"type": "image", "image": edited}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device, self.model.dtype)
        given = inputs["input_ids"].shape[1]
        (ids,) = self.model.generate(**inputs)[:, given:].tolist()
        ends = self.model.generation_config.eos_token_id
        finished = ids and ids[-1] in (ends if isinstance(ends, list) else [ends])
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, given, len(ids), None if finished else f"not at an end after {len(ids)} tokens")


def _name(path: Path) -> str:
    return path.name
