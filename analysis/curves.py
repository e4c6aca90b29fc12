"""Figure 1: localization error against training steps for every layer's proxy, and where they end [ABP Fig. 4]."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.config import CurvesConfig
from analysis.finding import Drawn, Finding
from probes.evaluate import Run, read_run
from probes.panel import HELD_OUT
from probes.verdict import MAIN_NAMES, called, named, natural, paragraph, verdict, worse
from store.errors import Refusal

NAME = "figure-1-curves"

CONTROLS = {
    "control task": ({"labels": "control"}, "+"),
    "random weights": ({"source": "random-weights"}, "^"),
    "shuffled pictures": ({"source": "shuffled-images"}, "s"),
    "permuted labels": ({"labels": "permuted"}, "x"),
}
"""Label → what a control's probes differ in from the layer's, and their marker."""
PROMPT_LABEL = "prompt tokens"


def draw(config: CurvesConfig) -> list[Path]:
    """Draw the figure of a finished probe run.

    Returns
    -------
    list of Path
        PNG, SVG, CSV and JSON.

    Raises
    ------
    Refusal
        When ``config.probes`` holds no finished run, or one without a layer's proxy.
    """
    run = read_run(config.probes)
    final = final_rows(run.results)
    if final.filter(pl.col("role") == "layer").is_empty():
        raise Refusal(f"{config.probes} holds no proxy of a single layer: train some, as `python -m probes train` does")
    curves = curve_rows(run.results, final)
    answer = verdict(run.results, run.comparisons)
    with style.styled():
        figure = Figure(figsize=(11.5, 5.4))
        figure.subplots_adjust(left=0.06, right=0.9, top=0.78, bottom=0.12, wspace=0.47)
        left, right = figure.subplots(1, 2)
        draw_error(left, curves, final)
        draw_final(right, final)
        figure.suptitle(title(run, final, answer["layer"]), x=0.06, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.06, 0.915, note(curves, final), fontsize=9, color=style.QUIET, va="top")
        sweep = Path(config.probes) / "sweep.json"
        made = json.loads(sweep.read_text()) if sweep.exists() else None
        making = {"probes": str(config.probes), "verdict": answer, "run": made}
        return style.save(figure, config.out, NAME, pl.concat([curves, final]), making)


def finding(config: CurvesConfig) -> Finding:
    """The figure with what the run's tables say in words.

    Raises
    ------
    Refusal
        As ``draw``.
    """
    run = read_run(config.probes)
    draw(config)
    final = final_rows(run.results)
    curves = curve_rows(run.results, final)
    words = paragraph(run.results, run.comparisons)
    caption = f"Left: error while training, a line a layer, floors dotted. {note(curves, final)}".replace("\n", " ")
    shown = ("probe", "role", "layer", "tokens", "metric", "value", "low", "high", "n", "seeds")
    tables = {"layers": final.select(shown), "comparisons": run.comparisons}
    return Finding("curves", "Which layer is the place read from best?", words, (Drawn(NAME, caption),), tables)


def final_rows(results: pl.DataFrame) -> pl.DataFrame:
    """Where the drawn probes end: the main metric on held-out images over all seeds, one row a probe.

    Drawn are the layers of one target, kind and tokens (boxes first, then the most layers), their controls, and the
    floors and prompt proxies of that target.
    """
    final = results.filter(pl.col("seed").is_null(), pl.col("step").is_null(), data=HELD_OUT, stratum="all")
    final = final.filter(pl.col("metric").is_in(list(MAIN_NAMES)), pl.col("role") != "codelength")
    layers = final.filter(pl.col("role") == "layer")
    series = layers.partition_by("target", "kind", "tokens", maintain_order=True)
    if not series:
        return final.clear()
    first = max(series, key=lambda one: (one["target"][0] == "box", one.height)).row(0, named=True)
    same = pl.all_horizontal(pl.col(name) == first[name] for name in ("kind", "tokens", "share"))
    twins = pl.col("role").is_in(["layer", "control"]) & same
    return final.filter(pl.col("target") == first["target"], twins | pl.col("role").is_in(["prompt", "floor"]))


def curve_rows(results: pl.DataFrame, final: pl.DataFrame) -> pl.DataFrame:
    """The curves, over all seeds, of the layers, prompt proxies and floors that are drawn."""
    drawn = final.filter(pl.col("role") != "control")["probe"].to_list()
    return results.filter(pl.col("step").is_not_null(), pl.col("seed").is_null(), pl.col("probe").is_in(drawn))


def title(run: Run, final: pl.DataFrame, answer: dict[str, Any]) -> str:
    """The finding in one line, from the numbers: the best layer, against the last one, and whether it holds."""
    metric = MAIN_NAMES[final["metric"][0]]
    if answer["answer"] is None:
        best = final.filter(pl.col("role") == "layer").sort("value").row(-1, named=True)
        return f"Of the layers trained, {named(best['layer'])} is read best: {metric} {best['value']:.2f}"
    values = dict(final.select("probe", "value").iter_rows())
    floors = set(run.about.filter(pl.col("role") == "layer", pl.col("layer") != "embed")["probe"])
    against = [row for row in answer["differences"] if row["b"] in floors]
    nearest = min(against, key=lambda row: row["difference"])
    names = called(run.results)
    block = names[answer["chosen"]]
    numbers = f"{metric} {values[answer['chosen']]:.2f} against {values[nearest['b']]:.2f}"
    if answer["answer"]:
        return f"Read best from the middle: {block} beats the last layer, {numbers}"
    if any(map(worse, against)):
        return f"The last layer is better than the best mid layer, {block}: {numbers}"
    if nearest["low"] > 0:
        return f"{block.capitalize()} beats the last layer ({numbers}) but not every floor"
    return f"No clear difference between {block} and the last layer: {numbers}"


def note(curves: pl.DataFrame, final: pl.DataFrame) -> str:
    """What the reader must know of the sample: images, seeds, and what bands and bars are."""
    layers = final.filter(pl.col("role") == "layer")
    several = layers["seeds"].max() > 1
    seeds = f"{layers['seeds'].max()} seeds" if several else "one seed"
    watched = f"Left: {curves['n'].max():,} watched images" if curves.height else "Left: no curves were kept"
    return (
        f"One proxy per layer on {layers['tokens'][0]} tokens, {seeds}. {watched}"
        f"{'; bands are 95 % intervals over seeds' if several and curves.height else ''}.\n"
        f"Right: all {layers['n'].max():,} held-out images; bars are 95 % bootstrap intervals over "
        f"{'seeds and ' if several else ''}images."
    )


def layers_in_order(final: pl.DataFrame) -> list[str]:
    """The layers that have a proxy: embed, blocks by number, final."""
    return sorted(final.filter(pl.col("role") == "layer")["layer"].unique(), key=natural)


def floor_label(probe: str) -> str:
    """A floor's name without what all floors share."""
    return probe.removeprefix("floor-").replace("-", " ")


