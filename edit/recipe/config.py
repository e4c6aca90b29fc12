"""What a data set is to be made by."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edit.config import POCKET
from edit.endpoints.config import EndpointSettings
from edit.endpoints.wire import URLS
from store.errors import Refusal

PAPER = "paper"
SCENES = "scenes"
WRITER_TEMPERATURE = 0.9
BY_RECIPE: dict[str, dict[str, str | int | None]] = {
    POCKET: {"samples": 64, **dict.fromkeys(("writer", "generator", "harmonizer", "captioner"), SCENES)}
    | {"boxer": POCKET, "conditioner": POCKET, "conditioning": "native", "threads": 1},
    PAPER: {"samples": 400, "writer": "Qwen/Qwen2.5-7B-Instruct", "generator": "Qwen/Qwen-Image"}
    | {"harmonizer": "Qwen/Qwen-Image-Edit", "conditioning": "edit"}
    | dict.fromkeys(("captioner", "boxer", "conditioner"), "Qwen/Qwen2.5-VL-7B-Instruct"),
}
"""Settings that a preset of the recipe decides where they are not given."""


@dataclass(frozen=True)
class RecipeConfig:
    """Make a data set of hard edits as the paper made its own, one stage after the other, each by a model of choice.

    write (a scene with one odd object, and the edit that makes it like the rest) → generate (the scene) → harmonize
    (the odd object) → reverse (the uniform picture becomes the source, the odd one the target) → caption (an
    instruction by position alone) → box → verify (by a person, with `python -m extract.review`).

    The result is a folder of parquet shards in OmniEdit's columns, OUT/dataset; after the review, the same command
    writes what the person accepted or fixed to OUT/verified. An interrupted run goes on by the same command; a changed
    setting redoes its stage and those after it. A sample that fails is set aside; OUT/manifest.parquet says why.
    """

    out: Path = Path("data/recipe")
    """Folder of the run: what each stage made, the data set, the store to review (made if missing)."""
    preset: Literal["pocket", "paper"] = POCKET
    """Where the defaults of the models come from. pocket: scenes drawn here, with exact truth, and the shipped model
    that boxes them. paper: Qwen/Qwen2.5-7B-Instruct writes, Qwen/Qwen-Image draws, Qwen/Qwen-Image-Edit harmonizes,
    Qwen/Qwen2.5-VL-7B-Instruct captions and boxes; one after the other on one large GPU."""
    samples: int | None = None
    """Samples to begin with (pocket 64, paper 400); a larger number later adds to them."""
    writer: str | None = None
    """Who writes the prompts: scenes, a folder or hub id of a language model in safetensors, or one behind an endpoint:
    openai:NAME (any OpenAI-compatible one, see --url) or gemini:NAME."""
    endpoint: EndpointSettings = field(default_factory=lambda: EndpointSettings(temperature=WRITER_TEMPERATURE))
    generator: str | None = None
    """Who draws the scene: scenes, or a folder or hub id of a diffusers text-to-image pipeline."""
    harmonizer: str | None = None
    """Who makes the odd object like the rest: scenes (exactly), pocket, or a folder or hub id of a Qwen-Image-Edit."""
    captioner: str | None = None
    """Who writes the instruction: scenes, pocket, or a folder or hub id of a vision-language model."""
    boxer: str | None = None
    """Who boxes the object: scenes (exactly), pocket, or a folder or hub id of a vision-language model."""
    conditioner: str | None = None
    """The vision-language model whose last layer conditions the harmonizer, if that is an editor."""
    conditioning: Literal["native", "edit"] | None = None
    """The prompt it reads then, as of `python -m extract` (pocket native, paper edit)."""
    side: int = 1024
    """Width and height in pixels that a pipeline draws at; drawn scenes have sizes of their own."""
    generator_steps: int | None = None
    """Denoising steps of the generator; the pipeline's own number if not given."""
    harmonizer_steps: int | None = None
    """Denoising steps of the harmonizer; the editor's own number if not given."""
    verdicts: Path | None = None
    """File of verdicts to apply; those beside this run's stores to review if not given."""
    retry: bool = False
    """Try samples again that were set aside."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the models run; auto: cuda if there is one."""
    threads: int | None = None
    """Torch threads on a CPU (pocket 1); torch's own choice if not given."""
    seed: int = 0
    """Decides every sample."""
    json: bool = False
    """Print the summary as one JSON object."""

    def __post_init__(self):
        """Take the preset's settings, and refuse what makes no sense."""
        if self.preset not in BY_RECIPE:
            raise Refusal(f"--preset {self.preset!r} is not one of {', '.join(BY_RECIPE)}")
        for name, value in BY_RECIPE[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("samples", "generator_steps", "harmonizer_steps", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} {value}: give 1 or more")
        if self.side < 64 or self.side % 32:
            raise Refusal(f"--side {self.side}: give a multiple of 32 from 64 on")
        if not 0 <= self.seed < 2**32:
            raise Refusal(f"--seed {self.seed}: give one from 0 to {2**32 - 1}")
        if endpoint_of(self.writer) is None and self.endpoint != EndpointSettings(temperature=WRITER_TEMPERATURE):
            raise Refusal(
                f"--writer {self.writer} is behind no endpoint, but settings of one are given: add --writer openai:NAME"
            )
        if self.generator == SCENES and self.writer != SCENES:
            raise Refusal(f"--generator scenes draws no text of --writer {self.writer}: give --writer scenes")
        for name in ("harmonizer", "captioner", "boxer"):
            if getattr(self, name) == SCENES and self.generator != SCENES:
                raise Refusal(
                    f"--{name} scenes knows nothing of what --generator {self.generator} draws: give --generator "
                    f"scenes, or a model as --{name}"
                )


def endpoint_of(writer: str) -> tuple[str, str] | None:
    """The kind of endpoint and the name of the model there; null where the writer is behind none."""
    kind, colon, name = writer.partition(":")
    return (kind, name) if colon and kind in URLS else None
