"""The reader of editing samples in OmniEdit-Filtered's columns, from local parquet shards or streamed from the hub.

Whatever the source, every row goes through the same checks and comes out as a `Sample` or as a `SetAside` that
says why; nothing is skipped silently and one bad row never ends a read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from store.errors import Refusal

REQUIRED = ("omni_edit_id", "task", "src_img", "edited_prompt_list")
NOT_EXTRA = (*REQUIRED, "edited_img", "width", "height", "box")

UNREADABLE_SHARD = "shard cannot be read"
NO_ID, DUPLICATE = "no id", "duplicate id"
EMPTY_PROMPT, SPECIAL_TOKENS = "empty prompt", "prompt contains special tokens"
UNDECODABLE, TRUNCATED = "image cannot be decoded", "image truncated"
ABSURD_SIZE = "absurd size"
SIZE_DISAGREES = "width/height disagree with the image"
BAD_BOX = "box is not x1 < x2, y1 < y2"
OUTSIDE = "box outside the image"
AREA = "box area out of range"

# Pillow's other readers are not for data from strangers: EPS, for one, starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 14, 20_000, 200  # smart_resize itself refuses aspect ratios above 200
MAX_PIXELS = 89_478_485  # Pillow's own bound for decompression bombs
SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
ROWS_AT_ONCE = 32  # about 50 MB of OmniEdit's pictures
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_BUFFER = 512


class BadSample(ValueError):  # noqa: N818 - a verdict on data, not a fault
    """One sample cannot be used; ``reason`` is one of this module's, ``detail`` what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


class Place(NamedTuple):
    """Where a row lies: the shard (or hub id) and the row in it; ``row`` is null for a shard as a whole."""

    file: str
    row: int | None


@dataclass(frozen=True)
class SetAside:
    """What could not be used: ``rows`` rows at ``place``, for ``reason``."""

    sample_id: str | None
    place: Place
    reason: str
    detail: str = ""
    rows: int = 1


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

    prompt: Literal["first", "last", "random"] = "first"
    seed: int = 0
    min_area: float = 0.001
    max_area: float = 0.9
    pixels: bool = True
    edited: bool = False


