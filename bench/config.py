"""What a bench run is asked to do, and how large its inputs are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from store.errors import Refusal


@dataclass(frozen=True)
class Sizes:
    """How much is measured; two runs compare only if they agree on these."""

    samples: int
    """Scenes of the pocket store."""
    extracted: int
    """Scenes of the extraction that is timed."""
    batch: int
    """Scenes of a pass."""
    made_samples: int
    """Samples of the made-up states, which are as wide as a 7B model's."""
    made_layers: int
    """Their layers."""
    made_width: int
    """Their width."""
    made_image: tuple[int, int]
    """Least and most image tokens of a sample."""
    made_text: tuple[int, int]
    """Least and most prompt tokens of a sample."""
    gathered: int
    """Samples of a shuffled batch."""
    prompt_layers: int
    """Layers of a shuffled batch of prompts."""
    epochs: int
    """Epochs of shuffled batches in one reading: a training run starts its reader once, not once an epoch."""
    made_epochs: int
    """The same for the made-up states, which are eighty times as many bytes."""
    codec_bytes: int
    """States that codecs are tried on."""
    written_bytes: int
    """States that are written while the clock runs, in whole samples, or all there are."""
    opened_samples: int
    """Samples of the store that is only opened."""
    opened_layers: int
    """Its layers."""
    swept: int
    """Scenes whose states a sweep reads."""
    edited: int
    """Scenes on half of which a LoRA is trained."""
    seeds: tuple[int, ...]
    """Seeds of every kind of probe of the sweep."""
    epochs_trained: int
    """Epochs of the training that is timed; half of the scenes are train samples."""
    proxy_depth: int
    """Proxy layers."""
    repeats: int
    """Repeats unless the command line says otherwise."""
    least_seconds: float
    """Shorter work is repeated within a turn until it takes about this long."""


FULL = Sizes(
    samples=128,
    extracted=512,
    batch=32,
    made_samples=128,
    made_layers=10,
    made_width=3584,
    made_image=(210, 250),
    made_text=(24, 40),
    gathered=64,
    prompt_layers=10,
    epochs=2,
    made_epochs=1,
    codec_bytes=8_000_000,
    written_bytes=300_000_000,
    opened_samples=128_000,
    opened_layers=29,
    swept=384,
    edited=64,
    seeds=(0, 1, 2),
    epochs_trained=2,
    proxy_depth=6,
    repeats=5,
    least_seconds=0.1,
)
QUICK = Sizes(
    samples=12,
    extracted=16,
    batch=6,
    made_samples=10,
    made_layers=3,
    made_width=64,
    made_image=(6, 12),
    made_text=(5, 20),
    gathered=5,
    prompt_layers=2,
    epochs=1,
    made_epochs=1,
    codec_bytes=10_000,
    written_bytes=30_000,
    opened_samples=200,
    opened_layers=3,
    swept=24,
    edited=48,
    seeds=(0,),
    epochs_trained=2,
    proxy_depth=1,
    repeats=1,
    least_seconds=0.0,
)


@dataclass(frozen=True)
class PaperSizes:
    """The shapes of a run of ``--paper``."""

    train: int
    """Train samples; two test samples stand beside them."""
    layers: int
    """VLM layers, a probe each."""
    width: int
    """Their width."""
    image: tuple[int, int]
    """Least and most image tokens of a sample."""
    text: tuple[int, int]
    """Least and most prompt tokens of a sample."""
    preset: Literal["paper", "pocket"]
    """Preset of the probes."""
    batch: int
    """Samples in a batch."""
    steps: int
    """Training steps that are timed, after one that is not."""
    repeats: int
    """Repeats unless the command line says otherwise."""


PAPER = PaperSizes(
    train=64, layers=28, width=3584, image=(196, 196), text=(26, 34), preset="paper", batch=64, steps=1, repeats=1
)
PAPER_QUICK = PaperSizes(
    train=6, layers=3, width=64, image=(6, 12), text=(5, 20), preset="pocket", batch=3, steps=1, repeats=1
)


@dataclass(frozen=True)
class AnalysisSizes:
    """The masses of a run of ``--analysis``."""

    samples: int
    heads: int
    """Proxy heads: layers of the proxy × heads of each."""
    queries: int
    layers: int
    """VLM layers."""
    plain: int
    """Samples that plain NumPy has in memory."""
    repeats: int
    """Repeats unless the command line says otherwise."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the masses: sample, head, query, layer."""
        return self.samples, self.heads, self.queries, self.layers


ANALYSIS = AnalysisSizes(samples=128_000, heads=72, queries=16, layers=28, plain=2_048, repeats=1)
ANALYSIS_QUICK = AnalysisSizes(samples=300, heads=4, queries=3, layers=5, plain=50, repeats=1)


@dataclass(frozen=True)
class BenchConfig:
    """Measure the numbers this project answers for and print them as one table of ratios.

    Each ratio is to a named baseline that ran in turns with it, so that the drift of a shared machine cancels. The
    result is appended, with the machine and the commit, to a JSON file of the day and the machine. About eight minutes,
    and 15 GB of scratch.
    """

    quick: bool = False
    """Tiny inputs and one repeat: shows that every row can be measured, and says nothing about speed."""
    paper: bool = False
    """Only the training of proxies at the paper's sizes, on made-up states of 28 layers, 3,584 wide; on CUDA where
    there is a GPU. Some minutes on two CPU cores with --threads 2. Takes 80 % of the memory that is free, and trains
    fewer layers at once where 28 do not fit; 4 GB of scratch."""
    analysis: bool = False
    """Only the pass over attention mass, of 128,000 samples × 72 proxy heads × 16 queries × 28 layers, made up: 8.3 GB,
    read from disk, here and on a Dask cluster of processes. About four minutes."""
    repeats: int | None = None
    """Repeats of every measurement (5; quick, paper and analysis 1)."""
    threads: int = 1
    """Torch threads. The store's own reading threads are as they always are."""
    history: Path = Path("bench/history")
    """Folder that the result is appended to."""
    no_history: bool = False
    """Only print."""
    note: str = ""
    """A remark kept with the result; a machine that was busy with other work is noted by itself."""
    scratch: Path | None = None
    """Folder for the stores that are measured, on the disk that is meant; the system's temporary folder otherwise."""
    json: bool = False
    """Print the record that history keeps instead of the table."""

    def __post_init__(self):
        """Refuse two runs in one."""
        if self.paper and self.analysis:
            raise Refusal("--paper and --analysis are runs of their own: give one of them")

    @property
    def sizes(self) -> Sizes:
        """The inputs of a full or a quick run."""
        return QUICK if self.quick else FULL

    @property
    def paper_sizes(self) -> PaperSizes:
        """The same of a run of ``--paper``."""
        return PAPER_QUICK if self.quick else PAPER

    @property
    def analysis_sizes(self) -> AnalysisSizes:
        """The same of a run of ``--analysis``."""
        return ANALYSIS_QUICK if self.quick else ANALYSIS
