"""How long states are and where their length sits: norms, massive dimensions and register tokens, by layer and kind.

Shape suffixes: ``b`` sample of a batch, ``n`` sample, ``m`` token of all samples one after the other, ``l`` layer,
``t`` token of a sample, ``w`` width, ``k`` kind of token, ``q`` quantity, ``r`` bootstrap draw.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from probes import statistics
from store.inspection import MASSIVE, MOST_MASSIVE

KINDS = ("image", "instruction", "template")
"""Kinds of tokens that are told apart; their places here are their codes; any other kind is OTHER."""

OTHER, PADDING = -1, -2
"""Codes of tokens of other kinds, and of what is no token."""

REGISTER = 2.0
"""A register token's norm is so many standard deviations above the mean of its picture's tokens [MOL]."""

BY_CHANCE = 0.0228
"""Share of register tokens if norms were normally distributed: the floor."""

QUANTILES = {"median": 0.5, "p99": 0.99}

SCHEMA = {"layer": pl.String, "kind": pl.String, "metric": pl.String, "value": pl.Float64}
SCHEMA |= {"low": pl.Float64, "high": pl.Float64, "tokens": pl.Int64, "images": pl.Int64}


def measured(values_qm: np.ndarray, clusters_m: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each row with the ends of its 95 % interval, ``(mean, low, high)`` each (q,); NaN are unknown.

    ``clusters_m`` are the images (int ≥ 0) that are drawn whole; without them every column is one.
    """
    means_q = statistics.means(values_qm[:, None])
    known_q = np.isfinite(means_q)
    low_q, high_q = np.full((2, len(values_qm)), np.nan)
    if known_q.any():
        low_q[known_q], high_q[known_q] = statistics.ends(statistics.mean_draws(values_qm[known_q], clusters_m))
    return means_q, low_q, high_q


def of_kinds(values_bltw: Tensor, kinds_bt: Tensor) -> Tensor:
    """Sums over the tokens of each kind, (b, l, k, w)."""
    chosen_bkt = torch.stack([kinds_bt == k for k in range(len(KINDS))], dim=1).to(values_bltw.dtype)
    return chosen_bkt[:, None] @ values_bltw


class Norms:
    """Sums over the tokens of some layers, filled batch by batch; memory is samples × layers × kinds × width floats.

    Parameters
    ----------
    layers
        Names of the layers that ``add`` is given.
    kind_m, sample_m
        Kind (see ``KINDS``) and sample of every token that ``add`` will be given, in that order; samples count from 0.
    samples
        How many there are.
    width
        Of a state.
    """

    def __init__(self, layers: Sequence[str], kind_m: np.ndarray, sample_m: np.ndarray, samples: int, width: int):
        self.layers, self.kind_m, self.sample_m = tuple(layers), kind_m, sample_m
        self.norms_lm = np.full((len(layers), len(kind_m)), np.nan, np.float32)
        self.squares_nlkw = np.zeros((samples, len(layers), len(KINDS), width), np.float32)

    def add(self, states_bltw: Tensor, kinds_bt: Tensor, tokens: slice, samples: slice) -> None:
        """Add a batch: float32 states, the codes of their tokens' kinds, and which tokens and samples they are."""
        squares_bltw = states_bltw.square()
        norms_btl = squares_bltw.sum(-1).sqrt().transpose(1, 2)
        self.norms_lm[:, tokens] = norms_btl[kinds_bt != PADDING].T.numpy()
        self.squares_nlkw[samples] = of_kinds(squares_bltw, kinds_bt).numpy()

    def table(self) -> pl.DataFrame:
        """Every layer's numbers, tidy: columns of ``SCHEMA``, ``tokens`` and ``images`` being n.

        ``mean``, ``median`` and ``p99`` of the L2 norm over tokens; ``top4``, the share of the squared norm in its
        four largest dimensions (those of all tokens), mean over images; ``register``, the share of a picture's tokens
        that are register tokens.
        """
        rows = []
        for k, kind in enumerate(KINDS):
            chosen_m = self.kind_m == k
            if not chosen_m.any():
                continue
            norms_lm, images_m = self.norms_lm[:, chosen_m].astype(np.float64), self.sample_m[chosen_m]
            middles = {name: np.quantile(norms_lm, share, axis=1) for name, share in QUANTILES.items()}
            # One bootstrap for all: lengths, whether they are below a quantile, whether they are registers'.
            asked = {"mean": norms_lm} | {name: norms_lm <= middle_l[:, None] for name, middle_l in middles.items()}
            if kind == "image":
                asked["register"] = registers(norms_lm, images_m)
            ends_3ql = np.stack(measured(np.concatenate(list(asked.values())), images_m)).reshape(3, len(asked), -1)
            found = {name: ends_3ql[:, q] for q, name in enumerate(asked)}
            found |= {name: quantile_ends(norms_lm, middles[name], *found[name][1:]) for name in QUANTILES}
            found["top4"] = measured(self._top_shares(k).T)
            n = {"tokens": int(chosen_m.sum()), "images": len(np.unique(images_m))}
            for metric, ends_l in found.items():
                for layer, value, low, high in zip(self.layers, *ends_l, strict=True):
                    rows.append({"layer": layer, "kind": kind, "metric": metric, "value": value} | n)
                    rows[-1] |= {"low": low, "high": high}
        return pl.DataFrame(rows, schema=SCHEMA)

    def massive(self) -> pl.DataFrame:
        """The massive dimensions of every layer and kind, most massive first.

        ``ratio`` (with the ends of its interval over images) is the root mean square of the dimension over that of the
        median dimension, ``images`` is n.
        """
        schema = {"layer": pl.String, "kind": pl.String, "dim": pl.Int64, "ratio": pl.Float64}
        schema |= {"low": pl.Float64, "high": pl.Float64, "images": pl.Int64}
        rows = []
        for place, layer in enumerate(self.layers):
            for k, kind in enumerate(KINDS):
                squares_nw = self.squares_nlkw[:, place, k]
                squares_nw = squares_nw[squares_nw.any(1)]
                rms_w = np.sqrt(squares_nw.sum(0, dtype=np.float64))
                if not rms_w.any():
                    continue
                ratio_w = rms_w / max(np.median(rms_w), np.finfo(np.float32).tiny)
                most = np.argsort(-ratio_w, kind="stable")[:MOST_MASSIVE]
                most = most[ratio_w[most] >= MASSIVE]
                for dim, low, high in zip(most, *ratio_ends(squares_nw, most), strict=True) if most.size else ():
                    rows.append((layer, kind, int(dim), float(ratio_w[dim]), low, high, len(squares_nw)))
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _top_shares(self, k: int) -> np.ndarray:
        """Share of each image's squared norm in the layer's four largest dimensions, (n, l); NaN without tokens."""
        squares_nlw = self.squares_nlkw[:, :, k].astype(np.float64)
        top_l4 = np.argsort(-squares_nlw.sum(0), axis=1, kind="stable")[:, :MOST_MASSIVE]
        whole_nl = squares_nlw.sum(2)
        inside_nl = np.take_along_axis(squares_nlw, top_l4[None], axis=2).sum(2)
        return np.divide(inside_nl, whole_nl, out=np.full_like(whole_nl, np.nan), where=whole_nl > 0)


