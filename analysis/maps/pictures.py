"""Pictures of a store's samples from the data that it was made of, and maps laid over them.

The one file here, beside the lens, that reaches back to ``extract``: pictures lie where it finds them, and it knows
whether one is still the one that the model saw.
"""

from collections.abc import Sequence
from io import BytesIO

import matplotlib
import numpy as np
from PIL import Image

from store.errors import Refusal
from store.reader import Store

SIDE = 320
"""Longer side in pixels of a picture as it is drawn; photographs of any size are shrunk on the way in."""
HEAT = "cividis"
DIMMED, COLOUR, STRENGTH = 0.5, 0.6, 0.6
"""Under a map the picture keeps this share of its brightness where nothing looks (all of it where most does), and of
its colour; the map's own colour covers it by at most the third. So what is looked at stands out in grey, too."""


class SamplePictures:
    """Pictures by sample; ``missing`` tells of those that could not be had, and why.

    Parameters
    ----------
    opened
        A store of ``python -m extract``.
    data
        Folder or hub id of the data that it was made from.

    Raises
    ------
    Refusal
        When there are no data at ``data``, or the store does not say where its pictures lie.
    """

    def __init__(self, opened: Store, data: str):
        from extract.review.pictures import Missing, Pictures, check_columns

        check_columns(opened.samples.columns)
        wanted = ("sample_id", "file", "row", "image_crc32c", "shown")
        self._rows = opened.samples.select(name for name in wanted if name in opened.samples.columns)
        self._pictures, self._missing = Pictures(data), Missing
        self.missing: dict[int, str] = {}

    def picture(self, sample: int, side: int = SIDE) -> Image.Image | None:
        """The upright picture that the model saw, RGB, its longer side at most ``side``; null if it cannot be had."""
        row = self._rows.row(sample, named=True)
        # A store of shuffled images showed each sample another one's picture: that is the one to draw on.
        row["sample_id"] = row.pop("shown", None) or row["sample_id"]
        try:
            picture = Image.open(BytesIO(self._pictures.png(row)))
        except self._missing as reason:
            self.missing[sample] = str(reason)
            return None
        return resized(picture, side)


def find_pictures(opened: Store, data: str) -> tuple[SamplePictures | None, str]:
    """The pictures, or null and one sentence that says why maps are drawn without them."""
    try:
        return SamplePictures(opened, data), ""
    except Refusal as reason:
        return None, f"Maps are drawn without their pictures: {reason}. Give the data's place as --data."


def resized(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of at most ``side`` pixels."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.LANCZOS)


def blank(width: float, height: float, side: int = SIDE) -> Image.Image:
    """A light picture of these proportions, for where there is none."""
    scale = side / max(width, height)
    return Image.new("RGB", [max(1, round(length * scale)) for length in (width, height)], "#dddddd")


def lay_over(picture: Image.Image, map_t: np.ndarray, pixels_t4: np.ndarray, extent: Sequence[float]) -> Image.Image:
    """The picture, greyed, with a map over it: one flat cell a token, brighter the more mass it has.

    Parameters
    ----------
    picture
        RGB, of any size.
    map_t
        Mass of each image token; NaN where it stands for no part of the picture. Colours run to the largest.
    pixels_t4
        Token boxes, xyxy, in pixels of the source picture.
    extent
        Width and height of the source picture.
    """
    scale = np.array([picture.width / extent[0], picture.height / extent[1]] * 2)
    heat = np.zeros((picture.height, picture.width))
    largest = np.nanmax(map_t, initial=0)
    for mass, box in zip(map_t, pixels_t4, strict=True):
        if np.isnan(mass) or np.isnan(box).any() or not largest:
            continue
        x1, y1, x2, y2 = np.round(box * scale).astype(int)
        # Where parts of the picture have several tokens (tiles and an overview), the strongest is seen.
        heat[y1:y2, x1:x2] = np.maximum(heat[y1:y2, x1:x2], mass / largest)
    heat = heat[..., None]
    seen = np.asarray(picture, float) / 255
    grey = np.asarray(picture.convert("L"), float)[..., None] / 255
    lit = (COLOUR * seen + (1 - COLOUR) * grey) * (DIMMED + (1 - DIMMED) * heat)
    mixed = (1 - STRENGTH * heat) * lit + STRENGTH * heat * matplotlib.colormaps[HEAT](heat[..., 0])[..., :3]
    return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))
