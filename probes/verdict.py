"""What a run says, in sentences made of its numbers: is it the middle, is it the prompt, is it the layer's own?"""

import re
from typing import Any

import polars as pl

from probes.comparisons import BEST, EFFECTS, FLOOR, LAST, MID, NORMED, SELECTIVITY
from probes.panel import HELD_OUT

ALPHA = 0.05
MAIN_NAMES = {"iou": "mean IoU", "accuracy": "accuracy", "r2": "explained variance"}
FLOOR_NAMES = {
    "floor-mean-box": "the mean box",
    "floor-centre-box": "the centre box",
    "floor-text-only": "text only",
    "floor-image-only": "image only",
}


def natural(layer: str) -> tuple[int, str]:
    """Sort key of layer names: embed, blocks by number, final."""
    return (int(layer), "") if layer.isdigit() else (-1 if layer == "embed" else 10**6, layer)


def named(layer: str) -> str:
    """A layer in prose: ``block 5``, ``the embeddings``, ``the last block after its norm``."""
    return {"embed": "the embeddings", "final": "the last block after its norm"}.get(layer, f"block {layer}")


def called(results: pl.DataFrame) -> dict[str, str]:
    """Every probe's name in prose."""
    names = {}
    for row in results.unique("probe", maintain_order=True).iter_rows(named=True):
        name = named(row["layer"]) if row["role"] == "layer" else row["probe"]
        if row["role"] == "prompt":
            where = f"blocks {row['layer']}" if re.search("[–,]", row["layer"]) else named(row["layer"])
            name = f"the prompt tokens of {where}"
        for column, value, words in (
            ("labels", "permuted", "permuted labels"),
            ("labels", "control", "the control task"),
            ("source", "random-weights", "random weights"),
            ("source", "shuffled-images", "shuffled pictures"),
        ):
            if row[column] == value:
                name = f"{words} at {named(row['layer'])}"
        names[row["probe"]] = FLOOR_NAMES.get(row["probe"], name)
    return names


def held_comparisons(comparisons: pl.DataFrame) -> pl.DataFrame:
    """The held-out comparisons of the run's main target and its main series of layers (most layers, boxes first)."""
    held = comparisons.filter(pl.col("data") == HELD_OUT)
    if held.is_empty():
        return held
    held = held.filter(pl.col("target") == held["target"][0])
    main = held.row(0, named=True)
    same = (pl.col("kind") == main["kind"]) & (pl.col("tokens") == main["tokens"])
    return held.filter(same | pl.col("question").is_in(EFFECTS))


def asked(comparisons: pl.DataFrame, *questions: str) -> list[dict[str, Any]]:
    """The rows of these questions."""
    return comparisons.filter(pl.col("question").is_in(questions)).to_dicts()


def better(row: dict[str, Any]) -> bool:
    """Whether a is better than b: by the interval over seeds and images, and by the corrected p."""
    return row["low"] > 0 and corrected(row) < ALPHA


def worse(row: dict[str, Any]) -> bool:
    """Whether a is worse than b."""
    return row["high"] < 0 and corrected(row) < ALPHA


def corrected(row: dict[str, Any]) -> float:
    """The p that takes the family or the map into account."""
    return row["q_bh"] if row["p_holm"] is None else row["p_holm"]


