"""A baseline: an editor read from a folder or the hub, that edits a picture by an instruction."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from edit.baselines.recipes import BASELINES, Recipe
from store.errors import Refusal

MEND = "install diffusers 0.42"
OFFLOADS, POSITIONS = ("none", "model", "sequential"), ("stock", "mrope")
LIBRARIES = ("diffusers", "transformers", "torch")


@dataclass(frozen=True)
class Baseline:
    """An editor as its authors ship it."""

    name: str
    pipeline: Any
    settings: dict[str, Any]
    """Everything that its pictures follow from beside picture, instruction, seed and steps, for JSON; ``steps`` is
    the number that it takes where none is asked for."""

    @classmethod
    def load(
        cls,
        name: str,
        source: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "auto",
        offload: Literal["none", "model", "sequential"] = "none",
        positions: Literal["stock", "mrope"] = "stock",
        revision: str | None = None,
    ) -> Self:
        """The baseline of a name in `BASELINES`; safetensors alone are read, and no code that comes with them.

        Parameters
        ----------
        source
            A folder of its pipeline, or a hub id; its authors' if not given.
        dtype
            Of all its weights.
        device
            Where it runs: auto, cuda or cpu.
        offload
            What waits in main memory: none; model, all but the part at work; sequential, all but the layer at work,
            for the smallest cards.
        positions
            Of the tokens of Qwen2.5-VL: stock, as the installed libraries have them; mrope, in three dimensions.
        revision
            Branch, tag or commit at the hub.

        Raises
        ------
        Refusal
            There is no such baseline, the installed diffusers lacks its pipeline, or ``source`` is not one of it.
        """
        recipe = _checked(name, offload, positions)
        source = str(source or recipe.hub_id)
        folder = Path(source).expanduser()
        source = str(folder) if folder.is_dir() else source
        import diffusers

        from extract.model import find_device

        where = find_device(device)
        if offload != "none" and where.type == "cpu":
            raise Refusal(f"offload {offload} is from a GPU to main memory: give device cuda, or offload none")
        pipeline = getattr(diffusers, recipe.pipeline, None)
        if pipeline is None:
            raise Refusal(f"{name}: the installed diffusers {diffusers.__version__} has no {recipe.pipeline}; {MEND}")
        diffusers.utils.logging.disable_progress_bar()
        try:
            index, commit = pipeline.load_config(source, revision=revision, return_commit_hash=True)
            _check_index(name, source, recipe, index)
            given = {"revision": commit or revision, "dtype": dtype, "use_safetensors": True}
            parts = _text_models(name, source, index, given)
            made = pipeline.from_pretrained(source, trust_remote_code=False, **given, **parts)
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(
                f"{name}: {source!r} is not a folder or hub id of a whole {recipe.pipeline} in safetensors: {reason}"
            ) from error
        _check_weights(name, source, made)
        made.set_progress_bar_config(disable=True)
        if positions == "mrope":
            made.text_encoder.register_forward_pre_hook(_with_token_types, with_kwargs=True)
        if offload == "none":
            made.to(where)
        else:
            getattr(made, f"enable_{offload}_cpu_offload")(device=where)
        settings = {
            "name": name,
            "pipeline": recipe.pipeline,
            "id": source,
            "revision": commit or revision,
            "sha256": _digest(folder) if folder.is_dir() else None,
            "steps": recipe.steps,
            recipe.guides: recipe.guidance,
            **recipe.also,
            "prompt": "the instruction" if recipe.prompt is str else recipe.prompt("{instruction}"),
            "positions": positions,
            "dtype": str(dtype).removeprefix("torch."),
            "device": where.type,
            "offload": offload,
            "libraries": {library: version(library) for library in LIBRARIES},
        }
        return cls(name, made, settings)

    def edit(self, picture: Image.Image, instruction: str, seed: int = 0, steps: int | None = None) -> Image.Image:
        """The edited picture, RGB of the size of ``picture``.

        Parameters
        ----------
        picture
            RGB.
        instruction
            What to change. FIBO-Edit also takes the JSON of its own prompt writers.
        seed
            Of the noise that it begins with, drawn on the CPU: the same on every device.
        steps
            Denoising steps, 2 or more; as its authors have it if not given.

        Raises
        ------
        Refusal
            The input is none that it can be given, or the result is not finite.
        """
        recipe = BASELINES[self.name]
        steps = recipe.steps if steps is None else steps
        self._check(picture, instruction, steps)
        given = recipe.size(*picture.size) if recipe.size else {}
        seen = picture.resize((given["width"], given["height"]), Image.Resampling.LANCZOS) if given else picture
        given |= {recipe.guides: recipe.guidance, **recipe.also, "num_inference_steps": steps, "output_type": "np"}
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            made = self.pipeline(image=seen, prompt=recipe.prompt(instruction), generator=generator, **given).images
        except ValueError as error:
            size = "{} x {}".format(*picture.size)
            raise Refusal(f"{self.name} takes no picture of {size} with {instruction!r}: {error}") from error
        if not np.isfinite(made).all():
            raise Refusal(
                f"{self.name} made a picture that is not finite of {instruction!r} with seed {seed}: load it in "
                "float32 or bfloat16, or take another number of steps"
            )
        return self.pipeline.image_processor.numpy_to_pil(made)[0].resize(picture.size, Image.Resampling.LANCZOS)

    def _check(self, picture: Image.Image, instruction: str, steps: int) -> None:
        if picture.mode != "RGB":
            raise Refusal(f"{self.name} was given a picture of mode {picture.mode}: convert it to RGB")
        if not instruction.strip():
            raise Refusal(f"{self.name} was given an empty instruction: say what to change")
        if steps < 2:
            raise Refusal(
                f"{self.name} was asked for {steps} steps, of which its schedule is not finite: give 2 or more"
            )
        for part in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(self.pipeline, part, None)
            added = getattr(tokenizer, "tokenizer", tokenizer).get_added_vocab() if tokenizer else {}
            if special := [token for token in added if token.strip() and token in instruction]:
                raise Refusal(f"the instruction {instruction!r} holds {special[0]!r}, a special token of {self.name}")


def _checked(name: str, offload: str, positions: str) -> Recipe:
    if name not in BASELINES:
        raise Refusal(f"there is no baseline {name!r}: give one of {', '.join(BASELINES)}")
    if offload not in OFFLOADS:
        raise Refusal(f"offload {offload!r} is not known: give {', '.join(OFFLOADS)}")
    if positions not in POSITIONS:
        raise Refusal(f"positions {positions!r} are not known: give {' or '.join(POSITIONS)}")
    recipe = BASELINES[name]
    if positions == "mrope" and not recipe.positions:
        raise Refusal(f"positions mrope are those of Qwen2.5-VL, which {name} does not read: give stock")
    return recipe


def _check_index(name: str, source: str, recipe: Recipe, index: Mapping[str, Any]) -> None:
    found = index.get("_class_name")
    if found != recipe.pipeline:
        others = ", ".join(other for other, one in BASELINES.items() if one.pipeline == found)
        mend = f"that is {others}" if others else f"give a folder or hub id such as {recipe.hub_id}"
        raise Refusal(f"{name} is a {recipe.pipeline}, and {source!r} holds a {found}: {mend}")
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        if library not in (None, "diffusers", "transformers"):
            raise Refusal(
                f"{name}: the {part} of {source!r} is from {library!r}, code that is never run here: give a folder "
                "whose parts are all of diffusers and transformers"
            )


def _text_models(name: str, source: str, index: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Its text encoders, read before the rest: by themselves they draw at random what a file lacks, and go on."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    found = {}
    for part, value in index.items():
        kind = getattr(transformers, value[1], None) if isinstance(value, list) and value[0] == "transformers" else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            found[part], told = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **given)
            # No pipeline asks for the next token.
            if lacking := sorted(key for key in told["missing_keys"] if not key.startswith("lm_head")):
                raise _lacks(name, source, part, lacking[0])
    return found


def _check_weights(name: str, source: str, made: Any) -> None:
    for part, model in made.components.items():
        if isinstance(model, torch.nn.Module):
            for key, weight in model.named_parameters():
                if weight.is_meta:
                    raise _lacks(name, source, part, key)


def _lacks(name: str, source: str, part: str, key: str) -> Refusal:
    return Refusal(f"{name}: the {part} of {source!r} lacks the weight {key}: get its files again")


def _digest(folder: Path) -> str:
    """Of all that decides a folder's weights, as a hub's commit names its."""
    from extract.model import file_hash

    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    lines = [f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _with_token_types(encoder: torch.nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Name the tokens of pictures, which is what Qwen2.5-VL places tokens in three dimensions by."""
    return args, given | {"mm_token_type_ids": (given["input_ids"] == encoder.config.image_token_id).int()}
