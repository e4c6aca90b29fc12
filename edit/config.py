"""What the jobs of this package are asked to do: one dataclass each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edit.conditions import Conditioning
from edit.overlay import Overlay
from store.errors import Refusal

POCKET = "pocket"
POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"
"""The pocket editor as it is shipped, with its LoRA and the proxy that finds the box."""
POCKET_LORA, POCKET_PROXY = POCKET_WEIGHTS / "lora", POCKET_WEIGHTS / "proxy"


@dataclass(frozen=True)
class TrainConfig:
    """Teach an editor to obey a box drawn on its picture: LoRA on its transformer, on states and latents from disk.

    States come from the store, latents are encoded once and kept. An interrupted run goes on by the same command,
    with its optimizer's state; several GPUs train together by `accelerate launch -m edit train …`.
    """

    store: str = "data/store.zarr"
    """Store with the states of every token at the layer that conditions (folder or URL)."""
    data: str = "data/scenes"
    """Data that the store was made of, with edited pictures (folder or hub id)."""
    editor: str = POCKET
    """The editor: pocket, a folder of a diffusers pipeline, or a hub id such as Qwen/Qwen-Image-Edit."""
    out: Path = Path("runs/lora")
    """Folder for checkpoints, log.jsonl, validation pictures and the LoRA."""
    overlay: Overlay = field(default_factory=Overlay)
    train: Literal["lora", "all"] = "lora"
    """lora: adapters that see the overlay, the rest frozen. all: every weight, on pictures without overlay (how the
    pocket editor is made)."""
    bystanders: float = 0.0
    """Of --train all: the share of pictures that have the box of another sample drawn on them, and their targets have
    not. An editor so taught paints over frames that mean nothing, before a LoRA gives them a meaning."""
    layer: str = "final"
    """Layer whose states condition the editor."""
    tasks: tuple[str, ...] = ()
    """Tasks to train on; all if not given. Samples without a box cannot be overlaid and are left out."""
    steps: int = 3000
    """Optimizer steps."""
    batch_size: int = 2
    """Samples a step and process, all of one working size."""
    accumulate: int = 1
    """Batches whose gradients make a step."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: int = 16
    """Their scale is alpha over rank."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the blocks, with AdamW at a third of its rate for the rest; for --train all."""
    learning_rate: float = 1e-4
    """Peak rate; linear warm-up, then by a cosine to zero."""
    warmup: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    change_weight: float = 0.0
    """Additional weight of the loss where the picture changes; 0 is the plain flow-matching loss."""
    average: float = 0.0
    """Decay of a moving average of the weights, which is what is kept; 0 keeps the weights themselves."""
    base: Literal["bfloat16", "float32", "fp8", "nf4"] = "bfloat16"
    """How frozen weights are held: fp8 and nf4 fit 24-GB cards (nf4 needs CUDA and bitsandbytes)."""
    gradient_checkpointing: bool = True
    """Compute activations again on the way back instead of keeping them."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    validate_every: int = 250
    """Steps between validations: the loss and edited pictures of held-out samples."""
    validation: int = 8
    """Held-out samples that are edited at a validation (of eight times as many the loss is computed)."""
    limit: int | None = None
    """Take this many training samples at most."""
    threads: int | None = None
    """Torch threads on a CPU; torch's own choice where not given."""
    seed: int = 0
    """Seed of adapters, order, noise and times."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        for name in ("steps", "batch_size", "accumulate", "rank", "alpha", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise Refusal(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        if not 0 <= self.average < 1:
            raise Refusal(f"--average {self.average}: give a decay from 0 up to, not including, 1")
        if not 0 <= self.bystanders <= 1:
            raise Refusal(f"--bystanders {self.bystanders}: give a share from 0 to 1")
        if self.train == "lora" and self.bystanders:
            raise Refusal("--bystanders is for --train all: a LoRA is taught on every picture's own box")
        if self.train == "lora" and self.optimizer == "muon":
            raise Refusal("--optimizer muon is for --train all: the two thin matrices of an adapter want adamw")
        if self.train == "all" and self.base in ("fp8", "nf4"):
            raise Refusal(f"--train all --base {self.base}: weights that are trained cannot be held so; give bfloat16")


@dataclass(frozen=True)
class StagesConfig:
    """What edits in two stages: the VLM, the proxy, the editor and its LoRA, and how they are run."""

    editor: str = POCKET
    """The editor: pocket, a folder of a diffusers pipeline, or a hub id such as Qwen/Qwen-Image-Edit."""
    lora: str | None = POCKET
    """Folder of a LoRA that sees boxes, of `python -m edit train`; none edits without a box."""
    proxy: str | None = POCKET
    """Folder of a trained proxy that finds the box, of `python -m probes`; none where boxes are given."""
    store: str | None = None
    """Store that says how the VLM reads, where no proxy does."""
    vlm: str | None = None
    """Folder or hub id of the VLM's checkpoint, where it is not where it was when the proxy was trained."""
    steps: int | None = None
    """Denoising steps; the editor's own number if not given."""
    noise_seed: int = 0
    """Of the noise that the editor begins with."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where all of it runs."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the editor computes in."""
    threads: int | None = None
    """Torch threads on a CPU; torch's own choice where not given."""
    json: bool = False
    """Print one object instead of the summary."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        for name in ("steps", "threads", "samples", "limit", "max_new_tokens"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} {value}: give 1 or more")


@dataclass(frozen=True)
class RunConfig(StagesConfig):
    """Edit pictures in two stages: one pass of the VLM conditions the editor, and the proxy finds the box in it.

    Of one picture (--picture, --instruction), a folder of pictures, each with its instruction in a text file of the
    same name beside it, or a data set in OmniEdit's columns. Every edited picture gets a JSON file beside it with its
    box, seed and settings. What is there already of the same settings is not done again.
    """

    picture: Path | None = None
    """A picture that Pillow reads."""
    instruction: str | None = None
    """What is to be edited in --picture, in words."""
    folder: Path | None = None
    """A folder of pictures with text files."""
    data: str | None = None
    """A folder of parquet shards in OmniEdit's columns, or a hub id."""
    limit: int | None = 16
    """Samples of --data to edit."""
    out: Path = Path("runs/edited")
    """Folder for the edited pictures."""
    box: tuple[float, float, float, float] | None = None
    """x1 y1 x2 y2 in pixels, for --picture, in the place of the proxy's."""
    conditioning: Conditioning = field(default_factory=Conditioning)

    def __post_init__(self):
        """Refuse what does not go together."""
        super().__post_init__()
        given = [name for name in ("picture", "folder", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            raise Refusal(f"give one of --picture, --folder and --data; given: {', '.join(given) or 'none'}")
        if (self.picture is None) != (self.instruction is None):
            raise Refusal("--picture and --instruction go together: say in words what to edit in it")
        if self.box is not None and self.picture is None:
            raise Refusal("--box is of one --picture")


@dataclass(frozen=True)
class EvaluateConfig(StagesConfig):
    """Edit the same held-out scenes by every conditioning and box, and score them beside the VLM's own answer.

    The scenes are drawn afresh from a seed, so their masks and their true targets are known: an exact judge says of
    every edited picture which objects changed. What is edited is kept; the same command goes on where it ended.
    """

    out: Path = Path("runs/edit")
    """Folder for pictures, scores.parquet, report.html and the items that `python -m edit judge` asks about."""
    samples: int = 200
    """Scenes."""
    seed: int = 90_001
    """Names the set of scenes; training scenes have other seeds."""
    difficulty: Literal["easy", "medium", "hard", "named"] = "hard"
    """As of `python -m extract.scenes`."""
    methods: tuple[str, ...] = ()
    """plain, norm-average, description, middle, our-box, true-box, wrong-box, unedited; all if not given (middle needs
    --middle)."""
    middle: str | None = None
    """Layer of the method middle: the voted l*, by `python -m analysis layers`."""
    lpips_trunk: str = "random"
    """A safetensors file with AlexNet's weights; random is no published metric and says so."""

    def __post_init__(self):
        """Refuse what makes no sense."""
        super().__post_init__()
        if "middle" in self.methods and self.middle is None:
            raise Refusal("--methods middle needs --middle, the layer: `python -m analysis layers` votes on it")
        if self.lora is None or self.proxy is None:
            raise Refusal("an evaluation compares boxes: give --lora and --proxy")


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of an evaluation again from what it left on disk: no model is loaded.

    OUT/report.html is one page that needs no network: whether our box closes the gap between the plain editor and the
    true box, or why not, the table with paired tests, figures, and pictures side by side. Beside it lie table.md and,
    in OUT/report, every figure (PNG, SVG, CSV, JSON) and table. `python -m edit evaluate` ends with it.
    """

    out: Path = Path("runs/edit")
    """Folder of `python -m edit evaluate`."""
    verdicts: tuple[Path, ...] = ()
    """Tables of `python -m edit judge` on the same pictures, put beside the exact scores; named as their files."""
    gallery: int = 60
    """Scenes to look at, taken evenly from the outcomes of our box; 0 for none."""
    json: bool = False
    """Print one object instead of the summary."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        if self.gallery < 0:
            raise Refusal(f"--gallery {self.gallery}: give 0 or more")


@dataclass(frozen=True)
class GapConfig(StagesConfig):
    """The localization gap: where the VLM says the object is when it is asked, against where the editor edits.

    Both are boxes on the same pictures, and both are held against the true one: the VLM's answer, and the region in
    which the edited picture differs from its source (the largest one, with the editor's own shift and zoom undone).
    """

    lora: str | None = None
    """Folder of a LoRA: the gap that its boxes leave. None: that of the editor as it is."""
    data: str | None = None
    """Data in OmniEdit's columns with boxes (folder or hub id); hard scenes drawn from --seed if not given."""
    samples: int = 200
    """Pictures."""
    seed: int = 90_001
    """Names the set of scenes."""
    difficulty: Literal["easy", "medium", "hard", "named"] = "hard"
    """Of the scenes."""
    out: Path = Path("runs/gap")
    """Folder for edited pictures, gap.parquet and gap.json."""
    max_new_tokens: int = 400
    """Longest answer when asked for the box."""
