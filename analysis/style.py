"""One look for all figures: type, lines, layer colours that keep their order in grey and for every eye."""

import io
import itertools
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from store.places import write_file

INK = "#222222"
QUIET = "#767676"
"""Floors, notes and grid labels: what the eye may pass over."""
ACCENT = "#c2410c"
"""The mid-layer prompt proxy: the one series that is not a layer, told apart in grey by its dashes and marker."""

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "analysis",  # the same data, the same file
    "svg.fonttype": "none",
    "hatch.linewidth": 0.5,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw within this; nothing outside is changed, and no display is needed."""
    with matplotlib.rc_context(STYLE):
        yield


def layer_colours(layers: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Layer → colour, from dark (first) to light (last): cividis, equal steps of lightness, without its palest end."""
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.88, len(layers)))
    return dict(zip(layers, map(tuple, shades), strict=True))


def spread(wanted: Sequence[float], gap: float, low: float = -np.inf) -> np.ndarray:
    """Heights near ``wanted``, in the same order, at least ``gap`` apart and above ``low``: where labels go.

    Labels that would touch become a cluster that is centred on the mean of what they wanted.
    """
    order = np.argsort(wanted, kind="stable")
    clusters: list[list[float]] = []  # [first height, members, sum of wanted]
    for value in np.asarray(wanted, float)[order]:
        clusters.append([max(value, low), 1, value])
        while len(clusters) > 1 and clusters[-2][0] + gap * clusters[-2][1] > clusters[-1][0]:
            _, members, total = clusters.pop()
            members, total = members + clusters[-1][1], total + clusters[-1][2]
            clusters[-1] = [max(total / members - gap * (members - 1) / 2, low), members, total]
    heights = np.concatenate([first + gap * np.arange(members) for first, members, _ in clusters])
    out = np.empty(len(order))
    out[order] = heights
    return out


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, Any]], size: float = 8) -> None:
    """Write each label right of the end (x, height) of its line, moved apart where they would touch.

    ``ends`` are (height, label, colour); a thin line leads from a moved label to its line. Call when the axis
    limits are final.
    """
    bottom, top = axes.get_ylim()
    inches = axes.get_figure().get_figheight() * axes.get_position().height
    gap = abs(top - bottom) * size * 1.15 / 72 / inches
    heights = spread([height for height, _, _ in ends], gap, low=min(bottom, top) + gap / 2)
    left, right = axes.get_xlim()
    step = (right - left) * 0.03
    for (height, label, colour), moved in zip(ends, heights, strict=True):
        axes.plot([x, x + step], [height, moved], color=colour, lw=0.6, clip_on=False)
        axes.text(x + step * 1.2, moved, label, color=INK, fontsize=size, va="center", clip_on=False)


def label_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], avoid: Sequence[tuple[float, ...]] = (), size: float = 8
) -> None:
    """Write each label beside its point, where it covers no other label or point; a line leads to one further away.

    ``points`` are (x, y, label), those that matter most first; ``avoid`` are further rectangles (x1, y1, x2, y2) that
    are best left free, such as error bars. Call when the axis limits and the figure's size are final.
    """
    figure = axes.get_figure()
    unit, renderer = figure.dpi / 72, figure.canvas.get_renderer()
    place = axes.transData.transform
    marks = [Bbox.from_bounds(*(place((x, y)) - 5 * unit), 10 * unit, 10 * unit) for x, y, _ in points]
    bars = [Bbox(place([corners[:2], corners[2:]])).padded(1.5 * unit) for corners in avoid]
    within, written = axes.get_window_extent(renderer), []

    def cost(box: Bbox, away: float) -> float:
        covered = sum(_shared(box, other) for other in (*marks, *written))
        outside = box.width * box.height - _shared(box, within)
        return 100 * (covered + outside) + 2 * sum(_shared(box, bar) for bar in bars) + away * unit**2

    for x, y, label in points:
        text = axes.annotate(label, (x, y), (0, 0), textcoords="offset points", va="bottom", fontsize=size)
        extent = text.get_window_extent(renderer)
        wide, high = extent.width, extent.height
        found = []
        for away, turn in itertools.product((8, 13, 20, 30, 42, 56), np.arange(0, 2 * np.pi, np.pi / 8)):
            right, up = np.cos(turn), np.sin(turn)
            centre = place((x, y)) + away * unit * np.array([right, up]) + np.array([right * wide, up * high]) / 2
            box = Bbox.from_bounds(*(centre - np.array([wide, high]) / 2), wide, high)
            found.append((cost(box, away), away, box))
        _, away, box = min(found, key=lambda one: one[0])
        written.append(box.padded(unit))
        text.set_position(tuple((np.array([box.x0, box.y0]) - place((x, y))) / unit))
        if away > 13:
            nearest = np.clip(place((x, y)), [box.x0, box.y0], [box.x1, box.y1])
            ends = axes.transData.inverted().transform([place((x, y)), nearest])
            axes.plot(*ends.T, color=QUIET, lw=0.6, zorder=1)


def _shared(one: Bbox, other: Bbox) -> float:
    """Area that two boxes have in common."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


def save(figure: Figure, out: Path, name: str, data: pl.DataFrame, making: Mapping[str, Any]) -> list[Path]:
    """Write a figure with all it takes to trust and redraw it.

    ``NAME.png``, ``NAME.svg``, ``NAME.csv`` (the drawn numbers) and ``NAME.json`` (the command and ``making``).

    Returns
    -------
    list of Path
        The files, the picture first.
    """
    out = Path(out)
    written = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=kind, metadata=metadata)
        written.append((f"{name}.{kind}", buffer.getvalue()))
    about = {
        "command": ["python", "-m", "analysis", *sys.argv[1:]],
        "versions": {"python": platform.python_version(), "matplotlib": matplotlib.__version__},
        **making,
    }
    written.append((f"{name}.csv", data.write_csv().encode()))
    written.append((f"{name}.json", json.dumps(about, indent=1, ensure_ascii=False).encode()))
    for file, content in written:
        write_file(out / file, content)
    return [out / file for file, _ in written]
