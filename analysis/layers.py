"""Layer-mode voting: per sample, the layer that most decisive heads give most mass, l* [ABP §5]; and how firm it is.

Shape suffixes: ``s`` sample, ``n`` chosen sample, ``l`` layer, ``r`` bootstrap draw.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import polars as pl

from analysis.census import Census, Votes
from probes.statistics import DRAWS, LEVEL, ends, image_weights, mean_draws

NONE = "none"


def frame(census: Census, found: Votes, sample_ids: pl.Series, parts_s: np.ndarray, decisive: int) -> pl.DataFrame:
    """One row a sample: ``l_star`` (null without attention), ``votes`` for it of ``heads``, ``tied``, ``entropy``."""
    there_s = found.l_star_s >= 0
    names = np.array([*census.layers, ""], object)[found.l_star_s]
    return pl.DataFrame(
        {
            "sample": np.arange(len(there_s)),
            "sample_id": sample_ids,
            "part": pl.Series(parts_s).replace_strict({0: "choose", 1: "report", -1: NONE}, return_dtype=pl.String),
            "l_star": pl.Series(names.tolist(), dtype=pl.String),
            "votes": np.where(there_s, found.votes_s, 0),
            "heads": decisive,
            "tied": found.tied_s,
            "entropy": found.entropy_s.astype(float),
        }
    ).with_columns(
        pl.when(pl.Series(there_s)).then(pl.col(name)).alias(name) for name in ("l_star", "votes", "entropy")
    )


def shares(codes_n: np.ndarray, layers: Sequence[str]) -> pl.DataFrame:
    """How many of the samples vote for each layer: ``share`` with its 95 % interval over images; the even share beside.

    ``codes_n`` are places in ``layers``.
    """
    votes_ln = (np.arange(len(layers))[:, None] == codes_n).astype(np.float32)
    low_l, high_l = ends(mean_draws(votes_ln))
    told = {"share": votes_ln.mean(1, dtype=np.float64), "low": low_l.astype(float), "high": high_l.astype(float)}
    return pl.DataFrame({"layer": list(layers), **told, "even": 1 / len(layers), "n": len(codes_n)})


def kappa(codes_kn: np.ndarray, layers: int) -> tuple[float, float, float]:
    """Cohen's κ between voters, mean over all pairs, with its 95 % interval over images: (κ, low, high).

    ``codes_kn`` holds the place of each voter's layer. κ is 1 where two agree on every sample and 0 where they agree as
    often as their own frequencies would by chance. Voters that always say one and the same layer have no κ: NaN.
    """
    pairs = list(combinations(range(len(codes_kn)), 2))
    if not pairs or not codes_kn.shape[1]:
        return (float("nan"),) * 3
    whole = _kappas(codes_kn, layers, np.full((1, codes_kn.shape[1]), 1 / codes_kn.shape[1]), pairs)[0]
    drawn = np.concatenate(
        [_kappas(codes_kn, layers, weights_rn, pairs) for weights_rn in image_weights(codes_kn.shape[1], DRAWS)]
    )
    if np.isnan(drawn).all():
        return float(whole), float("nan"), float("nan")
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(whole), float(low), float(high)


def _kappas(codes_kn: np.ndarray, layers: int, weights_rn: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Mean κ over pairs for each row of weights (that sum to 1): float64 [r]."""
    said_krl = [weights_rn @ (codes_n[:, None] == np.arange(layers)).astype(weights_rn.dtype) for codes_n in codes_kn]
    found = []
    for a, b in pairs:
        agreed_r = weights_rn @ (codes_kn[a] == codes_kn[b]).astype(weights_rn.dtype)
        chance_r = (said_krl[a] * said_krl[b]).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Rounding must not make a κ of what has none.
            found.append(np.where(1 - chance_r > 1e-6, (agreed_r - chance_r) / (1 - chance_r), np.nan))
    stacked = np.stack(found)
    known = ~np.isnan(stacked)
    counts = known.sum(0)
    return np.where(counts > 0, np.where(known, stacked, 0).sum(0) / np.maximum(counts, 1), np.nan)
