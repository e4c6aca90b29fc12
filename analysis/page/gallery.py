"""The gallery in HTML: a card a sample, with what the filters of the page ask for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis.page.markup import ABSENT, data_uri, escaped
from analysis.page.tables import number
from store.errors import Refusal

NEEDED = (
    "sample",
    "sample_id",
    "instruction",
    "task",
    "split",
    "area",
    "l_star",
    "hit",
    "energy",
    "words",
    "picture",
    "overlay",
)
PRINTED = 12
"""Cards on paper; page.css has the same number."""
CLAMP = 140
"""Characters of an instruction that are shown before its reader asks for more."""


def cards(samples: pl.DataFrame) -> str:
    """HTML of the filters and of all cards, in the order of ``samples``.

    Raises
    ------
    Refusal
        When a column is missing.
    """
    for column in NEEDED:
        if column not in samples.columns:
            raise Refusal(f"the gallery has no column {column!r}: it needs {', '.join(NEEDED)}")
    if not len(samples):
        return '<p class="empty">No sample was drawn.</p>'
    rows = [_Sample(row) for row in samples.iter_rows(named=True)]
    return filtered(_legend(samples.columns), *_filters(rows), [_card(place, one) for place, one in enumerate(rows)])


def filtered(legend: str, fields: str, orders: Mapping[str, str], drawn: Sequence[str], kind: str = "") -> str:
    """HTML of cards that the page's script filters and sorts.

    Parameters
    ----------
    legend
        HTML above.
    fields
        HTML of the filters. A ``select`` called X shows the cards whose ``data-X`` is its value, or has it as a line.
    orders
        What cards can be sorted by, a name of their data with a minus for the largest first, and what that is called.
    drawn
        The cards: ``li`` of class ``card`` with ``data-order``, their place, and an ``instruction``.
    kind
        Class of their list.
    """
    options = "".join(f'<option value="{key}">{escaped(label)}</option>' for key, label in orders.items())
    more = f'<p class="paper">The first {PRINTED} are printed.</p>' if len(drawn) > PRINTED else ""
    cards = "\n".join(drawn)
    return f"""{legend}
<form id="filters" role="search" aria-label="Samples" hidden>
{fields}
<label class="wide">Instruction has <input type="search" name="text" autocomplete="off" dir="auto"></label>
<label>Sorted by <select name="sort">{options}</select></label>
<button type="button">Clear</button>
</form>
<p id="count" role="status">{len(drawn):,} of {len(drawn):,} shown</p>
{more}
<p id="none-fits" class="empty" hidden>No sample fits these filters.</p>
<ul id="cards"{f' class="{kind}"' if kind else ""}>
{cards}
</ul>"""


class _Sample:
    """One row as it is shown and filtered: null and NaN are absent."""

    def __init__(self, row: dict[str, Any]):
        self.row = row
        self.layer, self.task, self.split = (
            ABSENT if row[name] is None else str(row[name]) for name in ("l_star", "task", "split")
        )
        hit = _finite(row["hit"])  # where several places are highest alike, the share of them in the box
        self.outcome = ABSENT if hit is None else "hit" if hit >= 0.5 else "miss"
        iou = _finite(row.get("iou"))
        self.error = None if iou is None else 1 - iou
        self.area = _finite(row["area"])
        self.energy, chance = (_short(_finite(row.get(name))) for name in ("energy", "chance_energy"))
        self.energy += "" if chance == ABSENT else f" (chance {chance})"


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _legend(columns: list[str]) -> str:
    error = " <b>Error</b>: 1 − IoU of the proxy’s box and the true one." if "iou" in columns else ""
    return f"""<p class="note"><b>l*</b>: the layer that the proxy reads the place from. <b>Hit</b>: the map’s highest
