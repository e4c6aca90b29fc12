"""Paired comparisons of probes on the same images: the claims of a run, each with interval, p and correction.

The layer is chosen on the watched held-out images and compared on the others, so that choosing the best of many does
not count in its favour; on other data, where no image chose anything, it is compared on all.

A sign-flip test over images knows nothing of seeds: two layers whose probes differ by the luck of their seeds alone
get a tiny p. So with several seeds, p is the larger of that test's and of ``statistics.seeds_p``.

Shape suffixes: ``s`` seed, ``n`` image, ``k`` comparison.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from probes import panel as arrays
from probes import statistics
from probes.panel import HELD_OUT, Panel

COMPARISONS = {
    "data": pl.String,
    "target": pl.String,
    "kind": pl.String,
    "tokens": pl.String,
    "question": pl.String,
    "layer": pl.String,  # what is compared, by layer
    "a": pl.String,
    "b": pl.String,
    "metric": pl.String,
    "value_a": pl.Float64,  # of the same images
    "value_b": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,  # 95 % interval over seeds and images
    "high": pl.Float64,
    "p": pl.Float64,  # two-sided, see the top
    "p_holm": pl.Float64,  # over the family of a claim
    "q_bh": pl.Float64,  # over the layers of a map
    "n": pl.Int64,
    "chosen_on": pl.Int64,  # watched images on which a layer was chosen; null where none was
    "seeds": pl.Int64,
}

MID = "mid layer against"
LAST, NORMED, FLOOR = f"{MID} last block", f"{MID} after the norm", f"{MID} floor"
PROMPT = "middle prompt tokens against"
BEST = f"{PROMPT} best layer"
EFFECTS = ("2×2 effect of tokens", "2×2 effect of layer count", "2×2 interaction")
SELECTIVITY = "selectivity"
MAPS = {
    SELECTIVITY: {"labels": "control"},
    "against permuted labels": {"labels": "permuted"},
    "against random weights": {"source": "random-weights"},
    "against shuffled images": {"source": "shuffled-images"},
}
"""Question → what a layer's opponent differs in; asked of every layer."""
AGAINST_LAST = "layer against last block"


@dataclass(frozen=True)
class Question:
    """A weighted sum of probes, whose mean is asked to differ from 0."""

    text: str
    a: str
    b: str
    terms: tuple[tuple[float, str], ...]
    family: str
    """Holm corrects within it; a map's is empty and gets false-discovery control."""
    layer: str | None = None
    chosen: bool = False
    """Whether a layer was chosen for it."""
    about: dict[str, str] = field(default_factory=dict)


def blocks_of(layers: Iterable[str]) -> list[str]:
    """The decoder blocks among layer names, by number."""
    return sorted((name for name in layers if name.isdigit()), key=int)


def comparisons(predictions: pl.DataFrame, about: pl.DataFrame) -> pl.DataFrame:
    """All comparisons of a run, the columns of ``COMPARISONS``; empty where there is nothing to compare."""
    found = arrays.panels(predictions, about)
    rows: list[dict] = []
    for target in dict.fromkeys(sorted((each.target for each in found), key=lambda name: name != "box")):
        of_target = [each for each in found if each.target == target]
        held = next((each for each in of_target if each.data == HELD_OUT), None)
        described = about.filter(pl.col("target") == target)
        series = layer_series(described)
        chosen = [choose(held, one) for one in series]
        for each in of_target:
            asked = [
                question
                for one, pick in zip(series, chosen, strict=True)
                for question in of_series(described, one, pick)
            ]
            asked += two_by_two(described)
            rows += answers(each, asked, 0 if held is None else int(held.watched_n.sum()))
    return pl.DataFrame(rows, schema=COMPARISONS)


def layer_series(about: pl.DataFrame) -> list[pl.DataFrame]:
    """The layer probes by kind and tokens, the series of most layers first."""
    layers = about.filter(pl.col("role") == "layer")
    series = layers.partition_by("kind", "tokens", maintain_order=True)
    return sorted(series, key=lambda one: -one.height)


def choose(held: Panel | None, series: pl.DataFrame) -> dict[str, str]:
    """``mid``, the best block but the first and the last, and ``best`` of all layers, by the watched images."""
    if held is None or not held.watched_n.any():
        return {}
    watched = held.watched_n
    scores = {
        name: float(np.nanmean(held.main_values(name)[:, watched]))
        for name in series["probe"]
        if name in held.values and not np.isnan(held.main_values(name)[:, watched]).all()
    }
    if not scores:
        return {}
    middle = blocks_of(series["layer"])[1:-1]
    mid = [name for name in series.filter(pl.col("layer").is_in(middle))["probe"] if name in scores]
    picked = {"best": max(scores, key=scores.__getitem__)}
    return picked | ({"mid": max(mid, key=scores.__getitem__)} if mid else {})


