"""Token concentration: within its layer l*, which tokens a sample's decisive heads read [ABP §5].

Shape suffixes: ``s`` sample, ``h`` head, ``q`` query, ``l`` layer, ``t`` token, ``n`` chosen sample, ``k`` rank.
"""

from functools import partial

import numpy as np
import polars as pl
import xarray as xr

from analysis.blocks import over_blocks
from probes.statistics import ends, mean_draws


def shares(
    attention: xr.DataArray, decisive_h: np.ndarray, layer_s: np.ndarray, *, dask: str | None = None
) -> np.ndarray:
    """What share of the mass of a sample's layer goes to each token, mean over decisive heads and their queries.

    Parameters
    ----------
    attention : DataArray
        a[sample, head, query, layer, token], lazy, NaN past a sample's tokens.
    decisive_h : ndarray of bool
        Heads that count.
    layer_s : ndarray of int
        Place of the layer that is looked at, −1 for a sample that has none.
    dask
        As of ``over_blocks``.

    Returns
    -------
    ndarray, float32 (s, t)
        Each sample's tokens sum to 1; NaN past them and without a layer.
    """
    array = attention.transpose("sample", "head", "query", "layer", "token")
    work = partial(_shares, np.asarray(layer_s), np.asarray(decisive_h, bool))
    found = over_blocks(work, array, dask=dask, progress=True, label="tokens")
    return np.concatenate([share_st for _, share_st in found])


def _shares(layer_s: np.ndarray, decisive_h: np.ndarray, block_shqlt: np.ndarray, samples: slice) -> np.ndarray:
    place_s = layer_s[samples]
    there = np.flatnonzero(place_s >= 0)
    out = np.full((len(block_shqlt), block_shqlt.shape[-1]), np.nan, np.float32)
    # One layer of the block, not the block: it may be large.
    picked_nhqt = block_shqlt[there, :, :, place_s[there]][:, decisive_h].astype(np.float32)
    summed_nt = picked_nhqt.sum((1, 2), dtype=np.float64)
    total_n = np.nansum(summed_nt, axis=1, keepdims=True)
    out[there] = np.divide(summed_nt, total_n, out=np.full_like(summed_nt, np.nan), where=total_n > 0)
    return out


def among(share_nt: np.ndarray, samples_n: np.ndarray, tokens: pl.DataFrame) -> np.ndarray:
    """The shares among some tokens only, those of the table ``tokens``: they sum to 1, all others are NaN."""
    kept_nt = np.zeros(share_nt.shape, bool)
    kept_nt[places(samples_n, tokens)] = True
    kept = np.where(kept_nt, share_nt, np.nan)
    total_n1 = np.nansum(kept, axis=1, keepdims=True)
    return np.divide(kept, total_n1, out=np.full_like(kept, np.nan), where=total_n1 > 0)


