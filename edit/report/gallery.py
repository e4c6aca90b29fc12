"""The gallery in HTML: a row a scene, the source and every method's picture side by side, with boxes and outcomes."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from PIL import Image

from analysis.page import Section
from analysis.page.gallery import filtered, instruction, select, words
from analysis.page.markup import ABSENT, data_uri, escaped
from analysis.page.tables import number
from edit.methods import METHODS, REFERENCE, RIGHT_BOX
from edit.report.evaluation import OUTCOMES, Evaluation
from edit.scores.closing import PLAIN, TRUE
from extract.omniedit import BadSample, decode
from store.places import within

SIDES = (256, 208, 168, 128)
"""Longer sides in pixels that pictures are shown at: the largest at which all of them fit."""
LARGEST = 6_500_000
"""Bytes of all pictures; a third more in the page."""
QUALITY = 82
MARKS = {"success": "✓", "leaked": "≈", "mislocalized": "✕", "otherwise": "≠", "unchanged": "=", "not scored": ABSENT}
FIRST = (PLAIN, REFERENCE, TRUE)
"""What the question is about comes beside the source."""
RIGHT, WRONG = "right box", "wrong box"


@dataclass
class Shot:
    """One picture of a row."""

    title: str
    file: str
    outcome: str | None = None
    """Of a method; null for the source."""
    box: Sequence[float] | None = None
    """That was drawn, in pixels of the source."""
    facts: list[str] = field(default_factory=list)
    picture: Image.Image | None = None
    """Null where it cannot be shown."""
    scene: tuple[int, int] | None = None
    """Width and height of the source."""


def chosen(outcomes: pl.DataFrame, reference: str, count: int) -> list[str]:
    """Samples to show, taken in turn from every outcome of the reference, in their own order."""
    own = outcomes.filter(method=reference).with_row_index("place")
    turns = own.with_columns(pl.int_range(pl.len()).over("outcome").alias("turn"))
    return turns.sort("turn", "place").head(count).sort("place")["sample"].to_list()


def section(found: Evaluation, count: int, damage: str | None) -> Section:
    """The rows of up to ``count`` scenes; a picture that cannot be read is added to what is set aside."""
    outcomes, reference = found.outcomes(), found.reference
    samples = chosen(outcomes, reference, count)
    became = {(sample, method): outcome for sample, method, outcome in outcomes.iter_rows()}
    values = {
        (sample, method, metric): value
        for sample, method, metric, value in found.scores.filter(pl.col("sample").is_in(samples)).iter_rows()
        if value is not None and math.isfinite(value)
    }
    scenes = {row["sample"]: row for row in found.scenes.filter(pl.col("sample").is_in(samples)).iter_rows(named=True)}
    rows = [list(_shots(found, scenes[sample], became, values, damage)) for sample in samples]
    encoded = _encoded(rows)
    drawn = [
        _row(place, scenes[sample], shots, encoded, values, reference, damage)
        for place, (sample, shots) in enumerate(zip(samples, rows, strict=True))
    ]
    boxes = [word for word in (RIGHT, WRONG) if any(f'data-box="{word}"' in row for row in drawn)]
    fields = select("task", "Task", sorted({scenes[sample]["task"] for sample in samples}))
    fields += _outcome_select([(method, became[sample, method]) for sample in samples for method in found.methods if
                               (sample, method) in became])  # fmt: skip
    fields += select("box", f"Box of {reference}", boxes) if boxes else ""
    orders = {"order": "scene"}
    if damage is not None:
        orders |= {"-damage": f"most damage by {reference}", "damage": f"least damage by {reference}"}
    all_of = f"All {len(found.scenes):,} scenes"
    if len(samples) < len(found.scenes):
        all_of = (
            f"{len(samples):,} of {len(found.scenes):,} scenes, taken in turn from every outcome of {reference}, so "
        )
        all_of += "that failures are shown as well: how often each comes says nothing here"
    count_told = f"{len(samples):,} {'scene' if len(samples) == 1 else 'scenes'} to look at"
    return Section("samples", "Side by side", filtered(_legend(all_of), fields, orders, drawn, "rows"), count_told)


def _legend(chosen_how: str) -> str:
    meant = "; ".join(f"<b>{MARKS[name]} {name}</b>: {escaped(told)}" for name, told in OUTCOMES.items())
    return f"""<p class="note">{escaped(chosen_how)}. Each row scrolls by itself. {meant}.</p>