def difference(text: str, a: str, b: str, family: str, **more: Any) -> Question:
    """The question whether probe ``a`` is better than ``b``."""
    return Question(text, a, b, ((1.0, a), (-1.0, b)), family, **more)


def of_series(about: pl.DataFrame, series: pl.DataFrame, chosen: dict[str, str]) -> Iterator[Question]:
    """What is asked of the layers of one kind and tokens, and of the prompt proxy against them."""
    probes = dict(zip(series["layer"], series["probe"], strict=True))
    layer_of = {probe: layer for layer, probe in probes.items()}
    series_about = {"kind": series["kind"][0], "tokens": series["tokens"][0]}
    blocks = blocks_of(probes)
    last = probes[blocks[-1]] if blocks else None
    ends = [(name, what) for name, what in ((last, "last block"), (probes.get("final"), "after the norm")) if name]
    name = "/".join(series_about.values())
    if mid := chosen.get("mid"):
        common = {"layer": layer_of[mid], "chosen": True, "about": series_about}
        for probe, what in ends:
            yield difference(f"{MID} {what}", mid, probe, f"mid {name}", **common)
        floors = about.filter(pl.col("role") == "floor")["probe"].to_list()
        floors += [probes["embed"]] if "embed" in probes else []
        own = series.row(by_predicate=pl.col("probe") == mid, named=True)
        floors += [twin for wanted in list(MAPS.values())[1:] if (twin := twin_of(about, own, **wanted))]
        for floor in floors:
            yield difference(FLOOR, mid, floor, f"mid {name}", **common)
        yield from by_share(about, own, last, common, name)
    if best := chosen.get("best"):
        for row in about.filter(pl.col("role") == "prompt").iter_rows(named=True):
            common = {"layer": row["layer"], "chosen": True, "about": series_about}
            for probe, what in [(best, "best layer"), *ends]:
                yield difference(f"{PROMPT} {what}", row["probe"], probe, f"prompt {name}", **common)
    for row in series.iter_rows(named=True):
        for text, wanted in MAPS.items():
            if twin := twin_of(about, row, **wanted):
                yield difference(text, row["probe"], twin, "", layer=row["layer"], about=series_about)
        if last and row["probe"] != last:
            yield difference(AGAINST_LAST, row["probe"], last, "", layer=row["layer"], about=series_about)


def twin_of(about: pl.DataFrame, row: dict[str, Any], labels: str = "true", source: str = "ordinary") -> str | None:
    """The probe that reads the same as ``row`` from another source or was taught other labels."""
    same = about.filter(
        pl.all_horizontal(pl.col(name) == row[name] for name in ("kind", "tokens", "layer", "share")),
        pl.col("labels") == labels,
        pl.col("source") == source,
        pl.col("role") != "codelength",
    )
    return same["probe"][0] if same.height else None


def by_share(
    about: pl.DataFrame, mid: dict[str, Any], last: str | None, common: dict[str, Any], name: str
) -> Iterator[Question]:
    """The chosen layer against the last block with the same share of the train split."""
    shares = about.filter((pl.col("role") == "efficiency") & (pl.col("kind") == mid["kind"]))
    shares = shares.filter(pl.col("tokens") == mid["tokens"])
    end = about.filter(pl.col("probe") == last)
    if end.is_empty():
        return
    of_layer = [
        dict(shares.filter(pl.col("layer") == layer).select("share", "probe").iter_rows())
        for layer in (mid["layer"], end["layer"][0])
    ]
    for share in sorted(of_layer[0].keys() & of_layer[1].keys()):
        text = f"{MID} last block at share {share:.4g}"
        yield difference(text, of_layer[0][share], of_layer[1][share], f"share {name}", **common)


