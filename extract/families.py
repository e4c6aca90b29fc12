"""The families of vision-language models that are read: what differs between them, behind one interface.

Everything else of this package is the same for all: states, rows, tokens and positions mean what `capture` and
`sequence` say. Classes, processors and pixels are transformers' own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import PretrainedConfig
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from store.errors import Refusal

Box = tuple[float, float, float, float]


class Frame(NamedTuple):
    """In what numbers a model speaks of places: ``extent`` ``(x, y)`` of them span ``view``, a box in source pixels.

    ``view`` reaches beyond the picture where the model sees it padded, and not to its edges where it is cropped.
    """

    extent: tuple[float, float]
    view: Box


class Regions(NamedTuple):
    """Where each image token of a picture stands, in sequence order.

    ``row``, ``col`` int64 ``[n]``: its cell in the grid over the picture (-1: it is in none); ``box`` float64
    ``[n, 4]``: its part of the source picture in pixels, xyxy (NaN: it stands on padding alone).
    """

    row: np.ndarray
    col: np.ndarray
    box: np.ndarray


def raster(rows: int, cols: int, view: Box, width: int, height: int) -> Regions:
    """A grid over ``view``, row by row, its boxes cut off at the picture's edges."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    wide, high = (view[2] - view[0]) / cols, (view[3] - view[1]) / rows
    box = np.stack([col * wide, row * high, (col + 1) * wide, (row + 1) * high], axis=1)
    box = np.clip(box + [view[0], view[1]] * 2, 0, [width, height] * 2)
    box[(box[:, 2] <= box[:, 0]) | (box[:, 3] <= box[:, 1])] = np.nan
    return Regions(row, col, box)


