"""Tidy results of a run: every metric of every probe, with intervals over seeds and images, overall and by stratum.

Shape suffixes: ``p`` probe, ``m`` metric, ``s`` seed, ``n`` image, ``r`` draw.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl

from probes import panel as arrays
from probes import statistics
from probes.comparisons import comparisons
from probes.panel import Panel
from probes.specs import seen

ABOUT = {
    "probe": pl.String,
    "role": pl.String,  # layer, prompt, floor, control, matched, efficiency, codelength or other
    "kind": pl.String,  # qformer, linear, mlp, attention or constant
    "layer": pl.String,
    "tokens": pl.String,
    "target": pl.String,  # box, cell-3x3 or a column of the store
    "labels": pl.String,  # true, permuted or control
    "source": pl.String,  # ordinary, random-weights or shuffled-images
    "share": pl.Float64,  # of the train split
    "keys": pl.Int64,  # (layer, token) keys, where they are matched
}
VALUES = {
    "seed": pl.Int64,  # null: over all seeds
    "data": pl.String,
    "stratum": pl.String,  # all, a stratum as `area: small (< 2.10%)`, or watched for curves
    "step": pl.Int64,  # of a curve; null at the end of training
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,  # 95 % interval: over images, and over seeds where seed is null
    "high": pl.Float64,
    "n": pl.Int64,
    "seeds": pl.Int64,
}
RESULTS = ABOUT | VALUES

IN_STRATA = {"iou", "iou_at_0.5", "centre_distance", "accuracy", "bits", "r2", "absolute_error"}
"""Metrics that are told by stratum too."""
COLUMNS = 4000
"""Means (probe, metric, seed) that are drawn at once: 32 MB."""


def gather(
    predictions: pl.DataFrame,
    curves: pl.DataFrame,
    about: pl.DataFrame,
    samples: Mapping[str, pl.DataFrame] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Results and comparisons of a run; see ``results`` and ``probes.comparisons.comparisons``.

    Parameters
    ----------
    predictions : DataFrame
        One row per probe, seed, data and sample; ``probes.panel.joined`` makes one frame of many.
    curves : DataFrame
        ``probe, seed, step, metric, value, n`` on the watched rows.
    about : DataFrame
        One row a probe: the columns of ``ABOUT``, and ``layers``.
    samples : mapping of str to DataFrame, optional
        ``store.samples`` of each data by name, for strata; its row i is sample i.
    """
    return results(predictions, curves, about, samples), comparisons(predictions, about)