def two_by_two(about: pl.DataFrame) -> Iterator[Question]:
    """The effects of tokens, of layer count, and their interaction, of four probes with matched keys and parameters."""
    matched = about.filter(pl.col("role") == "matched")
    cells: dict[tuple[bool, bool], str] = {
        (row["tokens"] != "all", len(row["layers"]) > 1): row["probe"] for row in matched.iter_rows(named=True)
    }
    if len(cells) < 4:
        return
    all_1, all_n, prompt_1, prompt_n = (cells[cell] for cell in ((0, 0), (0, 1), (1, 0), (1, 1)))
    signs = (
        (EFFECTS[0], "prompt tokens", "all tokens", (-0.5, -0.5, 0.5, 0.5)),
        (EFFECTS[1], "several layers", "one layer", (-0.5, 0.5, -0.5, 0.5)),
        (EFFECTS[2], "several − one, prompt tokens", "several − one, all tokens", (1.0, -1.0, -1.0, 1.0)),
    )
    for text, a, b, weights in signs:
        terms = tuple(zip(weights, (all_1, all_n, prompt_1, prompt_n), strict=True))
        yield Question(text, a, b, terms, "2×2", about={"kind": matched["kind"][0], "tokens": "matched"})


def answers(each: Panel, asked: Sequence[Question], watched: int) -> list[dict[str, Any]]:
    """One row per question that this data can answer."""
    rest_n = ~each.watched_n if each.data == HELD_OUT else np.ones(len(each.samples_n), bool)
    known = [question for question in asked if all(probe in each.values for _, probe in question.terms)]
    rows, values = [], []
    for question in known:
        own_sn, value_a, value_b = contrast(each, question.terms, rest_n)
        n = int((~np.isnan(own_sn[0])).sum())
        if n < 2:
            continue
        values.append(own_sn)
        plain = {"value_a": value_a, "value_b": value_b} if len(question.terms) == 2 else {}
        rows.append(
            {"data": each.data, "target": each.target, "question": question.text, "layer": question.layer}
            | {"a": question.a, "b": question.b, "metric": each.main, "n": n, "seeds": len(own_sn)}
            | {"chosen_on": watched if question.chosen else None, "family": question.family}
            | question.about
            | plain
        )
    clusters_n = each.clusters_n[rest_n]
    for seeds in {len(own_sn) for own_sn in values}:
        which = [k for k, own_sn in enumerate(values) if len(own_sn) == seeds]
        values_ksn = np.stack([values[k] for k in which])
        k, s, n = values_ksn.shape
        drawn_rks = statistics.mean_draws(values_ksn.reshape(k * s, n), clusters_n).reshape(-1, k, s)
        low_k, high_k = statistics.ends(statistics.over_seeds(drawn_rks))
        p_k = statistics.sign_flip(values_ksn.mean(1), clusters_n)
        if seeds > 1:
            p_k = np.maximum(p_k, statistics.seeds_p(drawn_rks))
        for row, mean, low, high, p in zip(
            (rows[k] for k in which), statistics.means(values_ksn), low_k, high_k, p_k, strict=True
        ):
            row |= {"difference": float(mean), "low": float(low), "high": float(high), "p": float(p)}
    correct(rows)
    return rows


def contrast(each: Panel, terms: Sequence[tuple[float, str]], rest_n: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The weighted sum (s, n) on the images that all probes know, by the seeds that they share; two plain means.

    A probe of one seed, such as a constant box, stands against every seed of the others.
    """
    several = [set(each.seeds[probe]) for _, probe in terms if len(each.seeds[probe]) > 1]
    shared = sorted(set.intersection(*several)) if several else []
    parts = []
    for _, probe in terms:
        own = each.seeds[probe]
        rows = [own.index(seed) for seed in shared] if len(own) > 1 and shared else [0]
        parts.append(each.main_values(probe)[rows][:, rest_n])
    out_sn = sum(weight * part for (weight, _), part in zip(terms, parts, strict=True))
    out_sn[:, np.isnan(out_sn).any(0)] = np.nan
    known_n = ~np.isnan(out_sn[0])
    first, second = (float(part[:, known_n].mean()) if known_n.any() else np.nan for part in parts[:2])
    return out_sn, first, second


def correct(rows: list[dict[str, Any]]) -> None:
    """Fill in ``p_holm`` within each family, and ``q_bh`` over the layers of each map; takes ``family`` off."""

    def group(row: dict[str, Any]) -> tuple[str, ...]:
        if row["family"]:
            return ("p_holm", row["family"])
        return ("q_bh", row["question"], row["kind"], row["tokens"])

    for (column, *_), members in groupby(sorted(rows, key=group), key=group):
        same = list(members)
        adjust = statistics.holm if column == "p_holm" else statistics.benjamini_hochberg
        for row, value in zip(same, adjust([row["p"] for row in same]), strict=True):
            row[column] = float(value)
    for row in rows:
        del row["family"]
