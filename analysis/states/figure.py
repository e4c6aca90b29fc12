"""Figure 7: norms, similarity of layers, places and the logit lens, one figure a question; each returns its caption.

Shape suffixes: ``l`` layer.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.states.similarity import NAMES, VIEWS, steps

NORMS, CKA, POSITION, LENS = (f"figure-7-states-{name}" for name in ("norms", "cka", "position", "lens"))

DARK, LIGHT = matplotlib.colormaps["cividis"]([0.0, 0.8])
KIND_LOOKS = {
    "image": (DARK, "o", "-"),
    "instruction": (style.ACCENT, "s", (0, (4, 1.5))),
    "template": (LIGHT, "^", (0, (1, 1))),
}
"""Kind of token → colour, marker and dashes."""
RANDOM = "random weights"
WORDS, ROWS = 10, 14
"""Words and layers of an instruction that a readable table has room for."""


def norms(table: pl.DataFrame, out: Path, making: Mapping[str, Any]) -> str:
    """Mean norm, and the share of the squared norm in four dimensions, by layer and kind of token."""
    own, layers = table.filter(source="store"), in_order(table)
    with style.styled():
        figure, (left, right) = panels(2, title_of_norms(own, layers))
        for axes, metric in ((left, "mean"), (right, "top4")):
            ends, others = [], []
            for kind, (colour, marker, dashes) in KIND_LOOKS.items():
                rows = own.filter(metric=metric, kind=kind)
                if rows.height:
                    line(axes, rows, layers, colour, marker, dashes)
                    ends.append((rows["value"][-1], kind, colour))
                drawn = table.filter(source="random-weights", metric=metric, kind=kind)
                if drawn.height:
                    line(axes, drawn, layers, style.QUIET, marker, dashes, 0.7)
                    others.append(drawn["value"][-1])
            if others:
                ends.append((float(np.median(others)), RANDOM, style.QUIET))
            if metric == "mean":
                axes.set_yscale("log")
                label_log_ends(axes, len(layers) - 0.7, ends)
            else:
                axes.set_ylim(0, min(1, 1.15 * max(1e-3, own.filter(metric=metric)["high"].max())))
                style.label_ends(axes, len(layers) - 0.7, ends, 7.5)
            layer_axis(axes, layers)
        left.set_ylabel("mean L2 norm of a state (log)")
        left.set_title("How long states are")
        right.set_ylabel("share of the squared norm")
        right.set_title("How much of it four dimensions hold")
        n = own.row(0, named=True)
        said = f"n = {n['images']:,} images. Bands are 95 % bootstrap intervals over images."
        note(figure, said)
        style.save(figure, out, NORMS, table, making)
    return f"Left: mean L2 norm by layer and kind of token. Right: share of the squared norm in four dimensions. {said}"


def title_of_norms(own: pl.DataFrame, layers: Sequence[str]) -> str:
    """The growth over the blocks, and whether few dimensions carry it."""
    kind = "instruction" if "instruction" in own["kind"] else own["kind"][0]
    blocks = [layer for layer in layers if layer != "final"] or layers
    values = own.filter(pl.col("layer").is_in(blocks), metric="mean", kind=kind)["value"]
    top = own.filter(metric="top4").sort("value").row(-1, named=True)
    grown = f"{kind.capitalize()} states grow {values[-1] / values[0]:.3g} × from {blocks[0]} to {named(blocks[-1])}"
    return f"{grown}; four dimensions hold up to {top['value']:.0%} ({top['kind']}, {named(top['layer'])})"


def cka(pairs: pl.DataFrame, out: Path, making: Mapping[str, Any]) -> str:
    """A map of all pairs of layers for each view."""
    own = pairs.filter(source="store", labels="true")
    layers = own["a"].unique(maintain_order=True).to_list()
    with style.styled():
        figure = Figure(figsize=(11.5, 4.9))
        figure.subplots_adjust(left=0.06, right=0.9, top=0.72, bottom=0.13, wspace=0.22)
        maps = figure.subplots(1, len(VIEWS))
        for axes, view in zip(maps, VIEWS, strict=True):
            values_ll = own.filter(view=view)["value"].to_numpy().astype(float).reshape(len(layers), len(layers))
            axes.set_facecolor("white")
            shown = axes.pcolormesh(values_ll, cmap="cividis", vmin=0, vmax=1, rasterized=True)
            axes.set_aspect("equal")
            axes.invert_yaxis()
            thin = ticks(layers, 15)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks([place + 0.5 for place in thin], [layers[place] for place in thin])
            axes.tick_params(axis="x", rotation=90, labelsize=7.5)
            axes.tick_params(axis="y", labelsize=7.5)
            axes.set_title(NAMES[view].capitalize(), fontsize=9.5)
            if np.isnan(values_ll).any():
                axes.text(
                    1, 1.02, "white: no variation", transform=axes.transAxes, ha="right", fontsize=7, color=style.QUIET
                )
        bar = figure.colorbar(shown, cax=figure.add_axes((0.92, 0.2, 0.012, 0.48)))
        bar.set_label("linear CKA", fontsize=8.5)
        bar.outline.set_visible(False)
        heading(figure, title_of_cka(own))
        said = note_of_cka(pairs)
        note(figure, said)
        style.save(figure, out, CKA, pairs, making)
    return f"Linear CKA (unbiased) of every two layers, one row an image. {said}"


def title_of_cka(own: pl.DataFrame) -> str:
    """Where the instruction's states turn most."""
    found = {view: steps(own.filter(view=view)).drop_nulls("value").sort("value") for view in VIEWS[:2]}
    said = [
        f"{view} states turn most from block {rows['a'][0]} to {rows['b'][0]} (CKA {rows['value'][0]:.2f})"
        for view, rows in found.items()
        if rows.height
    ]
    return f"{said[0][0].upper()}{'; '.join(said)[1:]}" if said else "Which layers are alike: linear CKA"