@dataclass(frozen=True)
class Family:
    """What the extraction has to know of a family.

    Attributes
    ----------
    model_type
        Transformers' name of it.
    model, processor
        Names of transformers' own classes, which are imported when they are needed: each takes its time.
    core
        Of the class without head whose ``get_rope_index`` gives 3-D positions; null where positions are 0 … t-1.
    placeholder
        The token that stands for the image, once in a template, as often as the picture brings tokens in a sequence.
    image
        The placeholder with what the family puts around it.
    turn
        What opens the user's turn: tokens from there on are kept.
    speaks
        In what numbers its boxes are: ``pixels`` of the resized picture, ``thousandths`` or ``shares`` of a `Frame`.
    settings
        Attributes of the image processor that pixels depend on.
    """

    model_type: ClassVar[str]
    model: ClassVar[str]
    processor: ClassVar[str]
    core: ClassVar[str | None] = None
    placeholder: ClassVar[str]
    image: ClassVar[str]
    turn: ClassVar[str] = "<|im_start|>user"
    speaks: ClassVar[Literal["pixels", "thousandths", "shares"]]
    settings: ClassVar[tuple[str, ...]]

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """Transformers' class of the model with its head."""
        return getattr(transformers, self.model)

    @property
    def processor_class(self) -> type[transformers.ProcessorMixin]:
        """Transformers' class of the processor."""
        return getattr(transformers, self.processor)

    @property
    def core_class(self) -> type[transformers.PreTrainedModel] | None:
        """Transformers' class of the model without head, if it is needed for positions."""
        return None if self.core is None else getattr(transformers, self.core)

    @property
    def own_positions(self) -> Literal["mrope", "sequential"]:
        """The positions that the family was trained with."""
        return "sequential" if self.core is None else "mrope"

    def chat(self, system: str) -> str:
        """The family's chat text with ``system``, the image, and ``{}`` for the instruction (here: ChatML)."""
        return (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{self.image}{{}}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def shrink(self, processor, max_pixels: int) -> None:
        """Have ``processor`` shrink pictures of a larger area (raises `Refusal` where it cannot)."""
        raise NotImplementedError

    def regions(self, processor, width: int, height: int) -> Regions:
        """The image tokens of a picture, without its pixels."""
        raise NotImplementedError

    def frame(self, processor, width: int, height: int) -> Frame:
        """The numbers in which the model speaks of places in a picture."""
        raise NotImplementedError

    def pixels(self, processor, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What the stock image processor gives for one RGB picture; those of several are joined on the first axis."""
        return dict(processor.image_processor(images=[picture], return_tensors="pt"))

    def thinned(self, processor, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pixels without what `whole` can put back, for the way from another process."""
        return dict(pixels)

    def whole(self, processor, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pixels as the model takes them, of `thinned` ones or others."""
        return dict(pixels)

    def look(self, core: nn.Module, inputs: Mapping[str, torch.Tensor]) -> BaseModelOutputWithPooling:
        """What the vision tower, and the projection after it, make of a batch's pictures."""
        given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        return core.get_image_features(**given, return_dict=True)

    def embed(
        self, core: nn.Module, inputs: Mapping[str, torch.Tensor], features: BaseModelOutputWithPooling | None = None
    ) -> tuple[torch.Tensor, dict]:
        """What enters block 0, ``[b, t, d]``, and what else the decoder has to be given, by keyword.

        Token embeddings, with the vision tower's output (after projection) at the image tokens; ``features`` if the
        tower has run.
        """
        states = core.get_input_embeddings()(inputs["input_ids"])
        features = self.look(core, inputs) if features is None else features
        image = torch.cat(list(features.pooler_output)).to(states.device, states.dtype)
        mask = core.get_placeholder_mask(inputs["input_ids"], inputs_embeds=states, image_features=image)
        mask = mask[0] if isinstance(mask, tuple) else mask
        return states.masked_scatter(mask, image), self._further(features, mask[..., 0])

    def _further(self, features, image_mask: torch.Tensor) -> dict:
        return {}


class _Qwen(Family):
    """Both Qwen families: the picture resized, each axis on its own, and read row by row."""

    placeholder = "<|image_pad|>"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    settings = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "resample")

    def shrink(self, processor, max_pixels: int) -> None:
        """The processor's own largest area."""
        size = dict(processor.image_processor.size)
        processor.image_processor.size = size | {
            "longest_edge": max_pixels,
            "shortest_edge": min(size["shortest_edge"], max_pixels),
        }

    def thinned(self, processor, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A still picture comes as a film of equal frames, of which one is enough."""
        return dict(pixels) | {"pixel_values": self._frames(processor, pixels["pixel_values"])[:, :, 0].flatten(1)}

    def whole(self, processor, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image, values = processor.image_processor, pixels["pixel_values"]
        if values.shape[1] == 3 * image.patch_size**2:
            frames = values.view(len(values), 3, 1, -1).expand(-1, -1, image.temporal_patch_size, -1)
            return dict(pixels) | {"pixel_values": frames.flatten(1)}
        return dict(pixels)

    def _frames(self, processor, values: torch.Tensor) -> torch.Tensor:
        """Patches ``[n, channel, frame, pixel]``."""
        return values.view(len(values), 3, processor.image_processor.temporal_patch_size, -1)

    def resized(self, processor, width: int, height: int) -> tuple[int, int]:
        """``(width, height)`` to which the processor resizes a picture; each axis is rounded on its own."""
        image = processor.image_processor
        factor = image.patch_size * image.merge_size
        size = smart_resize(height, width, factor, image.size["shortest_edge"], image.size["longest_edge"])
        return size[1], size[0]

    def regions(self, processor, width: int, height: int) -> Regions:
        """One grid over the picture."""
        factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        cols, rows = (side // factor for side in self.resized(processor, width, height))
        return raster(rows, cols, (0, 0, width, height), width, height)


class Qwen25VL(_Qwen):
    """Qwen2.5-VL of any size. It speaks in pixels of the resized picture."""

    model_type = "qwen2_5_vl"
    model, processor, core = "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", "Qwen2_5_VLModel"
    speaks = "pixels"

    def frame(self, processor, width: int, height: int) -> Frame:
        """Pixels of the resized picture."""
        return Frame(self.resized(processor, width, height), (0, 0, width, height))


class Qwen3VL(_Qwen):
    """Qwen3-VL. It speaks in thousandths of the picture.

    Its DeepStack features (of three layers of the vision tower) are added by the decoder to the image tokens' states
    *after* the first blocks. States are what leaves a block: ``embed`` and the first blocks' do not have those
    features yet; what enters block n+1 is the state of block n plus the n-th of them.
    """

    model_type = "qwen3_vl"
    model, processor, core = "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen3VLModel"
    speaks = "thousandths"

    def frame(self, processor, width: int, height: int) -> Frame:
        """Thousandths of the picture."""
        return Frame((1000, 1000), (0, 0, width, height))

    def _further(self, features, image_mask: torch.Tensor) -> dict:
        deep = [torch.cat(list(one)) for one in features.deepstack_features]
        return {"visual_pos_masks": image_mask, "deepstack_visual_embeds": deep}


class Llava(Family):
    """LLaVA-1.5: one square, a centre crop of the picture or the picture padded, as its processor's settings say.

    It speaks in shares of that square.
    """

    model_type = "llava"
    model, processor = "LlavaForConditionalGeneration", "LlavaProcessor"
    placeholder = "<image>"
    image = "<image>\n"
    turn = " USER:"
    speaks = "shares"
    settings = ("size", "crop_size", "do_center_crop", "do_pad", "image_mean", "image_std", "resample")

    def chat(self, system: str) -> str:
        """Vicuna's chat text."""
        return f"{system} USER: {self.image}{{}} ASSISTANT:"

    def shrink(self, processor, max_pixels: int) -> None:
        """Refused: every picture takes one square."""
        raise Refusal(f"--max-pixels {max_pixels}: a llava always sees a square of one size; leave it out")

    def frame(self, processor, width: int, height: int) -> Frame:
        """Shares of the square that is shown: beyond the picture where it is padded, within it where it is cropped."""
        image = processor.image_processor
        canvas_w, canvas_h = [max(width, height)] * 2 if image.do_pad else (width, height)
        if image.size.get("shortest_edge"):
            resized_h, resized_w = get_size_with_aspect_ratio((canvas_h, canvas_w), image.size["shortest_edge"])
        else:
            resized_h, resized_w = image.size["height"], image.size["width"]
        seen_w, seen_h = resized_w, resized_h
        if image.do_center_crop:
            seen_w, seen_h = image.crop_size["width"], image.crop_size["height"]
        scale_x, scale_y = canvas_w / resized_w, canvas_h / resized_h
        left = int((resized_w - seen_w) / 2) * scale_x - (canvas_w - width) // 2
        top = int((resized_h - seen_h) / 2) * scale_y - (canvas_h - height) // 2
        return Frame((1, 1), (left, top, left + seen_w * scale_x, top + seen_h * scale_y))

    def regions(self, processor, width: int, height: int) -> Regions:
        """One grid over the square."""
        image = processor.image_processor
        seen = image.crop_size if image.do_center_crop else image.size
        rows, cols = seen["height"] // processor.patch_size, seen["width"] // processor.patch_size
        return raster(rows, cols, self.frame(processor, width, height).view, width, height)


class InternVL(Family):
    """InternVL-3.5: square tiles over the resized picture, row by row, then a thumbnail of the whole.

    Tokens go row by row within a tile; rows and columns count over the whole picture. Tokens of a thumbnail that
    follows tiles stand in no cell: their row and column are null, their box is theirs. It speaks in thousandths.
    """

    model_type = "internvl"
    model, processor = "InternVLForConditionalGeneration", "InternVLProcessor"
    placeholder = "<IMG_CONTEXT>"
    image = "<img><IMG_CONTEXT></img>\n"
    speaks = "thousandths"
    settings = ("size", "min_patches", "max_patches", "image_mean", "image_std", "resample")

    def shrink(self, processor, max_pixels: int) -> None:
        """As few tiles as fit into that area."""
        image = processor.image_processor
        tile = image.size["height"] * image.size["width"]
        if max_pixels < tile * image.min_patches:
            raise Refusal(f"--max-pixels {max_pixels}: this internvl needs {tile * image.min_patches} or more")
        image.max_patches = min(image.max_patches, max_pixels // tile)

    def frame(self, processor, width: int, height: int) -> Frame:
        """Thousandths of the picture."""
        return Frame((1000, 1000), (0, 0, width, height))

    def regions(self, processor, width: int, height: int) -> Regions:
        """Tile after tile, then the thumbnail where there is more than one tile."""
        image = processor.image_processor
        tile = image.size["height"], image.size["width"]
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        across, down = get_optimal_tiled_canvas((height, width), tile, image.min_patches, image.max_patches)
        side = int(processor.image_seq_length**0.5)
        whole = (0, 0, width, height)
        grid = raster(down * side, across * side, whole, width, height)
        if across * down == 1:
            return grid
        cells = np.arange(len(grid.row)).reshape(down, side, across, side).transpose(0, 2, 1, 3).ravel()
        thumbnail = raster(side, side, whole, width, height)
        none = np.full(side * side, -1)
        return Regions(
            np.concatenate([grid.row[cells], none]),
            np.concatenate([grid.col[cells], none]),
            np.concatenate([grid.box[cells], thumbnail.box]),
        )

    def pixels(self, processor, picture: Image.Image) -> dict[str, torch.Tensor]:
        """The tiles ``[n, 3, h, w]`` and the thumbnail."""
        # Tiling is the processor's default, not its image processor's.
        given = processor.image_processor(images=[picture], crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": given["pixel_values"]}


FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen25VL(), Qwen3VL(), Llava(), InternVL())}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint's configuration.

    Raises
    ------
    Refusal
        It is none of those known here.
    """
    if config.model_type not in FAMILIES:
        raise Refusal(f"the model is a {config.model_type!r}; those that are read are {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]
