"""Is attention cause? What masking a proxy's keys costs where its attention is, and where it is not (science §8).

Shape suffixes: ``s`` proxy (seed), ``n`` sample that is asked about, ``l`` VLM layer, ``k`` quantity.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from analysis.causes import figure as causes_figure
from analysis.causes import words as causes_words
from analysis.causes.masks import (
    CONTROLS,
    CROSSED,
    KEPT,
    LAYER,
    NOTHING,
    TOKEN,
    WORD,
    Mask,
    Prompt,
    masks_of,
    overlaps,
    voted,
)
from analysis.causes.paired import corrected, differences, summary
from analysis.causes.retrained import retrain, retrained
from analysis.config import CausesConfig
from analysis.finding import Drawn, Finding
from probes import boxes, floors, targets
from probes.data import Source
from probes.trained import TrainedProbe
from store.errors import Refusal

LABELS = {
    NOTHING: "nothing",
    LAYER: "the layer that the heads vote for",
    TOKEN: "the top token, at all layers",
    WORD: "the top word of the instruction, at all layers",
    CROSSED: "the top token, at that layer only",
    KEPT: "all but the layer that the heads vote for",
    CONTROLS[LAYER]: "another layer",
    CONTROLS[TOKEN]: "another token of the instruction, at all layers",
    CONTROLS[WORD]: "as many other tokens of the instruction, at all layers",
    CONTROLS[CROSSED]: "another token of the instruction, at that layer only",
    CONTROLS[KEPT]: "all but another layer",
}
FLOOR = "floor"
METRICS = ("iou", "iou_at_0.5")


def masking(
    opened: Any,
    proxies: Sequence[TrainedProbe],
    votes: pl.DataFrame,
    top: pl.DataFrame,
    samples: Sequence[int],
    draws: int = 5,
    seed: int = 0,
) -> dict[str, pl.DataFrame]:
    """What masking costs at l*, at every layer, at the top token and word, and beside them at random.

    Parameters
    ----------
    opened
        The store whose states the proxies read.
    proxies
        Q-Formers that say boxes and read the same layers and tokens: seeds of one.
    votes
        ``sample`` (row of ``Store.samples``), ``l_star`` (name of the layer that its heads vote for) and, where seeds
        differ, ``seed``.
    top
        ``sample``, ``rank`` (low is first), ``slot`` (on the token axis of hidden/text) and, where seeds differ,
        ``seed``. The top word is the instruction's word whose token comes first.
    samples
        Rows that are asked about: with states, a box, and no part in the training.
    draws
        Draws of random layers and tokens of every sample, shared out over the proxies, at least one each. Another layer
        masked is no draw but the mean over all others.
    seed
        Of the draws.

    Returns
    -------
    dict of DataFrame
        ``comparisons`` (a mask against no mask, and against its control: difference, 95 % interval, p, Holm's p),
        ``values`` (IoU and IoU@0.5 under every mask) and ``layers`` (IoU without each layer, and its share of votes).

    Raises
    ------
    Refusal
        When the proxies read different tokens or say no box, or the tables lack one of them.
    """
    samples_n = np.asarray(samples, np.int64)
    alike(proxies)
    prompt = Prompt.of(opened, proxies[0].spec.tokens, samples_n)
    each = -(-draws // len(proxies))
    wanted = [
        list(masks_of(probe, prompt, votes, top, range(each * p, each * p + each), seed))
        for p, probe in enumerate(proxies)
    ]
    found = overlaps(opened, proxies, wanted, samples_n)
    layers = proxies[0].spec.layers
    star_snl = np.stack([voted(votes, probe, samples_n) for probe in proxies])
    values = gathered(wanted, found, layers, star_snl)
    floor_1n = mean_box(opened, samples_n)
    return {
        "comparisons": compared(values),
        "values": valued(values, floor_1n),
        "layers": by_layer(values, layers, star_snl),
    }


def finding(
    opened: Any, proxies: Sequence[TrainedProbe], votes: pl.DataFrame, top: pl.DataFrame, config: CausesConfig
) -> Finding:
    """Mask, compare with what was trained again, draw, and say what it comes to.

    ``votes`` and ``top`` are as of ``masking``; to train again (``config.retrain``) they are of all samples.

    Raises
    ------
    Refusal
        As ``masking`` and ``retrained`` do, or when no image of the reporting split can be asked about.
    """
    alike(proxies)
    samples_n = askable(opened, proxies[0], config.report, config.images, config.seed)
    tables = masking(opened, proxies, votes, top, samples_n, config.draws, config.seed)
    if config.retrain:
        retrain(opened, proxies[0], votes, top, config.retrained_in, [p.seed for p in proxies[:3]], seed=config.seed)
    if config.retrain or config.retrained or config.retrained_in.exists():
        tables |= retrained(config.retrained_in, proxies, votes)
    told = causes_words.told(tables)
    making = {"store": str(opened.place), "proxies": {probe.folder.name: probe.hash for probe in proxies}}
    causes_figure.draw(tables, told.title, told.note, config.out, making)
    figure = Drawn(causes_figure.NAME, told.caption)
    return Finding("causes", "Is attention cause?", told.answer, (figure,), tables, told.caveats)


def askable(opened: Any, probe: TrainedProbe, split: str, most: int, seed: int) -> np.ndarray:
    """Rows of a split that the proxy can be asked about, int64 rising: at most so many, drawn with the seed.

    Raises
    ------
    Refusal
        When there is none.
    """
    source, spec = Source(opened, opened), probe.spec
    lacking = [layer for layer in spec.layers if layer not in opened.layers]
    if lacking:
        raise Refusal(f"{opened.place} lacks layers {', '.join(lacking)} that {probe.folder.name} reads")
    usable = source.usable_s & targets.unit_boxes(opened.samples)[1] & (source.slots(spec.tokens)[1] > 0)
    found = np.flatnonzero(usable & opened.samples["split"].eq_missing(split).to_numpy())
    if not len(found):
        raise Refusal(
            f"no sample of split {split!r} of {opened.place} has states, a token that is read, and a true box"
        )
    return np.sort(np.random.default_rng([seed, 5]).permutation(found)[:most])


def alike(proxies: Sequence[TrainedProbe]) -> None:
    """Refuse proxies that are not seeds of one, or have no boxes to mask for."""
    first = proxies[0]
    for probe in proxies:
        if probe.spec.kind != "qformer" or probe.making["target"]["form"] != "box":
            raise Refusal(f"{probe.folder} is no Q-Former that says boxes: give proxies of boxes")
        if (probe.spec.layers, probe.spec.tokens) != (first.spec.layers, first.spec.tokens):
            raise Refusal(f"{probe.folder} reads other layers or tokens than {first.folder}: give seeds of one proxy")


def gathered(
    wanted: Sequence[Sequence[Mask]], found: Sequence[np.ndarray], layers: Sequence[str], star_snl: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Metric → mask → values (s, n): the mean over draws; without l*, and the mean over each of the other layers."""
    out: dict[str, dict[str, np.ndarray]] = {}
    for metric in METRICS:
        seen = [values if metric == "iou" else np.where(np.isnan(values), np.nan, values >= 0.5) for values in found]
        by_name = {
            name: np.stack(
                [
                    own[[k for k, mask in enumerate(of_probe) if mask.name == name]].mean(0)
                    for own, of_probe in zip(seen, wanted, strict=True)
                ]
            )
            for name in dict.fromkeys(mask.name for mask in wanted[0])
        }
        each_snl = np.stack([by_name[f"layer {layer}"] for layer in layers], -1)
        known_sn, others = star_snl.any(-1), max(1, len(layers) - 1)
        at_sn = np.where(known_sn, np.where(star_snl, each_snl, 0).sum(-1), np.nan)
        beside_sn = np.where(known_sn & (len(layers) > 1), np.where(star_snl, 0, each_snl).sum(-1) / others, np.nan)
        out[metric] = by_name | {LAYER: at_sn, CONTROLS[LAYER]: beside_sn}
    return out


def mean_box(opened: Any, samples_n: np.ndarray) -> np.ndarray:
    """IoU of the mean box of the train split with each sample's, (1, n): what knows nothing reaches."""
    target = targets.make("box", opened.samples)
    train = np.flatnonzero(opened.samples["split"].eq_missing("train").to_numpy() & target.known)
    if not len(train):
        return np.full((1, len(samples_n)), np.nan)
    said = dict(floors.constant(target, train, samples_n))["floor-mean-box"]
    pair = [
        torch.from_numpy(np.stack([said[f"{prefix}{side}"] for side in targets.BOX], 1)) for prefix in ("", "true_")
    ]
    return boxes.iou(*pair).numpy()[None]


def compared(values: Mapping[str, Mapping[str, np.ndarray]]) -> pl.DataFrame:
    """Every mask against none and against its control; Holm over all of a metric."""
    asked = [(name, against) for name in CONTROLS for against in (NOTHING, CONTROLS[name])]
    return corrected([row for metric, by_name in values.items() for row in differences(by_name, asked, metric)])


def valued(values: Mapping[str, Mapping[str, np.ndarray]], floor_1n: np.ndarray) -> pl.DataFrame:
    """IoU and IoU@0.5 under every mask, what it changes against no mask, and the mean box's."""
    rows = []
    for metric, by_name in values.items():
        rows += told({name: by_name[name] for name in LABELS}, by_name[NOTHING], {"metric": metric})
        floor_1n = floor_1n if metric == "iou" else np.where(np.isnan(floor_1n), np.nan, floor_1n >= 0.5)
        rows += [{"masked": FLOOR, "metric": metric} | told_of(one) for one in summary(floor_1n[None])]
    table = pl.DataFrame(rows, infer_schema_length=None)
    return table.with_columns(label=pl.col("masked").replace(LABELS | {FLOOR: "nothing known: the mean box"}))


def told(by_name: Mapping[str, np.ndarray], whole_sn: np.ndarray, common: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a mask: its metric, and what it changes against no mask, with intervals."""
    each_ksn = np.stack(list(by_name.values()))
    rows = []
    for name, row, change in zip(by_name, summary(each_ksn), summary(each_ksn - whole_sn), strict=True):
        changed = {"difference": change["value"], "difference_low": change["low"], "difference_high": change["high"]}
        rows.append({"masked": name} | common | told_of(row) | changed)
    return rows


def told_of(row: dict[str, Any]) -> dict[str, Any]:
    """A summary without its p: that a metric is not 0 is no news."""
    return {name: value for name, value in row.items() if name != "p"}


def by_layer(
    values: Mapping[str, Mapping[str, np.ndarray]], layers: Sequence[str], star_snl: np.ndarray
) -> pl.DataFrame:
    """The curve over fixed layers: metrics with one layer masked for all, what that costs, and its share of votes."""
    share_l = star_snl.sum((0, 1)) / max(1, star_snl.any(-1).sum())
    tables = []
    for metric, by_name in values.items():
        rows = told({name: by_name[f"layer {name}"] for name in layers}, by_name[NOTHING], {"metric": metric})
        tables.append(pl.DataFrame(rows, infer_schema_length=None).with_columns(votes=pl.Series(share_l)))
    return pl.concat(tables).rename({"masked": "layer"})
