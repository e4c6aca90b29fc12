"""The conditioning sequence: (picture, instruction) as the model's inputs, with a table that says what each token is.

The sequence is the editing pipeline's own [ABP §3.1]: its template around image and instruction, of which the system
part is dropped from what is kept. Instruction and template never share a token, because special tokens stand between
them; so the template is tokenized once and instructions by themselves, which also makes planning cheap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import nn
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from extract.omniedit import EMPTY_PROMPT, SPECIAL_TOKENS, BadSample
from extract.prompts import fill

IMAGE_PAD = "<|image_pad|>"
USER_TURN = "<|im_start|>user"

TOKEN_SCHEMA = {
    "sample": pl.String,
    "position": pl.Int32,
    "slot": pl.Int32,
    "token_id": pl.Int32,
    "text": pl.String,
    "kind": pl.Enum(["image", "instruction", "template"]),
    "word": pl.Int32,
    "row": pl.Int32,
    "col": pl.Int32,
    **dict.fromkeys(("px1", "py1", "px2", "py2"), pl.Float32),
    **dict.fromkeys(("pos_t", "pos_h", "pos_w"), pl.Int32),
}


class TokenCount(NamedTuple):
    """How many tokens a sample brings: kept image tokens, kept other tokens, and how many of those instruct."""

    n_image: int
    n_text: int
    n_query: int


class Encoded(NamedTuple):
    """An instruction's token ids, and per token the whitespace-separated word it belongs to (-1: none)."""

    ids: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Model inputs of several samples.

    Attributes
    ----------
    inputs
        ``input_ids, attention_mask, mm_token_type_ids`` int64 ``[b, t]``, ``position_ids`` int64 ``[3, b, t]``,
        ``pixel_values`` float32 ``[patches, …]``, ``image_grid_thw`` int64 ``[b, 3]``.
    image_mask, text_mask, query_mask
        Bool ``[b, t]``: the kept image tokens, the other kept tokens, and the instruction's among them.
    source_sizes
        ``(width, height)`` of each picture before the processor resized it.
    encoded
        The instructions' tokens.
    """

    inputs: Mapping[str, torch.Tensor]
    image_mask: torch.Tensor
    text_mask: torch.Tensor
    query_mask: torch.Tensor
    source_sizes: tuple[tuple[int, int], ...]
    encoded: tuple[Encoded, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on ``device``."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        masks = (mask.to(device, non_blocking=True) for mask in (self.image_mask, self.text_mask, self.query_mask))
        return Batch(inputs, *masks, self.source_sizes, self.encoded)


class Conditioner:
    """Turns (picture, instruction) into what the model reads, and says what each token is.

    Parameters
    ----------
    processor
        A ``Qwen2_5_VLProcessor`` (its fast tokenizer and its image processor are used).
    template
        Chat text with one image placeholder and ``{}`` for the instruction (`extract.prompts`).
    positions
        ``mrope``: the model's 3-D positions, asked of the model explicitly. ``sequential``: 0 … t-1 on all three
        axes, which is what a caller gets who forgets ``mm_token_type_ids``.
    model
        Whose ``get_rope_index`` gives the positions; only ``batch`` under ``mrope`` needs it.
    """

    def __init__(
        self,
        processor,
        template: str,
        positions: Literal["mrope", "sequential"] = "mrope",
        model: nn.Module | None = None,
    ):
        if positions not in ("mrope", "sequential"):
            raise ValueError(f"positions is {positions!r}: 'mrope' or 'sequential'")
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.template, self.positions, self.model = template, positions, model
        before, after = fill(template, "\0").split("\0")
        system = before[: before.index(USER_TURN)]
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.pad_token_id = self.tokenizer.pad_token_id
        self.drop = len(self._ids(system))
        self.before, self.after = self._ids(before), self._ids(after)
        self._added = np.array(sorted(self.tokenizer.get_added_vocab().values()))
        (self._image_at,) = np.flatnonzero(self.before == self.image_token_id)
        self._decoded = lru_cache(maxsize=None)(lambda token_id: self.tokenizer.decode([token_id]))

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` to which the processor resizes a picture; each axis is rounded on its own."""
        size = self.image_processor.size
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        resized = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
        return resized[1], resized[0]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """``(rows, cols)`` of the image tokens of a picture."""
        factor = self.image_processor.patch_size * self.image_processor.merge_size
        resized_width, resized_height = self.resized_size(width, height)
        return resized_height // factor, resized_width // factor

    def encode(self, instruction: str) -> Encoded:
        """The instruction's tokens and words.

        Raises
        ------
        BadSample
            It has no tokens, or it contains one of the tokenizer's added tokens, which would break the sequence.
        """
        encoding = self.tokenizer(instruction, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        if not instruction.strip() or not len(ids):
            raise BadSample(EMPTY_PROMPT)
        if len(special := ids[np.isin(ids, self._added)]):
            raise BadSample(SPECIAL_TOKENS, self._decoded(int(special[0])))
        blank = np.array([character.isspace() for character in instruction])
        word_of = np.where(blank, -1, np.cumsum(~blank & np.r_[True, blank[:-1]]) - 1)
        # A token belongs to the word of its first visible character: " cube" starts with a blank.
        words = [next((w for w in word_of[start:end] if w >= 0), -1) for start, end in encoding["offset_mapping"]]
        return Encoded(ids, np.array(words, dtype=np.int64))

    def count_tokens(self, width: int, height: int, instruction: str) -> TokenCount:
        """The tokens of a sample, exactly as `batch` will give them, without touching pixels (raises `BadSample`)."""
        rows, cols = self.grid(width, height)
        n_query = len(self.encode(instruction).ids)
        return TokenCount(rows * cols, len(self.before) - 1 - self.drop + n_query + len(self.after), n_query)

    def batch(
        self, samples: Sequence[tuple[Image.Image, str]], padding_side: Literal["right", "left"] = "right"
    ) -> Batch:
        """The inputs of several (RGB picture, instruction); padded on the right, but for decoding on the left.

        Raises
        ------
        BadSample
            An instruction is refused by `encode`.
        ValueError
            Positions are ``mrope`` and no model was given.
        """
        encoded = tuple(self.encode(instruction) for _, instruction in samples)
        pictures = [picture for picture, _ in samples]
        pixels = self.image_processor(images=pictures, return_tensors="pt")
        n_images = (pixels["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        fixed = len(self.before) - 1 + len(self.after)
        lengths = [fixed + n_image + len(one.ids) for n_image, one in zip(n_images, encoded, strict=True)]
        shape = len(samples), max(lengths)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        mask, image, text, query = (np.zeros(shape, dtype=bool) for _ in range(4))
        for number, (n_image, one, length) in enumerate(zip(n_images, encoded, lengths, strict=True)):
            at = slice(0, length) if padding_side == "right" else slice(shape[1] - length, shape[1])
            image_start, ask = self._image_at, len(self.before) - 1 + n_image
            ids[number, at] = self._sequence(n_image, one)
            mask[number, at] = True
            image[number, at][image_start : image_start + n_image] = True
            text[number, at][self.drop :] = True
            query[number, at][ask : ask + len(one.ids)] = True
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "mm_token_type_ids": torch.from_numpy(image.astype(np.int64)),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }
        inputs["position_ids"] = self._positions(inputs)
        masks = (torch.from_numpy(image), torch.from_numpy(text & ~image), torch.from_numpy(query))
        return Batch(inputs, *masks, tuple(picture.size for picture in pictures), encoded)

    def _sequence(self, n_image: int, one: Encoded) -> np.ndarray:
        """The whole sequence, the image placeholder repeated once per image token."""
        before = np.repeat(self.before, np.where(np.arange(len(self.before)) == self._image_at, n_image, 1))
        return np.concatenate([before, one.ids, self.after])

    def _positions(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Position ids ``[3, b, t]``, never left to the model to guess."""
        batch, length = inputs["input_ids"].shape
        if self.positions == "sequential":
            steps = inputs["attention_mask"].cumsum(1) - 1
            return steps.clamp(min=0).expand(3, batch, length).clone()
        if self.model is None:
            raise ValueError("the model's positions need the model: Conditioner(…, model=model)")
        core = self.model if hasattr(self.model, "get_rope_index") else self.model.model
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, _ = core.get_rope_index(**{name: inputs[name] for name in names})
        return positions

    def tokens(self, batch: Batch, sample_ids: Sequence[str]) -> pl.DataFrame:
        """One row per kept token of a batch, samples in their order, tokens in theirs.

        ``position`` is the index in the unpadded sequence, ``slot`` the index among the sample's kept image tokens
        or among its kept other tokens; ``px1 … py2`` is the part of the source picture that an image token stands
        for, each axis mapped on its own. ``word, row, col`` and the pixel box are null where they mean nothing.
        """
        inputs = {name: batch.inputs[name].cpu().numpy() for name in ("input_ids", "attention_mask", "position_ids")}
        tables = []
        samples = zip(sample_ids, batch.source_sizes, batch.encoded, strict=True)
        for number, (sample_id, size, one) in enumerate(samples):
            real = inputs["attention_mask"][number].astype(bool)
            positions = inputs["position_ids"][:, number, real][:, self.drop :]
            ids = inputs["input_ids"][number, real][self.drop :]
            tables.append(self._table(sample_id, ids, positions, size, one))
        return pl.concat(tables)

    def _table(
        self, sample_id: str, ids: np.ndarray, positions: np.ndarray, size: tuple[int, int], one: Encoded
    ) -> pl.DataFrame:
        """The rows of one sample: ``ids`` ``[t]`` and ``positions`` ``[3, t]`` of its kept tokens."""
        rows, cols = self.grid(*size)
        start = self._image_at - self.drop
        index = np.arange(len(ids)) - start
        image = (index >= 0) & (index < rows * cols)
        first = len(ids) - len(self.after) - len(one.ids)
        query = (np.arange(len(ids)) >= first) & (np.arange(len(ids)) < first + len(one.ids))
        word = np.full(len(ids), -1)
        word[query] = one.words
        row, col = np.where(image, index // cols, -1), np.where(image, index % cols, -1)
        wide, high = size[0] / cols, size[1] / rows
        edges = {"px1": col * wide, "py1": row * high, "px2": (col + 1) * wide, "py2": (row + 1) * high}

        def where(known: np.ndarray, values: np.ndarray) -> pl.Series:
            return pl.Series(values).set(pl.Series(~known), None)

        columns = {
            "sample": [sample_id] * len(ids),
            "position": np.arange(len(ids)) + self.drop,
            "slot": np.where(image, index, np.cumsum(~image) - 1),
            "token_id": ids,
            "text": [self._decoded(token_id) for token_id in ids.tolist()],
            "kind": np.select([image, query], ["image", "instruction"], "template").tolist(),
            "word": where(word >= 0, word),
            "row": where(image, row),
            "col": where(image, col),
            **{name: where(image, values) for name, values in edges.items()},
            **dict(zip(("pos_t", "pos_h", "pos_w"), positions, strict=True)),
        }
        return pl.DataFrame({name: pl.Series(name, columns[name]).cast(kind) for name, kind in TOKEN_SCHEMA.items()})
