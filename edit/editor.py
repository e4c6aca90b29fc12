"""The editor: diffusers' own Qwen-Image-Edit pipeline, given states of the single pass and a picture with its box.

The pipeline's call is the stock code. Two things are decided here and not there: how large a picture it works at (the
stock code always takes a million pixels), and whose states condition it (the stock code reads the last layer, by 1-D
positions).
"""

import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
from diffusers import BitsAndBytesConfig, QwenImageEditPipeline, QwenImageTransformer2DModel
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from edit.config import POCKET, POCKET_WEIGHTS
from edit.frames import for_single_frames
from extract.model import file_hash
from store.errors import Refusal

SETTINGS_FILE = "editor.json"
STOCK_AREA, STOCK_MULTIPLE = 1024 * 1024, 32
PARTS = ("scheduler", "transformer", "vae")
"""What of a pipeline's folder decides an edit by given states."""
INDEX, DECIDING = "model_index.json", (".json", ".safetensors")
MEND = "install diffusers 0.42"
WANTED = "the folder of a Qwen-Image-Edit pipeline, as its save_pretrained writes it, or a hub id"


@dataclass(frozen=True)
class Settings:
    """How an editor is run; kept beside its weights as editor.json."""

    area: int = STOCK_AREA
    """Pixels that a picture is resized to before the autoencoder."""
    multiple: int = STOCK_MULTIPLE
    """Its sides are multiples of this."""
    steps: int = 40
    """Denoising steps."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Those of an editor's folder; the stock ones where it keeps none."""
        path = folder / SETTINGS_FILE
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        """Write them beside the weights."""
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def working_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of this size is worked at: of ``area``, by its own proportions."""
        across = math.sqrt(self.area * width / height)
        sides = (across, self.area / across)
        found = tuple(max(self.multiple, round(side / self.multiple) * self.multiple) for side in sides)
        return found[0], found[1]


@lru_cache
def call_at(pipeline: type, settings: Settings) -> Callable:
    """The stock ``__call__`` of a pipeline, word for word, but for the size it works at.

    The stock code asks a function of its module for that size, with an area it has written into it. Here the same
    code runs with another function of that name; the module is not touched.

    Raises
    ------
    Refusal
        The installed diffusers does not ask so.
    """
    stock = inspect.unwrap(pipeline.__call__)
    if "calculate_dimensions" not in stock.__code__.co_names or stock.__closure__:
        raise Refusal(f"the installed diffusers' {pipeline.__name__} has another way to its working size: {MEND}")

    def calculate_dimensions(_area: int, ratio: float) -> tuple[int, int, None]:
        return *settings.working_size(round(ratio * 10_000), 10_000), None

    own = {**stock.__globals__, "calculate_dimensions": calculate_dimensions}
    made = types.FunctionType(stock.__code__, own, stock.__name__, stock.__defaults__)
    made.__kwdefaults__ = stock.__kwdefaults__
    return torch.no_grad()(made)


@dataclass(frozen=True)
class Editor:
    """A pipeline that edits pictures by given states."""

    pipeline: QwenImageEditPipeline
    settings: Settings
    weights: str | None = None
    """What names its weights, as of `weights_of`; null of one that is at hand alone."""

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", nf4: bool = False
    ) -> Self:
        """The editor in a folder, of a hub id, or ``pocket``.

        It comes without its text encoder: `extract.Encoder` does that work. With ``nf4`` the transformer's weights are
        held in four bits (bitsandbytes).

        Raises
        ------
        Refusal
            There is none, it cannot be loaded from safetensors, or bitsandbytes is needed and not installed.
        """
        folder = POCKET_WEIGHTS if folder == POCKET else folder
        parts = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
        if nf4 and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
            raise Refusal("weights in nf4 need a CUDA device and bitsandbytes (pip install bitsandbytes): or take fp8")
        try:
            if nf4:
                parts["transformer"] = _in_nf4(folder, dtype)
            pipeline = QwenImageEditPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **parts)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise Refusal(f"{folder} is no editor that can be loaded ({first}): give {WANTED}") from error
        pipeline = pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        for_single_frames(pipeline.vae)
        return cls(pipeline, Settings.load(Path(folder)), weights_of(folder))

    def resized(self, picture: Image.Image) -> Image.Image:
        """The picture at the size it is worked at."""
        return picture.resize(self.settings.working_size(*picture.size), Image.Resampling.LANCZOS)

    @torch.inference_mode()
    def latents(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Normalised latents ``[b, c, h/8, w/8]`` of pictures of one size, as the pipeline makes them."""
        pipe = self.pipeline
        frames = pipe.image_processor.preprocess(pictures).unsqueeze(2).to(pipe.vae.device, pipe.vae.dtype)
        return pipe._encode_vae_image(frames, None)[:, :, 0]

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of normalised latents ``[b, c, h, w]``."""
        vae = self.pipeline.vae
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        raw = latents.unsqueeze(2).to(vae.device, torch.float32) * std.to(vae.device) + mean.to(vae.device)
        return self.pipeline.image_processor.postprocess(vae.decode(raw.to(vae.dtype)).sample[:, :, 0].float())

    def edit(self, picture: Image.Image, states: torch.Tensor, seed: int = 0, steps: int | None = None) -> Image.Image:
        """The edited picture, of the size of ``picture``.

        Parameters
        ----------
        picture
            RGB, with its box drawn on it if the editor is to see one.
        states
            What conditions it, ``[t, w]``, in the order of the sequence.
        seed
            Of the noise that it begins with.
        steps
            Denoising steps; the editor's own number if not given.
        """
        device, dtype = self.pipeline.transformer.device, self.pipeline.transformer.dtype
        width, height = self.settings.working_size(*picture.size)
        made = call_at(type(self.pipeline), self.settings)(
            self.pipeline,
            image=picture,
            prompt_embeds=states[None].to(device, dtype),
            prompt_embeds_mask=torch.ones(1, len(states), dtype=torch.long, device=device),
            width=width,
            height=height,
            num_inference_steps=steps or self.settings.steps,
            true_cfg_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        return made.resize(picture.size, Image.Resampling.LANCZOS)


def weights_of(folder: str | Path) -> str | None:
    """The sha256 (hex) of an editor's files in a folder, or the commit of a hub id as the hub's cache has it."""
    if not Path(folder).is_dir():
        cached = try_to_load_from_cache(str(folder), INDEX)
        return Path(cached).parent.name if isinstance(cached, str) else None
    files = [path for part in PARTS for path in sorted((Path(folder) / part).glob("*")) if path.suffix in DECIDING]
    told = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _in_nf4(folder: str | Path, dtype: torch.dtype) -> QwenImageTransformer2DModel:
    about = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return QwenImageTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=about, dtype=dtype, use_safetensors=True
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """``[b, c, h, w]`` to the transformer's tokens ``[b, h/2 · w/2, 4c]``, as the pipeline packs them."""
    return QwenImageEditPipeline._pack_latents(latents, *latents.shape)
