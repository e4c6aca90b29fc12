"""Routes ``python -m extract.pocket``."""

from extract.pocket.evaluate import evaluate
from extract.pocket.train import train
from store.commandline import route

if __name__ == "__main__":
    route(
        "python -m extract.pocket",
        "The pocket model: a real, small Qwen2.5-VL, trained here and shipped in extract/pocket/weights.",
        {"train": train, "evaluate": evaluate},
    )