def results(
    predictions: pl.DataFrame,
    curves: pl.DataFrame,
    about: pl.DataFrame,
    samples: Mapping[str, pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """All numbers of a run, tidy: the columns of ``RESULTS``, probes in the order of ``about``.

    At the end of training every metric is of all test images, watched ones too (they are left out of comparisons
    only), per seed and over all seeds. A layer's codelength is a row of its own, of the probes that it takes.

    Raises
    ------
    Refusal
        When predictions are incomplete or not finite; see ``probes.panel.panels``.
    """
    samples = samples or {}
    found = arrays.panels(predictions, about)
    cuts = next((cut for each in found if (cut := arrays.area_cuts(each, samples))), None)
    rows: list[dict] = []
    for each in found:
        rows += final_rows(each, "all", np.ones(len(each.samples_n), bool), set(each.metrics), by_seed=True)
        for name, inside_n in arrays.strata(each, samples.get(each.data), cuts):
            rows += final_rows(each, name, inside_n, IN_STRATA)
    tables = [pl.DataFrame(rows, schema={"probe": pl.String} | VALUES), curve_rows(curves)]
    described = about.select(pl.col(name).cast(kind) for name, kind in ABOUT.items())
    order = described.select("probe").with_row_index("place")
    told = pl.concat(tables).join(described, on="probe").join(order, on="probe").sort("place", maintain_order=True)
    coded = pl.DataFrame(list(codelengths(predictions, about)), schema=RESULTS)
    return pl.concat([told.select(*RESULTS), coded])


def final_rows(
    each: Panel, stratum: str, inside_n: np.ndarray, wanted: set[str], by_seed: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of the wanted metrics of all probes on some of a panel's images."""
    chosen = [m for m, name in enumerate(each.metrics) if name in wanted]
    clusters_n = each.clusters_n[inside_n]
    for seeds in sorted({len(own) for own in each.seeds.values()}):
        probes = [name for name, own in each.seeds.items() if len(own) == seeds]
        at_once = max(1, COLUMNS // (len(chosen) * seeds))
        for names in (probes[i : i + at_once] for i in range(0, len(probes), at_once)):
            values_pmsn = np.stack([each.values[name][chosen][..., inside_n] for name in names])
            p, m, s, n = values_pmsn.shape
            drawn_rks = statistics.mean_draws(values_pmsn.reshape(-1, n), clusters_n).reshape(-1, p * m, s)
            over = np.stack(statistics.ends(statistics.over_seeds(drawn_rks)))
            over_2pm = over.reshape(2, p, m)
            if by_seed and s > 1:
                each_2pms = np.stack(statistics.ends(drawn_rks.reshape(-1, p * m * s))).reshape(2, p, m, s)
            else:
                each_2pms = over_2pm[..., None]
            means_pm = statistics.means(values_pmsn.reshape(p * m, s, n)).reshape(p, m)
            means_pms = statistics.means(values_pmsn.reshape(-1, 1, n)).reshape(p, m, s)
            known_p = (~np.isnan(values_pmsn[:, 0, 0])).sum(-1)
            for i, j in np.ndindex(p, m):
                if not known_p[i]:
                    continue
                common = {"probe": names[i], "data": each.data, "stratum": stratum, "metric": each.metrics[chosen[j]]}
                common["n"] = int(known_p[i])
                if by_seed:
                    for k, seed in enumerate(each.seeds[names[i]]):
                        yield (
                            common
                            | {"seed": seed, "seeds": 1}
                            | told(common, means_pms[i, j, k], each_2pms[:, i, j, k])
                        )
                yield common | {"seed": None, "seeds": s} | told(common, means_pm[i, j], over_2pm[:, i, j])


def told(common: Mapping[str, Any], value: float, ends_2: np.ndarray) -> dict[str, float]:
    """A mean and its interval; a share of none or all, whose bootstrap has no width, gets Wilson's."""
    low, high = map(float, ends_2)
    if common["metric"] in arrays.SHARES and value in (0, 1):
        low, high = statistics.wilson(value, common["n"])
    return {"value": float(value), "low": low, "high": high}


def curve_rows(curves: pl.DataFrame) -> pl.DataFrame:
    """The curves of each seed, and their mean with its 95 % interval over seeds (normal; none with one seed)."""
    if curves.is_empty():
        return pl.DataFrame(schema={"probe": pl.String} | VALUES)
    reach = statistics.Z * pl.col("value").std() / pl.len().sqrt()
    over = (
        curves.sort("probe", "metric", "step", "seed", maintain_order=True)
        .group_by("probe", "metric", "step", maintain_order=True)
        .agg(
            pl.lit(None, pl.Int64).alias("seed"),
            pl.col("value").mean(),
            (pl.col("value").mean() - reach).alias("low"),
            (pl.col("value").mean() + reach).alias("high"),
            pl.col("n").first(),
            pl.len().alias("seeds"),
        )
    )
    watched = pl.lit(arrays.HELD_OUT).alias("data"), pl.lit("watched").alias("stratum")
    whole = pl.concat([over, curves.with_columns(seeds=pl.lit(1))], how="diagonal_relaxed").with_columns(watched)
    return whole.select(pl.col(name).cast(kind) for name, kind in ({"probe": pl.String} | VALUES).items())


def codelengths(predictions: pl.DataFrame, about: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Online codelength of the labels given each layer's states, in bits [Voita & Titov 2020, arXiv 2003.12298 §2.2].

    The first portion of the train split is sent by the uniform code, log₂ K bits a label; each further one by the
    probe that was trained on all before it. ``compression`` is the uniform code's length over this one's: 1 if the
    states help with nothing. The portion behind the last probe ends the split. Intervals are over images and seeds.
    """
    about = about.filter(pl.col("role") == "codelength")
    groups = ["target", "layer", "kind", "tokens", "labels", "source"]
    found = arrays.panels(predictions.filter(pl.col("probe").is_in(about["probe"].to_list())), about, "next")
    for each in found:
        for key, of_layer in about.filter(pl.col("target") == each.target).group_by(groups, maintain_order=True):
            probes = [name for name in of_layer["probe"] if name in each.values]
            if not probes:
                continue
            described = dict(zip(groups, key, strict=True))
            first = of_layer.filter(pl.col("probe").is_in(probes))["share"].min()
            own_sn = online_bits(each, probes)
            sent = int((~np.isnan(own_sn[0])).sum())
            before = next(n for n in itertools.count(2) if seen(first, n + sent) == n)
            whole = before + sent
            per_label = math.log2(classes(each.target, predictions, about))
            mean, low, high = (before * per_label + sent * x for x in statistics.interval(own_sn, each.clusters_n))
            uniform = whole * per_label
            name = "-".join(["codelength", key[1], *(word for word in key[4:] if word not in ("true", "ordinary"))])
            common = described | {"probe": name, "role": "codelength", "data": each.data, "stratum": "all"}
            common |= {"n": whole, "seeds": len(own_sn)}
            yield common | {"metric": "codelength", "value": mean, "low": low, "high": high}
            yield common | {"metric": "uniform_codelength", "value": uniform}
            yield common | {
                "metric": "compression",
                "value": uniform / mean,
                "low": uniform / high,
                "high": uniform / low,
            }


def online_bits(each: Panel, probes: list[str]) -> np.ndarray:
    """Bits (s, n) of each label under the probe trained on what came before it, for the seeds that all probes have."""
    bits = each.metrics.index("bits")
    seeds = sorted(set.intersection(*(set(each.seeds[name]) for name in probes)))
    of_probe = [each.values[name][bits][[each.seeds[name].index(seed) for seed in seeds]] for name in probes]
    out_sn = np.full_like(of_probe[0], np.nan)
    for own_sn in of_probe:
        out_sn = np.where(np.isnan(out_sn), own_sn, out_sn)
    return out_sn


def classes(target: str, predictions: pl.DataFrame, about: pl.DataFrame) -> int:
    """How many classes a target has: the cells of a grid, else those that any row of these probes has for true."""
    grid = re.fullmatch(r"cell-(\d+)x(\d+)", target)
    if grid:
        return int(grid[1]) * int(grid[2])
    names = about.filter(pl.col("target") == target)["probe"].to_list()
    return max(2, predictions.filter(pl.col("probe").is_in(names))["true"].n_unique())
