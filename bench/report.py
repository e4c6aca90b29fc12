"""The table that people read, and the history that is kept as data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import Row
from store.errors import Refusal

HEAD = ("", "measured", "", "baseline", "", "ratio", "min–max", "good is")


def table(record: dict[str, Any], rows: Sequence[Row]) -> str:
    """All rows in aligned columns, grouped by their part, under the machine they were measured on."""
    cells = [
        (
            row.part,
            row.name,
            _number(row.value, row.unit),
            row.baseline,
            _number(row.baseline_value, row.unit),
            f"{row.ratio:.2f}",
            f"{row.low:.2f}–{row.high:.2f}" if row.repeats > 1 else "",
            row.better,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]
    right = (2, 4, 5)
    lines = [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (HEAD, *cells)
    ]
    for place in range(len(lines) - 1, 1, -1):
        if cells[place - 1][0] == cells[place - 2][0]:
            lines[place] = " " * widths[0] + lines[place][widths[0] :]
    return "\n".join([*_heading(record), "", *lines])


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


def _number(value: float, unit: str) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
