"""``python -m probes evaluate``: the table of a finished run, and whether a mid layer beats the last and the floors."""

import json
from pathlib import Path

import numpy as np
import polars as pl

from probes.config import EvaluateConfig
from probes.intervals import interval, paired_difference, resamples
from probes.specs import blocks_of
from store.errors import Refusal

SHOWN = ("iou", "iou_at_0.5", "centre_distance")


def read_run(out: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Results and predictions of a finished run.

    Raises
    ------
    Refusal
        When the folder holds none.
    """
    paths = [Path(out) / f"{name}.parquet" for name in ("results", "predictions")]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise Refusal(f"{out} lacks {', '.join(missing)}: run `python -m probes train --out {out}` to its end first")
    return pl.read_parquet(paths[0]), pl.read_parquet(paths[1])


def overlaps(predictions: pl.DataFrame) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """IoU of every test image by probe, averaged over seeds, and which images were watched during training.

    All arrays (n,) are in the order of the images, so that differences are paired.
    """
    means = predictions.group_by("probe", "sample").agg(pl.col("iou").mean(), pl.col("watched").first())
    means = means.sort("probe", "sample")
    by_probe = {name: part for (name,), part in means.partition_by("probe", as_dict=True, maintain_order=True).items()}
    watched_n = next(iter(by_probe.values()))["watched"].to_numpy()
    return {name: part["iou"].to_numpy() for name, part in by_probe.items()}, watched_n


def final_table(results: pl.DataFrame, predictions: pl.DataFrame) -> pl.DataFrame:
    """One row per probe in the order of training: n, and each shown metric with its 95 % interval over images.

    Seeds are averaged per image first; the interval is of images, not of seeds.
    """
    identity = results.select("probe", "role", "layer", "tokens").unique(maintain_order=True)
    marked = predictions.with_columns((pl.col("iou") >= 0.5).cast(pl.Float64).alias("iou_at_0.5"))
    means = marked.group_by("probe", "sample").agg(pl.col(*SHOWN).mean()).sort("probe", "sample")
    rows = []
    for about in identity.iter_rows(named=True):
        part = means.filter(pl.col("probe") == about["probe"])
        weights_rn = resamples(part.height)
        numbers: dict[str, float] = {"n": part.height}
        for metric in SHOWN:
            ends = interval(part[metric].to_numpy(), weights_rn)
            numbers |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), ends, strict=True))
        rows.append(about | numbers)
    return pl.DataFrame(rows)


def verdict(results: pl.DataFrame, predictions: pl.DataFrame) -> dict:
    """Whether the best mid layer beats the last layer, before and after the final norm, and every floor.

    The layer, any block but the first and the last, is chosen on the watched test images and compared on the
    others, so that choosing the best of many does not count in its favour. It must beat every opponent by its own
    95 % interval: a claim that needs all of them at once needs no correction for their number.

    Returns
    -------
    dict
        ``answer`` (bool, None if there is no mid layer to speak of), ``chosen``, ``n``, ``differences`` (opponent,
        mean, low, high of the IoU difference) and ``sentence``.
    """
    iou, watched_n = overlaps(predictions)
    blocks = blocks_of(sorted(results.filter(pl.col("role") == "layer")["layer"].unique(), key=natural))
    middle = [f"layer-{name}" for name in blocks[1:-1]]
    floors = results.filter(pl.col("role") == "floor")["probe"].unique(maintain_order=True).to_list()
    last = [name for name in (f"layer-{blocks[-1]}" if blocks else "", "layer-final") if name in iou]
    if not middle or not last:
        return {"answer": None, "sentence": "No verdict: it takes a mid layer and the last one, each with a proxy."}
    rest_n = ~watched_n
    chosen = max(middle, key=lambda name: iou[name][watched_n].mean())
    weights_rn = resamples(int(rest_n.sum()))
    differences = []
    for name in [*last, *floors]:
        mean, low, high = paired_difference(iou[chosen][rest_n], iou[name][rest_n], weights_rn)
        differences.append({"opponent": name, "mean": mean, "low": low, "high": high})
    lost = [entry["opponent"] for entry in differences if entry["low"] <= 0]
    nearest = min(differences[len(last) :], key=lambda entry: entry["mean"])
    told = ", ".join(
        f"{entry['opponent']} {entry['mean']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"
        for entry in [*differences[: len(last)], nearest]
    )
    sentence = (
        f"{'No' if lost else 'Yes'}: the best mid layer on {watched_n.sum()} images, {chosen}, differs in mean IoU on "
        f"{rest_n.sum()} others from {told} (the nearest floor)."
    )
    if lost:
        sentence += f" It does not clearly beat {', '.join(lost)}."
    return {
        "answer": not lost,
        "chosen": chosen,
        "n": int(rest_n.sum()),
        "differences": differences,
        "sentence": sentence,
    }


def natural(layer: str) -> tuple[int, str]:
    """Sort key of layer names: embed, blocks by number, final."""
    return (int(layer), "") if layer.isdigit() else (-1 if layer == "embed" else 10**6, layer)


def evaluate(config: EvaluateConfig) -> None:
    """Print a row per proxy with its 95 % intervals, and whether a mid layer beats the last one and the floors."""
    results, predictions = read_run(config.out)
    table, answer = final_table(results, predictions), verdict(results, predictions)
    if config.json:
        print(json.dumps({"probes": table.to_dicts(), "verdict": answer}))
        return
    width = max(map(len, table["probe"]))
    print(f"\n{'probe':<{width}}  {'reads':<12} {'n':>5}  {'mean IoU':<21} {'IoU@0.5':<21} centre distance / diagonal")
    for entry in table.iter_rows(named=True):
        cells = (f"{entry[m]:.3f} [{entry[f'{m}_low']:.3f}, {entry[f'{m}_high']:.3f}]" for m in SHOWN)
        reads = f"{entry['tokens']} @ {entry['layer']}" if entry["tokens"] != "none" else "nothing"
        print(f"{entry['probe']:<{width}}  {reads:<12} {entry['n']:>5}  {'  '.join(cells)}")
    print("\nDoes the best mid layer beat the last layer, before and after the final norm, and every floor?")
    print(answer["sentence"])
