"""``python -m edit report``: the page, the table and the figures of an evaluation, made again from disk."""

import json
from pathlib import Path

import polars as pl

from analysis import page
from edit.config import ReportConfig
from edit.judges.questions import QUESTIONS
from edit.methods import METHODS, MISLOCALIZED, RIGHT, RIGHT_BOX, SECONDS, SHARES, SUCCESS
from edit.report import figures, findings, gallery, grid
from edit.report.evaluation import Evaluation, read
from edit.scores import table
from edit.scores.closing import closing
from store.places import write_file

FOLDER = "report"
"""Of figures and tables, beside the page."""


def report(config: ReportConfig) -> Path:
    """Write ``report.html``, ``table.md`` and the folder ``report``, and say what came out.

    The same files on disk give the same bytes.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    Refusal
        What the evaluation left is missing, damaged or of several evaluations.
    """
    found = read(config.out, config.verdicts)
    summary, compared = tables(found)
    closed = closing(found.scores)
    text = markdown(found, summary, compared)
    folder = found.out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    judged = ["--verdicts", *map(str, config.verdicts)] if config.verdicts else []
    making = {"command": ["python", "-m", "edit", "report", "--out", str(config.out), *judged]} | found.hashes()
    metrics = summary["metric"].unique(maintain_order=True).to_list()
    damage = figures.damage_metric(metrics)
    shown = gallery.section(found, config.gallery, damage) if config.gallery else None
    drawn = []
    if damage is not None and SUCCESS in metrics:
        grades = [f"{QUESTIONS[0]}, judge {judge}" for judge in found.judges]
        drawn.append(figures.scatter(summary, damage, grades, folder, making))
    asked = [findings.gap(found, closed), findings.methods(found, summary, compared, damage, drawn)]
    counted = figures.strata(found.scores, found.scenes)
    if len(counted):
        asked.append(findings.strata(found, counted, figures.strata_figure(counted, folder, making)))
    for one in asked:
        one.save(folder)
    first, *rest = asked
    parts = [first, grid.section(summary, compared, text), *rest, *([shown] if shown else [])]
    parts.append(findings.explained(found, summary))
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    settings = found.about["settings"]
    title = f"Does the recovered box steer the editor? {len(found.scenes):,} {settings['difficulty']} scenes"
    written = page.assemble(found.out, title, parts, folder, findings.provenance(found), style)
    write_file(found.out / "table.md", text.encode())
    if config.json:
        told = {
            "n": len(found.scenes),
            "page": str(written),
            "gap": closed.table().to_dicts(),
            "answer": closed.words(),
        }
        told |= {"summary": summary.to_dicts(), "comparisons": compared.to_dicts(), "set_aside": found.aside}
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(f"{in_short(summary, damage)}\n\n{closed.words()}\n\nreport  {written}")
        for file, why in found.aside.items():
            print(f"  set aside  {file}: {why}")
    return written


def tables(found: Evaluation) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Means of everything, and the reference against the others in all but whose box it is and how long it took."""
    metrics = set(found.scores["metric"])
    shares = [name for name in SHARES if name in metrics]
    summary = table.summary(found.scores, shares)
    tested = found.scores.filter(~pl.col("metric").is_in([RIGHT_BOX, SECONDS]))
    if found.reference not in set(tested["method"]):
        return summary, pl.DataFrame(schema=table.COMPARISONS)
    return summary, table.comparisons(tested, found.reference, [name for name in shares if name != RIGHT_BOX])


def in_short(summary: pl.DataFrame, damage: str | None) -> str:
    """What a terminal has room for: a line a method, the shares with their intervals; ``table.md`` has all of it."""
    columns = [name for name in (RIGHT, SUCCESS, MISLOCALIZED, damage) if name in set(summary["metric"])]
    rows = [["", "n", *columns]]
    for (method,), of_method in summary.group_by("method", maintain_order=True):
        known = {row["metric"]: row for row in of_method.filter(pl.col("mean").is_not_null()).iter_rows(named=True)}
        if known:
            n = max(row["n"] for row in known.values())
            rows.append([method, str(n), *(_mean(known.get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _mean(row: dict | None) -> str:
    if row is None:
        return "–"
    digits = 3 if row["metric"] in SHARES else 5
    interval = "" if row["low"] is None else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{row['mean']:.{digits}f}{interval}"


def markdown(found: Evaluation, summary: pl.DataFrame, compared: pl.DataFrame) -> str:
    """``table.md``."""
    settings = found.about["settings"]
    head = f"{len(found.scenes)} {settings['difficulty']} scenes of seed {settings['seed']}."
    told = "\n".join(f"* {name}: {METHODS[name].about}" for name in found.methods if name in METHODS)
    return "\n\n".join((head, table.markdown(summary, compared), told)) + "\n"
