"""One look for all figures: type, lines, layer colours that keep their order in grey and for every eye."""

import io
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
    unit, renderer, place = figure.dpi / 72, figure.canvas.get_renderer(), axes.transData.transform
    at_n2 = place([(x, y) for x, y, _ in points])
    taken_k4 = np.hstack([at_n2 - 5 * unit, at_n2 + 5 * unit])  # the markers; labels join them
    bars_k4 = np.array([[*place(one[:2]) - 1.5 * unit, *place(one[2:]) + 1.5 * unit] for one in avoid]).reshape(-1, 4)
    within_14 = np.array([axes.get_window_extent(renderer).extents])
    away_m, turn_m = map(
        np.ravel, np.meshgrid((8, 13, 20, 30, 42, 56), np.arange(0, 2 * np.pi, np.pi / 8), indexing="ij")
    )
    turned_m2 = np.stack([np.cos(turn_m), np.sin(turn_m)], 1)
    for (x, y, label), at_2 in zip(points, at_n2, strict=True):
        text = axes.annotate(label, (x, y), (0, 0), textcoords="offset points", va="bottom", fontsize=size)
        size_2 = np.array(text.get_window_extent(renderer).size)
        centre_m2 = at_2 + turned_m2 * (away_m[:, None] * unit + size_2 / 2)
        box_m4 = np.hstack([centre_m2 - size_2 / 2, centre_m2 + size_2 / 2])
        covered_m = _shared(box_m4, taken_k4) + size_2.prod() - _shared(box_m4, within_14)
        costs_m = 100 * covered_m + 2 * _shared(box_m4, bars_k4) + (away_m - 4 * turned_m2[:, 1]) * unit**2
        best = np.argmin(costs_m)  # above rather than below, else near
        box_4 = box_m4[best]
        taken_k4 = np.vstack([taken_k4, box_4 + unit * np.array([-1, -1, 1, 1])])
        text.set_position(tuple((box_4[:2] - at_2) / unit))
        if away_m[best] > 13:
            ends = axes.transData.inverted().transform([at_2, np.clip(at_2, box_4[:2], box_4[2:])])
            axes.plot(*ends.T, color=QUIET, lw=0.6, zorder=1)


def _shared(box_m4: np.ndarray, other_k4: np.ndarray) -> np.ndarray:
    """Area that each box (x1, y1, x2, y2) has in common with the others, summed over them."""
    low_mk2 = np.maximum(box_m4[:, None, :2], other_k4[:, :2])
    high_mk2 = np.minimum(box_m4[:, None, 2:], other_k4[:, 2:])
    return (high_mk2 - low_mk2).clip(0).prod(2).sum(1)


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
