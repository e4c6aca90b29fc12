"""Predictions as arrays: one value per metric, seed and image of every probe, on the same images in the same order.

Shape suffixes: ``m`` metric, ``s`` seed, ``n`` image.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from probes import boxes
from store.errors import Refusal

HELD_OUT = "held-out"
"""The data of the store's own test split."""

METRICS = {"box": boxes.METRICS, "class": ("accuracy", "bits"), "number": ("r2", "absolute_error")}
"""Metrics by what is predicted. ``bits`` is −log₂ of the true class's probability; ``r2`` is, per image, one less its
squared error over the variance of the true values, so that its mean is the share of variance explained."""
MAIN = {"box": "iou", "class": "accuracy", "number": "r2"}
"""The metric that probes are compared by; more is better."""
SHARES = {"iou_at_0.5", "pointing", "accuracy"}
"""Metrics that are 0 or 1 for an image."""
TRUE_BOX = ("true_x1", "true_y1", "true_x2", "true_y2")
DOWN, ACROSS = ("top", "middle", "bottom"), ("left", "centre", "right")
SMALLEST = 20
"""Images below which a stratum is left out."""


@dataclass(frozen=True, eq=False)
class Panel:
    """All probes of one target on one data set."""

    data: str
    target: str
    metrics: tuple[str, ...]
    main: str
    """The metric that probes are compared by."""
    values: dict[str, np.ndarray]
    """Probe → (m, s, n) float32, NaN at images that the probe has no answer for."""
    seeds: dict[str, tuple[int, ...]]
    """Probe → its seeds, along s."""
    samples_n: np.ndarray
    """Rows of the data's store, rising."""
    clusters_n: np.ndarray
    """Images by number: rows of one number are of one image."""
    watched_n: np.ndarray
    """Rows on which a layer may be chosen."""
    truth: pl.DataFrame
    """``sample`` and, for boxes, the true corners; of what was asked, not of a control task."""

    def main_values(self, probe: str) -> np.ndarray:
        """The main metric of a probe (s, n)."""
        return self.values[probe][self.metrics.index(self.main)]


