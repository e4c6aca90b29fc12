"""Thumbnails for the report: the picture, and the map at l* over it with the boxes, as small JPEG files in a table."""

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise

import numpy as np
import polars as pl
from PIL import Image, ImageDraw
from tqdm import tqdm

from analysis.maps.pictures import SamplePictures, blank, lay_over, resized
from analysis.maps.scores import CORNERS, METRICS, STAR, Maps
from store.reader import Store

SIDE = 224
"""Longer side of a thumbnail in pixels."""
MOST_BYTES = 12_000
QUALITIES = (82, 70, 55, 40, 25)
SHOWN = ("instruction", "task", "split", "n_objects")
TRUE, GUESSED = "#ffffff", "#ff8c00"
"""Outlines of the true box (solid) and of the one that was guessed (dashed)."""
DASH = 6


def gallery(
    opened: Store,
    found: Maps,
    pictures: SamplePictures | None,
    *,
    count: int = 120,
    seed: int = 0,
    votes: pl.DataFrame | None = None,
    boxes: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Samples drawn by the seed among those that were scored, ascending.

    Parameters
    ----------
    opened, found
        A store and its scored maps.
    pictures
        Where pictures are taken from; null draws the maps alone.
    count, seed
        How many, and the seed that chooses them: nobody's hand does.
    votes
        ``sample`` and whatever columns are to stand beside (``l_star`` is there anyway).
    boxes
        Guessed boxes: ``sample, x1, y1, x2, y2`` in pixels of the source picture; the VLM's own answers if not given.

    Returns
    -------
    DataFrame
        ``sample, sample_id, instruction, task, split, n_objects`` (those that the store has), ``area`` (true box over
        picture), ``l_star``, ``hit`` and ``energy`` with ``chance_hit`` and ``chance_energy``, ``words`` (dominant
        tokens' texts), columns of ``votes``, ``picture`` (null without one) and ``overlay`` (JPEG bytes).
    """
    at_n = np.sort(np.random.default_rng([seed, 2]).permutation(found.samples.height)[:count])
    mine = found.samples[at_n.tolist()]
    numbers = mine["sample"].to_list()
    told = opened.samples[numbers].select(name for name in SHOWN if name in opened.samples.columns)
    scores = {
        f"{prefix}{name}": values_mn[m, at_n] for prefix, values_mn in _both(found) for m, name in enumerate(NAMES)
    }
    guessed = guessed_boxes(opened, boxes)
    drawn = {"picture": [], "overlay": []}
    for n in tqdm(at_n.tolist(), desc="gallery", unit="picture", delay=2):
        plain, laid = thumbnails(found, n, pictures, guessed)
        drawn["picture"].append(plain)
        drawn["overlay"].append(laid)
    table = mine.select("sample", "sample_id").hstack(told).hstack(mine.select("area", "l_star", "words"))
    table = table.hstack(pl.DataFrame(scores, nan_to_null=True))
    if votes is not None:
        more = votes.select("sample", pl.exclude("sample", *table.columns)).unique("sample", keep="first")
        table = table.join(more, on="sample", how="left", maintain_order="left")
    return table.hstack(pl.DataFrame(drawn, schema=dict.fromkeys(drawn, pl.Binary)))


NAMES = tuple({"pointing": "hit"}.get(metric, metric) for metric in METRICS)
"""What the report calls the metrics, in their order."""


def _both(found: Maps) -> tuple[tuple[str, np.ndarray], ...]:
    """Scores at l*, and by chance, with the prefix of their columns."""
    return ("", found.scores[STAR]), ("chance_", found.chance_mn)


def guessed_boxes(opened: Store, boxes: pl.DataFrame | None) -> dict[int, tuple[float, ...]]:
    """Sample → guessed box in pixels, of those that have a whole one."""
    if boxes is None:
        names = [f"vlm_{name}" for name in CORNERS]
        if not set(names) <= set(opened.samples.columns):
            return {}
        corners = [pl.col(name).alias(name[4:]) for name in names]
        boxes = opened.samples.select(pl.int_range(pl.len(), dtype=pl.Int64).alias("sample"), *corners)
    whole = boxes.filter(pl.all_horizontal(pl.col(name).is_finite().fill_null(False) for name in CORNERS))
    return {sample: tuple(box) for sample, *box in whole.select("sample", *CORNERS).iter_rows()}


def thumbnails(
    found: Maps, n: int, pictures: SamplePictures | None, guessed: dict[int, tuple[float, ...]]
) -> tuple[bytes | None, bytes]:
    """The picture (null without one) and the overlay of the n-th scored sample, JPEG."""
    row = found.samples.row(n, named=True)
    extent = extent_of(found, n)
    picture = pictures.picture(row["sample"], SIDE) if pictures is not None else None
    laid = lay_over(picture or blank(*extent, SIDE), found.map_nt[n], found.pixels_nt4[n], extent)
    scale = np.array([laid.width / extent[0], laid.height / extent[1]] * 2)
    draw = ImageDraw.Draw(laid)
    outline(draw, scale * [row[name] for name in CORNERS], TRUE, dashed=False)
    if row["sample"] in guessed:
        outline(draw, scale * guessed[row["sample"]], GUESSED, dashed=True)
    return (None if picture is None else jpeg(picture)), jpeg(laid)


def extent_of(found: Maps, n: int) -> tuple[float, float]:
    """Width and height in pixels of the n-th scored sample's picture; what its tokens cover where nobody says."""
    row = found.samples.row(n, named=True)
    if row["width"] and row["height"]:
        return row["width"], row["height"]
    return tuple(np.nanmax(found.pixels_nt4[n, :, 2:], axis=0).tolist())


def outline(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, dashed: bool) -> None:
    """A box's outline, two pixels wide on a dark one of four, so that it shows on any ground."""
    x1, y1, x2, y2 = map(float, box)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for ink, width in (("#000000", 4), (colour, 2)):
        for (ax, ay), (bx, by) in pairwise(corners):
            length = max(1.0, abs(bx - ax) + abs(by - ay))
            step = 2 * DASH if dashed else length
            for start in np.arange(0, length, step):
                stop = min(length, start + (DASH if dashed else length))
                along = [(ax + (bx - ax) * at / length, ay + (by - ay) * at / length) for at in (start, stop)]
                draw.line(along, fill=ink, width=width)


def jpeg(picture: Image.Image) -> bytes:
    """The picture as JPEG of at most ``MOST_BYTES``: coarser first, then smaller."""
    while True:
        for quality in QUALITIES:
            stream = BytesIO()
            picture.save(stream, "JPEG", quality=quality, optimize=True)
            if len(stream.getvalue()) <= MOST_BYTES:
                return stream.getvalue()
        picture = resized(picture, max(picture.size) * 3 // 4)
