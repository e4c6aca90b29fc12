"""What a review is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from store.errors import Refusal


@dataclass(frozen=True)
class ReviewConfig:
    """Verify boxes by hand, on a page that this machine alone can open.

    The page shows each sample's picture, instruction and box (the true one where the data brought one, else the
    model's), in the store's order; the person accepts it, fixes it or rejects the sample. Every verdict is on the disk
    before the page goes on, so the command may be stopped, or killed, at any time; started again, it goes on at the
    first sample without a verdict. Ctrl-C ends it with a summary.
    """

    store: str = "data/store.zarr"
    """Folder or URL of the store whose samples are reviewed; it is only read."""
    data: str = "data/scenes"
    """The data that the store was made from: a folder of parquet shards, or one shard. The pictures come from here."""
    out: Path | None = None
    """File for the verdicts, one JSON line each (made if missing); ``STORE.verdicts.jsonl`` beside a store on disk
    where not given."""
    split: str | None = None
    """Review only the samples of this split, such as ``test``."""
    reviewer: str | None = None
    """Name written into every verdict."""
    port: int = 0
    """Port of the page on 127.0.0.1; any free one where not given."""

    def __post_init__(self):
        """Refuse what makes no sense."""
        if not 0 <= self.port <= 65535:
            raise Refusal(f"--port {self.port}: give one from 0 (any free port) to 65535")
        if self.reviewer is not None and not self.reviewer.isprintable():
            raise Refusal(f"--reviewer {self.reviewer!r}: give a name of printable characters")
