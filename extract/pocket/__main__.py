"""Routes ``python -m extract.pocket``."""

from extract.pocket.train import train
from store.commandline import route

if __name__ == "__main__":
    route("python -m extract.pocket", "The pocket model: trained here, shipped in extract/pocket/weights.", {"train": train})
