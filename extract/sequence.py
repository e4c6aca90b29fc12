"""The conditioning sequence: (picture, instruction) as the model's inputs, with a table that says what each token is.

The sequence is the editing pipeline's own [ABP §3.1]: its template around image and instruction, of which the system
part is dropped from what is kept. Samples are prepared one by one, without weights and in any process, then collated.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from PIL import Image
from torch import nn
from transformers import PretrainedConfig

from extract.editors import OPENING, Editor, editor_of
from extract.families import Frame, Regions, family_of
from extract.omniedit import EMPTY_PROMPT, SPECIAL_TOKENS, BadSample
from extract.prompts import fill, ground_template, native_template
from store.errors import Refusal

KINDS = pl.Enum(["image", "instruction", "template"])
TOKEN_SCHEMA = {
    "sample": pl.String,
    "position": pl.Int32,
    "slot": pl.Int32,
    "token_id": pl.Int32,
    "text": pl.String,
    "kind": KINDS,
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
    """The whole text as tokens, one for the image.

    ``ids`` int64 ``[u]``; ``query`` bool ``[u]``: the instruction's; ``words`` int64 ``[q]``: the blank-separated word
    of the instruction that each of those belongs to (-1: none).
    """

    ids: np.ndarray
    query: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """One sample as the model gets it, unpadded, with what each of its tokens is; made without weights.

    Attributes
    ----------
    sample_id
        Its name.
    ids
        Token ids, int64 ``[t]``.
    pixels
        What the stock image processor gives for the picture.
    positions
        Position ids, int64 ``[3, t]``, or ``[t]`` where the family has one axis.
    image, text, query
        Bool ``[t]``: the kept image tokens, the other kept tokens, and the instruction's among them.
    source_size
        ``(width, height)`` of the picture.
    table
        ``tokens``, or what they are on the way between this command's processes.
    """

    sample_id: str
    ids: torch.Tensor
    pixels: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor
    query: torch.Tensor
    source_size: tuple[int, int]
    table: pl.DataFrame | bytes = field(repr=False)

    @property
    def tokens(self) -> pl.DataFrame:
        """One row per kept token, in `TOKEN_SCHEMA` without ``sample``."""
        return ForkingPickler.loads(self.table) if isinstance(self.table, bytes) else self.table

    def __getstate__(self) -> dict[str, Any]:
        # Torch's own way to another process opens a file for every tensor, and a table is a thing of many parts that
        # the process with the model has no need to look at.
        table = self.table
        if isinstance(table, pl.DataFrame):
            table = bytes(ForkingPickler.dumps(table))
        return {name: _flattened(value) for name, value in vars(self).items()} | {"table": table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, _restored(value))


def _flattened(value: Any) -> Any:
    """Tensors as arrays, with the name of the dtype that NumPy lacks."""
    if isinstance(value, dict):
        return {name: _flattened(one) for name, one in value.items()}
    if isinstance(value, torch.Tensor):
        same = value.dtype == torch.bfloat16
        return _Array(value.view(torch.uint16).numpy() if same else value.numpy(), same)
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(one) for name, one in value.items()}
    if isinstance(value, _Array):
        tensor = torch.from_numpy(value.values)
        return tensor.view(torch.bfloat16) if value.bfloat16 else tensor
    return value


class _Array(NamedTuple):
    values: np.ndarray
    bfloat16: bool


@dataclass(frozen=True)
class Batch:
    """Model inputs of several samples.

    Attributes
    ----------
    inputs
        ``input_ids, attention_mask`` int64 ``[b, t]``, ``position_ids`` int64 ``[3, b, t]`` or ``[b, t]``,
        ``pixel_values`` float32 ``[patches or tiles, …]``; of Qwen families also ``image_grid_thw`` int64 ``[b, 3]``
        and ``mm_token_type_ids`` int64 ``[b, t]``.
    image_mask, text_mask, query_mask
        Bool ``[b, t]``: the kept image tokens, the other kept tokens, and the instruction's among them.
    """

    inputs: Mapping[str, torch.Tensor]
    image_mask: torch.Tensor
    text_mask: torch.Tensor
    query_mask: torch.Tensor

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The kept tokens by kind, bool ``[b, t]``: of the token table's, and ``text`` (all but the image's)."""
        template = self.text_mask & ~self.query_mask
        kinds = (self.image_mask, self.text_mask, self.query_mask, template)
        return dict(zip(("image", "text", "instruction", "template"), kinds, strict=True))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on ``device``."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        masks = (mask.to(device, non_blocking=True) for mask in (self.image_mask, self.text_mask, self.query_mask))
        return Batch(inputs, *masks)


