"""The report as one HTML file: the answers, then what they rest on."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import polars as pl

from analysis.finding import Finding
from analysis.page.figures import figure
from analysis.page.gallery import cards
from analysis.page.markup import escaped, lead, marked, prose
from analysis.page.provenance import listed
from analysis.page.tables import GLANCE, table
from store.places import write_file

HERE = Path(__file__).parent
FILE = "report.html"


@dataclass(frozen=True)
class Section:
    """A part of the page that is no finding."""

    name: str
    """Its address on the page."""
    title: str
    html: str
    count: str = ""
    """What the head of the page says of how much it holds."""


def write(
    out: Path,
    title: str,
    findings: Sequence[Finding],
    figures: Path,
    gallery: pl.DataFrame | None,
    provenance: Mapping[str, Any],
) -> Path:
    """Write ``out/report.html``; the same findings, figures and samples give the same bytes.

    Parameters
    ----------
    out
        Folder of the page.
    title
        Its heading.
    findings
        What it answers, in the order it is read.
    figures
        Folder of their figures, as ``style.save`` wrote them.
    gallery
        A row a sample: sample, sample_id, instruction, task, split, area (share of the picture), l_star,
        hit (or the share of tied places that hit), energy, words, picture and overlay (JPEG files), and, where known,
        n_objects, iou and chance_energy. No gallery if None.
    provenance
        Where all this comes from: nested names and values.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    Refusal
        When a figure's file or a column of the gallery is missing.
    """
    samples = []
    if gallery is not None:
        count = f"{len(gallery):,} {'sample' if len(gallery) == 1 else 'samples'} to look at"
        samples.append(Section("samples", "Samples", cards(gallery), count))
    return assemble(out, title, [*findings, *samples], figures, provenance)


def assemble(
    out: Path,
    title: str,
    parts: Sequence[Finding | Section],
    figures: Path,
    provenance: Mapping[str, Any],
    style: str = "",
) -> Path:
    """Write ``out/report.html`` of findings and other sections, in this order; else as ``write``.

    ``style`` is CSS that the sections need besides the page's own.
    """
    figures, script = Path(figures), _asset("page.js")
    findings = [part for part in parts if isinstance(part, Finding)]
    numbers = iter(range(1, 1 + sum(len(finding.figures) for finding in findings)))
    named, told = {"answers": "Answers"}, []
    for part in parts:
        if isinstance(part, Section):
            named[part.name] = part.title
            told.append(_section(part))
        else:
            named[f"finding-{part.name}"] = part.name.replace("_", " ").capitalize()
            told.append(_finding(part, [figure(one, next(numbers), part, figures) for one in part.figures]))
    page = Template(_asset("page.html")).substitute(
        title=escaped(title),
        count=_count(findings, [part.count for part in parts if isinstance(part, Section) and part.count]),
        style=_asset("page.css") + style,
        script=script,
        script_hash=_hash(script),
        nav=_nav(named | {"provenance": "Provenance"}),
        answers=_answers(findings),
        parts="\n".join(told),
        provenance=listed(provenance),
    )
    path = Path(out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page.encode("utf-8", "replace"))
    return path


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a content security policy calls ``script``: no other is run.

    Styles are not held to a hash: some browsers hold the drawings to it too, and theirs are within.
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _count(findings: Sequence[Finding], further: Sequence[str]) -> str:
    counts = [("question", len(findings)), ("figure", sum(len(finding.figures) for finding in findings))]
    return " · ".join([*(f"{n:,} {word}{'' if n == 1 else 's'}" for word, n in counts), *map(escaped, further)])


def _nav(sections: Mapping[str, str]) -> str:
    return "\n".join(f'<li><a href="#{escaped(name)}">{escaped(label)}</a></li>' for name, label in sections.items())


def _answers(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="empty">No question has been answered yet.</p>'
    return "<ol>\n" + "\n".join(_headline(finding) for finding in findings) + "\n</ol>"


def _headline(finding: Finding) -> str:
    first, rest = lead(finding.answer)
    return f"""<li>
<p class="question"><a href="#finding-{escaped(finding.name)}">{escaped(finding.question)}</a></p>
<p class="lead" dir="auto">{marked(escaped(first))}</p>
{prose(rest)}
</li>"""


def _finding(finding: Finding, figures: Sequence[str]) -> str:
    name = escaped(finding.name)
    tables = list(finding.tables.items())
    shown = [table(rows, title, f"{finding.name}-{title}") for title, rows in tables[:1]]
    further = [
        f'<details class="further"><summary>{escaped(title)} <span>{len(rows):,} rows</span></summary>\n'
        f"{table(rows, title, f'{finding.name}-{title}', GLANCE)}</details>"
        for title, rows in tables[1:]
    ]
    caveats = "\n".join(f"<li>{marked(escaped(caveat))}</li>" for caveat in finding.caveats)
    against = f'<aside class="caveats"><h3>What to hold against it</h3>\n<ul>{caveats}</ul></aside>' if caveats else ""
    return "\n".join(
        [
            f'<section id="finding-{name}" class="finding" aria-labelledby="title-{name}">',
            f'<h2 id="title-{name}">{escaped(finding.question)}</h2>',
            f'<div class="answer">{prose(finding.answer)}</div>',
            against,
            *figures,
            *shown,
            *further,
            "</section>",
        ]
    )


def _section(section: Section) -> str:
    name = escaped(section.name)
    return f"""<section id="{name}" aria-labelledby="{name}-title">
<h2 id="{name}-title">{escaped(section.title)}</h2>
{section.html}
</section>"""
