"""Figures of an evaluation: success against damage outside the box; success by task and by number of objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes

from analysis import style
from analysis.finding import Drawn
from edit.methods import METHODS, REFERENCE, STANDALONE, SUCCESS
from edit.scores.closing import TRUE
from probes import statistics

UNEDITED = "unedited"
MARKERS = dict(zip(METHODS, "os^vD*Xp", strict=True))
GLYPHS = dict(zip(METHODS, "●■▲▼◆★✖⬟", strict=True))
"""The markers as text."""
L2 = "L2"
GROUPS = 3
"""Groups of scenes by their number of objects, of about equal size."""


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a method: ours in the one colour that stands out, the true box in ink."""
    others = [name for name in METHODS if name not in (REFERENCE, TRUE)]  # the last, and palest, is no method
    colours = style.layer_colours(others) | {REFERENCE: style.ACCENT, TRUE: style.INK, UNEDITED: style.QUIET}
    return {"color": colours.get(method, style.QUIET), "marker": MARKERS.get(method, "h")}


def damage_metric(metrics: Sequence[str]) -> str | None:
    """What is drawn as damage: LPIPS filled, or L2 where LPIPS is of a random trunk; null if there is neither."""
    filled = [name for name in metrics if name.startswith("LPIPS") and name.endswith("filled") and "random" not in name]
    return next((name for name in (*filled, L2) if name in metrics), None)


def scatter(summary: pl.DataFrame, damage: str, grades: Sequence[str], out: Path, making: dict[str, Any]) -> Drawn:
    """Success, and each judge's grade, against damage: a marker a method, 95 % crosses; files ``success-damage``."""
    wanted = [SUCCESS, *(name for name in grades if name in summary["metric"])]
    points = summary.filter(pl.col("metric").is_in([damage, *wanted]), pl.col("mean").is_not_null())
    with style.styled():
        figure, panels = plt.subplots(1, len(wanted), figsize=(5.8 * len(wanted) + 0.6, 4.5), squeeze=False)
        figure.subplots_adjust(left=0.62 / figure.get_figwidth(), right=0.965, bottom=0.13, top=0.92, wspace=0.2)
        for axes, metric in zip(panels[0], wanted, strict=True):
            _panel(axes, points, damage, metric)
        style.save(figure, out, "success-damage", points, making)
        plt.close(figure)
    n = points.filter(pl.col("metric").is_in(wanted))["n"].max()
    return Drawn(
        "success-damage",
        f"What each method gets right ({', '.join(wanted)}) against what it damages outside the true box ({damage}). "
        f"Crosses are 95 % intervals over scenes, n up to {n}. Up and left is better.",
    )


def _panel(axes: Axes, points: pl.DataFrame, damage: str, metric: str) -> None:
    across, up = (
        {row["method"]: row for row in points.filter(metric=name).iter_rows(named=True)} for name in (damage, metric)
    )
    both = [name for name in across if name in up]
    labels, bars = [], []
    for name in both:
        (x, *ends_x), (y, *ends_y) = ([one[name][key] for key in ("mean", "low", "high")] for one in (across, up))
        colour = look(name)["color"]
        for ends, line, flat in ((ends_x, axes.hlines, y), (ends_y, axes.vlines, x)):
            if None not in ends:
                line(flat, *ends, color=colour, lw=1.1, alpha=0.75, zorder=2)
        axes.plot(x, y, **look(name), ms=10 if name == TRUE else 7.5, mec="white", mew=0.8, ls="", zorder=3)
        labels.append((x, y, name))
        bars += [(ends_x[0], y, ends_x[1], y)] if None not in ends_x else []
        bars += [(x, ends_y[0], x, ends_y[1])] if None not in ends_y else []
    axes.margins(0.12)
    if metric == SUCCESS:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))
    axes.set_xlim(left=max(axes.get_xlim()[0], -0.04 * axes.get_xlim()[1]))
    axes.set_xlabel(f"{damage}, outside the true box (less is better)")
    share = ", share of scenes" if metric == SUCCESS else ""
    axes.set_ylabel(f"{metric}{share} (more is better)")
    axes.set_title("↖ better", loc="right", fontsize=9, fontweight="normal", color=style.QUIET)
    axes.set_title(f"{metric[0].upper()}{metric[1:]} against damage")
    labels.sort(key=lambda one: one[2] != REFERENCE)
    style.label_points(axes, labels, bars)


