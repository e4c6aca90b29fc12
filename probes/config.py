"""Every setting of the probes' commands, with their presets; the text under each field is its ``--help``."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from store.errors import Refusal

SCHEDULE = {"warm_up": 100, "l1_steps": 100}
PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        # [ABP §4.4], with the sizes that it leaves open from science §4.
        "paper": dict(width=512, heads=8, depth=6, queries=16, lr=1e-4, batch=64, steps=2000, **SCHEDULE),
        # Measured: boxes as good as those of proxies four times as wide and of four times the queries (docs/log.md).
        "pocket": dict(width=32, heads=4, depth=6, queries=4, lr=2e-3, batch=32, steps=700, **SCHEDULE),
    }
)

PARTS = ("layers", "prompt", "joint", "floors", "permuted", "control-task", "matched", "shares", "codelength")
Kind = Literal["qformer", "linear", "mlp", "attention"]

WHERE = frozenset({"store", "out", "preset", "seeds", "memory", "device", "threads", "checkpoint", "stack"})
"""Fields that say where and how much is run, not what a probe is: they may differ between runs into one folder."""

CHOICE = frozenset(
    {"parts", "layers", "prompt_layers", "random_weights", "shuffled_images", "tokens", "probe", "labels", "without"}
)
"""Fields that say which probes are trained, which every probe's own spec says, too."""