def note_of_cka(pairs: pl.DataFrame) -> str:
    """The sample, the widest interval, and the floors."""
    own = pairs.filter(source="store", labels="true").drop_nulls("low")
    reach = (own["high"] - own["low"]).max() if own.height else None
    shuffled = pairs.filter(labels="shuffled", source="store")["value"].abs().max()
    said = f"n = {pairs['images'].max():,} images"
    if reach is not None:
        said += f"; 95 % intervals are at most {reach:.2f} wide (jackknife over minibatches)"
    if shuffled is not None:
        said += f". Images shuffled: at most {shuffled:.2f} either way"
    drawn = pairs.filter(source="random-weights", labels="true", view="instruction").drop_nulls("value")
    if drawn.height:
        lowest = drawn.filter(pl.col("a") != "final", pl.col("b") != "final").sort("value").row(0, named=True)
        said += f". Random weights, instruction: the least alike pair has {lowest['value']:.2f}"
    return f"{said}."


def places(table: pl.DataFrame, out: Path, making: Mapping[str, Any]) -> str:
    """Accuracy of the cell, by layer: of image tokens, and of the edited object from the instruction."""
    layers = in_order(table)
    titles = {"token": "Image tokens: the cell of their own patch", "object": "Instruction: the edited object's cell"}
    asked = [question for question in titles if table.filter(question=question).height]
    with style.styled():
        figure, all_axes = panels(len(asked), title_of_places(table, asked))
        for axes, question in zip(all_axes, asked, strict=True):
            rows = table.filter(question=question, metric="cell", source="store")
            series = {
                "true cells": (rows.filter(labels="true"), style.ACCENT, "o", "-"),
                "shuffled cells": (rows.filter(labels="shuffled"), style.QUIET, "x", (0, (1, 1))),
            }
            drawn = table.filter(question=question, metric="cell", source="random-weights", labels="true")
            if drawn.height:
                series[RANDOM] = (drawn, style.QUIET, "^", (0, (4, 1.5)))
            ends = []
            for label, (one, colour, marker, dashes) in series.items():
                line(axes, one, layers, colour, marker, dashes)
                ends.append((one["value"][-1], label, colour))
            common = rows.filter(labels="most-frequent")["value"][0]
            axes.axhline(common, color=style.QUIET, lw=0.8, ls=":", zorder=0)
            ends.append((common, "commonest cell", style.QUIET))
            axes.set_ylim(0, min(1.03, 1.2 * rows["high"].max()))
            layer_axis(axes, layers)
            style.label_ends(axes, len(layers) - 0.7, ends)
            axes.set_title(titles[question])
        all_axes[0].set_ylabel("accuracy of the 3×3 cell")
        rows = [table.filter(question=question).row(0, named=True) for question in asked]
        said = " ".join(
            f"{titles[row['question']].split(':')[0]}: taught on {row['taught']:,} images, n = {row['n']:,} "
            f"{'tokens' if row['question'] == 'token' else 'instructions'} of {row['images']:,} others."
            for row in rows
        )
        said += " Bands are 95 % bootstrap intervals over images."
        note(figure, said)
        style.save(figure, out, POSITION, table, making)
    return f"Accuracy of a linear classifier of the 3×3 cell, by layer. {said}"


