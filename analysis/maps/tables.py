"""What the scored maps come to: each condition against chance and against l*, by block, by stratum, and in words.

Shape suffixes: ``k`` quantity, ``n`` sample, ``r`` bootstrap draw; see `analysis.maps.scores` for the others.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from analysis.finding import Drawn, Finding
from analysis.maps.rollout import LIMITS
from analysis.maps.scores import (
    ALL,
    CONTRAST,
    LAST,
    MEANING,
    METRICS,
    OBJECT,
    OTHERS,
    RANDOM,
    ROLLOUT,
    ROLLOUT_STAR,
    STAR,
    Maps,
)
from probes.panel import Panel, area_cuts, strata
from probes.statistics import benjamini_hochberg, ends, holm, mean_draws, means, sign_flip

NAME = "maps"
CHANCE = "chance"
QUESTION = "Do the dominant tokens look at the object at l*, more than elsewhere and more than other tokens do?"
ALPHA = 0.05


def clusters(found: Maps) -> np.ndarray:
    """A number a picture (n,): samples that share one are drawn together."""
    return found.samples["image"].rank("dense").to_numpy().astype(np.int64)


def compared(values_kn: np.ndarray, found: Maps, chance_kn: np.ndarray, star_kn: np.ndarray) -> pl.DataFrame:
    """One row a quantity: its mean, its ratio to chance, and how far l* is ahead of it, paired.

    Parameters
    ----------
    values_kn
        Scores under other conditions, NaN where unknown.
    chance_kn, star_kn
        A uniform map's scores, and those at l*, by the same metric as each quantity.

    Returns
    -------
    DataFrame
        ``value, low, high, n``; ``ratio`` (of means) ``, ratio_low, ratio_high``; ``difference`` (l* less this)
        ``, difference_low, difference_high, pairs, p``. Intervals are 95 % bootstraps over pictures, p by sign flips.
    """
    groups_n = clusters(found)
    known_kn = np.where(np.isnan(values_kn), np.nan, chance_kn)
    apart_kn = star_kn - values_kn
    stacked_kn = np.concatenate([values_kn, known_kn, apart_kn])
    drawn_rk = mean_draws(stacked_kn, groups_n)
    value_rk, chance_rk, apart_rk = np.split(drawn_rk, 3, axis=1)
    value_k, chance_k, apart_k = np.split(means(stacked_kn[:, None]), 3)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Without a chance to hit there is no ratio.
        ratio_k = np.where(chance_k > 0, value_k / chance_k, np.nan)
        ratio_rk = np.where(chance_rk > 0, value_rk / chance_rk, np.nan)
    columns = {"value": value_k, "chance": chance_k, "ratio": ratio_k, "difference": apart_k}
    for name, drawn in (("value", value_rk), ("ratio", ratio_rk), ("difference", apart_rk)):
        low_k, high_k = _ends(drawn)
        prefix = "" if name == "value" else f"{name}_"
        columns |= {f"{prefix}low": low_k, f"{prefix}high": high_k}
    counts = {"n": (~np.isnan(values_kn)).sum(1), "pairs": (~np.isnan(apart_kn)).sum(1)}
    p_k = np.where(counts["pairs"] > 0, sign_flip(apart_kn, groups_n), np.nan)
    return pl.DataFrame(columns | counts | {"p": p_k}, nan_to_null=True)


def _ends(drawn_rk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals; NaN, without a warning, for what no draw knows."""
    known_k = ~np.isnan(drawn_rk).all(0)
    low_k, high_k = np.full((2, drawn_rk.shape[1]), np.nan)
    if known_k.any():
        low_k[known_k], high_k[known_k] = ends(drawn_rk[:, known_k])
    return low_k, high_k


