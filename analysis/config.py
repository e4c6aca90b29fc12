"""Settings of every analysis command; the text under each field is its ``--help``."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CurvesConfig:
    """Draw localization error against training steps, and the final IoU, of every layer's proxy and the floors.

    Reads what `python -m probes train` left; writes PNG, SVG, the drawn numbers as CSV, and how it was made as JSON.
    """

    probes: Path = Path("runs/probes")
    """Folder of a finished probe run."""
    out: Path = Path("figures")
    """Folder of the figure."""
