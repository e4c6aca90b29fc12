"""What the recipe leaves: shards in OmniEdit's columns, a store to review them by, what a person made of them."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import store
from edit.recipe.stages import UNFINISHED, exchange
from extract.config import POCKET, ExtractConfig
from extract.omniedit import BOX_COLUMNS
from extract.review import verdicts
from extract.review.verdicts import REJECTED, Box
from extract.run import extract
from extract.scenes.shards import ROWS_PER_GROUP, ROWS_PER_SHARD, features
from store.errors import Refusal

if TYPE_CHECKING:
    import datasets

IDENTITY = "analysis_by_proxy.recipe"  # key of the parquet metadata
TRUE_COLUMNS = tuple(f"true_{name}" for name in BOX_COLUMNS)
MANIFEST = {
    "number": pl.Int64,
    "sample_id": pl.String,
    "stage": pl.String,
    "set_aside": pl.String,
    "detail": pl.String,
    "verdict": pl.String,
    "instruction": pl.String,
    **dict.fromkeys((*BOX_COLUMNS, *TRUE_COLUMNS), pl.Float64),
}


@dataclass
class Sample:
    """One sample on its way; ``aside`` is (stage, reason, detail) where it failed."""

    number: int
    fingerprint: str
    """Of all that its last result follows from."""
    done: str = ""
    """Name of the last stage that it passed."""
    told: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    aside: tuple[str, str, str] | None = None
    verdict: str | None = None
    final: Box | None = None
    """The box that a person left."""

    @property
    def sample_id(self) -> str:
        """Named by picture, instruction and box, so that no verdict is ever taken for another version's."""
        told = json.dumps([self.told["instructions"], self.told["box"]]).encode()
        digest = hashlib.sha256(self.files["source"].read_bytes() + told).hexdigest()
        return f"recipe_{self.number:06d}_{digest[:10]}"


@cache
def columns() -> "datasets.Features":
    """Those of scenes, with boxes between pixels, the true box where it is known, and both prompts."""
    import datasets  # slow to import

    box, text = datasets.List(datasets.Value("float64")), datasets.Value("string")
    return datasets.Features({**features(), "box": box, "true_box": box, "scene_prompt": text, "edit_prompt": text})


def row_of(sample: Sample, name: str, seed: int) -> dict[str, Any]:
    """A sample as a row of the data set, with its final box if it has one."""
    told = sample.told
    pictures = {
        column: {"bytes": sample.files[part].read_bytes(), "path": None}
        for column, part in (("src_img", "source"), ("edited_img", "target"))
    }
    return {
        "omni_edit_id": name,
        "task": told["task"],
        **pictures,
        "edited_prompt_list": told["instructions"],
        "width": told["width"],
        "height": told["height"],
        "box": list(sample.final or told["box"]),
        "true_box": told.get("true_box"),
        "objects": told.get("objects"),
        "layout": told.get("layout"),
        "reference": told.get("reference"),
        "seed": seed,
        "scene_prompt": told["scene"],
        "edit_prompt": told["edit"],
    }


def write_shards(
    folder: Path, samples: Sequence[Sample], names: Sequence[str], seed: int, described: Mapping[str, Any]
) -> None:
    """The rows as parquet shards, in place of what the folder held."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    unfinished.mkdir(parents=True)
    shards = -(-len(samples) // ROWS_PER_SHARD)
    schema = columns().arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), IDENTITY: json.dumps(described, sort_keys=True)})
    for shard in range(shards):
        rows = range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(samples)))
        with pq.ParquetWriter(unfinished / f"train-{shard:05d}-of-{shards:05d}.parquet", schema) as writer:
            for first in range(rows.start, rows.stop, ROWS_PER_GROUP):
                group = range(first, min(first + ROWS_PER_GROUP, rows.stop))
                made = [row_of(samples[row], names[row], seed) for row in group]
                writer.write_table(pa.Table.from_pylist(made, schema=schema))
    exchange(unfinished, folder)


def lay_out_review(data: Path, folder: Path, names: Sequence[str]) -> Path:
    """The store by which `python -m extract.review` shows the data set: of these samples, embeddings of prompts only.

    Another set of samples gets another store, so that the verdicts about each stay beside their own.

    Raises
    ------
    Refusal
        It cannot be made.
    """
    path = folder / f"{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}.zarr"
    with contextlib.suppress(Refusal):
        if not store.pending(path):
            return path
    config = ExtractConfig(
        preset=POCKET,
        data=str(data),
        store=str(path),
        limit=None,
        layers="embed",
        tokens="text",
        attention="none",
        vlm_boxes=False,
        codec="none",
        max_prompt_tokens=4096,
        device="cpu",
        loaders=0,
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = extract(config)
    if code:
        raise Refusal(f"{path}, the store to review, is not whole: {said.getvalue().strip().splitlines()[-1]}")
    return path


def apply_verdicts(samples: Sequence[Sample], names: Sequence[str], given: Path | None, folder: Path) -> None:
    """Tell every sample its verdict, from the file that was given or from all beside the stores to review.

    Raises
    ------
    Refusal
        A file is none of verdicts, or the one that was given says nothing about these samples.
    """
    files = sorted(folder.glob("*.verdicts.jsonl")) if given is None else [given]
    found = pl.concat([pl.DataFrame(schema=verdicts.SCHEMA), *map(verdicts.read, files)])
    last = {row["sample_id"]: row for row in found.sort("time", maintain_order=True).iter_rows(named=True)}
    if given is not None and not last.keys() & set(names):
        raise Refusal(f"--verdicts {given} says nothing about this run's samples: it is of another data set")
    for sample, name in zip(samples, names, strict=True):
        if (row := last.get(name)) is None:
            continue
        sample.verdict = row["verdict"]
        if sample.verdict == REJECTED:
            sample.aside = ("verify", REJECTED, row["reason"] or "")
        else:
            sample.done, sample.final = "verify", tuple(row["box"])


def write_manifest(path: Path, samples: Sequence[Sample], names: Mapping[int, str]) -> None:
    """One row a sample: how far it came, why not further, its instruction and boxes."""
    rows = []
    for sample in samples:
        stage, reason, detail = sample.aside or (sample.done, None, None)
        boxes = (sample.final or sample.told.get("box"), sample.told.get("true_box"))
        numbers = [value for box in boxes for value in (box or (None,) * 4)]
        rows.append(
            {
                "number": sample.number,
                "sample_id": names.get(sample.number),
                "stage": stage,
                "set_aside": reason,
                "detail": detail,
                "verdict": sample.verdict,
                "instruction": next(iter(sample.told.get("instructions", ())), None),
                **dict(zip((*BOX_COLUMNS, *TRUE_COLUMNS), map(_float, numbers), strict=True)),
            }
        )
    unfinished = path.with_name(path.name + UNFINISHED)
    pl.DataFrame(rows, schema=MANIFEST).write_parquet(unfinished)
    unfinished.replace(path)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def remove(folder: Path) -> None:
    """Remove a data set that no longer is one."""
    shutil.rmtree(folder, ignore_errors=True)
