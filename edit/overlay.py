"""One rendering of a box on a picture, for training and inference alike.

The frame stands around the box, so that it hides nothing of what the box is about, and has two tones: a stroke of
the chosen colour in a casing of black or white, whichever is further from it. On any background one of them shows.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from PIL import Image

from store.errors import Refusal

CORNER = 0.3
"""Share of a side, from each of its ends, that the style ``corners`` draws."""
TINT = 0.35
"""Opacity of the colour within the box in the style ``tint``."""


@dataclass(frozen=True)
class Overlay:
    """How a box is drawn; stored with a LoRA that was trained to see it."""

    colour: tuple[int, int, int] = (255, 0, 0)
    """Red, green and blue of the stroke, 0 to 255."""
    width: float = 0.012
    """Width of the stroke as a share of the picture's short side; never under 2 pixels."""
    style: Literal["frame", "corners", "tint"] = "frame"
    """A whole frame, its corners alone, or a frame filled with a tint of its colour."""

    def __post_init__(self):
        colour = tuple(self.colour)
        if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise Refusal(f"overlay colour {self.colour!r} is not three whole numbers from 0 to 255, such as 255 0 0")
        if not 0 < self.width <= 0.1:
            raise Refusal(f"overlay width {self.width!r} is not a share of the short side over 0 and up to 0.1")
        if self.style not in ("frame", "corners", "tint"):
            raise Refusal(f"overlay style {self.style!r} is not known: frame, corners or tint")
        object.__setattr__(self, "colour", colour)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Self:
        """The overlay that ``as_dict`` wrote."""
        if unknown := sorted(set(stored) - set(cls.__dataclass_fields__)):
            raise Refusal(f"an overlay has no setting {unknown[0]!r}: it has {', '.join(cls.__dataclass_fields__)}")
        return cls(**{**stored, "colour": tuple(stored.get("colour", cls.colour))})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def casing(self) -> tuple[int, int, int]:
        """Black or white, whichever is further from the stroke's colour."""
        dark, light = sum(value**2 for value in self.colour), sum((255 - value) ** 2 for value in self.colour)
        return (0, 0, 0) if dark >= light else (255, 255, 255)

    def draw(self, picture: Image.Image, box: Sequence[float]) -> Image.Image:
        """A copy of ``picture`` with ``box`` drawn on it.

        Parameters
        ----------
        picture
            RGB, of at least 16 pixels a side.
        box
            x1, y1, x2, y2 in pixels of the picture. What lies outside the picture is cut off. A frame that would
            leave the picture, at its edge, is moved in over the box as far as needed, so that all four sides show.

        Raises
        ------
        Refusal
            The box is not four finite numbers with x1 < x2 and y1 < y2, or has no part in the picture.
        """
        if picture.mode != "RGB" or min(picture.size) < 16:
            raise Refusal(
                f"a box cannot be drawn on a {picture.mode} picture of {picture.width}×{picture.height}: "
                "give RGB of at least 16 pixels a side"
            )
        stroke = max(2, round(self.width * min(picture.size)))
        casing = max(1, stroke // 2)
        rim = stroke + casing
        canvas = np.array(picture)
        x1, y1, x2, y2 = _inner(checked_box(box, picture.size), picture.size, rim)
        if self.style == "tint":
            within = canvas[y1:y2, x1:x2]
            canvas[y1:y2, x1:x2] = np.rint(within + TINT * (np.array(self.colour) - within.astype(float)))
        shown = np.ones((y2 - y1 + 2 * rim, x2 - x1 + 2 * rim), bool)

        shown[rim:-rim, rim:-rim] = False
        if self.style == "corners":
            height, width = shown.shape
            down, across = math.ceil(CORNER * height), math.ceil(CORNER * width)
            shown[down : height - down] = False
            shown[:, across : width - across] = False
        region = canvas[y1 - rim : y2 + rim, x1 - rim : x2 + rim]

        region[shown] = self.casing
        shown[:casing] = shown[-casing:] = False
        shown[:, :casing] = shown[:, -casing:] = False
        region[shown] = self.colour
        return Image.fromarray(canvas)


def checked_box(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a box that lies within a picture of ``size`` (width, height).

    Raises
    ------
    Refusal
        The box is not four finite numbers with x1 < x2 and y1 < y2, or has no part in the picture.
    """
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError):
        raise Refusal(f"box {box!r} is not four numbers x1 y1 x2 y2 in pixels") from None
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x1 >= x2 or y1 >= y2:
        raise Refusal(f"box {[x1, y1, x2, y2]} is not x1 < x2 and y1 < y2, in pixels")
    width, height = size
    cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise Refusal(f"box {[x1, y1, x2, y2]} lies outside the picture of {width}×{height} pixels")
    return cut


def _inner(box: Sequence[float], size: tuple[int, int], rim: int) -> tuple[int, int, int, int]:
    """The whole pixels that the frame stands around, with room for its rim within the picture."""
    low, high = [], []
    for first, last, extent in zip(box[:2], box[2:], size, strict=True):
        start, end = math.floor(first), math.ceil(last)
        start, end = max(start, rim), min(end, extent - rim)
        if end <= start:  # all of the box lies in the rim of one edge
            start = min(max(start, rim), extent - rim - 1)
            end = start + 1
        low.append(start)
        high.append(end)
    return (*low, *high)


def rescaled(box: Sequence[float], size: tuple[int, int], to: tuple[int, int]) -> tuple[float, ...]:
    """A box in pixels of a picture of ``size`` (width, height), in pixels of the same picture resized ``to``."""
    return tuple(float(value) * new / old for value, old, new in zip(box, size * 2, to * 2, strict=True))
