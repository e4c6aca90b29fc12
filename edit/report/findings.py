"""What an evaluation is asked, and its answers in words with the numbers behind them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from analysis.finding import Drawn, Finding
from analysis.page import Section
from analysis.page.markup import escaped
from analysis.page.tables import table as as_table
from edit.methods import METHODS, MISLOCALIZED, REFERENCE, RIGHT, SECONDS, SHARES, STANDALONE, SUCCESS
from edit.report.evaluation import ABOUT, OUTCOMES, Evaluation
from edit.report.figures import by_objects
from edit.report.grid import p_value
from edit.scores.closing import PLAIN, Closing, Estimate
from probes import statistics

OF_A_PICTURE = ("scene", "instruction", "method", "box", "read", "seconds")
"""Entries of a label that are of its picture alone; the rest is how its method was set."""
MEANINGS = {
    SUCCESS: OUTCOMES[SUCCESS],
    RIGHT: "the right object changed, and nothing else (of the standalone VLM: its box is on that object)",
    MISLOCALIZED: OUTCOMES[MISLOCALIZED],
    "unchanged": OUTCOMES["unchanged"],
    "instruction, accuracy, leakage (0–4)": "the exact judge’s grades: what was asked is there; the right subject "
    "changed; nothing else changed (4 is best)",
    "L2": "mean squared difference of RGB in 0 … 1 outside the true box",
    "LPIPS, filled": "the same grey is put into the box of both pictures",
    "LPIPS, map": "the mean of the spatial map outside the box; not comparable with filled",
    "aligned": "the editor’s own shift and zoom are estimated and undone first",
}


def gap(found: Evaluation, closed: Closing) -> Finding:
    """Whether our box closes the gap, or why not."""
    caveats = [f"Only {found.about['settings']['difficulty']} drawn scenes of one seed were asked."]
    if closed.unpaired:
        caveats.append(f"Left out for want of one of the three methods: {closed.unpaired} of the scenes.")
    return Finding(
        "gap",
        "How much of the gap between the plain editor and the true box does the proxy’s box close?",
        closed.words(),
        tables={"quantities": closed.table()},
        caveats=tuple(caveats),
    )


def methods(
    found: Evaluation, summary: pl.DataFrame, compared: pl.DataFrame, damage: str | None, drawn: Sequence[Drawn]
) -> Finding:
    """Every method's success and damage, and how it stands to the reference."""
    reference = found.reference
    cells = {(row["method"], row["metric"]): row for row in summary.iter_rows(named=True)}

    def told(method: str, metric: str | None) -> str | None:
        row = cells.get((method, metric))
        if row is None or row["mean"] is None:
            return None
        return str(_estimate(row)) if metric in SHARES else _estimate(row).told("{:.5f}")

    own = cells.get((reference, SUCCESS))
    if own is None or not own["n"]:
        answer = f"Nothing is known: {reference} has no scores."
    else:
        answer = f"With {reference}, {told(reference, SUCCESS)} of {own['n']} edits are a success"
        answer += f"; {damage} outside the true box is {told(reference, damage)}." if told(reference, damage) else "."
        for metric in filter(None, (SUCCESS, damage)):
            tests = compared.filter(metric=metric).drop_nulls("p_holm")
            form = "{:+.3f}" if metric == SUCCESS else "{:+.4f}"
            against = [
                f"{row['method']} {Estimate(row['difference'], row['low'], row['high'], row['n']).told(form)}, "
                f"p {p_value(row['p_holm'])}"
                for row in tests.iter_rows(named=True)
            ]
            if against:
                pairs = "–".join(map(str, sorted({tests["n"].min(), tests["n"].max()})))
                answer += f"\n\nIts {metric} less that of others, n = {pairs} pairs: {'; '.join(against)}."
        if len(compared):
            answer += f" All p are by Holm over {compared['p'].count()} tests."
    caveats = []
    if damage is not None and any("random trunk" in name for name in summary["metric"].unique()):
        caveats.append("LPIPS is of a random trunk, no published metric: damage is drawn and said as L2.")
    if lost := int(summary.filter(pl.col("metric") != SECONDS)["missing"].sum()):
        caveats.append(f"Values that are missing: {lost}. Means are of the rest, each with its n.")
    if found.aside:
        reasons = "; ".join(f"`{file}`: {why}" for file, why in list(found.aside.items())[:5])
        more = f"; and {len(found.aside) - 5} more" if len(found.aside) > 5 else ""
        caveats.append(f"Pictures set aside and not shown: {len(found.aside)} ({reasons}{more}).")
    caveats += [
        f"The pictures of {name} were made by {len(kinds)} different settings (see Provenance)."
        for name, kinds in settings_of(found).items()
        if len(kinds) > 1
    ]
    return Finding(
        "methods",
        "Which way of editing does what is asked, and at what cost to the rest of the picture?",
        answer,
        tuple(drawn),
        {"success and damage": summary.filter(pl.col("metric").is_in([SUCCESS, damage]))}
        | {"all means": summary, "all paired tests": compared},
        tuple(caveats),
    )