def gap(row: dict[str, Any], with_p: bool = True) -> str:
    """A difference with its interval and corrected p: ``+0.043 [+0.036, +0.052], p = 0.003``."""
    text = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    if not with_p:
        return text
    name, p = ("p" if row["q_bh"] is None else "q"), corrected(row)
    return f"{text}, {name} {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def verdict(results: pl.DataFrame, comparisons: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """The three answers of a run on held-out images: ``layer``, ``prompt`` and ``controls``.

    Each has ``answer`` (bool, None where the run does not say) and ``sentence``; ``layer`` also ``chosen``,
    ``chosen_layer``, ``n``, ``seeds`` and ``differences``; ``prompt`` also ``worse``. A claim is true only if every
    comparison that it needs has a 95 % interval above 0 and a corrected p below 0.05.
    """
    held, names = held_comparisons(comparisons), called(results)
    told = {"layer": layer_verdict(held, names), "prompt": prompt_verdict(held, names)}
    return told | {"controls": controls_verdict(held, told["layer"].get("chosen"), names)}


def layer_verdict(held: pl.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    """Does the best mid layer beat the last layer, before and after the final norm, and every floor?"""
    last, floors = asked(held, LAST, NORMED), asked(held, FLOOR)
    if not last:
        sentence = "No verdict: it takes a mid layer and the last one, a probe each, and watched images to choose on."
        return {"answer": None, "sentence": sentence}
    lost = [row for row in [*last, *floors] if not better(row)]
    first = last[0]
    told = [f"{names[row['b']]} {row['value_b']:.3f} ({gap(row)})" for row in last]
    if floors:
        nearest = min(floors, key=lambda row: row["difference"])
        told.append(f"the nearest floor, {names[nearest['b']]}, {nearest['value_b']:.3f} ({gap(nearest)})")
    sentence = (
        f"{'No' if lost else 'Yes'}: {names[first['a']]}, the best mid layer on {first['chosen_on']:,} watched images, "
        f"has {MAIN_NAMES[first['metric']]} {first['value_a']:.3f} on {first['n']:,} others; {'; '.join(told)}."
    )
    if lost:
        sentence += f" It does not clearly beat {listed([names[row['b']] for row in lost])}."
    if len(last) < 2:
        sentence += " The last layer was trained on one side of the final norm only."
    if not floors:
        sentence += " No floor was trained."
    return {
        "answer": not lost,
        "sentence": sentence,
        "chosen": first["a"],
        "chosen_layer": first["layer"],
        "n": first["n"],
        "seeds": first["seeds"],
        "differences": [*last, *floors],
    }


def prompt_verdict(held: pl.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    """Do prompt tokens of the middle layers together beat the best single layer, and what does the 2×2 say?"""
    rows = asked(held, BEST)
    if not rows:
        told = "No verdict: it takes a probe on the prompt tokens of the middle layers, and single layers."
        answer, less = None, False
    else:
        row = rows[0]
        answer, less = better(row), worse(row)
        head = "Yes" if answer else "No, they are worse" if less else "Not clearly"
        told = (
            f"{head}: {names[row['a']]} have {MAIN_NAMES[row['metric']]} {row['value_a']:.3f}, the best single layer, "
            f"{names[row['b']]}, {row['value_b']:.3f} ({gap(row)})."
        )
    return {"answer": answer, "worse": less, "sentence": f"{told} {matched_sentence(held)}".strip()}


def matched_sentence(held: pl.DataFrame) -> str:
    """What the 2×2 with matched keys and parameters says; empty without one."""
    rows = {row["question"]: row for row in asked(held, *EFFECTS)}
    if len(rows) < len(EFFECTS):
        return ""
    tokens, layers, both = (rows[name] for name in EFFECTS)
    causes = [
        f"{words} {'helps' if better(row) else 'harms'}"
        for row, words in ((tokens, "reading prompt tokens alone"), (layers, "reading several layers"))
        if better(row) or worse(row)
    ]
    return (
        f"With keys and parameters matched, prompt tokens instead of all change it by {gap(tokens)}; several layers "
        f"instead of one by {gap(layers)}; interaction {gap(both)}: {listed(causes) or 'neither clearly matters'}."
    )


def controls_verdict(held: pl.DataFrame, chosen: str | None, names: dict[str, str]) -> dict[str, Any]:
    """Is what the layer's probe says the layer's own: more than a control task, and more than random weights?"""
    rows = asked(held, SELECTIVITY, "against random weights")
    if not rows:
        return {"answer": None, "sentence": "No control task and no random-weight model were trained."}
    probe = chosen if any(row["a"] == chosen for row in rows) else max(rows, key=lambda row: row["value_a"])["a"]
    own = {row["question"]: row for row in rows if row["a"] == probe}
    told = []
    if row := own.get(SELECTIVITY):
        told.append(f"selectivity {gap(row)} (the control task reaches {row['value_b']:.3f})")
    if row := own.get("against random weights"):
        told.append(f"random weights reach {row['value_b']:.3f} there, a difference of {gap(row)}")
    sentence = f"{'Yes' if all(map(better, own.values())) else 'Not clearly'}: {names[probe]} has " + "; ".join(told)
    sentence = sentence.replace("has random weights", "is not alone: random weights") if len(own) == 1 else sentence
    return {"answer": all(map(better, own.values())), "sentence": f"{sentence}."}


def paragraph(results: pl.DataFrame, comparisons: pl.DataFrame) -> str:
    """The run in plain words, from its numbers alone; it says no where it is no."""
    told, names = verdict(results, comparisons), called(results)
    final = results.filter(
        pl.col("seed").is_null(), pl.col("step").is_null(), stratum="all", data=HELD_OUT, role="layer"
    ).filter(pl.col("metric").is_in(list(MAIN_NAMES)))
    if final.is_empty():
        return "No layer has a probe in this run, so it says nothing of where the answer lives."
    target = comparisons["target"][0] if comparisons.height else final["target"][0]
    final = final.filter(pl.col("target") == target)
    best, worst = (final.sort("value").row(at, named=True) for at in (-1, 0))
    seeds = f"{best['seeds']} seeds" if best["seeds"] > 1 else "one seed"
    what = "the box" if target == "box" else target
    parts = [
        f"On {best['n']:,} held-out images and {seeds}, {what} is read best from {names[best['probe']]} "
        f"({MAIN_NAMES[best['metric']]} {best['value']:.3f}) and worst from {names[worst['probe']]} "
        f"({worst['value']:.3f})."
    ]
    parts += [layer_words(told["layer"], names), prompt_words(told["prompt"]), controls_words(told["controls"])]
    parts += [few_images(comparisons), code_words(results), shift_words(comparisons)]
    if best["seeds"] == 1:
        parts.append("With one seed nothing here says how much a second training would differ.")
    parts.append("That a probe can read it does not say that the model uses it.")
    return " ".join(part for part in parts if part)


def layer_words(told: dict[str, Any], names: dict[str, str]) -> str:
    """The answer about the layer in plain words."""
    if told["answer"] is None:
        return "Whether the middle knows more than the end, this run cannot say."
    chosen = names[told["chosen"]]
    if told["answer"]:
        return (
            f"On images that took no part in choosing it, {chosen} beats the last layer that was trained and every "
            "floor that was, by interval and by corrected p."
        )
    last = [row for row in told["differences"] if row["question"] in (LAST, NORMED)]
    lost_last = [row for row in last if not better(row)]
    if any(map(worse, last)):
        return (
            f"The middle does not know more than the end: {chosen}, the best mid layer, is worse than the last layer."
        )
    if lost_last:
        return (
            f"That the middle knows more than the end, this run does not show: {chosen}, the best mid layer, does not "
            f"clearly beat {listed([names[row['b']] for row in lost_last])}."
        )
    lost = [names[row["b"]] for row in told["differences"] if not better(row)]
    return f"{chosen.capitalize()} beats the last layer but not every floor: it does not clearly beat {listed(lost)}."


def prompt_words(told: dict[str, Any]) -> str:
    """The answer about prompt tokens in plain words."""
    if told["answer"] is None:
        return ""
    if told["answer"]:
        return "The prompt tokens of the middle layers together beat the best single layer, as the paper found."
    how = "worse than" if told["worse"] else "not clearly better than"
    return (
        "The paper's finding, that prompt tokens of the middle layers together are best, is not seen here: they are "
        f"{how} the best single layer."
    )


def controls_words(told: dict[str, Any]) -> str:
    """The answer about controls in plain words."""
    if told["answer"] is None:
        return ""
    if told["answer"]:
        return (
            "The probe there reads what the layer holds rather than learning it by itself: its controls lie below it."
        )
    return "Its controls are not clearly below it, so the probe may be learning the answer rather than reading it."


def few_images(comparisons: pl.DataFrame) -> str:
    """Sample efficiency: the chosen layer against the last block with the smallest share of the train split."""
    held = held_comparisons(comparisons)
    rows = held.filter(pl.col("question").str.starts_with(f"{MID} last block at share")).to_dicts()
    if not rows:
        return ""
    row = min(rows, key=lambda row: float(row["question"].rsplit(" ", 1)[1]))
    share = float(row["question"].rsplit(" ", 1)[1])
    clear = "" if better(row) or worse(row) else ", which is not clear"
    return f"Taught with {share:.3g} of the images its lead on the last block is {gap(row, with_p=False)}{clear}."


def code_words(results: pl.DataFrame) -> str:
    """The layer whose states make the labels' code shortest."""
    rows = results.filter(metric="compression", labels="true", source="ordinary").sort("value").to_dicts()
    if not rows:
        return ""
    best = rows[-1]
    return (
        f"The labels ({best['target']}) are sent in the fewest bits with {named(best['layer'])}, "
        f"{best['value']:.2f} times fewer than by the uniform code [{best['low']:.2f}, {best['high']:.2f}]."
    )


def shift_words(comparisons: pl.DataFrame) -> str:
    """Whether the lead on the last block holds on other data."""
    rows = comparisons.filter(pl.col("question") == LAST, pl.col("data") != HELD_OUT).to_dicts()
    same = ("target", "kind", "tokens")
    rows = [row for row in rows if all(row[name] == rows[0][name] for name in same)]
    told = [f"{row['data']} {gap(row, with_p=False)}{'' if better(row) else ' (not clear)'}" for row in rows]
    return f"On other data that lead is: {', '.join(told)}." if told else ""
