"""Figure 8: what a proxy loses without what it attends to, beside what it loses without as much elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.causes.masks import CONTROLS, CROSSED, KEPT, LAYER, NOTHING, TOKEN, WORD
from analysis.causes.retrained import AGAINST, FULL, TOKENS, VOTED

NAME = "figure-8-causes"
MASKED = {
    LAYER: "layer that the heads\nvote for",
    CROSSED: "top token, at that layer",
    TOKEN: "top token, all layers",
    WORD: "top instruction word,\nall layers",
}
TRAINED = {VOTED: "most voted layer", TOKENS: "top token"}
CHOSEN, RANDOM = "where the attention is", "elsewhere, at random"
Row = tuple[str, Mapping[str, Any], Mapping[str, Any]]


def draw(tables: Mapping[str, pl.DataFrame], title: str, note: str, out: Path, making: Mapping[str, Any]) -> list[Path]:
    """Draw ``causes.masking``'s tables, and ``retrained`` where there is one; the files, PNG first."""
    values = {row["masked"]: row for row in tables["values"].filter(metric="iou").iter_rows(named=True)}
    layers = tables["layers"].filter(metric="iou")
    with style.styled():
        figure = Figure(figsize=(12.5, 5.6))
        grid = figure.add_gridspec(
            2, 3, width_ratios=(1.25, 0.5, 1.15), height_ratios=(3.2, 1), left=0.155, right=0.985, top=0.79, bottom=0.11
        )
        grid.update(wspace=0.36, hspace=0.12)
        draw_costs(figure.add_subplot(grid[:, 0]), cost_rows(values, tables.get("retrained")))
        draw_alone(figure.add_subplot(grid[:, 1]), values)
        upper = figure.add_subplot(grid[0, 2])
        draw_layers(upper, figure.add_subplot(grid[1, 2], sharex=upper), layers)
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
        figure.text(0.02, 0.925, note, fontsize=9, color=style.QUIET, va="top")
        return style.save(figure, out, NAME, pl.concat(drawn(tables), how="diagonal_relaxed"), making)


def drawn(tables: Mapping[str, pl.DataFrame]) -> list[pl.DataFrame]:
    """The numbers of the figure."""
    names = [name for name in ("values", "layers", "retrained") if name in tables]
    return [tables[name].filter(metric="iou").with_columns(table=pl.lit(name)) for name in names]


def cost_rows(values: Mapping[str, Mapping], retrained: pl.DataFrame | None) -> list[tuple[str, list[Row]]]:
    """Groups of rows: what was masked or left out, its change of mean IoU, and its control's."""
    groups = [("masked in the trained proxy", [(MASKED[k], values[k], values[CONTROLS[k]]) for k in MASKED])]
    if retrained is not None:
        changes = {
            row["treatment"]: row | {"difference_low": row["low"], "difference_high": row["high"]}
            for row in retrained.filter(against=FULL).iter_rows(named=True)
        }
        there = [k for k in TRAINED if k in changes and AGAINST[k] in changes]
        groups.append(("trained again without", [(TRAINED[k], changes[k], changes[AGAINST[k]]) for k in there]))
    return [(head, rows) for head, rows in groups if rows]


def draw_costs(axes: Axes, groups: Sequence[tuple[str, list[Row]]]) -> None:
    """Paired dots: the change of mean IoU where attention chose, and beside it where chance did."""
    ticks, labels, height = [], [], 0.0
    for head, rows in groups:
        axes.text(
            -0.02, height + 0.1, head, transform=axes.get_yaxis_transform(), ha="right", style="italic", fontsize=9
        )
        for label, chosen, control in rows:
            height += 1
            point(axes, chosen, height - 0.15, True)
            point(axes, control, height + 0.15, False)
            ticks.append(height)
            labels.append(label)
        height += 1
    axes.axvline(0, color=style.QUIET, lw=0.8, zorder=0)
    axes.set_ylim(height - 0.35, -0.45)
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("change of mean IoU")
    axes.set_title("Needed?")
    handles = [
        axes.plot([], [], "o", color=style.ACCENT, ms=6, label=CHOSEN)[0],
        axes.plot([], [], "o", color=style.QUIET, mfc="white", mew=1.2, ms=6, label=RANDOM)[0],
    ]
    place = {"loc": "lower right", "bbox_to_anchor": (1.09, 0.985)}
    axes.legend(handles=handles, ncols=2, fontsize=8, handletextpad=0.1, columnspacing=1.2, **place)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def point(axes: Axes, row: Mapping[str, Any], height: float, chosen: bool) -> None:
    """One change with its interval; nothing where it is not known."""
    if row["difference"] is None:
        return
    reach = [[row["difference"] - row["difference_low"]], [row["difference_high"] - row["difference"]]]
    look = {"color": style.ACCENT} if chosen else {"color": style.QUIET, "mfc": "white", "mew": 1.2}
    axes.errorbar([row["difference"]], [height], xerr=reach, fmt="o", ms=6, elinewidth=1.4, zorder=3, **look)


def draw_alone(axes: Axes, values: Mapping[str, Mapping]) -> None:
    """Mean IoU with nothing but one layer left: l*, and another."""
    for place, (name, chosen) in enumerate(((KEPT, True), (CONTROLS[KEPT], False))):
        row = values[name]
        if row["value"] is None:
            continue
        reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        look = {"color": style.ACCENT} if chosen else {"color": style.QUIET, "mfc": "white", "mew": 1.2}
        axes.errorbar([place], [row["value"]], yerr=reach, fmt="o", ms=6, elinewidth=1.4, zorder=3, **look)
    top = values[NOTHING]["value"] or 1
    axes.set_ylim(0, top * 1.12)
    for name, label in ((NOTHING, "all layers"), ("floor", "mean box")):
        if values[name]["value"] is not None:
            axes.axhline(values[name]["value"], color=style.QUIET, lw=0.8, ls=(0, (4, 2)), zorder=0)
            axes.text(1.5, values[name]["value"] + top * 0.012, label, fontsize=8, color=style.QUIET, ha="right")
    axes.set_xlim(-0.5, 1.5)
    axes.set_xticks([0, 1], ["voted\nlayer", "another\nlayer"], fontsize=9)
    axes.set_xlabel("the only layer left")
    axes.set_ylabel("mean IoU")
    axes.set_title("Enough?")


def draw_layers(upper: Axes, lower: Axes, layers: pl.DataFrame) -> None:
    """The change of mean IoU without each fixed layer, and below it how many samples vote for the layer."""
    names = layers["layer"].to_list()
    places = np.arange(len(names))
    known = layers.with_columns(place=places).filter(pl.col("difference").is_not_null())
    reach = known.select(
        pl.col("difference") - pl.col("difference_low"), pl.col("difference_high") - pl.col("difference")
    ).to_numpy()
    upper.axhline(0, color=style.QUIET, lw=0.8, zorder=0)
    upper.errorbar(
        known["place"], known["difference"], yerr=reach.T, fmt="o-", color=style.INK, ms=4.5, lw=0.9, elinewidth=1.2
    )
    upper.set_ylabel("change of mean IoU")
    upper.set_title("The same layer masked for all images")
    upper.tick_params(axis="x", labelbottom=False)
    shades = matplotlib.colormaps["cividis"](0.35)
    lower.bar(places, layers["votes"], color=shades, width=0.7)
    lower.set_ylabel("votes")
    lower.set_ylim(0, max(0.1, layers["votes"].max()) * 1.15)
    lower.set_xlabel("layer")
    every = -(-len(names) // 16)
    lower.set_xticks(places[::every], names[::every])
