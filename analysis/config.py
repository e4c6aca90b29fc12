"""Settings of every analysis command; the text under each field is its ``--help``."""

from dataclasses import dataclass
from pathlib import Path

from store.errors import Refusal


@dataclass(frozen=True)
class Common:
    """Where the store is and where results go."""

    store: str
    """Store that is asked."""
    out: Path = Path("runs/analysis")
    """Folder of the answer, its tables (parquet) and its figures (PNG, SVG, the drawn numbers, the command)."""
    seed: int = 0
    """Seed of all that is drawn: bootstraps, subsamples, random layers, tokens and heads."""
    json: bool = False
    """Print one JSON object: every question with its answer, caveats, and the files of its tables and figures."""


@dataclass(frozen=True)
class CurvesConfig:
    """Draw localization error against training steps, and the final IoU, of every layer's proxy and the floors.

    Reads what `python -m probes train` left; writes PNG, SVG, the drawn numbers as CSV, and how it was made as JSON.
    """

    probes: Path = Path("runs/probes")
    """Folder of a finished probe run."""
    out: Path = Path("figures")
    """Folder of the figure."""


@dataclass(frozen=True)
class Attended(Common):
    """A store into which `python -m probes attend` has written a proxy's attention."""

    attention: str | None = None
    """Derived array that is read; the proxy of true labels that reads the most layers, first seed, if not given. Its
    other seeds, and its twins that were taught permuted labels, are found beside it."""
    choose: str = "train"
    """Split on which thresholds are chosen."""
    report: str = "test"
    """Split that answers are about."""
    threshold: float | None = None
    """T of decisive heads: mean mass of the first rank less that of the second. Not given: where the heads of the
    choosing split part best into two groups (Otsu)."""
    dask: str | None = None
    """Dask cluster that reads the attention: tcp://scheduler:8786, or local:4 for four processes here. The results are
    the same to the bit."""

    def __post_init__(self):
        """Refuse one split for both purposes, and thresholds that no drop can have."""
        if self.choose == self.report:
            raise Refusal(f"--choose and --report are both {self.choose}: a threshold is reported on another split")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise Refusal(f"--threshold {self.threshold} is no use: mass is a share, give a number from 0 to below 1")


@dataclass(frozen=True)
class Trained(Attended):
    """The same, and where the proxies themselves are."""

    probes: Path = Path("runs/probes")
    """Folder of the run that trained the proxies: it is looked for here if it is no longer where it was."""


@dataclass(frozen=True)
class MapsConfig(Trained):
    """Draw where the dominant tokens look at l*, and score it: pointing game and energy in the true box.

    The VLM's own attention rows of those tokens, against chance, other blocks, random tokens and attention rollout;
    writes the finding, figure 4 and a gallery of thumbnails.
    """

    top: int = 3
    """Dominant tokens a sample: those that the proxy's decisive heads attend to most at l*."""
    examples: int = 12
    """Pictures in the figure, drawn by the seed among hits and misses in their proportion."""
    data: str = "data/scenes"
    """Folder or hub id of the data that the store was made from: pictures are taken there. Without them maps are drawn
    on plain ground."""
    gallery: int = 120
    """Thumbnails for the report, drawn by the seed."""

    def __post_init__(self):
        """Refuse numbers that name no token or no picture."""
        super().__post_init__()
        for name, least in (("top", 1), ("examples", 1), ("gallery", 0)):
            if getattr(self, name) < least:
                raise Refusal(f"--{name} {getattr(self, name)} is no use: give {least} or more")


@dataclass(frozen=True)
class CausesConfig(Trained):
    """Mask what a proxy attends to, and as much elsewhere at random: does it lose the box?

    Masked are the layer that its heads vote for, the top token and the top word, in the trained proxy. With
    `--retrain`, proxies are trained again without the layer that most samples vote for, without another, without the
    top tokens and without random ones; that takes minutes, and goes on where it was stopped.
    """

    images: int = 512
    """Images of the reporting split on which masks are tried, drawn with the seed; all if it has no more."""
    draws: int = 5
    """Draws of random layers and tokens of every image, shared out over the proxies of all seeds, at least one each."""
    retrain: bool = False
    """Train again what is not trained yet, of the first three seeds; writes derived/top-tokens and random-tokens."""
    retrained: Path | None = None
    """Folder of the proxies that were trained again; OUT/retrained if not given. It is read if it is there."""

    def __post_init__(self):
        """Refuse numbers that are no use."""
        super().__post_init__()
        for name in ("images", "draws"):
            if getattr(self, name) < 1:
                raise Refusal(f"--{name} {getattr(self, name)} is too small: give a positive number")

    @property
    def retrained_in(self) -> Path:
        """Folder of the proxies that were trained again."""
        return self.retrained or self.out / "retrained"


@dataclass(frozen=True)
class StatesConfig(Common):
    """Ask the states themselves, without proxies: norms, similarity of layers, places, and the words they lean to."""

    split: str = "test"
    """Split whose samples are read, one a picture."""
    samples: int = 512
    """How many samples are read, drawn by the seed; half of them teach a classifier of places, the others test it."""
    random_weights: str | None = None
    """Store of the same samples by the model with random weights (`python -m extract --control random-weights`)."""
    no_lens: bool = False
    """Leave out the logit lens, the one part that needs two tensors of the checkpoint."""
    checkpoint: str | None = None
    """Where the checkpoint is found, a folder or a hub id; where the store's identity says, if not given."""

    def __post_init__(self):
        """Refuse too few samples for anything to be said of images."""
        if self.samples < 8:
            raise Refusal(f"--samples {self.samples} is too few: four teach and four test at the least, give 8 or more")


@dataclass(frozen=True)
class ReportConfig(MapsConfig, CausesConfig, StatesConfig):
    """Ask a store everything and write one page with the answers: OUT/report.html, which needs no network.

    Answers first, then figures, tables, a gallery of samples with filters, and where it all comes from. What cannot be
    asked, for want of probes, pictures or attention rows, is left out with its reason.
    """

    def __post_init__(self):
        """Refuse what the questions refuse."""
        MapsConfig.__post_init__(self)
        CausesConfig.__post_init__(self)
        StatesConfig.__post_init__(self)


@dataclass(frozen=True)
class ReadingConfig(Attended):
    """Read a proxy's attention: how its mass is spread over layers, heads and words.

    The four questions mass, heads, layers and words share these settings; each prints its answer in words and writes
    its tables and figure.
    """
