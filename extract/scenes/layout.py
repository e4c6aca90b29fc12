"""Where objects stand: lines, rings, grids and scattered layouts, with the ranks that instructions count by."""

from dataclasses import dataclass

import numpy as np

LAYOUTS = ("line", "column", "ring", "grid", "scattered")
MARGIN = 0.03  # of the short side, kept free at the border
SEPARATION = 0.055  # of an axis: objects closer than this along it are not told apart by counting along it


@dataclass(frozen=True)
class Arrangement:
    """Centres and sizes in pixels, and for each object its dense rank along the ways of counting.

    ``ranks`` maps ``left, right, top, bottom`` (columns and rows in a grid) and ``clockwise`` (rings, from the
    topmost object) to int arrays (n,); -1 marks an object that this way of counting would leave ambiguous.
    """

    layout: str
    centres: np.ndarray
    sizes: np.ndarray
    ranks: dict[str, np.ndarray]
    shape: tuple[int, int] = (1, 1)  # rows and columns of a grid


def _both_ends(name_low: str, name_high: str, rank: np.ndarray) -> dict[str, np.ndarray]:
    return {name_low: rank, name_high: rank.max() - rank}


def _ranks_along(values: np.ndarray, extent: float, low: str, high: str) -> dict[str, np.ndarray]:
    """Ranks from both ends; -1 for an object with a neighbour too close along this axis to be told apart."""
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order], prepend=-np.inf, append=np.inf)
    clear = np.minimum(gaps[:-1], gaps[1:]) >= SEPARATION * extent
    rank = np.empty(len(values), int)
    rank[order] = np.arange(len(values))
    told = np.empty(len(values), bool)
    told[order] = clear
    return {name: np.where(told, r, -1) for name, r in _both_ends(low, high, rank).items()}


def _line(rng: np.random.Generator, count: int, width: int, height: int) -> Arrangement:
    pitch = width * rng.uniform(0.8, 0.96) / count
    size = min(pitch * rng.uniform(0.72, 0.86), 0.42 * height)
    left = rng.uniform(0, width - pitch * count)
    x = left + pitch * (np.arange(count) + 0.5)
    slope = rng.uniform(-0.12, 0.12) * height
    middle = rng.uniform(0.28, 0.72) * height
    y = middle + slope * np.linspace(-1, 1, count) + rng.normal(0, 0.015 * height, count)
    return Arrangement("line", np.stack([x, y], 1), np.full(count, size), _both_ends("left", "right", np.arange(count)))


def _ring(rng: np.random.Generator, count: int, width: int, height: int) -> Arrangement:
    radii = np.array([width, height]) * rng.uniform(0.32, 0.37)
    chord = 2 * min(radii) * np.sin(np.pi / count)
    size = min(chord * rng.uniform(0.74, 0.86), 0.3 * min(width, height))
    turn = rng.uniform(0, 2 * np.pi)
    angle = turn + 2 * np.pi * np.arange(count) / count
    direction = np.stack([np.sin(angle), -np.cos(angle)], 1)
    centres = np.array([width, height]) * rng.uniform(0.46, 0.54, 2) + direction * radii
    top = int(centres[:, 1].argmin())
    apart = np.ptp(np.partition(centres[:, 1], 1)[:2]) >= SEPARATION * height
    ranks = {"clockwise": (np.arange(count) - top) % count} if apart else {}
    return Arrangement("ring", centres, np.full(count, size), ranks)


def _grid(rng: np.random.Generator, count: int, width: int, height: int) -> Arrangement:
    shapes = [(r, c) for r in (2, 3) for c in (2, 3, 4) if r * c <= count]
    shapes = [s for s in shapes if s[0] * s[1] == max(r * c for r, c in shapes)] + [
        s for s in shapes if s[0] * s[1] >= 4
    ]
    rows, columns = shapes[rng.integers(len(shapes))]
    if (width < height) != (columns < rows) and rows != columns and columns <= 3:
        rows, columns = columns, rows
    pitch = np.array([width / columns, height / rows]) * rng.uniform(0.8, 0.95, 2)
    size = min(min(pitch) * rng.uniform(0.62, 0.84), 0.36 * min(width, height))
    corner = (np.array([width, height]) - pitch * (columns, rows)) * rng.uniform(0.2, 0.8, 2)
    row, column = (index.ravel() for index in np.mgrid[:rows, :columns])
    centres = corner + (np.stack([column, row], 1) + 0.5) * pitch
    ranks = _both_ends("left", "right", column) | _both_ends("top", "bottom", row)
    return Arrangement("grid", centres, np.full(rows * columns, size), ranks, (rows, columns))


def _scattered(rng: np.random.Generator, count: int, width: int, height: int) -> Arrangement:
    extent = np.array([width, height], float)
    size = min(width, height) * rng.uniform(0.17, 0.25) * (6 / max(count, 5)) ** 0.4
    for shrink in 0.97 ** np.arange(60):
        room = size * shrink
        low = room / 2 + MARGIN * min(width, height)
        candidates = rng.uniform(low, extent - low, (40, count, 2))
        gaps = np.linalg.norm(candidates[:, :, None] - candidates[:, None], axis=-1)
        gaps[:, np.arange(count), np.arange(count)] = np.inf
        apart = gaps.min((1, 2)) >= 1.12 * room
        if apart.any():
            return Arrangement("scattered", candidates[int(apart.argmax())], np.full(count, room), {})
    return _grid(rng, count, width, height)  # more objects than the picture has room for


def fits(layout: str, count: int, width: int, height: int) -> bool:
    """Whether ``count`` objects in this layout are each large enough to see on a picture of this shape."""
    if layout == "line":
        return count <= 5 * (width / height) ** 0.8
    if layout == "column":
        return fits("line", count, height, width)
    return layout == "scattered" or count >= 4


def arrange(
    rng: np.random.Generator, layout: str, count: int, width: int, height: int, growth: float = 1.0
) -> Arrangement:
    """Place ``count`` objects (a grid may hold fewer) on a ``width`` × ``height`` picture.

    ``growth`` over 1 enlarges the objects in their places, so that neighbours overlap.
    """
    if layout == "line":
        made = _line(rng, count, width, height)
    elif layout == "column":
        lying = _line(rng, count, height, width)
        made = Arrangement(
            "column", lying.centres[:, ::-1].copy(), lying.sizes, _both_ends("top", "bottom", np.arange(count))
        )
    else:
        made = {"ring": _ring, "grid": _grid, "scattered": _scattered}[layout](rng, count, width, height)
    n = len(made.centres)
    ranks = dict(made.ranks)
    if made.layout in ("scattered", "ring"):
        ranks |= _ranks_along(made.centres[:, 0], width, "left", "right")
        ranks |= _ranks_along(made.centres[:, 1], height, "top", "bottom")
    jitter = rng.normal(0, 0.03, (n, 2)).clip(-0.06, 0.06) * made.sizes[:, None]
    sizes = np.minimum(made.sizes * rng.uniform(0.88, 1.06, n) * growth, 0.9 * min(width, height))
    margin = sizes[:, None] / 2 + 1
    centres = np.clip(made.centres + jitter, margin, np.array([width, height]) - margin)
    return Arrangement(made.layout, centres, sizes, ranks, made.shape)