def strata(found: Evaluation, counted: pl.DataFrame, drawn: Drawn) -> Finding:
    """Where our box helps the plain editor: by task and by number of objects."""
    pairs = _paired(found, REFERENCE, PLAIN)
    told, differences = [], {}
    for by, group in counted.select("by", "group").unique(maintain_order=True).iter_rows():
        sizes = counted.filter(by=by, group=group)
        name = group.replace("_", " ") if by == "task" else f"{group} objects"
        if by in pairs:
            one = pairs[by].get(group)
            if one is not None:
                differences[name] = one
                told.append(f"{name} {one.told('{:+.3f}')} (n = {one.n})")
        elif (own := sizes.filter(method=found.reference)).height:
            told.append(f"{name} {_estimate(own.row(0, named=True))} (n = {own['n'][0]})")
    lead = f"Success of {found.reference} by kind of scene.\n\n"
    if differences:
        best, worst = (pick(differences, key=lambda name: differences[name].value) for pick in (max, min))
        gained, lost = (differences[name].told("{:+.3f}") for name in (best, worst))
        lead = f"Our box changes the plain editor’s success by {gained} in scenes of {best} "
        lead += f"(n = {differences[best].n}), the most, "
        lead += f"and by {lost} in those of {worst} (n = {differences[worst].n}), the least.\n\nAll: "
    return Finding(
        "scenes",
        "In which scenes does the box help: by task, and by how many objects look alike?",
        f"{lead}{'; '.join(told)}. Intervals are not corrected for asking of several groups.",
        (drawn,),
        {"success": counted},
    )


def _paired(found: Evaluation, ours: str, other: str) -> dict[str, dict[str, Estimate]]:
    """By ``task`` and ``objects`` and group, the paired difference of success; empty without one of the methods."""
    if not {ours, other} <= set(found.methods):
        return {}
    wide = found.scores.filter(pl.col("metric") == SUCCESS, pl.col("method").is_in([ours, other])).pivot(
        "method", index="sample", values="value"
    )
    scenes = found.scenes
    known = scenes.with_columns(by_objects(scenes["objects"])).join(wide, on="sample", maintain_order="left")
    known = known.with_columns((pl.col(ours) - pl.col(other)).fill_nan(None).alias("difference")).drop_nulls(
        "difference"
    )
    return {
        by: {
            group: Estimate(*statistics.interval(part["difference"].to_numpy()), len(part))
            for (group,), part in known.group_by(column, maintain_order=True)
        }
        for by, column in (("task", "task"), ("objects", "group"))
    }


def explained(found: Evaluation, summary: pl.DataFrame) -> Section:
    """What each method is and how long it takes, and what the metrics mean."""
    took = {row["method"]: row for row in summary.filter(metric=SECONDS).iter_rows(named=True) if row["n"]}
    rows = [
        {
            "method": name,
            "what_it_is": METHODS[name].about if name in METHODS else "",
            "seconds_a_picture": took.get(name, {}).get("mean"),
            "low": took.get(name, {}).get("low"),
            "high": took.get(name, {}).get("high"),
            "pictures": took.get(name, {}).get("n"),
        }
        for name in found.methods
    ]
    kinds = dict.fromkeys(("seconds_a_picture", "low", "high"), pl.Float64) | {"pictures": pl.Int64}
    rows = pl.DataFrame(rows, schema_overrides=kinds)
    meanings = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(told)}</dd>" for name, told in MEANINGS.items())
    asked = (
        f"<p class='note'>{escaped(STANDALONE)} is no editor: it is the VLM, asked in words for the object’s box.</p>"
    )
    scored = f'<h3>What is scored</h3>\n<dl class="meanings">{meanings}</dl>'
    html = "\n".join([as_table(rows, "Ways to edit", "ways"), asked, scored])
    return Section("explained", "What is compared", html)


def settings_of(found: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """By method, the different settings that its pictures were made by, in the order they come in."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for (_, method), label in found.labels.items():
        settings = {key: value for key, value in label.items() if key not in OF_A_PICTURE}
        kinds.setdefault(method, {})[json.dumps(settings, sort_keys=True)] = settings
    return {method: list(several.values()) for method, several in kinds.items()}


def provenance(found: Evaluation) -> dict[str, Any]:
    """What the page was made of: scenes, settings of every method, files with their hashes, machine."""
    kinds = settings_of(found)
    every = [settings for several in kinds.values() for settings in several]
    common = {key: value for key, value in (every or [{}])[0].items() if all(one.get(key) == value for one in every)}
    own = [
        {"method": method} | {key: _short(value) for key, value in settings.items() if key not in common}
        for method, several in kinds.items()
        for settings in several
    ]
    about: Mapping[str, Any] = found.about
    told = {
        "scenes": {"difficulty": about["settings"]["difficulty"], "seed": about["settings"]["seed"]}
        | {"scenes": len(found.scenes)},
        "of every picture": common,
        "of each method": own,
        "evaluation": {key: value for key, value in about.items() if key not in ("methods", "peak_memory_bytes")},
        "files, SHA-256": found.hashes(),
    }
    if (peak := about.get("peak_memory_bytes")) is not None:
        told["evaluation"]["peak memory of the last run"] = f"{peak / 2**20:,.0f} MiB"
    if found.aside:
        told["set aside"] = found.aside
    return told | {"from": f"{ABOUT} and the labels beside the pictures"}


def _short(value: Any) -> Any:
    """A setting as one cell of a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one is not None)
    return value


def _estimate(row: Mapping[str, Any]) -> Estimate:
    return Estimate(row["mean"], row["low"], row["high"], row["n"])
