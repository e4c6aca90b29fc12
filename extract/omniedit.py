"""Editing samples in OmniEdit-Filtered's columns, from the rows of parquet shards (`extract.rows`), here or on the hub.

Whatever the source, every row goes through the same checks and comes out as a `Sample` or as a `SetAside` that
says why; nothing is skipped silently and one bad row never ends a read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from PIL import Image

from extract.rows import NOT_EXTRA, OBJECTS, REQUIRED, Place, SetAside, Shards

BOX_COLUMNS = ("x1", "y1", "x2", "y2")

STRATA = ("n_objects", "object_kind", "object_colour")
"""Columns of samples whose data list the objects of a picture; a column that the data have by that name is kept."""

NO_ID, DUPLICATE = "no id", "duplicate id"
EMPTY_PROMPT, SPECIAL_TOKENS = "empty prompt", "prompt contains special tokens"
ONE_PROMPT = "no other wording of the prompt"
UNDECODABLE, TRUNCATED = "image cannot be decoded", "image truncated"
ABSURD_SIZE = "absurd size"
SIZE_DISAGREES = "width/height disagree with the image"
BAD_BOX = "box is not x1 < x2, y1 < y2"
OUTSIDE = "box outside the image"
AREA = "box area out of range"

# Pillow's other readers are not for data from strangers: EPS, for one, starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Floats and 32-bit integers say nowhere what is white.
IMAGE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"}
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 14, 20_000, 200  # smart_resize itself refuses aspect ratios above 200
MAX_PIXELS = 89_478_485  # Pillow's own bound for decompression bombs


class BadSample(ValueError):  # noqa: N818 - a verdict on data, not a fault
    """One sample cannot be used; ``reason`` is one of this module's, ``detail`` what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, eq=False)