def places(samples_n: np.ndarray, tokens: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of a table are in an array (n, t) of these samples: rows and columns."""
    row = {sample: n for n, sample in enumerate(samples_n.tolist())}
    return (
        tokens["sample"].replace_strict(row, return_dtype=pl.Int64).to_numpy(),
        tokens["token"].to_numpy().astype(np.int64),
    )


def ranked(share_nt: np.ndarray) -> pl.DataFrame:
    """The shares sorted from the largest, mean over samples: one row a rank, with intervals and the even share beside.

    A rank is of the samples that have so many tokens, ``n``; ``even`` is the mean of one over their number of tokens.
    """
    sorted_kn = -np.sort(-share_nt, axis=1).T  # NaN sort last
    known_kn = ~np.isnan(sorted_kn)
    sorted_kn, known_kn = (part[known_kn.any(1)] for part in (sorted_kn, known_kn))
    low_k, high_k = ends(mean_draws(sorted_kn))
    even_n = 1 / np.maximum(known_kn.sum(0), 1)
    return pl.DataFrame(
        {
            "rank": np.arange(1, len(sorted_kn) + 1),
            "share": np.nanmean(sorted_kn, axis=1, dtype=np.float64),
            "low": low_k.astype(float),
            "high": high_k.astype(float),
            "even": (known_kn * even_n).sum(1) / known_kn.sum(1),
            "n": known_kn.sum(1),
        }
    )


def top(share_nt: np.ndarray, samples_n: np.ndarray, tokens: pl.DataFrame, count: int) -> pl.DataFrame:
    """The ``count`` most read tokens of each sample, most read first: a row each of the token table.

    ``tokens`` is the token table of these samples with ``token``, its place along the second axis. Adds ``rank`` (from
    0) and ``share``. Of equal shares the earlier token comes first.
    """
    order_nk = np.argsort(-share_nt, axis=1, kind="stable")[:, :count]
    share_nk = np.take_along_axis(share_nt, order_nk, axis=1)
    ranks = np.broadcast_to(np.arange(order_nk.shape[1]), order_nk.shape)
    rows = pl.DataFrame(
        {
            "sample": np.repeat(samples_n, order_nk.shape[1]).astype(np.int64),
            "rank": ranks.ravel().astype(np.int64),
            "token": order_nk.ravel().astype(np.int32),
            "share": share_nk.ravel(),
        }
    )
    rows = rows.filter(pl.col("share").is_not_nan())
    return rows.join(tokens, on=["sample", "token"], how="left", maintain_order="left")


def by_tag(share_nt: np.ndarray, samples_n: np.ndarray, tokens: pl.DataFrame) -> pl.DataFrame:
    """What share of the layer's mass goes to the tokens of each tag, and what an even spread would give them.

    ``tokens`` has ``sample``, ``token`` and ``tag``; those of other samples are passed over. One row a tag: ``share``
    with its interval over images, ``even``, ``excess`` (share less even) with its interval, ``first`` (how often the
    most read token is of the tag), and ``n``.
    """
    tokens = tokens.filter(pl.col("sample").is_in(samples_n.tolist()))
    at = places(samples_n, tokens)
    count_n = (~np.isnan(share_nt)).sum(1)
    tag_nt = np.full(share_nt.shape, None, object)
    tag_nt[at] = tokens["tag"].to_list()
    first_n = tag_nt[np.arange(len(share_nt)), np.nanargmax(share_nt, axis=1)]
    tags = sorted({tag for tag in tag_nt.ravel() if tag is not None})
    of_tag_gnt = np.stack([tag_nt == tag for tag in tags])
    share_gn = np.where(of_tag_gnt, share_nt, 0).sum(2)
    even_gn = of_tag_gnt.sum(2) / count_n
    first_gn = np.array(tags, object)[:, None] == first_n
    told = {"share": share_gn, "even": even_gn, "excess": share_gn - even_gn, "first": first_gn}
    low_k, high_k = ends(mean_draws(np.concatenate(list(told.values())).astype(np.float32)))
    columns: dict[str, object] = {"tag": tags}
    for place, (name, values_gn) in enumerate(told.items()):
        part = slice(place * len(tags), (place + 1) * len(tags))
        columns |= {name: values_gn.mean(1), f"{name}_low": low_k[part], f"{name}_high": high_k[part]}
    return pl.DataFrame(columns | {"n": len(share_nt)}).sort("excess", descending=True)


def words(top_tokens: pl.DataFrame, tokens: pl.DataFrame) -> pl.DataFrame:
    """The words that are the most read token of a sample: ``first`` times in the ``n`` samples that have the word.

    Tokens of no word (of the template) go by their text, line ends made visible.
    """
    named = pl.col("word").fill_null(pl.col("text").str.replace_all("\n", "⏎", literal=True)).alias("word")
    first = top_tokens.filter(pl.col("rank") == 0).select(named, "tag").group_by("word", "tag").len("first")
    there = tokens.select("sample", named, "tag").unique().group_by("word", "tag").len("n")
    found = first.join(there, on=["word", "tag"], how="left")
    return found.with_columns(rate=pl.col("first") / pl.col("n")).sort("first", "word", descending=[True, False])
