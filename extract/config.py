"""What an extraction is asked to do: one dataclass, and the two presets of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from store.errors import Refusal

POCKET = "pocket"
PAPER = "paper"
SCENES_SEED = 1
RANDOM_WEIGHTS, SHUFFLED_IMAGES = "random-weights", "shuffled-images"
STORES = {POCKET: "data/store.zarr", PAPER: "data/store-paper.zarr"}
"""Where a preset's store lies if no other place is given."""


@dataclass(frozen=True)
class ExtractConfig:
    """Run a vision-language model once over (picture, instruction) and keep its hidden states and attention rows.

    The store is laid out whole before the first pass, filled block by block and verified at the end. An interrupted
    run is taken up by the same command; a store of other settings is never written to.
    """

    preset: Literal["auto", "pocket", "paper"] = "auto"
    """Where the other options' defaults come from; auto: paper on a machine with CUDA, pocket elsewhere."""
    model: str = POCKET
    """A folder with a checkpoint in safetensors (Qwen2.5-VL, Qwen3-VL, LLaVA-1.5 or InternVL-3.5), a hub id, or
    ``pocket`` for the one shipped here."""
    revision: str | None = None
    """Revision of the hub id."""
    data: str = "data/scenes"
    """Folder of parquet shards in OmniEdit's columns, one shard, or a hub id (read by place, never whole). The pocket
    preset's own folder is drawn if it is missing."""
    store: str = STORES[POCKET]
    """Folder of the store, or a URL such as s3://bucket/name.zarr (made if missing). A control's own is beside the
    preset's: data/store-random-weights.zarr, data/store-shuffled-images.zarr."""
    control: Literal["none", "random-weights", "shuffled-images"] = "none"
    """A floor for what is read from the ordinary store, of the very same samples. random-weights: the same model with
    weights drawn anew (seed 0) by its own class; what a probe reads there is not learned. shuffled-images: every
    sample is shown the picture of another of its split (seed 0; column ``shown``), its box keeps its shares of the
    picture; what a probe reads there is not seen. Neither is asked for boxes: where the data bring none, give
    ``--boxes`` with the ordinary store."""
    grow: bool = False
    """Add to a store that is there the samples and layers of this command that it lacks; nothing in it is touched."""
    limit: int | None = 4096
    """Number of good samples to take; the data are read until so many are found or they end."""
    prompt: Literal["first", "last", "random"] | int = "first"
    """Which of a row's instructions: the first, the last, or one drawn from the seed. A number is a paraphrase of the
    first: 1 is the next that words it otherwise, 2 the one after, and so on around; a row with one wording is set
    aside. 0 is the first."""
    shuffle: bool = False
    """Read the data in a random order (OmniEdit is sorted by task)."""
    seed: int = 0
    """Seed of the random prompt, the shuffling and the held-out split."""
    min_area: float = 0.001
    """Smallest box kept, as a share of the picture."""
    max_area: float = 0.9
    """Largest box kept, as a share of the picture."""
    held_out: float = 0.25
    """Share of the samples whose split is ``test``, chosen by their ids."""
    layers: str = "all"
    """``all`` (embed, every block, final) or a list such as ``embed,15-24,final``. Nothing above the last of them is
    computed."""
    tokens: Literal["all", "text", "image"] = "all"
    """Keep the states of all tokens, of the prompt's (instruction and template), or of the picture's only."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in and its states are kept in; float32 is twice as large, and lossless codecs only."""
    attention: Literal["none", "mean", "heads"] = "mean"
    """Attention rows of every kept block: none, averaged over heads, or each head's."""
    queries: Literal["instruction", "prompt"] = "instruction"
    """Whose rows: the instruction's tokens, or all kept tokens but the picture's."""
    keys: Literal["all", "image", "text"] = "all"
    """What the rows look at: all kept tokens, the picture's, or all others."""
    conditioning: Literal["native", "edit", "edit-plus"] = "native"
    """The prompt around the instruction, and the picture's size. edit: as Qwen-Image-Edit conditions (1024² area),
    edit-plus: as its Plus, 2509 and 2511 do (384² area), both taken from the installed diffusers; native: the editing
    prompt in the model's own chat format, the picture as the checkpoint's processor sizes it."""
    positions: Literal["mrope", "sequential"] | None = None
    """Position ids: 3-D ones, or 0 … t-1 (what a caller of Qwen2.5-VL gets who forgets ``mm_token_type_ids``, as
    diffusers' editing pipelines do); by default those that the model was trained with."""
    max_prompt_tokens: int = 512
    """Longest instruction in tokens; every sample is laid out as wide as the longest, so an endless one costs all."""
    max_pixels: int | None = None
    """Area in pixels above which pictures are shrunk; the checkpoint's own processor setting where not given."""
    vlm_boxes: bool = True
    """Also ask the model for the box by generating; the answer is kept beside the sample. Samples whose data bring no
    box get this one as their true box, and the area filter applies to it."""
    boxes: str | None = None
    """A file of verdicts of ``python -m extract.review``: its boxes are the true ones, what it rejects is set aside.
    Or another store: exactly its valid samples are taken, with its boxes, so that a control has the boxes that the
    model gave there."""
    max_new_tokens: int = 400
    """Longest answer when asked for the box."""
    codec: Literal["none", "zstd", "planes", "int8", "fp8"] = "zstd"
    """Compression of image states: zstd (lossless, any Zarr reader), planes (lossless, smaller, read by this package),
    int8 and fp8 (lossy), or none. Attention rows are zstd unless this is none."""
    text_codec: Literal["none", "zstd", "planes", "int8", "fp8"] = "none"
    """Compression of prompt states; they are small and read most."""
    batch_size: int = 32
    """Samples a pass."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; auto: cuda if there is one."""
    threads: int | None = None
    """Torch threads on a CPU; torch's own choice where not given. One is best for models as small as the pocket one:
    two that have to share a busy core can be thirty times slower."""
    loaders: int | None = None
    """Processes that read, decode and prepare pictures, and build token tables; 0 does it in a thread. By default as
    many as cores are left, up to 8, and none for a few hundred samples."""
    worker: str | None = None
    """Name of this process's commit log; processes that fill one store at the same time need different ones. By
    default its rank, where torchrun or Slurm gives it one (RANK and WORLD_SIZE, SLURM_PROCID, SLURM_ARRAY_TASK_ID)."""
    dask: str | None = None
    """Spread the blocks over a Dask cluster: the address of its scheduler (tcp://host:8786), ``local`` or ``local:4``.
    The workers need this package, the data and the store under the same paths."""
    dry_run: bool = False
    """Only say what would be written, how large it would be, and from a few samples how long it would take."""
    budget: str | None = None
    """Only propose what to keep so that the store fits into this (500GB, 2TB), and what each proposal leaves out."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        if self.control != "none" and self.store in STORES.values():
            own = self.store.removesuffix(".zarr") + f"-{self.control}.zarr"
            object.__setattr__(self, "store", own)  # the ordinary store is what a control is compared with
        if self.control == SHUFFLED_IMAGES and self.grow:
            raise Refusal(
                "--grow --control shuffled-images: with more samples each would be shown another picture; make a new "
                "store"
            )
        if isinstance(self.prompt, int) and self.prompt < 0:
            raise Refusal(f"--prompt {self.prompt}: give 0 (the first), 1 (its first paraphrase) or more")
        if self.loaders is not None and self.loaders < 0:
            raise Refusal(f"--loaders {self.loaders}: give 0 or more")
        for name in ("limit", "max_prompt_tokens", "max_pixels", "max_new_tokens", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} {value}: give 1 or more")
        if self.max_pixels is not None and self.conditioning != "native":
            raise Refusal(
                f"--max-pixels {self.max_pixels}: --conditioning {self.conditioning} says the size; leave it away"
            )
        if not 0 <= self.held_out < 1:
            raise Refusal(f"--held-out {self.held_out}: give a share from 0 up to, not including, 1")
        if not 0 <= self.min_area < self.max_area <= 1:
            raise Refusal(f"--min-area {self.min_area} --max-area {self.max_area}: give shares, the first the smaller")

    @property
    def asks_boxes(self) -> bool:
        """Whether the model is asked for boxes; a control's cannot know where its own sample's is."""
        return self.vlm_boxes and self.control == "none"


PRESETS: dict[str, ExtractConfig] = {
    POCKET: ExtractConfig(preset=POCKET, max_new_tokens=40, threads=1),
    PAPER: ExtractConfig(
        preset=PAPER,
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        data="TIGER-Lab/OmniEdit-Filtered-1.2M",
        store=STORES[PAPER],
        limit=128_000,
        shuffle=True,
        tokens="text",
        conditioning="edit",
        batch_size=8,
    ),
}

ABOUT_PRESETS = """
Presets:
  pocket  the shipped 4-million-parameter Qwen2.5-VL over 4,096 scenes drawn here; minutes on any laptop
  paper   Qwen/Qwen2.5-VL-7B-Instruct over TIGER-Lab/OmniEdit-Filtered-1.2M, 128,000 samples as Qwen-Image-Edit
          conditions on them; one CUDA GPU or several. It keeps the prompt's tokens at all layers and the attention
          rows, which fits a 2-TB disk; the picture's tokens (--tokens all) would take 36 TB
"""


def choose_preset(argv: Sequence[str]) -> tuple[ExtractConfig, str]:
    """The preset that ``argv`` asks for (or the machine, for auto), and one line that says which and why."""
    asked = "auto"
    for number, argument in enumerate(argv):
        if argument == "--preset" and number + 1 < len(argv):
            asked = argv[number + 1]
        elif argument.startswith("--preset="):
            asked = argument.partition("=")[2]
    if asked in PRESETS:
        return PRESETS[asked], f"preset {asked}: asked for"
    if torch.cuda.is_available():
        return PRESETS[
            PAPER
        ], f"preset paper: this machine has CUDA ({torch.cuda.get_device_name()}); PRESET=pocket overrides"
    return PRESETS[POCKET], "preset pocket: this machine has no CUDA device; PRESET=paper overrides"
