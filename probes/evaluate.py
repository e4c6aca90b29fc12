"""``python -m probes evaluate``: the table of a finished run, its verdict, and a paragraph that says what it shows."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from probes.comparisons import SELECTIVITY
from probes.config import EvaluateConfig
from probes.panel import HELD_OUT, MAIN
from probes.verdict import MAIN_NAMES, natural, paragraph, verdict
from store.errors import Refusal

COLUMNS = {
    "iou": ("iou_at_0.5", "centre_distance"),
    "accuracy": ("bits",),
    "r2": ("absolute_error",),
}
"""Main metric → what stands beside it in the table."""
HEADS = {
    "iou_at_0.5": "IoU@0.5",
    "centre_distance": "centre/diag",
    "bits": "bits",
    "absolute_error": "abs. error",
}
QUESTIONS = {
    "layer": "Does the best mid layer beat the last layer, before and after the final norm, and every floor?",
    "prompt": "Do prompt tokens of the middle layers together beat the best single layer?",
    "controls": "Is it the layer's own: more than a control task, and than a model of random weights?",
}
ROLES = ("floor", "layer", "prompt", "matched", "other")
"""Roles that get a row of the table, in order; controls stand beside their layer, shares and codes below."""


class Run(NamedTuple):
    """The tables of a finished run."""

    results: pl.DataFrame
    comparisons: pl.DataFrame
    about: pl.DataFrame
    predictions: pl.DataFrame


def read_run(out: Path) -> Run:
    """The tables of a finished run.

    Raises
    ------
    Refusal
        When the folder lacks one.
    """
    paths = {name: Path(out) / f"{name}.parquet" for name in Run._fields}
    missing = [path.name for path in paths.values() if not path.exists()]
    if missing:
        raise Refusal(f"{out} lacks {', '.join(missing)}: run `python -m probes sweep --out {out}` to its end first")
    return Run(*map(pl.read_parquet, paths.values()))


def final_table(results: pl.DataFrame, data: str = HELD_OUT, stratum: str = "all") -> pl.DataFrame:
    """One row per probe over all its seeds: what it is, n, seeds, and each metric with ``_low`` and ``_high``."""
    rows = results.filter(pl.col("seed").is_null(), pl.col("step").is_null(), data=data, stratum=stratum)
    identity = ["probe", "role", "kind", "layer", "tokens", "target", "labels", "source", "share", "keys"]
    out: dict[str, dict[str, Any]] = {}
    for row in rows.iter_rows(named=True):
        own = out.setdefault(row["probe"], {name: row[name] for name in [*identity, "data", "n", "seeds"]})
        own |= {row["metric"]: row["value"], f"{row['metric']}_low": row["low"], f"{row['metric']}_high": row["high"]}
    return pl.DataFrame(list(out.values()), infer_schema_length=None)


def evaluate(config: EvaluateConfig) -> None:
    """Print a row per probe with its 95 % intervals, the verdict, and what the run shows in plain words."""
    if config.on:
        # Not at the top: to print a table takes no model.
        from probes import gathering, shifts

        for on in config.on:
            shifts.ask(config.out, on)
        gathering.gather(config.out)
    run = read_run(config.out)
    told, words = verdict(run.results, run.comparisons), paragraph(run.results, run.comparisons)
    data = run.results["data"].unique(maintain_order=True).to_list()
    if config.json:
        probes = [row for name in data for row in final_table(run.results, name).to_dicts()]
        print(
            json.dumps(
                {"probes": probes, "comparisons": run.comparisons.to_dicts(), "verdict": told, "paragraph": words}
            )
        )
        return
    for name in data:
        print("\n".join(["", *table(run.results, run.comparisons, name)]))
    for part, question in QUESTIONS.items():
        print(f"\n{question}\n{told[part]['sentence']}")
    print(f"\n{words}")


def table(results: pl.DataFrame, comparisons: pl.DataFrame, data: str = HELD_OUT) -> list[str]:
    """The lines of the table of one data set: floors, layers in the order of the pass with their controls, the rest."""
    whole = final_table(results, data)
    if whole.is_empty():
        return [f"no probe has an answer on {data} images"]
    lines: list[str] = []
    for target in whole["target"].unique(maintain_order=True):
        rows = whole.filter(pl.col("target") == target).to_dicts()
        main = next((name for name in MAIN.values() if any(row.get(name) is not None for row in rows)), None)
        if main:
            asked = comparisons.filter(pl.col("data") == data, pl.col("target") == target)
            lines += [caption(target, data, asked), *target_lines(rows, main, asked)]
        lines += code_lines(rows)
    return lines


def caption(target: str, data: str, comparisons: pl.DataFrame) -> str:
    """What the intervals are of, and on how many images selectivity is."""
    n = comparisons.filter(pl.col("question") == SELECTIVITY)["n"]
    unseen = f"; selectivity on the {n.max():,} images that chose nothing" if len(n) and data == HELD_OUT else ""
    return f"{target} on {data} images; 95 % intervals over seeds and images{unseen}"


def target_lines(rows: list[dict[str, Any]], main: str, comparisons: pl.DataFrame) -> list[str]:
    """The table of one target."""
    selectivity = {row["a"]: row for row in comparisons.filter(pl.col("question") == SELECTIVITY).iter_rows(named=True)}
    shown = sorted(
        (row for row in rows if row["role"] in ROLES and row.get(main) is not None),
        key=lambda row: (ROLES.index(row["role"]), natural(row["layer"]) if row["role"] == "layer" else (0, "")),
    )
    beside = {
        "random": {"source": "random-weights"},
        "shuffled": {"source": "shuffled-images"},
        "permuted": {"labels": "permuted"},
    }
    twins = {
        head: {row["probe"]: twin_value(rows, row, main, wanted) for row in shown} for head, wanted in beside.items()
    }
    twins = {head: values for head, values in twins.items() if any(value is not None for value in values.values())}
    cells = [["probe", "reads", "n", "seeds", MAIN_NAMES[main], *(HEADS[name] for name in COLUMNS[main])]]
    cells[0] += [*(["selectivity"] if selectivity else []), *twins]
    for row in shown:
        reads = f"{row['tokens']} @ {row['layer']}" if row["tokens"] != "none" else "nothing"
        line = [row["probe"], reads, str(row["n"]), str(row["seeds"])]
        line += [f"{row[main]:.3f} [{row[f'{main}_low']:.3f}, {row[f'{main}_high']:.3f}]"]
        line += [f"{row[name]:.3f}" for name in COLUMNS[main]]
        if selectivity:
            own = selectivity.get(row["probe"])
            line.append(f"{own['difference']:+.3f} [{own['low']:+.3f}, {own['high']:+.3f}]" if own else "")
        line += ["" if values[row["probe"]] is None else f"{values[row['probe']]:.3f}" for values in twins.values()]
        cells.append(line)
    return aligned(cells) + share_lines(rows, main)


def twin_value(rows: list[dict], own: dict, main: str, wanted: dict[str, str]) -> float | None:
    """The main metric of the layer's control that differs in what is wanted."""
    if own["role"] != "layer":
        return None
    same = {name: own[name] for name in ("kind", "tokens", "layer", "share", "labels", "source")} | wanted
    return next((row[main] for row in rows if all(row[name] == value for name, value in same.items())), None)


