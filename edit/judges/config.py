"""What a judgement is asked to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edit.endpoints.config import EndpointSettings
from store.errors import Refusal


@dataclass(frozen=True)
class JudgeEndpoint(EndpointSettings):
    """How a judge's endpoint is reached, what it costs, and how long it is waited for."""

    sampling_seed: int | None = None
    """Seed of the endpoint's sampling, where it takes one."""
    concurrency: int = 4
    """Requests at a time."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        super().__post_init__()
        if self.concurrency < 1:
            raise Refusal(f"--concurrency {self.concurrency}: give 1 or more")


@dataclass(frozen=True)
class HumanSettings:
    """Who judges by hand, and how the page is found."""

    rater: str | None = None
    """Name of the person who judges; the order of the pictures and the answers so far are this person's own."""
    order_seed: int = 0
    """Another number, another order of the pictures; it never tells which method made them."""
    port: int = 0
    """Port of the page on 127.0.0.1; any free one where not given."""

    def __post_init__(self):
        """Refuse a name that cannot be shown, and no port."""
        if self.rater is not None and not (self.rater.strip() and self.rater.isprintable()):
            raise Refusal(f"--rater {self.rater!r}: give a name of printable characters")
        if not 0 <= self.port <= 65535:
            raise Refusal(f"--port {self.port}: give one from 0 (any free port) to 65535")


@dataclass(frozen=True)
class JudgeConfig:
    """Have edited pictures judged: was the instruction followed, the right subject changed, nothing else changed?

    The pictures are named by a parquet table with the columns sample, method, instruction, source and edited (files,
    from the table's folder on); what comes out is a parquet table with a row each: three grades from 0 to 4, or why
    there are none. Every answer is kept, so that the same command asks only for what is missing. A person judges on a
    page that this machine alone can open, pair by pair in a blind order; Ctrl-C ends that with what was answered.
    """

    items: Path
    """The table of edited pictures; with columns x1, y1, x2, y2 of boxes for --show-box."""
    judge: Literal["openai", "gemini", "local", "human"]
    """A model behind an OpenAI-compatible endpoint, behind Gemini's, or on this machine; or a person."""
    model: str | None = None
    """Its name at the endpoint; of a local one a folder, a hub id or pocket (which cannot judge, only be tried)."""
    human: HumanSettings = field(default_factory=HumanSettings)
    out: Path = Path("runs/judged.parquet")
    """The table of verdicts."""
    cache: Path = Path("runs/judged")
    """Folder of all answers so far."""
    endpoint: JudgeEndpoint = field(default_factory=JudgeEndpoint)
    max_tokens: int = 2048
    """Longest answer in tokens, with what a model thinks before it."""
    show_box: bool = False
    """Tell the judge where the meant subject lies in the source."""
    estimate: bool = False
    """Only say what an endpoint would be asked and what that costs, roughly."""
    agreement: tuple[Path, ...] = ()
    """Tables of other judges' verdicts: how far does this judge agree with each?"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where a local model runs; auto: cuda if there is one."""
    max_pixels: int | None = None
    """Area in pixels above which a local model's pictures are shrunk; the checkpoint's own setting where not given."""

    def __post_init__(self):
        """Refuse numbers that make no sense, and a judge without a name."""
        by_hand = self.judge == "human"
        if by_hand != (self.human.rater is not None) or by_hand != (self.model is None):
            named, other = ("--rater", "--model") if by_hand else ("--model", "--rater")
            raise Refusal(f"--judge {self.judge} is named by {named} NAME, and by no {other}")
        for name in ("max_tokens", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} {value}: give 1 or more")
