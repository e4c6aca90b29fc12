"""The table that people read, and the history that is kept as data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import Row
from store.errors import Refusal

HEAD = ("measured", "", "baseline", "", "ratio", "min–max", "good is", "goal", "")
RIGHT = (1, 3, 4)
"""Columns of numbers."""


def table(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """All rows in aligned columns, part by part, under the machine they were measured on; then the goals missed."""
    judged = not record["settings"]["quick"]
    parts: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(_cells(row, judged))
    lines = [HEAD, *(line for of in parts.values() for line in of)]
    # A note may be long, and nothing stands behind it.
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)] + [0]
    printed = [*_heading(record), "", _line(HEAD, widths)]
    for part, of in parts.items():
        printed += ["", part, *(_line(line, widths) for line in of)]
    return "\n".join([*printed, *(_verdict(rows) if judged else [])])


def keep(record: dict[str, Any], folder: Path) -> Path:
    """Append ``record`` to the JSON list of its day and machine, and say where that is.

    Raises
    ------
    Refusal
        The file is there and holds something else.
    """
    path = folder / f"{record['time'][:10]}-{record['slug']}.json"
    try:
        kept = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        kept = None
    if not isinstance(kept, list):
        raise Refusal(f"{path} is not a list of bench results: move it away, or give another --history")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*kept, record], indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def _heading(record: dict[str, Any]) -> list[str]:
    machine, settings = record["machine"], record["settings"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, "
        f"torch {machine['torch']} with --threads {settings['threads']}, commit {record['commit'] or 'unknown'}",
        f"{record['time']}, {record['weights']} pocket weights, --repeats {settings['repeats']}",
    ]
    return [*lines, f"note: {record['note']}"] if record["note"] else lines


def _verdict(rows: Sequence[Row]) -> list[str]:
    promised = [row for row in rows if row.met is not None]
    missed = [f"  {row.part}: {row.name} / {row.baseline}: {_ratio(row.ratio)}" for row in promised if not row.met]
    met = f"{len(promised) - len(missed)} of {len(promised)} goals met"
    return ["", f"{met}; missed:" if missed else met, *missed]


def _cells(row: Row, judged: bool) -> tuple[str, ...]:
    if row.ratio is None:
        return (row.name, "–", row.baseline, "–", "–", "", "", "", row.note)
    goal = "" if row.goal is None else f"{'≥' if row.better == 'more' else '≤'} {row.goal:.2f}"
    if goal and judged:
        goal += " met" if row.met else " MISSED"
    return (
        row.name,
        _number(row.value, row.unit),
        row.baseline,
        _number(row.baseline_value, row.unit),
        _ratio(row.ratio),
        f"{_ratio(row.low)}–{_ratio(row.high)}" if row.repeats > 1 else "",
        row.better,
        goal,
        row.note,
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    placed = zip(cells, widths, range(len(cells)), strict=True)
    aligned = (cell.rjust(width) if place in RIGHT else cell.ljust(width) for cell, width, place in placed)
    return "  " + "  ".join(aligned).rstrip()


def _ratio(ratio: float) -> str:
    return f"{ratio:,.{0 if ratio >= 100 else 1 if ratio >= 10 else 2 if ratio >= 1 else 3}f}"


def _number(value: float, unit: str) -> str:
    digits = 0 if value >= 100 or not unit else 1 if value >= 10 else 3 if unit == "×" else 2
    return f"{value:,.{digits}f} {unit}".rstrip()
