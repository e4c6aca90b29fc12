"""A drawn figure in HTML, with its files to download."""

import re
import struct
from pathlib import Path

from analysis import style
from analysis.finding import Drawn, Finding
from analysis.page.markup import data_uri, download, escaped
from store.errors import Refusal

LARGEST_SVG = 1_000_000
"""Bytes; of a larger drawing the PNG is shown."""
LARGEST_DOWNLOAD = 500_000
"""Bytes; a larger file is named, not carried: it lies beside the report."""
KINDS = {"svg": "image/svg+xml", "png": "image/png", "csv": "text/csv", "json": "application/json"}
LABELS = {"svg": "SVG", "png": "PNG", "csv": "Numbers (CSV)", "json": "How it was made (JSON)"}
# Where DejaVu Sans is missing, Verdana has its widths, so labels stay where they were placed.
FONTS = (b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")


def figure(drawn: Drawn, number: int, finding: Finding, folder: Path) -> str:
    """HTML of figure ``number`` of the page.

    Raises
    ------
    Refusal
        When one of its files is not in ``folder``.
    """
    files = {kind: _read(folder / f"{drawn.name}.{kind}", finding) for kind in KINDS}
    shown = "svg" if len(files["svg"]) <= LARGEST_SVG else "png"
    picture = files[shown].replace(*FONTS) if shown == "svg" else files[shown]
    width, height = size(picture, shown)
    name, caption = escaped(drawn.name), escaped(drawn.caption)
    links = "\n".join(
        f'<a class="get" data-of="{name}" download="{name}.{kind}" hidden>{LABELS[kind]}</a>'
        if kind == shown  # the picture itself: the script lends it its address
        else _link(files[kind], kind, drawn.name, folder)
        for kind in KINDS
    )
    return f"""<figure id="figure-{name}">
<div class="plate"><img src="{data_uri(picture, KINDS[shown])}" width="{width}" height="{height}" alt="{caption}"></div>
<figcaption><b>Figure {number}.</b> {caption}
<span class="gets">{links}</span></figcaption>
</figure>"""


def size(picture: bytes, kind: str) -> tuple[int, int]:
    """Width and height of an SVG or PNG file of ``style.save``, in CSS pixels (96 an inch)."""
    if kind == "png":
        return tuple(round(side * 96 / style.STYLE["savefig.dpi"]) for side in struct.unpack(">II", picture[16:24]))
    view = re.search(rb'viewBox="\S+ \S+ (\S+) (\S+)"', picture[:4096])
    return tuple(round(float(side) * 96 / 72) for side in view.groups()) if view else (640, 480)


def _read(path: Path, finding: Finding) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        why = type(failure).__name__
        raise Refusal(
            f"{path} cannot be read ({why}): `python -m analysis {finding.name} --store STORE` draws it"
        ) from None


def _link(content: bytes, kind: str, name: str, folder: Path) -> str:
    file = f"{name}.{kind}"
    if len(content) > LARGEST_DOWNLOAD:
        return f"<span>{LABELS[kind]}: <code>{escaped(f'{folder.name}/{file}')}</code></span>"
    return download(content, KINDS[kind], file, LABELS[kind])
