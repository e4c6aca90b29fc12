"""What a bench run is asked to do, and how large its inputs are."""

from dataclasses import dataclass
from pathlib import Path


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
    steps: int
    """Training steps of the proxies that are timed."""
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
    steps=3,
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
    steps=1,
    proxy_depth=1,
    repeats=1,
    least_seconds=0.0,
)


@dataclass(frozen=True)
class BenchConfig:
    """Measure the numbers this project answers for and print them as one table of ratios.

    Each ratio is to a named baseline that ran in turns with it, so that the drift of a shared machine cancels. The
    result is appended, with the machine and the commit, to a JSON file of the day and the machine. About eight minutes,
    and 15 GB of scratch.
    """

    quick: bool = False
    """Tiny inputs and one repeat: shows that every row can be measured, and says nothing about speed."""
    repeats: int | None = None
    """Repeats of every measurement (5; quick 1)."""
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

    @property
    def sizes(self) -> Sizes:
        """The inputs of a full or a quick run."""
        return QUICK if self.quick else FULL