def title_of_places(table: pl.DataFrame, asked: Sequence[str]) -> str:
    """Where both are read best."""
    names = {"token": "patches tell their cell", "object": "words tell the object's"}
    said = []
    for question in asked:
        rows = table.filter(question=question, metric="cell", source="store", labels="true")
        top, first = rows.sort("value").row(-1, named=True), rows.row(0, named=True)
        best = f"best at {named(top['layer'])}: {top['value']:.2f}"
        said.append(f"{names[question]} {best} ({first['layer']} {first['value']:.2f})")
    joined = "; ".join(said)
    return joined[0].upper() + joined[1:]


def lens(table: pl.DataFrame, readings: pl.DataFrame, out: Path, making: Mapping[str, Any]) -> str:
    """Log-probability of the true next word by layer, and what each layer would say after each word of a sample."""
    own, layers = table.filter(source="store"), in_order(table)
    with style.styled():
        figure = Figure(figsize=(11.5, 5.2))
        figure.subplots_adjust(left=0.07, right=0.98, top=0.75, bottom=0.17, wspace=0.42)
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.55])
        ends = []
        looks = {
            "store": (style.ACCENT, "o", "-", "this model"),
            "random-weights": (style.QUIET, "^", (0, (4, 1.5)), RANDOM),
        }
        for source, (colour, marker, dashes, label) in looks.items():
            rows = table.filter(source=source, metric="log_p")
            if rows.height:
                line(left, rows, layers, colour, marker, dashes)
                ends.append((rows["value"][-1], label, colour))
        floor = table.filter(source="unigram", metric="log_p")["value"][0]
        left.axhline(floor, color=style.QUIET, lw=0.8, ls=":", zorder=0)
        ends.append((floor, "unigram", style.QUIET))
        left.set_ylim(own.filter(metric="log_p")["low"].min() * 1.05, 0)
        layer_axis(left, layers)
        style.label_ends(left, len(layers) - 0.7, ends)
        left.set_ylabel("mean log-probability (nats)")
        left.set_title("The true next token")
        draw_reading(right, readings, layers)
        heading(figure, title_of_lens(own))
        n = own.filter(metric="log_p").row(0, named=True)
        said = f"n = {n['n']:,} tokens of {n['images']:,} images. Bands are 95 % bootstrap intervals over images."
        note(figure, f"Left: {said} Right: the likeliest next token of one sample; lighter is more probable.")
        style.save(figure, out, LENS, pl.concat([table, readings], how="diagonal"), making)
    return f"Left: log-probability of the true next token by layer. {said} Right: what each layer would say next."


