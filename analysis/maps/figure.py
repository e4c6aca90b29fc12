"""Figure 4: maps of the dominant tokens at l* over the pictures, hits and misses, and pointing along the blocks."""

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from analysis import style
from analysis.finding import Drawn
from analysis.maps.gallery import extent_of
from analysis.maps.pictures import SamplePictures, blank, lay_over
from analysis.maps.scores import CORNERS, LAST, OBJECT, RANDOM, ROLLOUT, STAR, Maps
from analysis.maps.tables import ALPHA, CHANCE

NAME = "figure-4-maps"
ACROSS = 4
"""Examples beside each other."""
LEVELS = {
    STAR: ("dominant words, l*", "-"),
    RANDOM: ("random words, l*", (0, (4, 1.5))),
    ROLLOUT: ("rollout", "-."),
    OBJECT: ("any object by lot", (0, (1, 3))),
    CHANCE: ("uniform map", ":"),
}
"""Conditions that stand as lines across the blocks: label and dashes."""
TALLEST = 4.6
"""Height in inches of the left panel, however many examples stand beside it."""


def draw(
    found: Maps,
    tables: Mapping[str, pl.DataFrame],
    pictures: SamplePictures | None,
    out: Path,
    making: Mapping[str, Any],
    *,
    examples: int = 12,
    seed: int = 0,
) -> tuple[list[Path], Drawn]:
    """Draw the figure.

    Parameters
    ----------
    found
        Scored maps.
    tables
        ``comparisons`` and ``layers`` of the finding.
    pictures
        Where pictures are taken from; null draws maps on plain ground.
    out
        Folder.
    making
        How it was made, for its JSON.
    examples, seed
        How many examples, and the seed that draws them, see `chosen`.

    Returns
    -------
    (list of Path, Drawn)
        PNG, SVG, CSV and JSON; the caption.
    """
    beside, layers = tables["comparisons"], tables["layers"]
    shown = chosen(found, examples, seed)
    down = max(1, math.ceil(len(shown) / ACROSS))
    said = wrap(title(beside), 108)
    head = 0.95 + 0.2 * len(said)  # inches above the panels
    height = head + 0.5 + 1.8 * max(down, 2)
    with style.styled():
        figure = Figure(figsize=(12.5, height))
        whole = {"top": 1 - head / height, "bottom": 0.55 / height}
        lowest = max(whole["bottom"], whole["top"] - TALLEST / height)
        grid = figure.add_gridspec(1, 1, left=0.065, right=0.285, top=whole["top"], bottom=lowest)
        draw_layers(figure.add_subplot(grid[0]), found, layers, beside)
        tiles = figure.add_gridspec(down, ACROSS, left=0.415, right=0.99, hspace=0.36, wspace=0.06, **whole)
        for place, n in enumerate(shown):
            draw_example(figure.add_subplot(tiles[place // ACROSS, place % ACROSS]), found, n, pictures)
        look = {"ha": "left", "va": "top"}
        figure.suptitle("\n".join(said), x=0.065, y=1 - 0.12 / height, fontsize=12, fontweight="bold", **look)
        note = caption(found, len(shown), pictures is not None)
        figure.text(0.065, 1 - (0.2 + 0.2 * len(said)) / height, note, fontsize=9, color=style.QUIET, **look)
        ids = found.samples["sample_id"][shown].to_list()
        data = pl.concat([layers, beside.drop("meaning")], how="diagonal_relaxed")
        about = {**making, "examples": ids, "examples_seed": seed, "left_out": dict(found.left_out)}
        return style.save(figure, out, NAME, data, about), Drawn(NAME, note.replace("\n", " "))


def chosen(found: Maps, examples: int, seed: int) -> list[int]:
    """Places among the scored samples of the examples, hits first; drawn by the seed, by nobody's hand.

    As many hits as their share among all samples gives, but at least two of each kind where there are two.
    """
    pointing_n = found.scores[STAR][0]
    hits, misses = np.flatnonzero(pointing_n >= 0.5), np.flatnonzero(pointing_n < 0.5)
    examples = min(examples, len(hits) + len(misses))
    share = len(hits) / max(1, len(hits) + len(misses))
    wanted = round(examples * share)
    wanted = max(min(wanted, examples - min(2, len(misses))), min(2, len(hits)))
    wanted = min(max(wanted, examples - len(misses)), len(hits), examples)
    generator = np.random.default_rng([seed, 3])
    picked = (generator.permutation(hits)[:wanted], generator.permutation(misses)[: examples - wanted])
    return np.concatenate(picked).tolist()


def title(beside: pl.DataFrame) -> str:
    """The finding in one line, from the numbers: what l* is above, like and below after Holm."""
    rows = {row["condition"]: row for row in beside.filter(pl.col("metric") == "pointing").to_dicts()}
    sides: dict[str, list[str]] = {"above": [], "not told apart from": [], "below": []}
    for name, called in TITLED.items():
        row = rows.get(name)
        if row is None or row["p_holm"] is None:
            continue
        apart = "above" if row["difference"] > 0 else "below"
        sides[apart if row["p_holm"] < ALPHA else "not told apart from"].append(f"{called} ({row['value']:.0%})")
    told = "; ".join(f"{side} {', '.join(names)}" for side, names in sides.items() if names)
    return f"{rows[STAR]['value']:.0%} of maps at l* peak in the true box{': ' * bool(told)}{told}"


TITLED = {CHANCE: "chance", OBJECT: "any object by lot", RANDOM: "random words", LAST: "the last block"}
"""What the title compares l* with."""


def caption(found: Maps, examples: int, pictured: bool) -> str:
    """What the reader must know: n, bands, marks, and how the examples came here."""
    hits = int((found.scores[STAR][0] >= 0.5).sum())
    count = found.samples.height
    said = (
        f"Left: the rows of the same words at every block, {count:,} pictures; the band: 95 % bootstrap intervals "
        f"over pictures. Right: {examples} examples drawn by a seed among {hits:,} hits and {count - hits:,} misses,"
        " in that proportion but at least two of each; brighter is more attention, box: true, cross: strongest token, "
        "quoted: dominant tokens."
    )
    return "\n".join(wrap(said if pictured else f"{said} Plain ground: no pictures at hand.", 165))


def draw_layers(axes: Axes, found: Maps, layers: pl.DataFrame, beside: pl.DataFrame) -> None:
    """Pointing of the same tokens at every block with its band, and the levels to compare it with."""
    rows = layers.filter(pl.col("metric") == "pointing", pl.col("value").is_not_null())
    places = [found.layers.index(layer) for layer in rows["layer"]]
    axes.fill_between(places, rows["low"].to_numpy(), rows["high"].to_numpy(), color=style.INK, alpha=0.15, lw=0)
    axes.plot(places, rows["value"].to_numpy(), color=style.INK, marker="o", ms=4, lw=1.4)
    ends = []
    known = beside.filter(pl.col("metric") == "pointing", pl.col("value").is_not_null()).to_dicts()
    levels = {row["condition"]: row["value"] for row in known}
    for name, (label, dashes) in LEVELS.items():
        if name in levels:
            colour = style.ACCENT if name == STAR else style.QUIET
            axes.axhline(levels[name], color=colour, ls=dashes, lw=1.6 if name == STAR else 1, zorder=1)
            ends.append((levels[name], f"{label} {levels[name]:.1%}", colour))
    last = max(1, len(found.layers) - 1)
    axes.set_xlim(-0.3, last + 0.3)
    high = max([value for value in levels.values()] + rows["high"].to_list() + [0.01])
    axes.set_ylim(0, high * 1.08)
    every = max(1, math.ceil(len(found.layers) / 14))
    ticks = range(0, len(found.layers), every)
    axes.set_xticks(ticks, [found.layers[tick] for tick in ticks], fontsize=8.5)
    axes.set_xlabel("block whose rows are read")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_ylabel("maps that peak in the true box")
    axes.set_title("Pointing game")
    style.label_ends(axes, last + 0.3, ends)


def draw_example(axes: Axes, found: Maps, n: int, pictures: SamplePictures | None) -> None:
    """One picture under its map, with the true box, the strongest token, and the tokens that looked."""
    row, extent = found.samples.row(n, named=True), extent_of(found, n)
    map_t, pixels_t4 = found.map_nt[n], found.pixels_nt4[n]
    picture = pictures.picture(row["sample"]) if pictures is not None else None
    laid = lay_over(picture or blank(*extent), map_t, pixels_t4, extent)
    axes.imshow(np.asarray(laid), extent=(0, extent[0], extent[1], 0), interpolation="nearest")
    x1, y1, x2, y2 = (row[name] for name in CORNERS)
    for colour, width in (("black", 2.6), ("white", 1.3)):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width))
    if not np.isnan(map_t).all():
        left, top, right, bottom = pixels_t4[np.nanargmax(map_t)]
        for colour, width in (("white", 3.4), ("black", 1.6)):
            axes.plot([(left + right) / 2], [(top + bottom) / 2], "x", color=colour, ms=6, mew=width)
    axes.set_xlim(0, extent[0])
    axes.set_ylim(extent[1], 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_anchor("S")
    hit = "hit" if found.scores[STAR][0, n] >= 0.5 else "miss"
    words = shorten(" · ".join(row["words"]), 28, placeholder=" …")
    axes.set_title(f"{hit}, l* {row['l_star']}\n“{words}”", fontsize=7.5, fontweight="normal", pad=3, loc="center")