def ratio_ends(squares_nw: np.ndarray, dims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval over images of each dimension's root mean square over the median dimension's."""
    drawn = []
    for weights_rn in statistics.image_weights(len(squares_nw)):
        rms_rw = np.sqrt(weights_rn @ squares_nw)
        drawn.append(rms_rw[:, dims] / np.maximum(np.median(rms_rw, axis=1), np.finfo(np.float32).tiny)[:, None])
    return statistics.ends(np.concatenate(drawn))


def quantile_ends(
    norms_lm: np.ndarray, middle_l: np.ndarray, low_l: np.ndarray, high_l: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each layer's quantile and the ends of its interval, (l,), from the ends of the share of tokens below it.

    They are the quantiles at those shares, each being a mean over images (Woodruff, *Confidence intervals for medians
    and other position measures*, 1952).
    """
    low_l, high_l = (
        np.array([np.quantile(row, min(share, 1)) for row, share in zip(norms_lm, shares_l, strict=True)])
        for shares_l in (low_l, high_l)
    )
    return middle_l, np.minimum(low_l, middle_l), np.maximum(high_l, middle_l)


def registers(norms_lm: np.ndarray, images_m: np.ndarray) -> np.ndarray:
    """Which tokens are registers, bool (l, m): far above the mean norm of their own picture's tokens."""
    _, picture_m, counts_n = np.unique(images_m, return_inverse=True, return_counts=True)
    out_lm = np.zeros(norms_lm.shape, bool)
    for place, norms_m in enumerate(norms_lm):
        mean_n = np.bincount(picture_m, norms_m) / counts_n
        spread_n = np.sqrt(np.bincount(picture_m, (norms_m - mean_n[picture_m]) ** 2) / counts_n)
        out_lm[place] = norms_m > (mean_n + REGISTER * spread_n)[picture_m]
    return out_lm


def answer(table: pl.DataFrame, massive: pl.DataFrame, floor: pl.DataFrame | None) -> str:
    """What the tables say in words; ``floor`` is the table of random weights."""
    layers = table["layer"].unique(maintain_order=True).to_list()
    blocks = [layer for layer in layers if layer != "final"] or layers

    def told(rows: pl.DataFrame, metric: str, kind: str, layer: str, form: str = ".2f") -> str:
        row = rows.filter(metric=metric, kind=kind, layer=layer).row(0, named=True)
        return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

    said = []
    for kind in table["kind"].unique(maintain_order=True):
        n = table.filter(kind=kind).row(0, named=True)
        line = (
            f"The mean L2 norm of {kind} tokens goes from {told(table, 'mean', kind, blocks[0])} at {blocks[0]} to "
            f"{told(table, 'mean', kind, blocks[-1])} at {blocks[-1]}"
        )
        if floor is not None:
            line += f" (random weights: {told(floor, 'mean', kind, blocks[-1])})"
        said.append(f"{line}; n = {n['images']:,} images, {n['tokens']:,} tokens.")
    if massive.height:
        top = massive.sort("ratio", descending=True).row(0, named=True)
        said.append(
            f"Massive dimensions (RMS ≥ {MASSIVE:.0f} × the median dimension): {massive.height} in "
            f"{massive['layer'].n_unique()} of {len(layers)} layers; the largest is dimension {top['dim']} of "
            f"{top['kind']} tokens at {top['layer']}, {top['ratio']:.0f} [{top['low']:.0f}, {top['high']:.0f}] times."
        )
    else:
        said.append(f"No dimension is massive: none has an RMS of {MASSIVE:.0f} × the median dimension at any layer.")
    shares = table.filter(metric="register").sort("value")
    if shares.height:
        most = shares.row(-1, named=True)
        said.append(
            f"Register tokens (norm > mean + {REGISTER:.0f}σ of their picture) are at most "
            f"{most['value']:.1%} [{most['low']:.1%}, {most['high']:.1%}] of the image tokens, at {most['layer']} "
            f"({BY_CHANCE:.1%} if norms were normal)."
        )
    return " ".join(said)