def aligned(cells: list[list[str]]) -> list[str]:
    """Cells in columns, two blanks apart; counts to the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            text.rjust(width) if cells[0][i] in ("n", "seeds") else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def share_lines(rows: list[dict[str, Any]], main: str) -> list[str]:
    """Sample efficiency: the main metric by share of the train split, a line per layer."""
    by_layer: dict[str, dict[float, dict]] = {}
    for row in rows:
        if row["role"] == "efficiency" and row.get(main) is not None:
            by_layer.setdefault(row["layer"], {})[row["share"]] = row
    if not by_layer:
        return []
    for row in rows:
        if row["role"] == "layer" and row["layer"] in by_layer and row.get(main) is not None:
            by_layer[row["layer"]].setdefault(1.0, row)
    shares = sorted({share for of_layer in by_layer.values() for share in of_layer})
    cells = [[f"{MAIN_NAMES[main]} by share of the train split", "n", "seeds", *(f"{share:.4g}" for share in shares)]]
    for layer in sorted(by_layer, key=natural):
        some = next(iter(by_layer[layer].values()))
        line = [f"layer {layer}", str(some["n"]), str(some["seeds"])]
        for share in shares:
            row = by_layer[layer].get(share)
            line.append("" if row is None else f"{row[main]:.3f} [{row[f'{main}_low']:.3f}, {row[f'{main}_high']:.3f}]")
        cells.append(line)
    return ["", *aligned(cells)]


def code_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Codelengths of the labels: a line per layer."""
    coded = sorted((row for row in rows if row.get("compression") is not None), key=lambda row: natural(row["layer"]))
    if not coded:
        return []
    cells = [[f"online code of {coded[0]['target']}", "n", "seeds", "bits", "uniform", "compression"]]
    for row in coded:
        ends = f"[{row['compression_low']:.3f}, {row['compression_high']:.3f}]"
        numbers = [f"{row['codelength']:.0f}", f"{row['uniform_codelength']:.0f}", f"{row['compression']:.3f} {ends}"]
        cells.append([row["probe"], str(row["n"]), str(row["seeds"]), *numbers])
    return ["", *aligned(cells)]