def joined(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Predictions of probes with different targets as one frame; ``predicted`` and ``true`` become text."""
    texts = [
        frame.with_columns(pl.col(name).cast(pl.String) for name in ("predicted", "true") if name in frame.columns)
        for frame in frames
    ]
    return pl.concat(texts, how="diagonal_relaxed")


def panels(predictions: pl.DataFrame, about: pl.DataFrame, part: str = "test") -> list[Panel]:
    """A panel per target and data set, the held-out data first.

    Raises
    ------
    Refusal
        When a probe has predictions and no row in ``about``, two answers for one image, or one that is not finite.
    """
    rows = predictions.filter(pl.col("part") == part)
    unknown = set(rows["probe"].unique()) - set(about["probe"])
    if unknown:
        raise Refusal(f"predictions of {', '.join(sorted(unknown))}, which `about` does not describe: give a row each")
    twice = rows.filter(pl.struct("probe", "seed", "data", "sample").is_duplicated())
    if twice.height:
        raise Refusal(f"{where(twice)} has sample {twice['sample'][0]} more than once: remove one of its tables")
    rows = rows.join(about.select("probe", "target", "labels"), on="probe", maintain_order="left")
    found = []
    for (target,), of_target in rows.group_by("target", maintain_order=True):
        kind = kind_of(of_target)
        for (data,), of_data in of_target.group_by("data", maintain_order=True):
            found.append(panel(of_data, data, target, kind))
    return sorted(found, key=lambda each: each.data != HELD_OUT)


def where(rows: pl.DataFrame) -> str:
    """The probe, seed and data of the first row, for a message."""
    return f"probe {rows['probe'][0]}, seed {rows['seed'][0]}, on {rows['data'][0]}"


def kind_of(rows: pl.DataFrame) -> str:
    """What these rows predict: box, class or number."""
    for column, kind in (("x1", "box"), ("nll", "class")):
        if column in rows.columns and rows[column].is_not_null().any():
            return kind
    return "number"


def panel(rows: pl.DataFrame, data: str, target: str, kind: str) -> Panel:
    """The rows of one target and data set as arrays."""
    rows = scored(rows, kind).sort("probe", "seed", "sample", maintain_order=True)
    images = rows.unique("sample", keep="first").sort("sample")
    samples_n = images["sample"].to_numpy()
    names = images["image"] if "image" in images.columns else images["sample_id"]
    clusters_n = names.fill_null("").rank("dense").to_numpy().astype(np.int64)
    # A sample without a name is an image of its own.
    clusters_n = np.where(names.is_null().to_numpy(), clusters_n.max(initial=0) + 1 + np.arange(len(names)), clusters_n)
    metrics = METRICS[kind]
    values, seeds = {}, {}
    for (probe,), of_probe in rows.group_by("probe", maintain_order=True):
        seeds[probe] = tuple(sorted(of_probe["seed"].unique().to_list()))
        values[probe] = np.full((len(metrics), len(seeds[probe]), len(samples_n)), np.nan, np.float32)
        s = np.searchsorted(seeds[probe], of_probe["seed"].to_numpy())
        n = np.searchsorted(samples_n, of_probe["sample"].to_numpy())
        values[probe][:, s, n] = of_probe.select(metrics).to_numpy().T
    asked = rows.filter(pl.col("labels") != "control").unique("sample", keep="first").sort("sample")
    truth = asked.select("sample", *(TRUE_BOX if kind == "box" else ()))
    watched_n = images["watched"].fill_null(False).to_numpy()
    return Panel(data, target, metrics, MAIN[kind], values, seeds, samples_n, clusters_n, watched_n, truth)


def scored(rows: pl.DataFrame, kind: str) -> pl.DataFrame:
    """The rows with their metrics as columns."""
    if kind == "box":
        corners = [torch.from_numpy(rows.select(names).to_numpy().astype(np.float64)) for names in BOX_COLUMNS]
        told = boxes.metrics(*corners)
        out = rows.with_columns(pl.Series(name, value.numpy()) for name, value in told.items())
    elif kind == "class":
        right = (pl.col("predicted") == pl.col("true")).cast(pl.Float64)
        out = rows.with_columns(right.alias("accuracy"), (pl.col("nll") / np.log(2)).alias("bits"))
    else:
        numbers = rows.with_columns(pl.col("predicted", "true").cast(pl.Float64))
        error = pl.col("predicted") - pl.col("true")
        # Of the true values of the probe's own rows: a control task has other ones.
        spread = pl.col("true").var(ddof=0).over("probe", "seed").clip(lower_bound=1e-12)
        out = numbers.with_columns((1 - error**2 / spread).alias("r2"), error.abs().alias("absolute_error"))
    finite = pl.all_horizontal(pl.col(name).is_finite().fill_null(False) for name in METRICS[kind])
    lost = out.filter(~finite)
    if lost.height:
        raise Refusal(
            f"{where(lost)} has {lost.height} answers that are no finite numbers: remove its folder under proxies/ and "
            "train it again, with a lower --lr if it diverged"
        )
    return out


BOX_COLUMNS = (("x1", "y1", "x2", "y2"), TRUE_BOX, ("width", "height"))


def strata(
    found: Panel, samples: pl.DataFrame | None, area_cuts: tuple[float, float] | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and rows (n,), bool, of every stratum of at least 20 images: box area, place, objects, kind, task.

    Parameters
    ----------
    found : Panel
        Whose images are divided.
    samples : DataFrame, optional
        ``store.samples`` of this data; ``Panel.samples_n`` are its rows.
    area_cuts : pair of float, optional
        Shares of the picture that part small from medium from large boxes; see ``area_cuts``.
    """
    facts = pl.DataFrame({"sample": found.samples_n}).join(
        box_facts(found, samples), on="sample", how="left", maintain_order="left"
    )
    labels: dict[str, tuple[pl.Series, list[str]]] = {}
    if area_cuts is not None and "area" in facts.columns:
        low, high = area_cuts
        names = (f"small (< {low:.2%})", f"medium ({low:.2%} to {high:.2%})", f"large (≥ {high:.2%})")
        size = pl.when(pl.col("area") < low).then(pl.lit(names[0])).when(pl.col("area") < high).then(pl.lit(names[1]))
        size = size.when(pl.col("area").is_not_null()).then(pl.lit(names[2]))
        labels["area"] = facts.select(size.alias("area"))["area"], list(names)
        labels["position"] = facts["position"], [f"{down} {across}" for down in DOWN for across in ACROSS]
    for column, name in (("n_objects", "objects"), ("object_kind", "kind"), ("task", "task")):
        if samples is not None and column in samples.columns:
            series = samples[column].cast(pl.String)[found.samples_n]
            labels[name] = series, natural_order(series.drop_nulls().unique())
    for name, (series, order) in labels.items():
        for label in order:
            inside_n = (series == label).fill_null(False).to_numpy()
            if len(np.unique(found.clusters_n[inside_n])) >= SMALLEST:
                yield f"{name}: {label}", inside_n


def natural_order(labels: Iterable[str]) -> list[str]:
    """Labels with numbers in them by their size: 9 before 10."""
    return sorted(labels, key=lambda label: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", label)])


def box_facts(found: Panel, samples: pl.DataFrame | None) -> pl.DataFrame:
    """``sample``, ``area`` (share of the picture) and ``position`` (of nine regions) of each true box that is known."""
    if "true_x1" in found.truth.columns:
        table = found.truth.select("sample", *(pl.col(name).alias(name[5:]) for name in TRUE_BOX))
    elif samples is not None and {"x1", "y1", "x2", "y2", "width", "height"} <= set(samples.columns):
        unit = [pl.col(name) / pl.col("width" if name[0] == "x" else "height") for name in ("x1", "y1", "x2", "y2")]
        table = samples.with_row_index("sample").select(pl.col("sample").cast(pl.Int64), *unit)
    else:
        return pl.DataFrame(schema={"sample": pl.Int64})
    area = (pl.col("x2") - pl.col("x1")) * (pl.col("y2") - pl.col("y1"))
    down = third((pl.col("y1") + pl.col("y2")) / 2, DOWN)
    across = third((pl.col("x1") + pl.col("x2")) / 2, ACROSS)
    return table.select("sample", area.alias("area"), (down + " " + across).alias("position"))


def third(value: pl.Expr, names: tuple[str, str, str]) -> pl.Expr:
    """The name of the third of [0, 1] that a value is in."""
    low, middle, high = map(pl.lit, names)
    return pl.when(value < 1 / 3).then(low).when(value < 2 / 3).then(middle).when(value.is_not_null()).then(high)


def area_cuts(found: Panel, samples: Mapping[str, pl.DataFrame]) -> tuple[float, float] | None:
    """The tertiles of the true boxes' area on this data, None where no box is known."""
    facts = box_facts(found, samples.get(found.data))
    facts = facts.filter(pl.col("sample").is_in(found.samples_n.tolist()))
    if "area" not in facts.columns or facts["area"].drop_nulls().is_empty():
        return None
    low, high = np.quantile(facts["area"].drop_nulls().to_numpy(), [1 / 3, 2 / 3])
    return float(low), float(high)
