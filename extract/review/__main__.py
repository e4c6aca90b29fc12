"""Routes ``python -m extract.review``."""

from extract.review.server import review
from store.commandline import run

if __name__ == "__main__":
    run("python -m extract.review", review)
