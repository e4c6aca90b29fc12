"""Intervals over images and seeds, paired tests, and corrections for asking many questions at once.

Shape suffixes: ``k`` quantity (a probe's metric, or a difference of two), ``s`` seed, ``n`` image, ``r`` draw.
An image that a quantity does not know is NaN there; its mean is then of the images that it knows.
"""

from collections.abc import Iterator

import numpy as np

DRAWS = 2000
"""Bootstrap draws of an interval."""
FLIPS = 9999
"""Draws of a sign-flip test; the smallest p is 1 / (FLIPS + 1)."""
LEVEL = 0.95
Z = 1.959964
"""Normal quantile of LEVEL, both sides."""
STUDENT = (
    [0, 1 / 60, 1 / 30, 1 / 15, 1 / 10, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1 / 1.5, 1 / 1.2, 1],
    [Z, 2.0003, 2.0423, 2.1314, 2.2281, 2.3060, 2.4469, 2.5706, 2.7764, 3.1824, 4.3027, 6.0, 8.9, 12.7062],
)
"""One over the degrees of freedom, and the quantile of Student's t."""
HELD = 1 << 22
"""Numbers of a random matrix that are held at once."""


def image_weights(n: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """Bootstrap weights over ``n`` images in pieces (r, n), float32, ``draws`` rows in all.

    Row r holds how often draw r took each image, over n. The same arguments give the same weights, so that all that
    is computed from them is paired.
    """
    generator = np.random.default_rng(seed)
    piece = max(1, HELD // n)
    for start in range(0, draws, piece):
        counts_rn = generator.multinomial(n, np.full(n, 1 / n), size=min(piece, draws - start))
        yield counts_rn.astype(np.float32) / n


def seed_weights(seeds: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap weights over seeds (draws, seeds), each row sums to 1; ones if there is one seed.

    Resampling s seeds shows only (s − 1) / s of their variance, a fifth too little with five, so the deviations from
    1 / s are stretched by √(s / (s − 1)) (Hesterberg, *What Teachers Should Know about the Bootstrap*, 2015).
    """
    if seeds == 1:
        return np.ones((draws, 1), np.float32)
    counts_rs = np.random.default_rng([seed, seeds]).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    stretch = np.sqrt(seeds / (seeds - 1))
    return (1 / seeds + stretch * (counts_rs / seeds - 1 / seeds)).astype(np.float32)


def clustered(values_kn: np.ndarray, clusters_n: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts (k, clusters), float32, of the known values of each cluster; without clusters, each its own."""
    known_kn = ~np.isnan(values_kn)
    sums_kn = np.where(known_kn, values_kn, 0).astype(np.float32)
    if clusters_n is None or len(np.unique(clusters_n)) == len(clusters_n):
        return sums_kn, known_kn.astype(np.float32)
    order = np.argsort(clusters_n, kind="stable")
    starts = np.flatnonzero(np.diff(clusters_n[order], prepend=-1))
    return tuple(np.add.reduceat(part[:, order], starts, axis=1).astype(np.float32) for part in (sums_kn, known_kn))


def mean_draws(
    values_kn: np.ndarray, clusters_n: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Bootstrap means (draws, k), float32, of each quantity over images drawn with replacement.

    Parameters
    ----------
    values_kn : ndarray
        One value per quantity and image, NaN where unknown.
    clusters_n : ndarray of int ≥ 0, optional
        Rows of the same number are one image and are drawn together.
    """
    sums_kc, counts_kc = clustered(values_kn, clusters_n)
    # Most quantities know the same images: one denominator serves them all.
    patterns: dict[bytes, int] = {}
    which_k = np.array([patterns.setdefault(row.tobytes(), len(patterns)) for row in counts_kc])
    first_q = np.unique(which_k, return_index=True)[1]
    drawn_rk = np.empty((draws, len(values_kn)), np.float32)
    start = 0
    for weights_rc in image_weights(sums_kc.shape[1], draws, seed):
        stop = start + len(weights_rc)
        sizes_rq = weights_rc @ counts_kc[first_q].T
        # A draw that missed every known image has no mean; it says nothing and is left out of the quantiles.
        sizes_rq[sizes_rq == 0] = np.nan
        drawn_rk[start:stop] = (weights_rc @ sums_kc.T) / sizes_rq[:, which_k]
        start = stop
    return drawn_rk


def hierarchical_draws(
    values_ksn: np.ndarray, clusters_n: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Bootstrap means (draws, k) over seeds and images, both drawn with replacement and crossed.

    Every quantity sees the same draws of seeds and of images. With one seed only images are drawn.
    """
    k, s, n = values_ksn.shape
    return over_seeds(mean_draws(values_ksn.reshape(k * s, n), clusters_n, draws, seed).reshape(draws, k, s), seed)


def over_seeds(drawn_rks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap means (r, k) over seeds too, from those (r, k, s) that ``mean_draws`` gives of each seed.

    Few seeds tell their own variance badly, so the draws are stretched about their mean as Student's t is wider than
    the normal, at ``freedom``. Without that, 95 % intervals over seeds that differ cover 83 % with three of them and
    90 % with five.
    """
    drawn_rk = crossed(drawn_rks, seed)
    if drawn_rks.shape[2] == 1:
        return drawn_rk
    centre_k = np.nanmean(drawn_rk, axis=0)
    stretch_k = student(freedom(drawn_rks, drawn_rk)) / Z
    return (centre_k + stretch_k * (drawn_rk - centre_k)).astype(np.float32)


def crossed(drawn_rks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means (r, k) of the seeds that each draw took."""
    draws, _, seeds = drawn_rks.shape
    return np.einsum("rks,rs->rk", drawn_rks, seed_weights(seeds, draws, seed))


def freedom(drawn_rks: np.ndarray, drawn_rk: np.ndarray) -> np.ndarray:
    """Degrees of freedom (k,) of Welch and Satterthwaite: s − 1 if all variance is between seeds, else more."""
    seeds = drawn_rks.shape[2]
    whole_k = np.maximum(np.nanvar(drawn_rk, axis=0), 1e-30)
    share_k = np.clip(np.nanmean(drawn_rks, axis=0).var(1, ddof=1) / seeds / whole_k, 1e-6, 1)
    return (seeds - 1) / share_k**2


def seeds_p(drawn_rks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two-sided p (k,) that the mean over seeds and images is 0: Student's t at ``freedom``, by the draws' deviation.

    Unlike ``sign_flip`` it asks whether other seeds would say the same; it takes two or more. Small p are too small
    where seeds are few and matter more than images: with no difference, p < 0.05 came out in 8 % of cases with three
    or five seeds and in 5 % with ten, p < 0.005 in 2.7, 1.8 and 0.7 %. Two seeds are too few for any p (13 %).
    """
    drawn_rk = crossed(drawn_rks, seed)
    t_k = np.abs(np.nanmean(drawn_rks, axis=(0, 2))) / np.maximum(np.nanstd(drawn_rk, axis=0), 1e-15)
    freedom_k = np.minimum(freedom(drawn_rks, drawn_rk), 300)  # beyond it, t is normal
    # With t = √f · tan θ the density of t is that of cos(θ) to the power f − 1.
    beyond = np.linspace(0, 1, 2001)
    from_k = np.arctan(t_k / np.sqrt(freedom_k))
    theta_kx = from_k[:, None] + (np.pi / 2 - from_k[:, None]) * beyond
    tail_k = np.trapezoid(np.cos(theta_kx).clip(0) ** (freedom_k[:, None] - 1), theta_kx, axis=1)
    whole_kx = np.cos(beyond * np.pi / 2).clip(0) ** (freedom_k[:, None] - 1)
    return np.clip(tail_k / np.trapezoid(whole_kx, beyond * np.pi / 2, axis=1), 0, 1)


def student(freedom_k: np.ndarray) -> np.ndarray:
    """The quantile of Student's t that belongs to LEVEL, both sides, by degrees of freedom (≥ 1), within 5 %."""
    return np.interp(1 / np.asarray(freedom_k), *STUDENT)


def ends(drawn_rk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end (k,) of the 95 % percentile interval of each quantity."""
    quantile = np.nanquantile if np.isnan(drawn_rk).any() else np.quantile
    low_k, high_k = quantile(drawn_rk, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low_k, high_k


def means(values_ksn: np.ndarray) -> np.ndarray:
    """Mean (k,), float64, over seeds and the images that are known; NaN if none is."""
    known_ksn = ~np.isnan(values_ksn)
    counts_k = known_ksn.sum((1, 2))
    sums_k = np.where(known_ksn, values_ksn, 0).sum((1, 2), dtype=np.float64)
    return np.where(counts_k > 0, sums_k / np.maximum(counts_k, 1), np.nan)


def interval(values_sn: np.ndarray, clusters_n: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean over seeds and images with its 95 % interval: (mean, low, high). A flat array is one seed."""
    values_1sn = np.atleast_2d(values_sn)[None]
    low_1, high_1 = ends(hierarchical_draws(values_1sn, clusters_n))
    return float(means(values_1sn)[0]), float(low_1[0]), float(high_1[0])


def sign_flip(
    differences_kn: np.ndarray, clusters_n: np.ndarray | None = None, flips: int = FLIPS, seed: int = 0
) -> np.ndarray:
    """Two-sided p (k,) of paired differences: would their mean be as far from 0 if every sign were a coin's?

    The null is that the difference of an image is as likely one way as the other. Signs are flipped by image
    (cluster); p = (draws as far + 1) / (flips + 1), never 0. It speaks of images: differences are averaged over seeds
    before, so that it holds for the probes as they were trained; ``seeds_p`` speaks of other seeds too.
    """
    sums_kc, _ = clustered(differences_kn, clusters_n)
    seen_k = np.abs(sums_kc.sum(1, dtype=np.float64))
    slack_k = 1e-6 * np.abs(sums_kc).sum(1)  # rounding must not make a tie look nearer
    generator = np.random.default_rng(seed)
    as_far_k = np.zeros(len(sums_kc), np.int64)
    piece = max(1, HELD // sums_kc.shape[1])
    for start in range(0, flips, piece):
        shape = (min(piece, flips - start), sums_kc.shape[1])
        signs_rc = generator.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
        as_far_k += (np.abs(signs_rc @ sums_kc.T) >= seen_k - slack_k).sum(0)
    return (as_far_k + 1) / (flips + 1)


def holm(p_k: np.ndarray) -> np.ndarray:
    """Holm's adjusted p (k,): below 0.05 means right with 95 % for all of the family at once."""
    p_k = np.asarray(p_k, float)
    order = np.argsort(p_k)
    raised = np.maximum.accumulate(p_k[order] * np.arange(len(p_k), 0, -1))
    out_k = np.empty_like(p_k)
    out_k[order] = np.minimum(raised, 1)
    return out_k


def benjamini_hochberg(p_k: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's q (k,): of all with q < 0.05, at most 5 % are expected to be false."""
    p_k = np.asarray(p_k, float)
    order = np.argsort(p_k)[::-1]
    lowered = np.minimum.accumulate(p_k[order] * len(p_k) / np.arange(len(p_k), 0, -1))
    out_k = np.empty_like(p_k)
    out_k[order] = np.minimum(lowered, 1)
    return out_k


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of ``n`` (Wilson 1927); it has a width even where all or none were right."""
    middle, half = share + Z * Z / (2 * n), Z * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low, high = float((middle - half) / scale), float((middle + half) / scale)
    return max(0.0, min(low, share)), min(1.0, max(high, share))
