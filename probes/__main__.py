"""Routes ``python -m probes COMMAND``."""

from probes.config import EvaluateConfig, ProbeConfig
from store.commandline import route


def train(config: ProbeConfig) -> None:
    """Train a proxy per layer, the mid-layer prompt proxy and the floors on the states of a store."""
    from probes.train import train

    train(config)


def evaluate(config: EvaluateConfig) -> None:
    """Print a row per proxy with its 95 % intervals, and whether a mid layer beats the last one and the floors."""
    from probes.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    about = "Proxies that read an object's box from stored hidden states, one per layer, and the floors they must beat."
    route("python -m probes", about, {"train": train, "evaluate": evaluate})
