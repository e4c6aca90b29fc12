"""What masks and retraining come to, in words and numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.causes.masks import CONTROLS, CROSSED, KEPT, LAYER, NOTHING, TOKEN, WORD
from analysis.causes.retrained import AGAINST, FULL, TOKENS, VOTED

SURE = 0.05
MOST = 0.5
"""Share of what the proxy knows above the mean box from which on a loss is called most of it."""
CAVEATS = (
    "A masked key takes one state from the proxy, not the token from the model: later states have read it, and say it "
    "again. What a proxy can do without is not what the model can do without.",
    "No proxy was trained with masked keys, so part of what a mask costs may be that it is unusual; the random "
    "controls and proxies that are trained again answer that.",
)


@dataclass(frozen=True)
class Told:
    """The finding in words."""

    title: str
    note: str
    answer: str
    caption: str
    caveats: tuple[str, ...]


def signed(value: float | None) -> str:
    """A change with its sign: ``−0.012``."""
    return "unknown" if value is None else f"{value:+.3f}".replace("-", "−")


def change(row: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    low, high = (row.get(f"difference_{end}", row.get(end)) for end in ("low", "high"))
    return f"{signed(row['difference'])} [{signed(low)}, {signed(high)}]"


def chance(row: Mapping[str, Any]) -> str:
    """Holm's p of a row."""
    return "p < 0.001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.3f}"


def told(tables: Mapping[str, pl.DataFrame]) -> Told:
    """All words of the finding, from its tables."""
    values = {row["masked"]: row for row in tables["values"].filter(metric="iou").iter_rows(named=True)}
    asked = pair_rows(tables["comparisons"].filter(metric="iou"))
    again = pair_rows(tables["retrained"]) if "retrained" in tables else {}
    if values[NOTHING]["value"] is None or asked[LAYER, CONTROLS[LAYER]]["difference"] is None:
        answer = "It cannot be said: no image has a layer that the heads vote for, and another beside it."
        return Told("There is no layer to mask", "", answer, answer, CAVEATS)
    images = f"{values[NOTHING]['n']:,} held-out images"
    seeds = f"{values[NOTHING]['seeds']} seeds" if values[NOTHING]["seeds"] > 1 else "one seed"
    parts = [
        verdict(values, asked),
        needed(values, asked),
        *token_words(values, asked),
        enough(values, asked),
        *again_words(again),
    ]
    over = f"n = {images}, {seeds}; 95 % intervals over images{' and seeds' if seeds != 'one seed' else ''}"
    parts.append(f"({over}; p by Holm over all {len(asked)} comparisons of masks.)")
    caption = (
        "Left: change of mean IoU when keys are masked in the trained proxy, and when it is trained again without "
        "them; filled where its attention is, open where as much was chosen at random. Middle: mean IoU when only one "
        f"layer is left. Right: the same layer masked for all images, and below it the share of votes. {over}."
    )
    return Told(title(values, asked), note(over, again), " ".join(parts), caption, CAVEATS)


def pair_rows(table: pl.DataFrame) -> dict[tuple[str, str], dict[str, Any]]:
    """(treatment, against) → row."""
    return {(row["treatment"], row["against"]): row for row in table.iter_rows(named=True)}


def worse(row: Mapping[str, Any]) -> bool:
    """Whether a treatment is surely worse than what it is held against."""
    return row["difference"] is not None and row["difference"] < 0 and row["p_holm"] < SURE


def share_lost(values: Mapping[str, Mapping], name: str) -> float:
    """Share of what the proxy knows above the mean box that a mask takes."""
    floor = values["floor"]["value"] or 0.0
    return -values[name]["difference"] / max(values[NOTHING]["value"] - floor, 1e-9)


def better(row: Mapping[str, Any]) -> bool:
    """Whether a treatment is surely better than what it is held against."""
    return row["difference"] is not None and row["difference"] > 0 and row["p_holm"] < SURE


def verdict(values: Mapping[str, Mapping], asked: Mapping[tuple[str, str], Mapping]) -> str:
    """One sentence: yes, in part, or no."""
    share, enough = share_lost(values, LAYER), better(asked[KEPT, CONTROLS[KEPT]])
    if not worse(asked[LAYER, CONTROLS[LAYER]]):
        if enough:
            return (
                "Attention marks a layer that says more than others by itself, but it is not shown to be needed: "
                "masking it does not surely cost more than masking another."
            )
        return "It is not shown: masking the layer that the heads vote for does not surely cost more than another."
    if share >= MOST:
        return f"Yes: without the layer that the heads vote for, {share:.0%} of what the proxy knows is gone."
    return (
        "In part: the layer that the heads vote for matters more than others, yet without it only "
        f"{share:.1%} of what the proxy knows above the mean box is gone; the rest is found elsewhere."
    )