def comparisons(found: Maps) -> pl.DataFrame:
    """Every condition and chance, by metric, beside l*; ``p_holm`` over all of them but l* itself."""
    conditions = [STAR, *(name for name in found.scores if name != STAR), CHANCE]
    scores = {**found.scores, CHANCE: found.chance_mn}
    values_kn = np.concatenate([scores[name] for name in conditions])
    repeated = len(conditions)
    rows = compared(values_kn, found, np.tile(found.chance_mn, (repeated, 1)), np.tile(scores[STAR], (repeated, 1)))
    said = {**MEANING, CHANCE: "a uniform map: share of token centres, and of token area, in the true box"}
    rows = rows.with_columns(
        condition=pl.Series(np.repeat(conditions, len(METRICS))),
        metric=pl.Series(list(METRICS) * repeated),
        meaning=pl.Series(np.repeat([said[name] for name in conditions], len(METRICS))),
    )
    rows = rows.filter(pl.col("n") > 0)  # any object by lot has no energy, a store with one block no other block
    own = pl.col("condition") == STAR
    against = rows.filter(~own & pl.col("p").is_not_null())
    against = against.with_columns(p_holm=pl.Series(holm(against["p"].to_numpy())))
    rows = rows.join(
        against.select("condition", "metric", "p_holm"), on=["condition", "metric"], how="left", maintain_order="left"
    )
    beside = [name for name in rows.columns if name.startswith(("difference", "p")) and name != "pairs"]
    rows = rows.with_columns(pl.when(~own).then(pl.col(name)).alias(name) for name in (*beside, "pairs"))
    return rows.select("condition", "metric", *(name for name in rows.columns if name not in _LABELS), "meaning")


_LABELS = ("condition", "metric", "meaning")


def by_layer(found: Maps) -> pl.DataFrame:
    """The same tokens' rows at every fixed block beside l*; ``q`` holds the false-discovery rate over the blocks."""
    size = len(found.layers)
    values_kn = found.layers_mln.reshape(-1, found.samples.height)
    repeat = (np.repeat(part, size, axis=0) for part in (found.chance_mn, found.scores[STAR]))
    rows = compared(values_kn, found, *repeat)
    rows = rows.with_columns(
        layer=pl.Series(list(found.layers) * len(METRICS)), metric=pl.Series(np.repeat(METRICS, size))
    )
    q = pl.concat(
        part.filter(pl.col("p").is_not_null()).select(
            "layer", "metric", q=pl.col("p").map_batches(lambda p: pl.Series(benjamini_hochberg(p.to_numpy())))
        )
        for part in rows.partition_by("metric", maintain_order=True)
    )
    return rows.join(q, on=["layer", "metric"], how="left", maintain_order="left").select(
        "layer", "metric", pl.exclude("layer", "metric")
    )


def by_stratum(found: Maps, samples: pl.DataFrame) -> pl.DataFrame:
    """Scores at l* and their chance by box area, place, number of objects, kind and task (strata of 20 or more).

    Parameters
    ----------
    samples
        ``store.samples``: strata are of the columns that it has.
    """
    numbers, groups_n = found.samples["sample"].to_numpy(), clusters(found)
    nobody = np.zeros(len(numbers), bool)
    panel = Panel(NAME, "box", METRICS, METRICS[0], {}, {}, numbers, groups_n, nobody, found.samples.select("sample"))
    parts = []
    for stratum, inside_n in strata(panel, samples, area_cuts(panel, {NAME: samples})):
        star_mn, chance_mn = found.scores[STAR][:, inside_n], found.chance_mn[:, inside_n]
        drawn_rk = mean_draws(np.concatenate([star_mn, star_mn - chance_mn]), groups_n[inside_n])
        (low_k, high_k), mean_k = _ends(drawn_rk), means(np.concatenate([star_mn, star_mn - chance_mn])[:, None])
        m = len(METRICS)
        told = {"stratum": [stratum] * m, "metric": METRICS, "value": mean_k[:m], "low": low_k[:m], "high": high_k[:m]}
        ahead = {"over_chance": mean_k[m:], "over_low": low_k[m:], "over_high": high_k[m:]}
        counts = {"chance": means(chance_mn[:, None]), "n": (~np.isnan(star_mn)).sum(1)}
        parts.append(pl.DataFrame(told | ahead | counts, nan_to_null=True))
    return pl.concat(parts) if parts else pl.DataFrame(schema={"stratum": pl.String, "metric": pl.String})


def each_sample(found: Maps) -> pl.DataFrame:
    """One row a sample: what it was, its chance, and both metrics under every condition."""
    columns = {
        f"{metric}: {name}": values_mn[m]
        for name, values_mn in {**found.scores, CHANCE: found.chance_mn}.items()
        for m, metric in enumerate(METRICS)
    }
    return found.samples.with_columns(pl.DataFrame(columns, nan_to_null=True).get_columns())