def draw_error(axes: Axes, curves: pl.DataFrame, final: pl.DataFrame) -> None:
    """Loss on watched images along training: layers by colour with bands, the prompt proxy, floors where they end."""
    axes.set_xlabel("training step")
    box = final["target"][0] == "box"
    axes.set_ylabel("error, 0.6·L1 + 0.4·(1 − GIoU)" if box else "loss")
    axes.set_title("Error on watched images while training")
    error = curves.filter(pl.col("metric") == "error").sort("step")
    if error.is_empty():
        return
    colours = style.layer_colours(layers_in_order(final))
    ends, floors = [], []
    for (probe,), part in error.group_by("probe", maintain_order=True):
        role, layer = part["role"][0], part["layer"][0]
        steps, values = part["step"].to_numpy(), part["value"].to_numpy()
        if role == "floor":
            floors.append((values[-1], floor_label(probe)))
            continue
        prompt = role == "prompt"
        colour = style.ACCENT if prompt else colours[layer]
        look = {"lw": 2, "ls": (0, (4, 1.5)), "zorder": 5} if prompt else {"lw": 1.4}
        axes.plot(steps, values, color=colour, **look)
        if part["low"].is_not_null().all():
            low, high = part["low"].to_numpy(), part["high"].to_numpy()
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
        ends.append((values[-1], f"{PROMPT_LABEL} {layer}" if prompt else layer, colour))
    for value, _ in floors:
        axes.axhline(value, color=style.QUIET, lw=0.8, ls=":", zorder=1)
    last = int(error["step"].max())
    axes.set_xlim(0, last)
    low = min(value for value, *_ in [*ends, *floors])
    high = max([error.filter(pl.col("role") != "floor")["value"].max(), *(value for value, _ in floors)])
    # Room above all curves, for the line that names the floors.
    axes.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.18 * (high - low))
    style.label_ends(axes, last, sorted(ends, key=lambda end: natural(end[1])))
    if floors:
        names = ", ".join(label for _, label in sorted(floors, reverse=True))
        place = {"xy": (0.99, 0.99), "xycoords": "axes fraction", "ha": "right", "va": "top"}
        axes.annotate(f"dotted: floors, from the top\n{names}", **place, fontsize=7.5, color=style.QUIET)