def strata(scores: pl.DataFrame, scenes: pl.DataFrame) -> pl.DataFrame:
    """Success by task and by number of objects: columns by, group, method, mean, low, high (95 %, Wilson), n."""
    facts = pl.concat(
        [
            scenes.select("sample", pl.lit("task").alias("by"), pl.col("task").alias("group")),
            scenes.select("sample", pl.lit("objects").alias("by"), by_objects(scenes["objects"])),
        ]
    )
    known = scores.filter(pl.col("metric") == SUCCESS, pl.col("value").is_not_null(), pl.col("value").is_not_nan())
    counted = (
        facts.join(known, on="sample", maintain_order="left_right")
        .group_by("by", "group", "method", maintain_order=True)
        .agg(pl.col("value").mean().alias("mean"), pl.len().cast(pl.Int64).alias("n"))
    )
    ends = [statistics.wilson(mean, n) for mean, n in counted.select("mean", "n").iter_rows()]
    order = [pl.col("by") != "task", "group"]
    return counted.select(
        "by",
        "group",
        "method",
        "mean",
        pl.Series("low", [low for low, _ in ends], pl.Float64),
        pl.Series("high", [high for _, high in ends], pl.Float64),
        "n",
    ).sort(order, maintain_order=True)  # fmt: skip


def by_objects(counts: pl.Series) -> pl.Series:
    """Each scene's group of numbers of objects, such as 4–5."""
    bounds = np.unique(np.quantile(counts.to_numpy(), np.arange(1, GROUPS) / GROUPS, method="higher"))
    groups = np.digitize(counts.to_numpy(), bounds, right=True)
    names = {}
    for group in np.unique(groups):
        of = counts.filter(pl.Series(groups == group))
        names[group] = str(of.min()) if of.min() == of.max() else f"{of.min()}–{of.max()}"
    return pl.Series("group", [names[group] for group in groups], pl.String)


def strata_figure(found: pl.DataFrame, out: Path, making: dict[str, Any]) -> Drawn:
    """Success by task and by number of objects, with 95 % intervals; files ``success-by-scene``."""
    methods = [name for name in found["method"].unique(maintain_order=True) if name != STANDALONE]
    with style.styled():
        figure, panels = plt.subplots(1, 2, figsize=(8.8, 4.1), sharey=True)
        figure.subplots_adjust(left=0.075, right=0.86, bottom=0.18, top=0.91, wspace=0.08)
        for axes, by, title in zip(panels, ("task", "objects"), ("By task", "By number of objects"), strict=True):
            _strata_panel(axes, found.filter(by=by), methods, joined=by == "objects")
            axes.set_title(title)
        panels[0].set_ylabel("success, share of scenes")
        last = found.filter(by="objects")["group"].unique(maintain_order=True)
        at = {row["method"]: row["mean"] for row in found.filter(by="objects", group=last[-1]).iter_rows(named=True)}
        low, high = panels[1].get_xlim()
        ends = [(at[name], f"{GLYPHS.get(name, '⬢')} {name}", look(name)["color"]) for name in methods if name in at]
        style.label_ends(panels[1], high, ends)
        panels[1].set_xlim(low, high)
        style.save(figure, out, "success-by-scene", found, making)
        plt.close(figure)
    return Drawn(
        "success-by-scene",
        "Success by task and by number of objects in the scene, a marker a method; bars are 95 % intervals (Wilson), "
        "n is the number of scenes in a group.",
    )


def _strata_panel(axes: Axes, found: pl.DataFrame, methods: Sequence[str], joined: bool) -> None:
    groups = found["group"].unique(maintain_order=True).to_list()
    for place, method in enumerate(methods):
        rows = found.filter(method=method)
        offset = 0.62 * ((place + 0.5) / len(methods) - 0.5)
        at = np.array([groups.index(group) for group in rows["group"]]) + offset
        mean, low, high = (rows[name].to_numpy() for name in ("mean", "low", "high"))
        axes.vlines(at, low, high, color=look(method)["color"], lw=1.2, alpha=0.7)
        axes.plot(
            at,
            mean,
            **look(method),
            ls=":" if joined else "",
            lw=0.8,
            ms=8 if method == TRUE else 6,
            mec="white",
            mew=0.7,
        )
    counts = found.group_by("group").agg(pl.col("n").max())
    n = dict(counts.iter_rows())
    axes.set_xticks(range(len(groups)), [f"{group.replace('_', chr(10))}\nn = {n[group]}" for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(axis="x", length=0)
