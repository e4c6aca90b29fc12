"""What the scenes are made of: outlines of the kinds, named colours, textures."""

import functools

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 42, 40),
    "orange": (240, 138, 30),
    "yellow": (242, 214, 52),
    "green": (52, 158, 66),
    "teal": (38, 176, 176),
    "blue": (44, 84, 204),
    "purple": (134, 58, 178),
    "pink": (244, 136, 182),
    "brown": (124, 78, 44),
    "white": (240, 240, 238),
    "black": (32, 32, 36),
    "grey": (132, 134, 138),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SUPERSAMPLE = 4


def _polar(radii: np.ndarray, turn: float = -0.25) -> np.ndarray:
    """Corners at even angles with the given radii, the first one straight up."""
    angle = 2 * np.pi * (np.arange(len(radii)) / len(radii) + turn)
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], 1)


def _curve(points: int = 48) -> np.ndarray:
    return np.linspace(0, 2 * np.pi, points, endpoint=False)


def _heart() -> np.ndarray:
    t = _curve()
    return np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], 1)


def _moon() -> np.ndarray:
    outer = np.linspace(0.3 * np.pi, 1.7 * np.pi, 30)
    inner = outer[::-1]
    return np.concatenate(
        [np.stack([np.cos(outer), np.sin(outer)], 1), np.stack([0.42 + 0.84 * np.cos(inner), 0.84 * np.sin(inner)], 1)]
    )


def _drop() -> np.ndarray:
    t = _curve()
    return np.stack([0.9 * np.sin(t) * np.sin(t / 2) ** 1.6, -np.cos(t)], 1)


def _fish() -> np.ndarray:
    t = np.linspace(0.12 * np.pi, 1.88 * np.pi, 30)
    body = np.stack([0.72 * np.cos(t) - 0.28, 0.62 * np.sin(t)], 1)
    return np.concatenate([body, [[0.95, -0.6], [0.72, 0.0], [0.95, 0.6]]])


OUTLINES: dict[str, np.ndarray] = {
    "ball": _polar(np.ones(40)),
    "crate": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "pyramid": np.array([[0, -1], [1, 1], [-1, 1]], float),
    "star": _polar(np.tile([1.0, 0.45], 5)),
    "heart": _heart(),
    "kite": np.array([[0, -1], [0.7, -0.2], [0, 1], [-0.7, -0.2]], float),
    "nut": _polar(np.ones(6)),
    "cross": np.array(
        [
            *([-0.35, -1], [0.35, -1], [0.35, -0.35], [1, -0.35], [1, 0.35], [0.35, 0.35]),
            *([0.35, 1], [-0.35, 1], [-0.35, 0.35], [-1, 0.35], [-1, -0.35], [-0.35, -0.35]),
        ],
        float,
    ),
    "arrow": np.array([[0, -1], [0.9, 0.1], [0.4, 0.1], [0.4, 1], [-0.4, 1], [-0.4, 0.1], [-0.9, 0.1]], float),
    "moon": _moon(),
    "drop": _drop(),
    "house": np.array([[0, -1], [1, -0.2], [0.8, -0.2], [0.8, 1], [-0.8, 1], [-0.8, -0.2], [-1, -0.2]], float),
    "bolt": np.array([[0.25, -1], [-0.7, 0.2], [-0.1, 0.2], [-0.3, 1], [0.7, -0.25], [0.1, -0.25]], float),
    "flower": _polar(1 + 0.32 * np.cos(6 * _curve(72))),
    "fish": _fish(),
    "bottle": np.array(
        [[-0.22, -1], [0.22, -1], [0.22, -0.45], [0.55, -0.1], [0.55, 1], [-0.55, 1], [-0.55, -0.1], [-0.22, -0.45]],
        float,
    ),
}
KINDS = tuple(OUTLINES)
PLURALS = {kind: kind + ("es" if kind in ("cross", "fish") else "s") for kind in KINDS}


@functools.cache
def _unit_outline(kind: str) -> np.ndarray:
    """The outline scaled so that its larger extent spans [-1, 1], centred."""
    points = OUTLINES[kind]
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / ((high - low).max() / 2)


def silhouette(kind: str, size: float, fraction: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Coverage of a shape, float32 in [0, 1], (side, side); its centre lies at side/2 plus ``fraction`` of a pixel.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    size : float
        The larger extent in pixels.
    fraction : tuple of float
        Sub-pixel shift (x, y) of the centre, so that positions are not locked to the pixel grid.
    """
    side = int(np.ceil(size)) + 3
    canvas = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE), 0)
    centre = side // 2 + np.asarray(fraction)
    points = (_unit_outline(kind) * size / 2 + centre) * SUPERSAMPLE
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points.tolist()], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) / 255


def fill(texture: str, colour: np.ndarray, side: int, period: float) -> np.ndarray:
    """The surface of a shape: float32 (side, side, 3) in 0–255, lit from the upper left."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    light = 1.12 - 0.24 * (x + y) / max(2 * side - 2, 1)
    phase = 2 * np.pi / period
    if texture == "striped":
        marks = np.sin(phase * y) > 0.1
    elif texture == "dotted":
        marks = np.sin(phase * x) * np.sin(phase * y) > 0.45
    elif texture == "checked":
        marks = (np.sin(phase * x) > 0) ^ (np.sin(phase * y) > 0)
    else:
        marks = np.zeros((side, side), bool)
    contrast = -60.0 if colour.mean() > 100 else 75.0
    return np.clip((colour + contrast * marks[..., None]) * light[..., None], 0, 255).astype(np.float32)