def draw_reading(axes: Axes, readings: pl.DataFrame, layers: Sequence[str]) -> None:
    """The likeliest token by layer (rows) after each word (columns) of the first sample."""
    one = readings.filter(sample=readings["sample"][0])
    words = one.filter(layer=layers[0])["text"].to_list()[:WORDS]
    shown = [layers[place] for place in ticks(layers, ROWS)][::-1]
    p_lt = np.stack([one.filter(layer=layer)["p"].to_numpy()[: len(words)] for layer in shown])
    axes.pcolormesh(p_lt, cmap="cividis", vmin=0, vmax=1, rasterized=True)
    size = 7 if len(words) <= 8 else 6
    for row, layer in enumerate(shown):
        for column, said in enumerate(one.filter(layer=layer)["top"].to_list()[: len(words)]):
            ink = "white" if p_lt[row, column] < 0.55 else style.INK
            axes.text(column + 0.5, row + 0.5, shortened(said), ha="center", va="center", fontsize=size, color=ink)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(shown)) + 0.5, shown, fontsize=7.5)
    axes.set_xticks(np.arange(len(words)) + 0.5, [shortened(word) for word in words], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("layer")
    axes.set_xlabel("what each layer would say after the word above")


def shortened(text: str) -> str:
    """A token as a cell has room for it; ``$`` would begin mathematics."""
    text = text.strip().replace("\n", "⏎").replace("$", r"\$")
    return text if len(text) <= 9 else f"{text[:8]}…"


def title_of_lens(own: pl.DataFrame) -> str:
    """From where on the model's own head reads what the last layer will say."""
    agreement = own.filter(metric="agreement")
    half = agreement.filter(pl.col("value") >= 0.5).row(0, named=True)
    top1 = own.filter(metric="top1")
    return (
        f"From {named(half['layer'])} on the head reads the last layer's word (half of the tokens); the true one leads "
        f"for {top1['value'][-1]:.0%}"
    )


def named(layer: str) -> str:
    """A layer in a sentence."""
    return f"block {layer}" if layer.isdecimal() else layer


def in_order(table: pl.DataFrame) -> list[str]:
    """The layers of a table, in the order of the pass."""
    return table["layer"].drop_nulls().unique(maintain_order=True).to_list()


def panels(count: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    """A figure of panels beside each other, with room for labels at the right of each."""
    figure = Figure(figsize=(11.5 if count > 1 else 7.5, 4.8))
    figure.subplots_adjust(left=0.07, right=0.88, top=0.75, bottom=0.18, wspace=0.5)
    heading(figure, title)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def heading(figure: Figure, title: str) -> None:
    """The finding in one line."""
    figure.suptitle(title, x=0.06, y=0.97, ha="left", fontsize=11.5, fontweight="bold")


def note(figure: Figure, said: str) -> None:
    """What the reader must know of the sample, under the title, in as many lines as it takes."""
    wide = int(figure.get_figwidth() * 14)
    figure.text(0.06, 0.915, "\n".join(textwrap.wrap(said, wide)), fontsize=8.5, color=style.QUIET, va="top")


def line(
    axes: Axes, rows: pl.DataFrame, layers: Sequence[str], colour: Any, marker: str, dashes: Any, width=1.4
) -> None:
    """One series by layer with its band."""
    x_l = [layers.index(layer) for layer in rows["layer"]]
    axes.plot(x_l, rows["value"], color=colour, marker=marker, ms=3.5, lw=width, ls=dashes)
    axes.fill_between(x_l, rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)


def ticks(layers: Sequence[str], most: int) -> list[int]:
    """Places of at most so many layers, the first and the last among them."""
    return sorted(set(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int).tolist()))


def layer_axis(axes: Axes, layers: Sequence[str]) -> None:
    """Layers along x."""
    axes.set_xlim(-0.5, len(layers) - 0.7)
    places = ticks(layers, 15)
    axes.set_xticks(places, [layers[place] for place in places], fontsize=7.5, rotation=90 if len(layers) > 10 else 0)
    axes.set_xlabel("layer (embeddings, blocks, last block after its norm)", fontsize=9)


def label_log_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Labels at the ends of lines on a logarithmic axis: moved apart in decades."""
    low, high = np.log10(axes.get_ylim())
    over = axes.twinx()
    over.set_ylim(low, high)
    over.set_xlim(axes.get_xlim())
    over.axis("off")
    style.label_ends(over, x, [(float(np.log10(value)), label, colour) for value, label, colour in ends], 7.5)
