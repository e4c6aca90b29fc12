"""Bootstrap intervals over images: of a mean, and of a paired difference."""

import functools

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@functools.lru_cache(maxsize=4)
def resamples(n: int, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap weights (draws, n), float32: row r holds how often draw r took each image, over n.

    Shared, so do not write into it. The same weights serve every probe, so that differences between probes are paired.
    """
    generator = np.random.default_rng(seed)
    return (generator.multinomial(n, np.full(n, 1 / n), size=draws) / n).astype(np.float32)


def interval(values_s: np.ndarray, weights_rs: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values_s`` over images with the ends of its 95 % percentile interval: (mean, low, high)."""
    low, high = np.quantile(weights_rs @ values_s.astype(np.float32), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values_s.mean()), float(low), float(high)


def paired_difference(a_s: np.ndarray, b_s: np.ndarray, weights_rs: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``a − b`` over the same images, with its 95 % interval: (mean, low, high)."""
    return interval(a_s - b_s, weights_rs)