@dataclass(frozen=True)
class Recipe:
    """Where the states are, and how probes are trained on them."""

    store: str
    """Store whose hidden states the probes read."""
    out: Path = Path("runs/probes")
    """Folder of the results; a run that was stopped goes on from there."""
    preset: Literal["pocket", "paper"] = "pocket"
    """Sizes and schedule of all fields below that are not given: the paper's, or small ones for two CPU cores."""
    probe: Kind = "qformer"
    """What reads the states: qformer (the paper's proxy), linear or mlp (of the mean token), attention (pooling)."""
    target: str = "box"
    """What is to be said: box (of the edited object), cell-3x3 (or any grid: where its centre lies), or a column of the
    sample table: words and small counts are classes, other numbers quantities."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the start, the permuted labels and the control task; every probe is trained once per seed."""
    order_seed: int = 0
    """Seed of the order of the samples, which all probes of a sweep share: they read the disk once."""
    width: int | None = None
    """Width of a Q-Former or an MLP (pocket 32, paper 512)."""
    heads: int | None = None
    """Attention heads of a Q-Former's layer, or queries of an attention probe (pocket 4, paper 8)."""
    depth: int | None = None
    """Q-Former layers (6)."""
    queries: int | None = None
    """Learned queries of a Q-Former (pocket 4, paper 16)."""
    lr: float | None = None
    """Peak learning rate of Adam (pocket 2e-3, paper 1e-4); it falls along a cosine to 30 %."""
    batch: int | None = None
    """Samples in a batch (pocket 32, paper 64)."""
    steps: int | None = None
    """Training steps (pocket 700, paper 2000)."""
    warm_up: int | None = None
    """Steps over which the learning rate rises (100)."""
    l1_steps: int | None = None
    """Steps with L1 alone, before GIoU joins the loss (100)."""
    watch: int = 256
    """Test samples on which the error is followed during training, and by which a layer may be chosen; at most half."""
    watch_every: int = 50
    """Steps between two points of the error curve."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What products are computed in; weights, sums and Adam are always float32. auto: bfloat16 on CUDA
    and on CPUs that multiply it themselves (AVX-512 BF16), else float32."""
    memory: float | None = None
    """GB for weights and optimizer states of probes that are trained together; more probes than that take turns. Not
    given: 8, on CUDA 60 % of what is free."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where probes are trained; auto takes CUDA when there is one."""
    threads: int | None = None
    """CPU threads; as many as cores are free to use if not given. Give 1 on a machine that is busy with other work."""
    checkpoint: float = 2.0
    """Minutes between checkpoints."""

    def __post_init__(self):
        """Fill in the preset; refuse numbers that are not positive and widths that heads cannot share."""
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        numbers = [name for name, value in asdict(self).items() if isinstance(value, int | float)]
        for name in numbers:
            least = 0 if name in ("warm_up", "l1_steps", "order_seed", "checkpoint") else 1e-12
            if not least <= getattr(self, name) < math.inf:
                raise Refusal(f"--{name.replace('_', '-')} {getattr(self, name)} is no use: give a positive number")
        if self.width % self.heads:
            raise Refusal(
                f"--width {self.width} is not a multiple of --heads {self.heads}: each head needs a whole share"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise Refusal(f"--seeds {self.seeds} must name at least one seed, each once, none below 0")

    def sizes(self, kind: str) -> dict[str, int]:
        """The size arguments of a kind of probe."""
        names = {"qformer": ("width", "heads", "depth", "queries"), "mlp": ("width",), "attention": ("heads",)}
        return {name: getattr(self, name) for name in names.get(kind, ())}

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able: all that decides what a probe becomes, without where it is read, kept and computed."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in WHERE | CHOICE}


@dataclass(frozen=True)
class SweepConfig(Recipe):
    """Train every layer's probe and all that a referee would hold beside it, together, in one pass over the store.

    Held out is what the store's split column calls test. A run that was stopped goes on from there; a probe that is
    finished is never trained again. Ends with the table of `python -m probes evaluate`. Settings that are not given
    take the value of the preset.

    Examples, each with `--store STORE --out FOLDER`: `--parts layers permuted --layers 6 11 final` (three layers, and
    what their labels alone are worth); `--target cell-3x3 --parts layers` (which layer knows the ninth of the picture);
    `--probe linear` (what lies open in the states); `--preset paper --device cuda` (the paper's sizes).
    """

    parts: tuple[
        Literal["layers", "prompt", "joint", "floors", "permuted", "control-task", "matched", "shares", "codelength"],
        ...,
    ] = PARTS
    """What is trained: layers (a probe a layer), prompt (one on the prompt tokens of the middle layers together), joint
    (one on those of all blocks together, and its twin of permuted labels: `analysis` reads their attention), floors
    (words alone, picture alone), permuted (labels, every layer), control-task (a label drawn per type of input, every
    layer), matched (tokens x layer count, keys and parameters alike), shares (sample efficiency, first seed),
    codelength (online code, first seed)."""
    layers: tuple[str, ...] = ()
    """Layers that get a probe each, by their name in the store; none given means all."""
    prompt_layers: tuple[str, ...] = ()
    """Layers whose prompt tokens one probe reads together; none given means the middle third of the blocks."""
    tokens: str = "all"
    """Tokens that the layers' probes read: all, image, text, or a kind of the token table such as instruction."""
    random_weights: str | None = None
    """Store of the same samples by the model with random weights (`python -m extract --control random-weights`)."""
    shuffled_images: str | None = None
    """Store of the same samples with each other's pictures (`python -m extract --control shuffled-images`)."""


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Train one probe, once per seed: the layers that are named, read together.

    The same probe, to the bit of its order of samples, as a sweep trains among others; in one folder, a sweep takes it
    as it is. Settings that are not given take the value of the preset.

    Examples, each with `--store STORE --out FOLDER`: `--layers 6`; `--layers 4 5 6 7 --tokens text` (prompt tokens of
    four layers under one softmax); `--layers 6 --labels permuted` (what its labels alone are worth).
    """

    layers: tuple[str, ...] = ("final",)
    """Layers that it reads together, by their name in the store."""
    tokens: str = "all"
    """Tokens that it reads: all, image, text, or a kind of the token table such as instruction."""
    labels: Literal["true", "permuted", "control"] = "true"
    """The samples' own answers, each other's, or one drawn per type of input."""
    without: str | None = None
    """Derived array of the store (sample, token) over its prompt tokens; those at which it is not zero are left out, in
    training as in testing. Samples of which it says nothing (NaN), or leaves nothing, are left out whole."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Print a row per probe with its 95 % intervals, and what they say of the paper's claims.

    With `--on`, the finished probes first answer for other stores: fresh scenes, paraphrased instructions, other data.
    """

    out: Path = Path("runs/probes")
    """Folder that `python -m probes sweep` or `train` wrote."""
    on: tuple[str, ...] = ()
    """NAME=STORE: stores that the probes are asked about as they are, without training; kept in the folder. A control
    store of the same samples joins the ordinary one under the same NAME, given after it."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True)
class AttendConfig:
    """Write cross-attention a[h, q, l, i] of proxies for every sample of a store into the store, as derived arrays.

    `python -m analysis` reads them; so does `s = store.open(STORE)`, lazily: `s.derived[NAME].sel(layer="6")`.
    `python -m store drop STORE derived/NAME` takes one out again.
    """

    proxy: tuple[Path, ...]
    """Folders of trained proxies, e.g. runs/probes/proxies/mid-prompt-seed0."""
    store: str
    """Store of the samples, whose states came about as those that they were trained on."""
    keep: Literal["tokens", "mass"] = "tokens"
    """tokens: the attention to every token; mass: its sum over tokens, A[h, q, l], as many times smaller as a sample
    has tokens, and enough for the vote on the layer."""
    name: str | None = None
    """Name of the array, of one proxy; attention-PROBE-seedK-HASH (or mass-…) if not given, HASH the first 8 digits of
    its weights' sha256."""
    batch: int = 64
    """Samples that are read and attended at once; memory grows with it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the proxies run; auto takes CUDA when there is one."""

    def __post_init__(self):
        """Refuse an empty batch, no proxy, and one name for several."""
        if self.batch < 1:
            raise Refusal(f"--batch {self.batch} is too small: give a positive number")
        if not self.proxy:
            raise Refusal("--proxy names no proxy: give the folder of one, e.g. runs/probes/proxies/mid-prompt-seed0")
        if self.name and len(self.proxy) > 1:
            raise Refusal(f"--name {self.name} is one name for {len(self.proxy)} proxies: leave it out")
