"""From data to a plan: which samples there are, how many tokens each brings, what cannot be used and why."""

import hashlib
from collections.abc import Iterator

import google_crc32c
import polars as pl
from tqdm import tqdm

from extract.config import ExtractConfig
from extract.omniedit import BadSample, Sample, SetAside, read
from extract.sequence import Conditioner
from store.errors import Refusal

LONG_PROMPT = "prompt too long"
NO_BOX = "no box"
SAMPLE_SCHEMA = {
    "sample_id": pl.String,
    "task": pl.String,
    "instruction": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "n_image": pl.Int32,
    "n_text": pl.Int32,
    "n_query": pl.Int32,
    **dict.fromkeys(("x1", "y1", "x2", "y2"), pl.Float32),
    "split": pl.String,
    "image_crc32c": pl.UInt32,
}
SET_ASIDE_SCHEMA = {
    "sample_id": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "reason": pl.String,
    "detail": pl.String,
    "rows": pl.Int64,
}


def split_of(sample_id: str, seed: int, held_out: float) -> str:
    """``test`` for a share ``held_out`` of all ids, else ``train``: growing a store later moves no sample."""
    digest = hashlib.sha256(f"split {seed} {sample_id}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def read_samples(config: ExtractConfig, check_pixels: bool) -> Iterator[Sample | SetAside]:
    """The data as ``config`` describes them, in the one order that planning and extraction share."""
    return read(
        config.data,
        # The number of good samples is counted by the caller: token checks may set aside more.
        None,
        prompt=config.prompt,
        seed=config.seed,
        shuffle=config.shuffle,
        min_area=config.min_area,
        max_area=config.max_area,
        check_pixels=check_pixels,
    )


def read_plan(config: ExtractConfig, conditioner: Conditioner) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One pass over the data without the model.

    Returns
    -------
    samples : polars.DataFrame
        One row a sample in `SAMPLE_SCHEMA` plus the scalar columns that the data set brings.
    set_aside : polars.DataFrame
        One row a bad row (or shard), in `SET_ASIDE_SCHEMA`.

    Raises
    ------
    Refusal
        The data cannot be read, or no row of them can be used.
    """
    rows, extras, aside = [], [], []
    with tqdm(total=config.limit, desc="plan", unit="sample") as bar:
        for item in read_samples(config, check_pixels=True):
            if isinstance(item, SetAside):
                aside.append((item.sample_id, item.place.file, item.place.row, item.reason, item.detail, item.rows))
                continue
            try:
                counts = conditioner.count_tokens(item.width, item.height, item.instruction)
                if counts.n_query > config.max_prompt_tokens:
                    raise BadSample(LONG_PROMPT, f"{counts.n_query} tokens")
                if item.box is None and not config.vlm_boxes:
                    raise BadSample(NO_BOX, "the data bring none and --no-vlm-boxes was given")
            except BadSample as bad:
                aside.append((item.sample_id, item.place.file, item.place.row, bad.reason, bad.detail, 1))
                continue
            rows.append(
                (
                    item.sample_id,
                    item.task,
                    item.instruction,
                    item.width,
                    item.height,
                    *counts,
                    *(item.box or (None,) * 4),
                    split_of(item.sample_id, config.seed, config.held_out),
                    google_crc32c.value(item.source),
                )
            )
            extras.append(dict(item.extra))
            bar.update()
            if len(rows) == config.limit:
                break
    set_aside = pl.DataFrame(aside, schema=SET_ASIDE_SCHEMA, orient="row")
    if not rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in reasons_of(set_aside).items())
        raise Refusal(f"--data {config.data}: no sample can be used ({reasons or 'it has no rows'})")
    samples = pl.DataFrame(rows, schema=SAMPLE_SCHEMA, orient="row")
    brought = pl.DataFrame(extras, infer_schema_length=None)
    taken = [name for name in brought.columns if name not in SAMPLE_SCHEMA]
    return samples.hstack(brought.select(taken)), set_aside


def reasons_of(set_aside: pl.DataFrame) -> dict[str, int]:
    """How many rows were set aside for each reason, most first."""
    counted = set_aside.group_by("reason").agg(pl.col("rows").sum()).sort("rows", "reason", descending=[True, False])
    return dict(counted.iter_rows())