def read(
    data: str | Path,
    limit: int | None = None,
    *,
    prompt: Literal["first", "last", "random"] = "first",
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
        A folder of parquet shards, one parquet file, or a hub id (streamed, never downloaded whole).
    limit
        Stop after so many `Sample`; null reads all.
    prompt
        Which of a row's non-blank prompts: the first, the last, or one drawn from ``seed`` and the sample's id,
        so that the draw does not depend on the order of reading.
    seed, shuffle
        OmniEdit is sorted by task. Shuffling permutes all row groups of all shards and the rows of each (local),
        or the shards and a buffer of 512 rows (hub). The order is a function of the data and ``seed`` alone.
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
    path = Path(data).expanduser()
    if path.exists():
        rows = local_rows(path, split, edited, seed if shuffle else None)
    elif HUB_ID.fullmatch(str(data)):
        rows = hub_rows(str(data), split, edited, seed if shuffle else None)
    else:
        raise Refusal(f"there are no data at {data}: give a folder of parquet shards, a parquet file or a hub id")
    return checked(rows, checks, limit)


def checked(
    rows: Iterable[tuple[Place, Mapping[str, Any]] | SetAside], checks: Checks, limit: int | None
) -> Iterator[Sample | SetAside]:
    """Every row as a `Sample` or a `SetAside`; the first of several rows with one id is the one kept."""
    good, seen = 0, set()
    if limit is not None and limit <= 0:
        return
    for item in rows:
        if isinstance(item, SetAside):
            yield item
            continue
        place, row = item
        try:
            sample = sample_of(row, place, checks)
            if sample.sample_id in seen:
                raise BadSample(DUPLICATE)
        except BadSample as bad:
            name = row.get("omni_edit_id")
            yield SetAside(None if name is None else str(name), place, bad.reason, bad.detail)
            continue
        seen.add(sample.sample_id)
        yield sample
        good += 1
        if good == limit:
            return


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
    if row["omni_edit_id"] in (None, ""):
        raise BadSample(NO_ID)
    sample_id = str(row["omni_edit_id"])
    instruction = choose_prompt(row["edited_prompt_list"], sample_id, checks)
    source = image_bytes(row["src_img"])
    width, height = measured_size(source, row.get("width"), row.get("height"))
    box = checked_box(row.get("box"), width, height, checks)
    extra = {key: value for key, value in row.items() if key not in NOT_EXTRA}
    edited = image_bytes(row.get("edited_img")) if checks.edited else None
    sample = Sample(sample_id, str(row["task"]), instruction, width, height, box, place, extra, source, edited)
    if checks.pixels:
        _ = sample.image, sample.edited
        # Kept decoded pictures would fill the memory of whoever collects samples; decoding again is cheap.
        sample.__dict__.pop("image"), sample.__dict__.pop("edited")
    return sample


def choose_prompt(prompts: Any, sample_id: str, checks: Checks) -> str:
    """One of the non-blank prompts, stripped."""
    prompts = [prompts] if isinstance(prompts, str) else prompts or []
    usable = [text.strip() for text in prompts if isinstance(text, str) and text.strip()]
    if not usable:
        raise BadSample(EMPTY_PROMPT)
    digest = hashlib.sha256(f"{checks.seed} {sample_id}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") % len(usable)
    text = usable[{"first": 0, "last": -1, "random": drawn}[checks.prompt]]
    if special := SPECIAL_TOKEN.search(text):
        raise BadSample(SPECIAL_TOKENS, special[0])
    return text


def image_bytes(cell: Any) -> bytes:
    """The encoded picture of a Hugging Face image struct (or of a plain binary column)."""
    encoded = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(encoded, bytes) or not encoded:
        raise BadSample(UNDECODABLE, "no bytes")
    return encoded


def open_image(encoded: bytes) -> Image.Image:
    """The picture with its header read and its size found sane, pixels not yet decoded."""
    try:
        picture = Image.open(BytesIO(encoded), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample(ABSURD_SIZE, str(error)) from error
    except Exception as error:  # Pillow's readers raise many kinds on damaged headers
        raise BadSample(UNDECODABLE, type(error).__name__) from error
    short, long = sorted(picture.size)
    if short < MIN_SIDE or long > MAX_SIDE or long > MAX_ASPECT * short or short * long > MAX_PIXELS:
        raise BadSample(ABSURD_SIZE, f"{picture.width}×{picture.height}")
    return picture


def measured_size(encoded: bytes, width: Any, height: Any) -> tuple[int, int]:
    """``(width, height)`` of the upright picture; the columns, where given, must agree (with either orientation)."""
    picture = open_image(encoded)
    try:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged EXIF does not damage the picture; decode() ignores it too
        turned = False
    upright = picture.size[::-1] if turned else picture.size
    stated = (width, height)
    if None not in stated and stated not in (upright, picture.size):
        raise BadSample(SIZE_DISAGREES, f"columns {width}×{height}, picture {upright[0]}×{upright[1]}")
    return upright


def decode(encoded: bytes) -> Image.Image:
    """The picture as upright 8-bit RGB; transparency is laid on white, 16-bit greys are scaled, not clipped."""
    picture = open_image(encoded)
    try:
        picture.load()
    except Exception as error:  # as above: any kind, all mean that the data end or break off
        raise BadSample(TRUNCATED, str(error)) from error
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # see measured_size
        picture = picture.copy()
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8), "L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def checked_box(box: Any, width: int, height: int, checks: Checks) -> tuple[float, float, float, float] | None:
    """The box as four numbers, ordered, inside the picture and of a usable area."""
    if box is None or len(box) == 0:
        return None
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise BadSample(BAD_BOX, repr(box)) from error
    if not (x1 < x2 and y1 < y2):
        raise BadSample(BAD_BOX, repr(box))
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise BadSample(OUTSIDE, f"{box} in {width}×{height}")
    area = (x2 - x1) * (y2 - y1) / (width * height)
    if not checks.min_area <= area <= checks.max_area:
        raise BadSample(AREA, f"{area:.5f}")
    return x1, y1, x2, y2


def wanted_columns(schema: pa.Schema, edited: bool) -> list[str]:
    """The columns to read: the known ones and every other scalar one (masks and pictures stay on disk)."""
    known = {*NOT_EXTRA} - ({"edited_img"} if not edited else set())

    def scalar(kind: pa.DataType) -> bool:
        return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [item.name for item in schema if item.name in known or (item.name != "edited_img" and scalar(item.type))]


def local_shards(path: Path, split: str) -> list[Path]:
    """The parquet files at ``path``, those of the split where there are any."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return [file for file in files if file.name.startswith(f"{split}-")] or files


def local_rows(path: Path, split: str, edited: bool, seed: int | None) -> Iterator[Any]:
    """Rows of the shards at ``path``, in order or permuted; footers are read here and now, rows lazily."""
    files = local_shards(path, split)
    if not files:
        raise Refusal(f"{path} has no parquet shard in it")
    broken, groups, complete = [], [], False
    for file in files:
        try:
            with pq.ParquetFile(file) as shard:
                complete |= set(REQUIRED) <= set(shard.schema_arrow.names)
                sizes = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            broken.append(SetAside(None, Place(str(file), None), UNREADABLE_SHARD, str(error)))
            continue
        starts = np.cumsum([0, *sizes])
        groups += [(file, group, int(starts[group]), rows) for group, rows in enumerate(sizes)]
    if not complete:
        why = f"{len(broken)} of {len(files)} are damaged; {', '.join(REQUIRED)} are required columns"
        raise Refusal(f"{path} has no usable parquet shard: {why}")
    return walk_groups(broken, groups, edited, seed)


def walk_groups(broken: list[SetAside], groups: list[tuple], edited: bool, seed: int | None) -> Iterator[Any]:
    """The rows of all row groups, one row group (in order: a few rows of it) in memory at a time."""
    yield from broken
    draw = None if seed is None else np.random.default_rng(seed)
    for which in range(len(groups)) if draw is None else draw.permutation(len(groups)):
        file, group, start, rows = groups[which]
        order = None if draw is None else draw.permutation(rows)
        done = 0
        try:
            with pq.ParquetFile(file) as shard:
                columns = wanted_columns(shard.schema_arrow, edited)
                for rank, row in enumerate(group_rows(shard, group, columns, order)):
                    yield Place(str(file), start + (rank if order is None else int(order[rank]))), row
                    done = rank + 1
        except (pa.ArrowException, OSError) as error:
            yield SetAside(None, Place(str(file), start + done), UNREADABLE_SHARD, str(error), rows - done)


def group_rows(
    shard: pq.ParquetFile, group: int, columns: list[str], order: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    """Rows of one row group as dicts, in file order or in ``order``."""
    if order is None:
        for batch in shard.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()
    else:
        table = shard.read_row_group(group, columns=columns, use_threads=False)
        for row in order:
            yield table.slice(int(row), 1).to_pylist()[0]


def hub_rows(name: str, split: str, edited: bool, seed: int | None) -> Iterator[Any]:
    """Rows streamed from the hub, pictures as the bytes that are stored."""
    import datasets

    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        features = stream.features or stream._resolve_features().features
    except Exception as error:  # offline, unknown, private, no such split: all the same to the reader
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{name} is neither a folder here nor a data set that the hub gives: {first_line}") from error
    if lacking := [column for column in REQUIRED if column not in features]:
        raise Refusal(f"{name} has no column {', '.join(map(repr, lacking))}; OmniEdit's columns are needed")
    stream = stream.select_columns(wanted_columns(features.arrow_schema, edited))
    for column in ("src_img", "edited_img")[: 1 + edited]:
        if isinstance(features.get(column), datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=HUB_BUFFER)
    return walk_stream(name, stream)


def walk_stream(name: str, stream: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """The rows of a stream, numbered; a connection that breaks for good is a `Refusal`, not an early end."""
    number = 0
    try:
        for row in stream:
            yield Place(name, number), row
            number += 1
    except (OSError, pa.ArrowException) as error:
        raise Refusal(f"{name} stopped after {number} rows: {error}; the same command reads it again") from error
