"""Routes ``python -m bench``."""

from bench.config import BenchConfig
from store.commandline import run


def bench(config: BenchConfig) -> None:
    """Measure every row, print the table, keep it."""
    from bench.run import bench

    bench(config)


if __name__ == "__main__":
    run("python -m bench", bench)