class Conditioner:
    """Turns (picture, instruction) into what the model reads, and says what each token is. Holds no weights; pickles.

    Parameters
    ----------
    processor
        The checkpoint's (its fast tokenizer and its image processor are used).
    template
        Chat text with one image placeholder and ``{}`` for the instruction (`extract.prompts`).
    positions
        ``mrope``: the model's 3-D positions, asked of the model's class explicitly. ``sequential``: 0 … t-1 (on all
        three axes where there are three), which is what a caller gets who forgets ``mm_token_type_ids``.
    config
        The checkpoint's configuration: its family, and what the positions depend on.
    editor
        The editing pipeline whose handling of the picture is followed, and which keeps the tokens after the opening
        of the user's turn; null: the processor gets the picture as it is, and the opening is kept, too.

    Raises
    ------
    Refusal
        The family is not known here, or has no 3-D positions and they are wanted.
    """

    def __init__(
        self,
        processor,
        template: str,
        positions: Literal["mrope", "sequential"],
        config: PretrainedConfig,
        editor: Editor | None = None,
    ):
        if positions not in ("mrope", "sequential"):
            raise ValueError(f"positions is {positions!r}: 'mrope' or 'sequential'")
        self.family = family_of(config)
        if positions == "mrope" and self.family.own_positions != "mrope":
            raise Refusal(
                f"--positions mrope: a {self.family.model_type} has no 3-D positions; give --positions sequential"
            )
        self.processor, self.tokenizer, self.config = processor, processor.tokenizer, config
        self.template, self.positions, self.editor = template, positions, editor
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.family.placeholder)
        self.pad_token_id = self.tokenizer.pad_token_id
        opening = template.index(self.family.turn)
        kept = opening if editor is None else opening + len(OPENING)
        starts = self.tokenizer(template, return_offsets_mapping=True)["offset_mapping"]
        self.drop = next(index for index, (start, _) in enumerate(starts) if start >= kept)
        self._added = np.array(sorted(self.tokenizer.get_added_vocab().values()))
        self._decoded: dict[int, str] = {}
        self._skeleton: nn.Module | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_skeleton": None}

    def _handed(self, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` at which the processor gets a picture of this size."""
        return (width, height) if self.editor is None else self.editor.resized(width, height)

    def regions(self, width: int, height: int) -> Regions:
        """Where each image token of a picture of this size stands, in pixels of it."""
        handed = self._handed(width, height)
        row, col, box = self.family.regions(self.processor, *handed)
        return Regions(row, col, box * ([width / handed[0], height / handed[1]] * 2))

    def frame(self, width: int, height: int) -> Frame:
        """The numbers in which the model speaks of places in a picture of this size."""
        handed = self._handed(width, height)
        extent, view = self.family.frame(self.processor, *handed)
        scale = width / handed[0], height / handed[1]
        return Frame(extent, tuple(edge * scale[axis % 2] for axis, edge in enumerate(view)))

    def encode(self, instruction: str) -> Encoded:
        """The tokens of the whole text around ``instruction``, and which of them are its own.

        They are found by their place in the text: a token that holds template and instruction is the instruction's
        only if it begins inside it.

        Raises
        ------
        BadSample
            It has no tokens, or it contains one of the tokenizer's added tokens, which would break the sequence.
        """
        if not instruction.strip():
            raise BadSample(EMPTY_PROMPT)
        encoding = self.tokenizer(fill(self.template, instruction), return_offsets_mapping=True)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        starts, ends = np.array(encoding["offset_mapping"], dtype=np.int64).T - self.template.index("{}")
        query = (starts >= 0) & (starts < len(instruction))
        if not query.any():
            raise BadSample(EMPTY_PROMPT)
        if len(special := ids[query & np.isin(ids, self._added)]):
            raise BadSample(SPECIAL_TOKENS, *self._texts([int(special[0])]))
        blank = np.array([character.isspace() for character in instruction])
        word_of = np.cumsum(~blank & np.r_[True, blank[:-1]]) - 1
        # A token belongs to the word of its first visible character: " cube" starts with a blank.
        visible = np.where(blank, len(blank), np.arange(len(blank)))
        first = np.minimum.accumulate(visible[::-1])[::-1][starts[query]]
        words = np.where(first < ends[query], word_of[np.minimum(first, len(blank) - 1)], -1)
        return Encoded(ids, query, words)

    def count_tokens(self, width: int, height: int, instruction: str) -> TokenCount:
        """The tokens of a sample, exactly as `prepare` will give them, without touching pixels (raises `BadSample`)."""
        n_image = len(self.regions(width, height).row)
        encoded = self.encode(instruction)
        return TokenCount(n_image, len(encoded.ids) - 1 - self.drop, int(encoded.query.sum()))

    def prepare(
        self,
        picture: Image.Image,
        instruction: str,
        sample_id: str = "",
        pixels: Mapping[str, torch.Tensor] | None = None,
    ) -> Prepared:
        """One sample (RGB picture) as the model gets it; needs no weights and runs in any process.

        ``pixels`` are those of the same picture prepared for another question with the same sizes.

        Raises
        ------
        BadSample
            The instruction is refused by `encode`.
        """
        encoded = self.encode(instruction)
        regions = self.regions(*picture.size)
        if pixels is None:
            seen = picture if self.editor is None else self.editor.resize(picture)
            pixels = self.family.pixels(self.processor, seen)
        repeats = np.where(encoded.ids == self.image_token_id, len(regions.row), 1)
        ids = np.repeat(encoded.ids, repeats)
        image, query = ids == self.image_token_id, np.repeat(encoded.query, repeats)
        text = ~image & (np.arange(len(ids)) >= self.drop)
        positions = self._positions(ids, image, pixels)
        tokens = self._table(ids, image, query, encoded.words, positions, regions)
        arrays = (torch.from_numpy(array) for array in (image, text, query))
        return Prepared(sample_id, torch.from_numpy(ids), pixels, positions, *arrays, picture.size, tokens)

    def collate(self, prepared: Sequence[Prepared], padding_side: Literal["right", "left"] = "right") -> Batch:
        """The inputs of several samples in their order; padded on the right, but for decoding on the left."""
        length = max(len(one.ids) for one in prepared)

        def pad(tensor: torch.Tensor, value: int = 0) -> torch.Tensor:
            missing = length - tensor.shape[-1]
            return nn.functional.pad(tensor, (0, missing) if padding_side == "right" else (missing, 0), value=value)

        image, text, query = (
            torch.stack([pad(getattr(one, name)) for one in prepared]) for name in ("image", "text", "query")
        )
        inputs = {
            "input_ids": torch.stack([pad(one.ids, self.pad_token_id) for one in prepared]),
            "attention_mask": torch.stack([pad(torch.ones_like(one.ids)) for one in prepared]),
            "position_ids": torch.stack([pad(one.positions) for one in prepared], dim=-2),
            **self.pixels(prepared),
        }
        if self.family.core is not None:
            inputs["mm_token_type_ids"] = image.long()
        return Batch(inputs, image, text, query)

    def pixels(self, prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """The pixels of several samples, as the model takes them."""
        joined = {name: torch.cat([one.pixels[name] for one in prepared]) for name in prepared[0].pixels}
        return self.family.whole(self.processor, joined) if "pixel_values" in joined else joined

    def batch(
        self, samples: Sequence[tuple[Image.Image, str]], padding_side: Literal["right", "left"] = "right"
    ) -> Batch:
        """The inputs of several (RGB picture, instruction), prepared and collated here (raises `BadSample`)."""
        return self.collate([self.prepare(picture, instruction) for picture, instruction in samples], padding_side)

    def _positions(self, ids: np.ndarray, image: np.ndarray, pixels: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Position ids of an unpadded sequence, never left to the model to guess."""
        if self.family.core is None:
            return torch.arange(len(ids))
        if self.positions == "sequential":
            return torch.arange(len(ids)).expand(3, -1).clone()
        if self._skeleton is None:
            with torch.device("meta"):
                self._skeleton = self.family.core_class(copy.deepcopy(self.config))
        positions, _ = self._skeleton.get_rope_index(
            input_ids=torch.from_numpy(ids)[None],
            mm_token_type_ids=torch.from_numpy(image.astype(np.int64))[None],
            image_grid_thw=pixels["image_grid_thw"],
        )
        return positions[:, 0]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token decodes to by itself."""
        for token_id in set(ids) - self._decoded.keys():
            self._decoded[token_id] = self.tokenizer.decode([token_id])
        return [self._decoded[token_id] for token_id in ids]

    def _table(
        self,
        ids: np.ndarray,
        image: np.ndarray,
        query: np.ndarray,
        words: np.ndarray,
        positions: torch.Tensor,
        regions: Regions,
    ) -> pl.DataFrame:
        """The rows of one sample's kept tokens.

        ``position`` is the index in the unpadded sequence, ``slot`` the index among the sample's kept image tokens
        or among its kept other tokens; ``px1 … py2`` is the part of the source picture that an image token stands
        for. ``word, row, col`` and the pixel box are null where they mean nothing.
        """
        ids, image, query = ids[self.drop :], image[self.drop :], query[self.drop :]

        def known(name: str, places: np.ndarray, values: np.ndarray, missing: np.ndarray, kind: type) -> pl.Series:
            column, null = np.zeros(len(ids), dtype=kind), ~places
            column[places], null[places] = values, missing
            return pl.Series(name, pa.array(column, mask=null))

        slot = np.where(image, np.cumsum(image), np.cumsum(~image)).astype(np.int32) - 1
        kind = np.where(image, 0, np.where(query, 1, 2)).astype(np.uint8)
        edges = zip(("px1", "py1", "px2", "py2"), regions.box.T, strict=True)
        axes = positions[..., self.drop :].int().expand(3, -1).numpy()
        rotary = zip(("pos_t", "pos_h", "pos_w"), axes, strict=True)
        return pl.DataFrame(
            [
                pl.Series("position", np.arange(self.drop, self.drop + len(ids), dtype=np.int32)),
                pl.Series("slot", slot),
                pl.Series("token_id", ids.astype(np.int32)),
                pl.Series("text", self._texts(ids.tolist())),
                pl.Series("kind", kind).cat.to(KINDS),
                known("word", query, words, words < 0, np.int32),
                known("row", image, regions.row, regions.row < 0, np.int32),
                known("col", image, regions.col, regions.col < 0, np.int32),
                *(known(name, image, box, np.isnan(box), np.float32) for name, box in edges),
                *(pl.Series(name, values) for name, values in rotary),
            ]
        )


def conditioner_for(
    processor,
    config: PretrainedConfig,
    purpose: Literal["native", "edit", "edit-plus", "ground"],
    positions: Literal["mrope", "sequential"],
) -> Conditioner:
    """The conditioner for a checkpoint and what it is asked for.

    Parameters
    ----------
    processor, config
        The checkpoint's (`extract.model.load_processor`, `AutoConfig`).
    purpose
        ``edit``, ``edit-plus``: as those editing pipelines condition (`extract.editors`). ``native``: their system
        prompt in the family's own chat format, the picture as the processor sizes it. ``ground``: asks for the box.
    positions
        See `Conditioner`; answers are always given under the family's own.

    Raises
    ------
    Refusal
        The family is not known here, no editor conditions on it, or it does not have these positions.
    """
    family = family_of(config)
    if purpose == "ground":
        return Conditioner(processor, ground_template(family), family.own_positions, config)
    if purpose == "native":
        return Conditioner(processor, native_template(family), positions, config)
    editor = editor_of(purpose, family)
    return Conditioner(processor, editor.template, positions, config, editor)