def draw_final(axes: Axes, final: pl.DataFrame) -> None:
    """The main metric along depth with its intervals, controls as thin lines, the prompt proxy, floors."""
    layers = layers_in_order(final)
    colours = style.layer_colours(layers)
    rows = {row["layer"]: row for row in final.filter(pl.col("role") == "layer").to_dicts()}
    places = {name: place for place, name in enumerate(layers)}
    axes.plot(places.values(), [rows[name]["value"] for name in layers], color=style.QUIET, lw=0.8, zorder=2)
    for name, place in places.items():
        draw_point(axes, place, rows[name], colours[name], "o")
    controls = final.filter(pl.col("role") == "control", pl.col("layer").is_in(layers)).to_dicts()
    for label, (wanted, marker) in CONTROLS.items():
        own = [row for row in controls if all(row[name] == value for name, value in wanted.items())]
        own.sort(key=lambda row: natural(row["layer"]))
        if own:
            look = {"marker": marker, "ms": 3.5, "mfc": "white", "mew": 0.8}
            axes.plot(
                [places[row["layer"]] for row in own],
                [row["value"] for row in own],
                color=style.QUIET,
                lw=0.7,
                zorder=1,
                label=label,
                **look,
            )
    if axes.get_legend_handles_labels()[1]:
        small = {"fontsize": 7.5, "title_fontsize": 7.5, "labelspacing": 0.3, "columnspacing": 1.2}
        axes.legend(loc="upper left", ncols=2, title="controls, layer by layer", alignment="left", **small)
    for row in final.filter(pl.col("role") == "prompt").to_dicts():
        draw_prompt(axes, row, rows, places)
    ends = []
    for row in final.filter(pl.col("role") == "floor").to_dicts():
        axes.axhline(row["value"], color=style.QUIET, lw=0.8, ls=":", zorder=0)
        ends.append((row["value"], floor_label(row["probe"]), style.QUIET))
    axes.set_xlim(-0.6, len(layers) - 0.4)
    shown = final.filter(pl.col("role") != "floor")
    low, high = min(0, final["low"].min()), shown["high"].max()
    # Room for the legend above all points.
    axes.set_ylim(low, high + 0.22 * (high - low))
    if ends:
        style.label_ends(axes, len(layers) - 0.4, ends)
    axes.set_xticks(list(places.values()), layers, rotation=45 if len(layers) > 16 else 0)
    for name, tick in zip(layers, axes.get_xticklabels(), strict=True):
        tick.set_fontsize(9 if name.isdigit() else 7.5)
    axes.set_xlabel("layer (embeddings, blocks, last block after its norm)")
    axes.set_ylabel(f"{MAIN_NAMES[final['metric'][0]]} on held-out images")
    axes.set_title("What the states of each layer know at the end")


def draw_prompt(axes: Axes, row: dict[str, Any], rows: dict[str, dict], places: dict[str, int]) -> None:
    """The prompt proxy over the layers that it reads, its label above whatever stands there."""
    ends = [places[name] for name in re.split("[–,]", row["layer"]) if name in places]
    centre = float(np.mean(ends)) if ends else (len(places) - 1) / 2
    if ends:
        dashes = {"color": style.ACCENT, "lw": 2, "ls": (0, (4, 1.5)), "zorder": 3}
        axes.plot([min(ends), max(ends)], [row["value"]] * 2, **dashes)
    draw_point(axes, centre, row, style.ACCENT, "D")
    # The label is about as wide as four layers.
    near = [rows[name]["high"] for name, place in places.items() if abs(place - centre) <= 2.2]
    axes.annotate(
        f"{PROMPT_LABEL} {row['layer']}",
        (centre, max([row["high"], *near])),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=style.ACCENT,
    )


def draw_point(axes: Axes, place: float, row: dict[str, Any], colour: object, marker: str) -> None:
    """A mean with its interval."""
    reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
    axes.errorbar(
        [place], [row["value"]], yerr=reach, fmt=marker, color=colour, ecolor=colour, ms=6, elinewidth=1.4, zorder=4
    )