<p class="switches"><label><input type="checkbox" id="show-true" checked> true box on the source</label>
<label><input type="checkbox" id="show-drawn" checked> the box that each method was given</label></p>"""


def _shots(
    found: Evaluation,
    scene: Mapping[str, Any],
    became: Mapping[tuple[str, str], str],
    values: Mapping[tuple[str, str, str], float],
    damage: str | None,
) -> Iterator[Shot]:
    """The source, then every method that has the scene."""
    sample = scene["sample"]
    source = Shot("source", scene["source"], box=[scene[name] for name in ("x1", "y1", "x2", "y2")])
    source.picture = _picture(found, source.file)
    source.scene = source.picture.size if source.picture else None
    yield source
    edited = dict(found.items.filter(sample=sample).select("method", "edited").iter_rows())
    for method, file in sorted(edited.items(), key=lambda one: one[0] not in FIRST):
        box = found.labels.get((sample, method), {}).get("box")
        shot = Shot(method, file, became[sample, method], box, scene=source.scene)
        shot.picture = _picture(found, file)
        if (one := values.get((sample, method, damage))) is not None:
            shot.facts.append(f"{damage.split(' (')[0].split(',')[0]} {number(one, 4)}")
        if (one := values.get((sample, method, RIGHT_BOX))) is not None:
            shot.facts.append(RIGHT if one else WRONG)
        for judge in found.judges:
            grades = [values.get((sample, method, f"{name}, judge {judge}")) for name in ("edit", "subject", "leakage")]
            if None not in grades:
                shot.facts.append(f"{judge} {'/'.join(f'{grade:.0f}' for grade in grades)}")
        yield shot


def _picture(found: Evaluation, file: str) -> Image.Image | None:
    """A picture at the largest size that is shown; null if it is set aside, now or before."""
    if file in found.aside:
        return None
    try:
        return decode((found.out / within(found.out, file)).read_bytes())
    except (BadSample, OSError) as failure:
        found.aside[file] = str(failure)
        return None


def _encoded(rows: Sequence[Sequence[Shot]]) -> dict[str, bytes]:
    """WebP of every picture by its file, all of one largest side that keeps the page small."""
    shown = {shot.file: shot.picture for row in rows for shot in row if shot.picture is not None}
    for side in SIDES:
        encoded = {file: _webp(picture, side) for file, picture in shown.items()}
        if sum(map(len, encoded.values())) <= LARGEST:
            break
    return encoded


def _webp(picture: Image.Image, side: int) -> bytes:
    small, buffer = picture.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()


def _row(
    place: int,
    scene: Mapping[str, Any],
    shots: Sequence[Shot],
    encoded: Mapping[str, bytes],
    values: Mapping[tuple[str, str, str], float],
    reference: str,
    damage: str | None,
) -> str:
    sample = scene["sample"]
    right = values.get((sample, reference, RIGHT_BOX))
    data = {"order": place, "task": scene["task"], "box": None if right is None else RIGHT if right else WRONG}
    data["outcome"] = "\n".join(f"{shot.title}: {shot.outcome}" for shot in shots if shot.outcome)
    data["damage"] = values.get((sample, reference, damage))
    attributes = " ".join(f'data-{key}="{"" if value is None else escaped(value)}"' for key, value in data.items())
    facts = f"{escaped(words(scene['task']))} · {scene['objects']} objects"
    strip = "\n".join(_shot(shot, encoded.get(shot.file)) for shot in shots)
    return f"""<li class="card scene" {attributes}>
{instruction(scene["instruction"])}
<p class="which">{facts} · <bdi>{escaped(sample)}</bdi></p>
<div class="strip" role="region" tabindex="0" aria-label="Pictures of {escaped(sample)}">
{strip}
</div>
</li>"""


def _shot(shot: Shot, content: bytes | None) -> str:
    title = escaped(shot.title)
    seen = '<span class="lost">no picture</span>'
    if content is not None:
        told = f"{title}: {shot.outcome}" if shot.outcome else "the source"
        seen = f'<img src="{data_uri(content, "image/webp")}" alt="{told}" decoding="async">'
        seen += _box(shot)
    lines = [f'<p class="way">{title}</p>']
    if shot.outcome:
        about = f"{MARKS[shot.outcome]} {shot.outcome}"
        lines.append(f'<p class="outcome {"hit" if shot.outcome == "success" else "miss"}">{about}</p>')
    lines += [f'<p class="fact">{escaped(fact)}</p>' for fact in shot.facts]
    return f'<div class="shot">\n<div class="seen">{seen}</div>\n{"".join(lines)}\n</div>'


def _box(shot: Shot) -> str:
    """The box as a drawing over the picture, which is stretched to it."""
    if shot.box is None:
        return ""
    width, height = shot.scene or shot.picture.size
    x1, y1, x2, y2 = map(float, shot.box)
    place = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(x2 - x1, 0):.1f}" height="{max(y2 - y1, 0):.1f}"'
    kind = "drawn" if shot.outcome else "true"
    both = f'<rect class="casing" {place}/><rect {place}/>'
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{both}</svg>'
    )


def _outcome_select(pairs: Sequence[tuple[str, str]]) -> str:
    """A filter by what became of a method's pictures."""
    known = set(pairs)
    groups = []
    for method in dict.fromkeys(method for method, _ in pairs):
        options = "".join(
            f'<option value="{escaped(f"{method}: {outcome}")}">{escaped(f"{method}: {outcome}")}</option>'
            for outcome in OUTCOMES
            if (method, outcome) in known
        )
        about = METHODS[method].about if method in METHODS else method
        groups.append(f'<optgroup label="{escaped(method)}" title="{escaped(about)}">{options}</optgroup>')
    return f'<label>Outcome <select name="outcome"><option value="">all</option>{"".join(groups)}</select></label>\n'