point lies in the true box. <b>Energy</b>: share of the map inside it.{error} <b>Area</b>: the box’s share of the
picture. Solid outline: the true box; dashed: the guessed one.</p>"""


def _filters(samples: list[_Sample]) -> tuple[str, dict[str, str]]:
    """The fields, and the orders."""
    selects = (
        select("task", "Task", sorted({one.task for one in samples})),
        select("l", "Layer l*", sorted({one.layer for one in samples}, key=_layer_order)),
        select("split", "Split", sorted({one.split for one in samples})),
        select("outcome", "Outcome", [word for word in ("hit", "miss") if word in {one.outcome for one in samples}]),
    )
    ranges, orders = [_range("area", "Box area, %", 100)], {"order": "as drawn"}
    if any(one.error is not None for one in samples):
        ranges.append(_range("error", "Error", 1))
        orders |= {"-error": "largest error", "error": "smallest error"}
    return "".join(selects) + "".join(ranges), orders | {"-area": "largest box", "area": "smallest box"}


def _layer_order(layer: str) -> tuple[int, int, str]:
    """The embeddings, the blocks by number, the final norm, none."""
    return {"embed": 0, "final": 2, ABSENT: 3}.get(layer, 1), int(layer) if layer.isdecimal() else 0, layer


def select(name: str, label: str, values: Sequence[str]) -> str:
    """A filter by ``data-NAME``."""
    options = "".join(f'<option value="{escaped(value)}">{escaped(words(value))}</option>' for value in values)
    return f'<label>{label} <select name="{name}"><option value="">all</option>{options}</select></label>\n'


def _range(name: str, label: str, top: int) -> str:
    ends = " – ".join(
        f'<input type="number" name="{name}-{end}" aria-label="{label}, {word}" min="0" max="{top}" step="any" '
        f'inputmode="decimal" placeholder="{place}">'
        for end, word, place in (("from", "at least", 0), ("to", "at most", top))
    )
    return f'<fieldset><legend>{label}</legend><span class="range">{ends}</span></fieldset>\n'


def _card(place: int, sample: _Sample) -> str:
    row = sample.row
    percent = None if sample.area is None else f"{number(100 * sample.area, 1)} %"
    facts = [("l*", sample.layer), ("area", percent)]
    facts += [("energy", sample.energy)] + ([("error", _short(sample.error))] if "iou" in row else [])
    facts += [("objects", row["n_objects"])] if row.get("n_objects") is not None else []
    facts += [("task", words(sample.task)), ("split", sample.split), ("words", row["words"])]
    listed = "".join(
        f'<div class="{key.strip("*")}"><dt>{key}</dt> <dd dir="auto">{escaped(value)}</dd></div>'
        for key, value in facts
    )
    data = {"order": place, "task": sample.task, "l": sample.layer, "split": sample.split, "outcome": sample.outcome}
    data |= {"area": sample.area, "error": sample.error}
    attributes = " ".join(f'data-{key}="{"" if value is None else escaped(value)}"' for key, value in data.items())
    mark = {"hit": "✓ hit", "miss": "✕ miss"}.get(sample.outcome, ABSENT)
    return f"""<li class="card" {attributes}>
<div class="pictures">
{_picture(row["overlay"], "overlay", f"Sample {row['sample']} with its map")}
{_picture(row["picture"], "plain", f"Sample {row['sample']}, the plain picture")}
</div>
<p class="which"><span class="outcome {sample.outcome}">{mark}</span> <bdi>{escaped(row["sample_id"])}</bdi></p>
{instruction(row["instruction"])}
<dl>{listed}</dl>
</li>"""


def words(name: str) -> str:
    """Return a task's name as it is read."""
    return name.replace("_", " ")


def _short(value: float | None) -> str:
    return ABSENT if value is None else number(value, 2)


def _picture(content: bytes | None, kind: str, alt: str) -> str:
    if content is None:
        return f'<span class="{kind} lost">no picture</span>'
    return f'<img class="{kind}" src="{data_uri(content, "image/jpeg")}" alt="{escaped(alt)}" decoding="async">'


def instruction(text: str | None) -> str:
    """The whole instruction; a long one opens on demand."""
    if text is None or len(text) <= CLAMP:
        return f'<p class="instruction" dir="auto">{escaped(text)}</p>'
    start = escaped(text[:CLAMP].rstrip())
    return f"""<details class="instruction" dir="auto"><summary><span class="clip">{start}… </span></summary>
<p dir="auto">{escaped(text)}</p></details>"""
