"""Routes ``python -m probes COMMAND``."""

from probes.config import AttendConfig, EvaluateConfig, SweepConfig, TrainConfig
from store.commandline import route


def sweep(config: SweepConfig) -> None:
    """Train every layer's probe, and all that a referee would hold beside it, together, in one pass over the store."""
    from probes.sweep import sweep

    sweep(config)


def train(config: TrainConfig) -> None:
    """Train one probe, once per seed: the layers that are named, read together."""
    from probes.sweep import train

    train(config)


def evaluate(config: EvaluateConfig) -> None:
    """Print a row per probe with its 95 % intervals, and what they say of the paper's claims."""
    from probes.evaluate import evaluate

    evaluate(config)


def attend(config: AttendConfig) -> None:
    """Write a proxy's cross-attention for every sample into the store."""
    from probes.attend import attend

    attend(config)


if __name__ == "__main__":
    about = "Probes that read an object's box, or anything else, from stored hidden states, and what they must beat."
    route("python -m probes", about, {"sweep": sweep, "train": train, "evaluate": evaluate, "attend": attend})
