"""The table of scores in HTML: a row a method, a column a metric; in a cell mean ± SEM, interval and paired test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis.page import Section
from analysis.page.markup import ABSENT, download, escaped
from analysis.page.tables import decimals, number
from edit.methods import SECONDS, SHARES

LEVEL = 0.05
Cells = Mapping[tuple[str, str], dict[str, Any]]


def section(summary: pl.DataFrame, compared: pl.DataFrame, markdown: str) -> Section:
    """The tables, each with metrics of one kind."""
    metrics = summary["metric"].unique(maintain_order=True).to_list()
    judged = [name for name in metrics if ", judge " in name]
    shares = [name for name in SHARES if name in metrics]
    grades = [*(name for name in metrics if "(0–4)" in name), *judged]
    outside = [name for name in metrics if name not in (*shares, *grades, SECONDS)]
    cells = {(row["method"], row["metric"]): row for row in summary.iter_rows(named=True)}
    tests = {(row["method"], row["metric"]): row for row in compared.iter_rows(named=True)}
    kinds = {"What became of the object": shares, "Outside the true box": outside, "Grades from 0 to 4": grades}
    tables = [_table(title, names, cells, tests) for title, names in kinds.items() if names]
    reference = compared["reference"][0] if len(compared) else None
    note = "Mean ± 1 SEM (ddof 1) over scenes; [95 % interval] by bootstrap, Wilson’s for shares."
    if reference is not None:
        note += f" Below: {reference} less the method on the same scenes, and its p by exact McNemar for shares and by "
        note += f"sign flips else, Holm over all {compared['p'].count()} tests of these tables; in bold below {LEVEL}."
    link = download(markdown.encode(), "text/markdown", "table.md", "Markdown")
    html = "\n".join([f'<p class="note">{escaped(note)} {link}</p>', *tables])
    return Section("table", "Table", html)


def _table(title: str, metrics: Sequence[str], cells: Cells, tests: Cells) -> str:
    methods = list(dict.fromkeys(method for method, metric in cells if metric in metrics))
    most = max((cells[key]["n"] for key in cells if key[1] in metrics), default=0)
    places = {
        name: 3 if name in SHARES else _places([row for key, row in cells.items() if key[1] == name])
        for name in metrics
    }
    heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in metrics)
    rows = "\n".join(
        f'<tr><th scope="row">{escaped(method)}</th>'
        + "".join(_cell(cells.get((method, name)), tests.get((method, name)), most, places[name]) for name in metrics)
        + "</tr>"
        for method in methods
    )
    return f"""<h3>{escaped(title)} <span class="quiet">n = {most:,} where nothing else is said</span></h3>
<div class="scroll" role="region" tabindex="0" aria-label="{escaped(title)}">
<table class="grid"><thead><tr><th scope="col">method</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


def _places(rows: Sequence[dict[str, Any]]) -> int:
    """Decimals by which a column's errors can be told apart."""
    errors = np.array([row["sem"] for row in rows if row["sem"]])
    return decimals(errors) if len(errors) else 3


def _cell(row: dict[str, Any] | None, test: dict[str, Any] | None, most: int, places: int) -> str:
    if row is None or row["mean"] is None:
        return f"<td>{ABSENT}</td>"
    lines = [
        f"<b>{number(row['mean'], places)}</b>" + ("" if row["sem"] is None else f" ± {number(row['sem'], places)}")
    ]
    if row["low"] is not None:
        lines.append(f"<span>[{number(row['low'], places)}, {number(row['high'], places)}]</span>")
    if row["n"] != most:
        lines.append(f"<span>n = {row['n']:,}</span>")
    if test is not None and test["p_holm"] is not None:
        sign = "+" if test["difference"] > 0 else ""
        told = f"{sign}{number(test['difference'], places)}, p {p_value(test['p_holm'])}"
        lines.append(f"<b class='test'>{told}</b>" if test["p_holm"] < LEVEL else f"<span>{told}</span>")
    return f"<td>{'<br>'.join(lines)}</td>"


def p_value(p: float) -> str:
    """As it is read: = 0.31, = 0.004, < 0.001."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.01 else f"= {p:.2f}"
