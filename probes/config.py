"""Every setting of a probe run, with its presets; the text under each field is its ``--help``."""

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
        # Measured: 14 layers and their floors in under ten minutes on one CPU core, 4,096 samples.
        "pocket": dict(width=64, heads=4, depth=6, queries=16, lr=1e-3, batch=32, steps=700, **SCHEDULE),
    }
)

WHERE = frozenset({"store", "out", "preset", "seeds", "memory", "device", "threads"})
"""Fields that say where and how much is run, not what a proxy is: they may differ between runs into one folder."""


@dataclass(frozen=True)
class ProbeConfig:
    """Train a proxy per layer, the mid-layer prompt proxy and the floors on the states of a store.

    Held out is what the store's split column calls test. A run that was stopped goes on from there; a proxy that
    is finished is never trained again. Ends with the table of `python -m probes evaluate`. Settings that are not
    given take the value of the preset.
    """

    store: str
    """Store whose hidden states the proxies read."""
    out: Path = Path("runs/probes")
    """Folder of the results; a run that was stopped goes on from there."""
    preset: Literal["pocket", "paper"] = "pocket"
    """Sizes and schedule of all fields below that are not given: the paper's, or small ones for two CPU cores."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the start, the batch order and the permuted labels; every proxy is trained once per seed."""
    layers: tuple[str, ...] = ()
    """Layers that get a proxy each, by their name in the store; none given means all."""
    prompt_layers: tuple[str, ...] = ()
    """Layers whose prompt tokens one proxy reads together; none given means the middle third of the blocks."""
    width: int | None = None
    """Width of a proxy (pocket 64, paper 512)."""
    heads: int | None = None
    """Attention heads of a proxy layer (pocket 4, paper 8)."""
    depth: int | None = None
    """Proxy layers (6)."""
    queries: int | None = None
    """Learned queries (16)."""
    lr: float | None = None
    """Peak learning rate of Adam (pocket 1e-3, paper 1e-4); it falls along a cosine to 30 %."""
    batch: int | None = None
    """Samples in a batch (pocket 32, paper 64)."""
    steps: int | None = None
    """Training steps (pocket 700, paper 2000)."""
    warm_up: int | None = None
    """Steps over which the learning rate rises (100)."""
    l1_steps: int | None = None
    """Steps with L1 alone, before GIoU joins the loss (100)."""
    watch: int = 256
    """Test images on which the error is followed during training; the rest of the split stays unseen until the end."""
    watch_every: int = 50
    """Steps between two points of the error curve."""
    memory: float = 4.0
    """GB of states held at once; if all layers do not fit, groups of layers are read and trained in turn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where proxies are trained; auto takes CUDA when there is one."""
    threads: int | None = None
    """Torch threads on a CPU; torch's own choice where not given. Give 1 on a machine that is busy with other work."""

    def __post_init__(self):
        """Fill in the preset; refuse numbers that are not positive and widths that heads cannot share."""
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        numbers = [name for name, value in asdict(self).items() if isinstance(value, int | float)]
        for name in numbers:
            least = 0 if name in ("warm_up", "l1_steps") else 1e-12
            if getattr(self, name) < least:
                raise Refusal(f"--{name.replace('_', '-')} {getattr(self, name)} is too small: give a positive number")
        if self.width % self.heads:
            raise Refusal(
                f"--width {self.width} is not a multiple of --heads {self.heads}: each head needs a whole share"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise Refusal(f"--seeds {self.seeds} must name at least one seed, each once")

    @property
    def sizes(self) -> dict[str, int]:
        """The size arguments of ``probes.qformer.QFormer``."""
        return {name: getattr(self, name) for name in ("width", "heads", "depth", "queries")}

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able: all that decides what a proxy becomes, without where it is read, kept and computed."""
        names = [field.name for field in fields(self) if field.name not in WHERE | {"layers", "prompt_layers"}]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EvaluateConfig:
    """Print a row per proxy with its 95 % intervals, and whether a mid layer beats the last one and the floors."""

    out: Path = Path("runs/probes")
    """Folder that `python -m probes train` wrote."""
    json: bool = False
    """Print one JSON object instead of the table."""