def finding(found: Maps, samples: pl.DataFrame, figures: Sequence[Drawn] = ()) -> Finding:
    """The answer with its tables: comparisons, layers, strata, samples.

    Parameters
    ----------
    found
        Scored maps.
    samples
        ``store.samples``.
    figures
        Those that were drawn of it.
    """
    beside = comparisons(found)
    layers = by_layer(found)
    tables = {
        "comparisons": beside,
        "layers": layers,
        "strata": by_stratum(found, samples),
        "samples": each_sample(found),
    }
    return Finding(NAME, QUESTION, answer(found, beside, layers), tuple(figures), tables, caveats(found))


def answer(found: Maps, beside: pl.DataFrame, layers: pl.DataFrame) -> str:
    """The comparisons in words, pointing first; what did not hold is said, too."""
    rows = {(row["condition"], row["metric"]): row for row in beside.to_dicts()}
    star, energy = rows[STAR, "pointing"], rows[STAR, "energy"]
    said = [
        f"The strongest image token of the dominant words' own attention rows at l* lies in the true box in "
        f"{_share(star)} of {star['n']:,} pictures; a uniform map would in {star['chance']:.1%}. "
        f"{_share(energy)} of the map's mass lies in the box, {energy['ratio']:.1f} times "
        f"[{energy['ratio_low']:.1f}, {energy['ratio_high']:.1f}] the {energy['chance']:.1%} of an even one."
    ]
    said += [sentence for metric in METRICS for sentence in _verdicts(rows, metric)]
    best = layers.filter(pl.col("metric") == "pointing", pl.col("value").is_not_null()).sort("value")
    if best.height > 1:
        row = best.row(-1, named=True)
        said.append(
            f"Of fixed blocks, {row['layer']} points best: {_share(row)} (l* less it {_gap(row)}, q = {row['q']:.2g})."
        )
    if not {STAR, RANDOM} <= {name for name, _ in rows} or rows[RANDOM, "pointing"]["p_holm"] is None:
        said.append("No other tokens of the instruction have rows, so it is open whether these words look better.")
    said.append(
        "In brackets: the other's mean; l* less the other, paired by picture, with its 95 % interval; told apart "
        f"where p < {ALPHA} after Holm over both metrics."
    )
    return " ".join(said)


def _verdicts(rows: dict[tuple[str, str], dict], metric: str) -> list[str]:
    """By one metric, what l* is ahead of, behind, and not told apart from."""
    found: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
    for name, called in CALLED.items():
        row = rows.get((name, metric))
        if row is None or row["p_holm"] is None:
            continue
        side = "ahead of" if row["difference"] > 0 else "behind"
        verdict = side if row["p_holm"] < ALPHA else "not told apart from"
        found[verdict].append(f"{called} ({row['value']:.1%}; {_gap(row)})")
    return [f"In {metric}, l* is {verdict} {'; '.join(names)}." for verdict, names in found.items() if names]


CALLED = {
    CHANCE: "chance",
    OBJECT: "a peak on any object by lot",
    LAST: "the last block",
    OTHERS: "an average other block",
    RANDOM: "as many random words of the instruction",
    ALL: "the mean of all words",
    ROLLOUT: "rollout through all blocks",
    ROLLOUT_STAR: "rollout up to l*",
    CONTRAST: "the rows over the mean row (without sinks)",
}
"""How the answer names a condition."""


def _share(row: dict) -> str:
    """A share with its interval."""
    return f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def _gap(row: dict) -> str:
    """How far l* is ahead, with its interval."""
    return f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"


def caveats(found: Maps) -> tuple[str, ...]:
    """What to hold against the maps of this store."""
    said = [
        "Attention is not cause: where a token looks is not yet what the model uses.",
        "Rows are means over the VLM's heads: one head that looks at the object can drown in the others.",
    ]
    if found.left_out:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in found.left_out.items())
        said.append(f"Left out: {reasons}.")
    if found.drawn_of > sum(found.left_out.values()) + found.samples.height:
        said.append(f"{found.samples.height:,} of {found.drawn_of:,} samples were drawn by seed {found.seed}.")
    if found.skipped:
        said.append(
            f"{found.skipped:,} tokens that the proxy attends to more have no attention row in the store (only the "
            "instruction's are kept, not the template's): the next ones of the ranking took their place."
        )
    never = float((found.chance_mn[0] == 0).mean())
    if never:
        said.append(f"In {never:.1%} of pictures no token's centre lies in the true box, so pointing cannot hit there.")
    if OBJECT in found.scores:
        said.append("What beats a uniform map and not a peak on any object by lot may see objects, not the one meant.")
    said.append(LIMITS if ROLLOUT in found.scores else "No rollout: it needs the text's rows of all blocks from 0.")
    return tuple(said)
