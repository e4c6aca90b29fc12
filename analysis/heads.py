"""Decisive heads: those whose queries, on average, give one layer clearly more mass than any other [ABP §5].

Masses of every sample are sorted by size, so that rank takes the place of layer identity, and averaged over samples.
A head's *drop* is the mean of its queries' first rank less their second. Which drop is clear, T, is chosen on one split
of the samples and reported on another.

Shape suffixes: ``p`` part (0 choosing, 1 reporting split), ``h`` head, ``q`` query, ``k`` rank, ``s`` sample.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.census import Census
from probes.statistics import benjamini_hochberg, ends, mean_draws, sign_flip
from store.errors import Refusal

TESTED = 2048
"""Samples that intervals and tests over heads are drawn from, at most, evenly over the reporting split."""


@dataclass(frozen=True, eq=False)
class Decisive:
    """Which heads are decisive, and by how much."""

    threshold: float
    """T."""
    given: bool
    """Whether T was given, not chosen."""
    drop_ph: np.ndarray
    """Mean drop, float64."""
    decisive_h: np.ndarray
    """Drop above T on the choosing split, bool."""

    @property
    def stable_h(self) -> np.ndarray:
        """Decisive heads whose drop is above T on the reporting split, too."""
        return self.decisive_h & (self.drop_ph[1] > self.threshold)


def drops(ranked_phqk: np.ndarray) -> np.ndarray:
    """r1 − r2 of every head, mean over its queries: float64 (p, h). One layer alone has no second: its drop is 0."""
    if ranked_phqk.shape[-1] < 2:
        return np.zeros(ranked_phqk.shape[:2])
    return (ranked_phqk[..., 0] - ranked_phqk[..., 1]).mean(-1)


def otsu(values: np.ndarray) -> float:
    """The threshold that parts values into two groups with the least variance within [Otsu 1979].

    Midway between two neighbours of the sorted values; below all of them if they are equal, since nothing parts them.
    """
    ordered = np.sort(np.asarray(values, float))
    if ordered[0] == ordered[-1]:
        return min(0.0, float(ordered[0]))
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    between = below * (len(ordered) - below) * (sums / below - (ordered.sum() - sums) / (len(ordered) - below)) ** 2
    # Neighbours that are equal are not to be parted.
    between[np.diff(ordered) == 0] = -1
    best = int(np.argmax(between))
    return float(ordered[best : best + 2].mean())


def find(census: Census, threshold: float | None = None, *, needed: bool = True) -> Decisive:
    """The decisive heads; T by `otsu` over the heads' drops on the choosing split if not given.

    Raises
    ------
    Refusal
        When a split has no samples with attention, or no head's drop is above the given T and one is ``needed``.
    """
    for part, option in enumerate(("--choose", "--report")):
        if not census.count_p[part]:
            raise Refusal(f"{option} names a split of which no sample has attention: give another, or attend to more")
    drop_ph = drops(census.ranked_phqk)
    chosen = otsu(drop_ph[0]) if threshold is None else threshold
    decisive_h = drop_ph[0] > chosen
    if needed and not decisive_h.any():
        top = int(np.argmax(drop_ph[0]))
        raise Refusal(
            f"--threshold {chosen:g}: no head is decisive; the largest drop is {drop_ph[0, top]:.3f}, of head "
            f"{census.heads[top]}: give less than that"
        )
    return Decisive(chosen, threshold is not None, drop_ph, decisive_h)


def tested(parts_s: np.ndarray, favourite_sh: np.ndarray) -> np.ndarray:
    """Samples of the reporting split that have attention, at most TESTED, spread evenly: int64 [n]."""
    there = np.flatnonzero((parts_s == 1) & (favourite_sh[:, 0] != 255))
    return there[np.linspace(0, len(there) - 1, min(TESTED, len(there))).round().astype(int)]


def table(census: Census, found: Decisive, samples: np.ndarray) -> pl.DataFrame:
    """One row a head, largest drop first: its drop on both splits, the reporting one with interval, and its layer.

    ``samples`` are those that the interval is drawn from. ``layer`` is where most mass lies on the reporting split,
    ``mass`` how much; ``share_of_samples`` how many samples have their largest mass there.
    """
    low_h, high_h = ends(mean_draws(census.drop_sh[samples].T))
    mass_hl = census.layered_phql[1].mean(1)
    layer_h = mass_hl.argmax(1)
    rows = pl.DataFrame(
        {
            "head": census.heads,
            "decisive": found.decisive_h,
            "stable": found.stable_h,
            "drop_choosing": found.drop_ph[0],
            "drop": found.drop_ph[1],
            "low": low_h.astype(float),
            "high": high_h.astype(float),
            "n": [int(census.count_p[1])] * len(census.heads),
            "layer": [census.layers[layer] for layer in layer_h],
            "mass": mass_hl.max(1),
            "share_of_samples": (census.favourite_sh[samples] == layer_h).mean(0),
        }
    )
    return rows.sort("drop", descending=True, maintain_order=True)


def layer_map(census: Census, samples: np.ndarray) -> pl.DataFrame:
    """One row a (head, layer): mean mass, its difference to an even spread, and the q of that difference.

    p by sign flips over ``samples``, q by Benjamini and Hochberg over the whole map: of all cells with q < 0.05, at
    most 5 % are expected to be chance (science §8).
    """
    n_queries, n_layers = census.layered_phql.shape[2:]
    even = 1 / n_layers
    above_kn = census.summed_shl[samples].reshape(len(samples), -1).T / n_queries - even
    low_k, high_k = ends(mean_draws(above_kn))
    heads, layers = np.repeat(census.heads, n_layers), np.tile(census.layers, len(census.heads))
    mean_k = above_kn.mean(1, dtype=np.float64)
    return pl.DataFrame(
        {
            "head": heads,
            "layer": layers,
            "mass": mean_k + even,
            "low": low_k + even,
            "high": high_k + even,
            "even": [even] * len(mean_k),
            "q": benjamini_hochberg(sign_flip(above_kn)),
            "n": [len(samples)] * len(mean_k),
        }
    )


def ranked_rows(census: Census, found: Decisive) -> pl.DataFrame:
    """The rank-sorted mass of every head on the reporting split, mean over its queries: one row a (head, rank)."""
    ranked_hk = census.ranked_phqk[1].mean(1)
    n_heads, n_ranks = ranked_hk.shape
    return pl.DataFrame(
        {
            "head": np.repeat(census.heads, n_ranks),
            "decisive": np.repeat(found.decisive_h, n_ranks),
            "rank": np.tile(np.arange(1, n_ranks + 1), n_heads),
            "mass": ranked_hk.ravel(),
            "n": [int(census.count_p[1])] * ranked_hk.size,
        }
    )