class Sample:
    """One (picture, instruction); ``box`` is ``xyxy`` in pixels of the upright picture, null where there is none."""

    sample_id: str
    task: str
    instruction: str
    width: int
    height: int
    box: tuple[float, float, float, float] | None
    place: Place
    extra: Mapping[str, Any]
    source: bytes = field(repr=False)
    edited_source: bytes | None = field(default=None, repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """The source picture, RGB, upright, decoded on first access (raises `BadSample`)."""
        return decode(self.source)

    @cached_property
    def edited(self) -> Image.Image | None:
        """The edited picture, RGB; null unless the read was asked for it."""
        return None if self.edited_source is None else decode(self.edited_source)


@dataclass(frozen=True)
class Checks:
    """What `sample_of` demands of a row."""

    prompt: Literal["first", "last", "random"] | int = "first"
    seed: int = 0
    min_area: float = 0.001
    max_area: float = 0.9
    pixels: bool = True
    edited: bool = False


def read(
    data: str | Path,
    limit: int | None = None,
    *,
    prompt: Literal["first", "last", "random"] | int = "first",
    seed: int = 0,
    shuffle: bool = False,
    min_area: float = 0.001,
    max_area: float = 0.9,
    check_pixels: bool = True,
    edited: bool = False,
    split: str = "train",
) -> Iterator[Sample | SetAside]:
    """Read up to ``limit`` good samples, and every bad row met on the way.

    Parameters
    ----------
    data
        A folder of parquet shards, one parquet file, or a hub id (never downloaded whole).
    limit
        Stop after so many `Sample`; null reads all.
    prompt
        Which of a row's non-blank prompts: the first, the last, or one drawn from ``seed`` and the sample's id,
        so that the draw does not depend on the order of reading. A number ``n``: the ``n``-th paraphrase of the
        first, around its other wordings (0: the first itself).
    seed, shuffle
        OmniEdit is sorted by task. The shuffled order is a function of the data and ``seed`` alone; see
        `Shards.walk`.
    min_area, max_area
        Bounds of a box's area over the picture's area [ABP §4.1].
    check_pixels
        Decode every picture now; otherwise only headers are read and `Sample.image` may raise `BadSample` later.
    edited
        Read the edited pictures too.
    split
        Which split of a hub data set; in a folder, shards named ``<split>-*`` are preferred if there are any.

    Raises
    ------
    Refusal
        At once, before the first row: the data are not there or no shard has the required columns.
    """
    checks = Checks(prompt, seed, min_area, max_area, check_pixels, edited)
    return checked(Shards(data, split, edited).walk(seed if shuffle else None), checks, limit)


def checked(
    rows: Iterable[tuple[Place, Mapping[str, Any]] | SetAside], checks: Checks, limit: int | None
) -> Iterator[Sample | SetAside]:
    """Every row as a `Sample` or a `SetAside`; the first of several rows with one id is the one kept."""
    good, seen = 0, set()
    if limit is not None and limit <= 0:
        return
    for item in rows:
        verdict = item if isinstance(item, SetAside) else judged(item[1], item[0], checks)
        if isinstance(verdict, Sample) and verdict.sample_id in seen:
            verdict = SetAside(verdict.sample_id, verdict.place, DUPLICATE)
        yield verdict
        if isinstance(verdict, Sample):
            seen.add(verdict.sample_id)
            good += 1
            if good == limit:
                return


def judged(row: Mapping[str, Any], place: Place, checks: Checks) -> Sample | SetAside:
    """The row as a `Sample`, or why it is none."""
    try:
        return sample_of(row, place, checks)
    except BadSample as bad:
        name = row.get("omni_edit_id")
        return SetAside(None if name is None else str(name), place, bad.reason, bad.detail)


def sample_of(row: Mapping[str, Any], place: Place, checks: Checks) -> Sample:
    """The row as a `Sample`.

    Raises
    ------
    BadSample
        The first check that fails.
    """
    for column in REQUIRED:
        if column not in row:
            raise BadSample(f"missing column {column!r}")
    sample_id = checked_id(row["omni_edit_id"])
    instruction = choose_prompt(row["edited_prompt_list"], sample_id, checks)
    source = image_bytes(row["src_img"])
    picture, turned = open_image(source)
    width, height = measured_size(picture, turned, row.get("width"), row.get("height"))
    box = checked_box(row.get("box"), width, height, checks)
    extra = {key: value for key, value in row.items() if key not in NOT_EXTRA}
    if isinstance(extra.get(OBJECTS), list):
        extra = strata_of(extra.pop(OBJECTS), box) | extra
    edited = image_bytes(row.get("edited_img")) if checks.edited else None
    if checks.pixels:
        # Kept decoded pictures would fill the memory of whoever collects samples. At an eighth of its size a JPEG is
        # read to its end all the same, and whatever breaks it then does so now.
        picture.draft("RGB", (1, 1))
        pixels(picture, turned)
        if edited is not None:
            decode(edited)
    task = "" if row["task"] is None else str(row["task"])
    return Sample(sample_id, task, instruction, width, height, box, place, extra, source, edited)


def checked_id(given: Any) -> str:
    """The id as text: what it is where it is text, digits where it is an integer."""
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise BadSample(NO_ID, f"it is a {type(given).__name__}")
    if given is None or not str(given).strip():
        raise BadSample(NO_ID)
    return str(given)


def choose_prompt(prompts: Any, sample_id: str, checks: Checks) -> str:
    """One of the non-blank prompts, stripped; which text a tokenizer takes for more than text, only it can say."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list):
        raise BadSample(EMPTY_PROMPT, "" if prompts is None else f"it is a {type(prompts).__name__}")
    usable = [text.strip() for text in prompts if isinstance(text, str) and text.strip()]
    if not usable:
        raise BadSample(EMPTY_PROMPT)
    if isinstance(checks.prompt, int):
        others = [text for text in dict.fromkeys(usable) if text != usable[0]]
        if checks.prompt and not others:
            raise BadSample(ONE_PROMPT)
        return others[(checks.prompt - 1) % len(others)] if checks.prompt else usable[0]
    digest = hashlib.sha256(f"{checks.seed} {sample_id}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") % len(usable)
    return usable[{"first": 0, "last": -1, "random": drawn}[checks.prompt]]


def strata_of(objects: list, box: tuple[float, float, float, float] | None) -> dict[str, Any]:
    """By what results are told apart: how many objects a picture holds, and what the one in the sample's box is.

    Kind and colour are null where the box is of none of them, as of what is to be added; all where none are listed.
    """
    objects = [one for one in objects if one is not None]
    edited = next((one for one in objects if box is not None and tuple(one["box"] or ()) == box), {})
    kind, colour = (None if edited.get(name) is None else str(edited[name]) for name in ("kind", "colour"))
    return dict(zip(STRATA, (len(objects) or None, kind, colour), strict=True))


def image_bytes(cell: Any) -> bytes:
    """The encoded picture of a Hugging Face image struct (or of a plain binary column)."""
    encoded = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(encoded, bytes) or not encoded:
        raise BadSample(UNDECODABLE, "no bytes")
    return encoded


def open_image(encoded: bytes) -> tuple[Image.Image, int]:
    """The picture with its header read and its size found sane, and how it is turned (EXIF's orientation, 1 to 8)."""
    try:
        picture = Image.open(BytesIO(encoded), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample(ABSURD_SIZE, str(error)) from error
    except Exception as error:  # Pillow's readers raise many kinds on damaged headers
        raise BadSample(UNDECODABLE, type(error).__name__) from error
    return picture, checked_picture(picture, encoded)


def checked_picture(picture: Image.Image, encoded: bytes = b"") -> int:
    """How an opened picture is turned (see `open_image`), its size and mode found sane (raises `BadSample`)."""
    short, long = sorted(picture.size)
    if short < MIN_SIDE or long > MAX_SIDE or long > MAX_ASPECT * short or short * long > MAX_PIXELS:
        raise BadSample(ABSURD_SIZE, f"{picture.width}×{picture.height}")
    if picture.mode not in IMAGE_MODES:
        raise BadSample(UNDECODABLE, f"mode {picture.mode}")
    return orientation(picture, encoded)


def orientation(picture: Image.Image, encoded: bytes) -> int:
    """EXIF's orientation of an opened picture; 1 where Pillow turns it itself or its EXIF is damaged."""
    if picture.format == "TIFF":
        return 1
    try:
        if picture.format == "PNG" and "exif" not in picture.info and b"eXIf" in encoded:
            picture.load()  # it stands behind the pixels
        # PNG's own getexif decodes every picture that has no EXIF, to look behind the pixels.
        found = Image.Image.getexif(picture).get(0x0112, 1)
    except Exception:  # damaged EXIF does not damage the picture
        return 1
    return found if found in TURNED else 1


def measured_size(picture: Image.Image, turned: int, width: Any, height: Any) -> tuple[int, int]:
    """``(width, height)`` of the upright picture; the columns, where given, must agree (with either orientation)."""
    upright = picture.size[::-1] if turned >= 5 else picture.size
    for size in (upright, picture.size):
        if width in (None, size[0]) and height in (None, size[1]):
            return upright
    raise BadSample(SIZE_DISAGREES, f"columns {width}×{height}, picture {upright[0]}×{upright[1]}")


def crc_of(source: bytes) -> int:
    """The CRC-32C of an encoded picture, as the plan keeps it."""
    return google_crc32c.value(source)


def decode(encoded: bytes) -> Image.Image:
    """The picture as upright 8-bit RGB; transparency is laid on white, 16-bit greys are scaled, not clipped."""
    return pixels(*open_image(encoded))


def pixels(picture: Image.Image, turned: int) -> Image.Image:
    """What `decode` gives, of a picture from `open_image`."""
    try:
        picture.load()
    except Exception as error:  # as above: any kind, all mean that the data end or break off
        raise BadSample(TRUNCATED, str(error)) from error
    if turned in TURNED:
        picture = picture.transpose(TURNED[turned])
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def checked_box(box: Any, width: int, height: int, checks: Checks) -> tuple[float, float, float, float] | None:
    """The box as four numbers, ordered, inside the picture and of a usable area."""
    if box is None or box == []:
        return None
    # Of a struct, and of text, Python would give four things as well.
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise BadSample(BAD_BOX, repr(box))
    x1, y1, x2, y2 = map(float, box)
    if not (x1 < x2 and y1 < y2):
        raise BadSample(BAD_BOX, repr(box))
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise BadSample(OUTSIDE, f"{box} in {width}×{height}")
    area = (x2 - x1) * (y2 - y1) / (width * height)
    if not checks.min_area <= area <= checks.max_area:
        raise BadSample(AREA, f"{area:.5f}")
    return x1, y1, x2, y2
