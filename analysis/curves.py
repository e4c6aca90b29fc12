"""Figure 1: localization error against training steps for every layer's proxy, and where they end [ABP Fig. 4]."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.config import CurvesConfig
from probes.evaluate import final_table, natural, read_run, verdict

NAME = "figure-1-curves"

FLOOR_LABELS = {
    "floor-mean-box": "mean box",
    "floor-centre-box": "centre box",
    "floor-text-only": "text only",
    "floor-image-only": "image only",
    "floor-permuted": "permuted labels",
}
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
        When ``config.probes`` holds no finished run.
    """
    results, predictions = read_run(config.probes)
    curves, final = curve_table(results), final_table(results, predictions)
    with style.styled():
        figure = Figure(figsize=(11, 5.2))
        figure.subplots_adjust(left=0.065, right=0.895, top=0.78, bottom=0.12, wspace=0.45)
        left, right = figure.subplots(1, 2)
        draw_error(left, curves, final)
        draw_final(right, final)
        answer = verdict(results, predictions)
        figure.suptitle(title(final, answer), x=0.065, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.065, 0.915, note(curves, final, results), fontsize=9, color=style.QUIET, va="top")
        run = json.loads((Path(config.probes) / "probes.json").read_text())
        making = {"probes": str(config.probes), "verdict": answer, "run": run}
        return style.save(figure, config.out, NAME, pl.concat([curves, melted(final)], how="diagonal"), making)


def curve_table(results: pl.DataFrame) -> pl.DataFrame:
    """The error of each trained proxy at each step, averaged over seeds: probe, role, layer, step, metric, value."""
    curves = results.filter(pl.col("metric").is_in(["error", "one_minus_iou"]))
    keys = ["probe", "role", "layer", "tokens", "metric", "step"]
    return curves.group_by(keys, maintain_order=True).agg(pl.col("value").mean(), pl.col("n").first())


def melted(final: pl.DataFrame) -> pl.DataFrame:
    """The final mean IoU in the columns of ``curve_table``, with its interval."""
    shown = pl.col("iou").alias("value"), pl.col("iou_low").alias("low"), pl.col("iou_high").alias("high")
    return final.select("probe", "role", "layer", "tokens", pl.lit("iou").alias("metric"), *shown, "n")


def title(final: pl.DataFrame, answer: dict) -> str:
    """The finding in one line, from the numbers: the best layer, against the last one, and whether it holds."""
    layers = final.filter(pl.col("role") == "layer")
    if answer["answer"] is None:
        best = layers.sort("iou").tail(1).to_dicts()[0]
        return f"Of the layers trained, {named(best['layer'])} gives the best boxes: mean IoU {best['iou']:.2f}"
    chosen = layers.filter(pl.col("probe") == answer["chosen"]).to_dicts()[0]
    last = {row["probe"]: row for row in layers.to_dicts()}
    against = [entry for entry in answer["differences"] if entry["opponent"] in last]
    reference = min(against, key=lambda entry: entry["mean"])
    numbers = f"mean IoU {chosen['iou']:.2f} against {last[reference['opponent']]['iou']:.2f}"
    block = named(chosen["layer"])
    if answer["answer"]:
        return f"The box is read best from the middle: {block} beats the last layer, {numbers}"
    if all(entry["low"] > 0 for entry in against):
        return f"{block.capitalize()} beats the last layer ({numbers}) but not every floor"
    if any(entry["high"] < 0 for entry in against):
        return f"The last layer is better than the best mid layer, {block}: {numbers}"
    return f"No clear difference between {block} and the last layer: {numbers}"


def named(layer: str) -> str:
    """A layer in prose: ``block 5``, ``the embeddings``, ``the normed last block``."""
    return {"embed": "the embeddings", "final": "the last block after its norm"}.get(layer, f"block {layer}")


def note(curves: pl.DataFrame, final: pl.DataFrame, results: pl.DataFrame) -> str:
    """What the reader must know of the sample: images and seeds."""
    seeds = results.filter(pl.col("role") == "layer")["seed"].n_unique()
    layers = prompt_layers(final)
    return (
        f"One proxy per layer on all its tokens{f', one on the prompt tokens of layers {layers}' if layers else ''}; "
        f"{seeds} seed{'s' if seeds > 1 else ''}. Left: {curves['n'].max()} test images.\n"
        f"Right: all {final['n'].max()} test images; bars are 95 % bootstrap intervals over images."
    )


def prompt_layers(final: pl.DataFrame) -> str:
    """The layers of the mid-layer prompt proxy, empty without one."""
    found = final.filter(pl.col("role") == "prompt")["layer"]
    return found[0] if len(found) else ""


def layers_in_order(final: pl.DataFrame) -> list[str]:
    """The layers that have a proxy: embed, blocks by number, final."""
    return sorted(final.filter(pl.col("role") == "layer")["layer"], key=natural)