def needed(values: Mapping[str, Mapping], asked: Mapping[tuple[str, str], Mapping]) -> str:
    """What masking l* costs, against another layer."""
    floor = values["floor"]["value"]
    known = "" if floor is None else f" (mean box {floor:.3f})"
    against = asked[LAYER, CONTROLS[LAYER]]
    return (
        f"Masking it changes mean IoU by {change(values[LAYER])} from {values[NOTHING]['value']:.3f}{known}, masking "
        f"another layer by {change(values[CONTROLS[LAYER]])}: a difference of {change(against)}, {chance(against)}."
    )


def token_words(values: Mapping[str, Mapping], asked: Mapping[tuple[str, str], Mapping]) -> list[str]:
    """What masking the top token and word costs, against others."""
    names = {CROSSED: "the top token at that layer", TOKEN: "the top token at all layers", WORD: "the top word"}
    parts = []
    for name, label in names.items():
        row = asked[name, CONTROLS[name]]
        if row["difference"] is not None:
            parts.append(
                f"{label} {change(values[name])} against {change(values[CONTROLS[name]])} for random ones "
                f"({chance(row)}, n = {row['n']:,})"
            )
    return [f"Masking tokens: {'; '.join(parts)}."] if parts else []


def enough(values: Mapping[str, Mapping], asked: Mapping[tuple[str, str], Mapping]) -> str:
    """What is left with l* alone, against another layer alone."""
    row = asked[KEPT, CONTROLS[KEPT]]
    alone, other = (values[name] for name in (KEPT, CONTROLS[KEPT]))
    return (
        f"With that layer alone the proxy reaches {alone['value']:.3f} [{alone['low']:.3f}, {alone['high']:.3f}], with "
        f"another alone {other['value']:.3f} [{other['low']:.3f}, {other['high']:.3f}] ({chance(row)})."
    )


def again_words(again: Mapping[tuple[str, str], Mapping]) -> list[str]:
    """What proxies reach that were trained again without a layer or token."""
    parts = []
    for name, label in ((VOTED, "the most voted layer"), (TOKENS, "the top token")):
        if (name, FULL) not in again or again[name, FULL]["difference"] is None:
            continue
        whole, control = again[name, FULL], again.get((AGAINST[name], FULL))
        where = f" ({whole['left_out']})" if name == VOTED else ""
        said = f"trained again without {label}{where} it changes by {change(whole)}"
        if control and control["difference"] is not None:
            apart = again[name, AGAINST[name]]
            said += f", without {'another layer' if name == VOTED else 'a random token'} by {change(control)}"
            said += f" ({chance(apart)})"
        parts.append(said)
    if not parts:
        return []
    lost = [again[name, AGAINST[name]] for name in (VOTED, TOKENS) if (name, AGAINST[name]) in again]
    most = max(-again[name, FULL]["low"] for name in (VOTED, TOKENS) if (name, FULL) in again)
    end = f"so it is found elsewhere too: at most {max(most, 0):.3f} IoU is lost (95 %)"
    if any(map(worse, lost)):
        end = "so not all of it is found elsewhere"
    first = again[next(name for name in (VOTED, TOKENS) if (name, FULL) in again), FULL]
    over = f"n = {first['n']:,}, {first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    said = f"{'; '.join(parts)}; {end} ({over})."
    return [said[0].upper() + said[1:]]


def title(values: Mapping[str, Mapping], asked: Mapping[tuple[str, str], Mapping]) -> str:
    """The finding in one line."""
    cost, other = (-values[name]["difference"] for name in (LAYER, CONTROLS[LAYER]))
    alone = f"alone it keeps {values[KEPT]['value']:.2f} of {values[NOTHING]['value']:.2f}"
    enough = better(asked[KEPT, CONTROLS[KEPT]])
    if not worse(asked[LAYER, CONTROLS[LAYER]]):
        head = "Says more alone, not shown to be needed" if enough else "Not shown to be a cause"
    elif share_lost(values, LAYER) >= MOST:
        head = "Attention is where it matters"
    else:
        head = "Useful, not indispensable"
    lost = f"masking the voted layer costs {signed(cost)} IoU, another {signed(other)}".replace("+", "")
    return f"{head}: {lost}; {alone}"


def note(over: str, again: Mapping[tuple[str, str], Mapping]) -> str:
    """What the reader of the figure must know."""
    more = ""
    if (VOTED, FULL) in again:
        row = again[VOTED, FULL]
        more = f" Trained again: n = {row['n']:,}, {row['seeds']} seed{'s' if row['seeds'] > 1 else ''}."
    return f"{over}.{more}\nChanges are against the same proxy with nothing masked, image by image."
