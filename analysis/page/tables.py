"""A table of numbers in HTML: digits that can be compared, columns that can be sorted, all rows as CSV."""

from typing import Any

import numpy as np
import polars as pl

from analysis.page.markup import ABSENT, download, escaped

SHOWN = 200
"""Rows of a finding's first table that are shown; the CSV has all."""
GLANCE = 25
"""Rows that are shown of each further table."""
PRINTED = 30, 16
"""Rows and columns on paper; page.css has the same numbers."""
WIDE = 11
"""Columns; of more the type is smaller on paper."""
SHORT = 32
"""Characters of a text that is not broken into lines."""
LARGEST_CSV = 1_000_000
"""Bytes; a larger table is only named: its file lies beside the report."""
IDENTIFIERS = {"sample", "seed"}
"""Whole numbers that are names: written without separators."""


def table(rows: pl.DataFrame, title: str, name: str, shown: int = SHOWN) -> str:
    """HTML of a table's first ``shown`` rows, in a frame of its own that scrolls, and a link to all of them.

    ``name`` is unique on the page: the table's id, and the name of its CSV and of the parquet file it is a copy of.
    """
    first = rows.head(shown)
    columns = [_Column(first[column]) for column in rows.columns]
    heads = "".join(f'<th scope="col"{column.kind}>{escaped(column.title)}</th>' for column in columns)
    body = "\n".join("<tr>" + "".join(cells) + "</tr>" for cells in zip(*(c.cells() for c in columns), strict=True))
    some = "" if len(rows) <= shown else f"the first {shown:,} of "
    count = f"{some}{len(rows):,} {'row' if len(rows) == 1 else 'rows'}"
    cut = " and ".join(
        f"{most} {side}"
        for most, side, there in zip(PRINTED, ("rows", "columns"), first.shape, strict=True)
        if there > most
    )
    paper = f' <span class="paper">the first {cut} are printed</span>' if cut else ""
    wide = " wide" if len(columns) > WIDE else ""
    return f"""<div class="table">
<p class="about" id="table-{escaped(name)}"><b>{escaped(title)}</b> <span>{count}</span>{paper} {_csv(rows, name)}</p>
<div class="scroll" role="region" tabindex="0" aria-labelledby="table-{escaped(name)}">
<table class="numbers{wide}" aria-labelledby="table-{escaped(name)}">
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</div>"""


def decimals(values: np.ndarray) -> int:
    """Decimals with which a column of floats is written.

    Three significant digits of all but its smallest quarter: at most three decimals, five where every value is small.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)].astype(float))
    if not len(sizes) or np.all(sizes == np.round(sizes)):
        return 0
    wanted = 2 - int(np.floor(np.log10(np.quantile(sizes, 0.25))))
    return int(np.clip(wanted, 0, 3 if sizes.max() >= 0.01 else 5))


def number(value: float, places: int) -> str:
    """Return a number as it is read: 1,040 · −0.031 · 1.2e−9 (where ``places`` would show nothing of it) · NaN."""
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    small = value != 0 and abs(value) < 0.5 * 10**-places
    if small or abs(value) >= 1e12:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:,.{places}f}"
    return text.replace("-", "−")


class _Column:
    """One column: how its values are written, and what they are sorted by."""

    def __init__(self, values: pl.Series):
        self.values, self.title = values, values.name.replace("_", " ")
        self.numeric = values.dtype.is_numeric()
        self.told = values.to_list() if self.numeric else [None if v is None else _told(v) for v in values.to_list()]
        longest = 0 if self.numeric else max((len(text) for text in self.told if text is not None), default=0)
        self.kind = f' class="{"number" if self.numeric else "short" if longest <= SHORT else "long"}"'
        self.places = decimals(values.drop_nulls().to_numpy()) if values.dtype.is_float() else 0

    def cells(self) -> list[str]:
        return [self._cell(value) for value in self.told]

    def _cell(self, value: Any) -> str:
        if value is None:
            return f'<td{self.kind} data-v="">{ABSENT}</td>'
        if not self.numeric:
            return f"<td{self.kind}>{escaped(value)}</td>"
        written = str(value) if self.values.name in IDENTIFIERS else number(float(value), self.places)
        exact = "" if str(value) == written else f' data-v="{value}"'
        return f"<td{self.kind}{exact}>{written}</td>"


def _told(value: Any) -> str:
    """A value that is no number, as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list | pl.Series):
        return ", ".join(ABSENT if one is None else _told(one) for one in value)
    return str(value)


def _csv(rows: pl.DataFrame, name: str) -> str:
    """Return a link to the whole table as CSV, or where it lies if it is too large for a page."""
    told = [
        pl.Series(c.name, [None if v is None else _told(v) for v in c.to_list()], pl.String)
        if c.dtype.is_nested() or c.dtype in (pl.Binary, pl.Object)
        else c
        for c in rows
    ]
    content = pl.DataFrame(told).write_csv().encode()
    if len(content) > LARGEST_CSV:
        return f"<span>all rows: <code>{escaped(name)}.parquet</code> beside this page</span>"
    return download(content, "text/csv", f"{name}.csv", "CSV")