def draw_error(axes: Axes, curves: pl.DataFrame, final: pl.DataFrame) -> None:
    """Loss on watched test images along training: layers by colour, the prompt proxy, floors as horizontal lines."""
    error = curves.filter(pl.col("metric") == "error")
    layers = layers_in_order(final)
    colours = style.layer_colours(layers)
    ends = []
    for (role, layer), part in error.filter(pl.col("role") != "floor").group_by("role", "layer", maintain_order=True):
        part = part.sort("step")
        steps, values = part["step"].to_numpy(), part["value"].to_numpy()
        if role == "prompt":
            axes.plot(steps, values, color=style.ACCENT, lw=2, ls=(0, (4, 1.5)), zorder=5)
            ends.append((values[-1], f"{PROMPT_LABEL} {layer}", style.ACCENT))
        else:
            axes.plot(steps, values, color=colours[layer], lw=1.4)
            ends.append((values[-1], layer, colours[layer]))
    floors = [(part["value"][-1], FLOOR_LABELS.get(name, name)) for (name,), part in floor_parts(error)]
    for value, _ in floors:
        axes.axhline(value, color=style.QUIET, lw=0.8, ls=":", zorder=1)
    last = int(error["step"].max())
    axes.set_xlim(0, last)
    shown = np.array([value for value, *_ in ends] + [value for value, _ in floors])
    start = error.filter(pl.col("step") == 0)["value"].max()
    low, high = shown.min(), max(start, shown.max())
    # Room above all curves, for the line that names the floors.
    axes.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.18 * (high - low))
    style.label_ends(axes, last, ends)
    if floors:
        names = ", ".join(label for _, label in sorted(floors, reverse=True))
        place = {"xy": (0.99, 0.99), "xycoords": "axes fraction", "ha": "right", "va": "top"}
        axes.annotate(f"dotted: floors, from the top\n{names}", **place, fontsize=7.5, color=style.QUIET)
    axes.set_xlabel("training step")
    axes.set_ylabel("error on test images, 0.6·L1 + 0.4·(1 − GIoU)")
    axes.set_title("Localization error while training")


def floor_parts(error: pl.DataFrame):
    """The error of each floor, in order of steps; those without training have one point."""
    return error.filter(pl.col("role") == "floor").sort("step").group_by("probe", maintain_order=True)


def draw_final(axes: Axes, final: pl.DataFrame) -> None:
    """Final mean IoU along depth with 95 % intervals; the prompt proxy over the layers it reads; floors as lines."""
    layers = layers_in_order(final)
    colours = style.layer_colours(layers)
    rows = {row["layer"]: row for row in final.filter(pl.col("role") == "layer").to_dicts()}
    places = range(len(layers))
    axes.plot(places, [rows[name]["iou"] for name in layers], color=style.QUIET, lw=0.8, zorder=1)
    for place, name in zip(places, layers, strict=True):
        draw_point(axes, place, rows[name], colours[name], "o")
    for row in final.filter(pl.col("role") == "prompt").to_dicts():
        read = [place for place, name in enumerate(layers) if name in re.split("[–,]", row["layer"])]
        centre = np.mean(read) if read else len(layers) / 2
        if read:
            axes.plot([min(read), max(read)], [row["iou"]] * 2, color=style.ACCENT, lw=2, ls=(0, (4, 1.5)), zorder=3)
        draw_point(axes, centre, row, style.ACCENT, "D")
        # Above whatever stands under the label, which is about as wide as four layers.
        near = [rows[name]["iou_high"] for place, name in enumerate(layers) if abs(place - centre) <= 2.2]
        axes.annotate(
            f"{PROMPT_LABEL} {row['layer']}",
            (centre, max([row["iou_high"], *near])),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=style.ACCENT,
        )
    floors = [(row["iou"], row["probe"]) for row in final.to_dicts() if row["role"] == "floor"]
    for value, _ in floors:
        axes.axhline(value, color=style.QUIET, lw=0.8, ls=":", zorder=0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(0, min(1, final["iou_high"].max() * 1.15))
    style.label_ends(
        axes, len(layers) - 0.4, [(value, FLOOR_LABELS.get(name, name), style.QUIET) for value, name in floors]
    )
    axes.set_xticks(list(places), layers, rotation=45 if len(layers) > 16 else 0)
    for name, tick in zip(layers, axes.get_xticklabels(), strict=True):
        tick.set_fontsize(9 if name.isdigit() else 7.5)
    axes.set_xlabel("layer (embeddings, blocks, last block after its norm)")
    axes.set_ylabel("mean IoU on test images")
    axes.set_title("What the states of each layer know at the end")


def draw_point(axes: Axes, place: float, row: dict, colour: object, marker: str) -> None:
    """A mean with its interval."""
    reach = [[row["iou"] - row["iou_low"]], [row["iou_high"] - row["iou"]]]
    axes.errorbar(
        [place], [row["iou"]], yerr=reach, fmt=marker, color=colour, ecolor=colour, ms=6, elinewidth=1.4, zorder=4
    )
