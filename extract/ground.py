"""Boxes for data of any size without a store: the model is asked once a sample, the answers are a table of parquet."""

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig

from extract.boxes import count_problems, generate_boxes
from extract.config import POCKET, ExtractConfig
from extract.model import find_checkpoint, find_device, identity, load_model, load_processor
from extract.omniedit import BOX_COLUMNS, BadSample, Sample, decode, read
from extract.planning import LONG_PROMPT
from extract.rows import SetAside, Shards
from extract.scoring import centre_boxes, score_boxes
from extract.sequence import Conditioner, conditioner_for
from store.commandline import run
from store.errors import Refusal
from store.places import as_refusal

TRUE_COLUMNS = tuple(f"true_{name}" for name in BOX_COLUMNS)
SCHEMA = {
    "sample_id": pl.String,
    **dict.fromkeys(BOX_COLUMNS, pl.Float32),
    "answer": pl.String,
    "problem": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    **dict.fromkeys(TRUE_COLUMNS, pl.Float32),
}
IDENTITY = "analysis_by_proxy.boxes"  # key of the parquet metadata


@dataclass(frozen=True)
class GroundConfig:
    """Ask a vision-language model for the box of what every instruction is about, and write the boxes as a table.

    A row a sample: its id, the box in pixels of the source picture, the model's words, and why there is no box; with
    the picture's size and the true box where the data bring one. The table is a folder of parquet parts, which
    readers of parquet take for one table. An interrupted run is taken up by the same command.
    """

    data: str
    """Folder of parquet shards in OmniEdit's columns, one shard, or a hub id (read by place, never whole)."""
    out: Path
    """Folder of the table, such as boxes.parquet (made if missing)."""
    model: str = POCKET
    """A folder with a Qwen2.5-VL checkpoint in safetensors, a hub id, or ``pocket`` for the one shipped here."""
    revision: str | None = None
    """Revision of the hub id."""
    limit: int | None = None
    """Number of samples; all of them where not given. A larger one later adds to the table."""
    prompt: Literal["first", "last", "random"] = "first"
    """Which of a row's instructions: the first, the last, or one drawn from the seed."""
    shuffle: bool = False
    """Read the data in a random order (OmniEdit is sorted by task)."""
    seed: int = 0
    """Seed of the random prompt and the shuffling."""
    max_prompt_tokens: int = 512
    """Longest instruction in tokens that the model is asked."""
    max_pixels: int | None = None
    """Area in pixels above which pictures are shrunk; the checkpoint's own processor setting where not given."""
    max_new_tokens: int = 400
    """Longest answer; it ends as soon as its box is complete."""
    batch_size: int = 32
    """Samples decoded together; those of a part that are alike in length."""
    part_samples: int = 256
    """Samples a part of the table: what a kill loses at most, and what is sorted by length."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; auto: cuda if there is one."""
    threads: int | None = None
    """Torch threads on a CPU; torch's own choice where not given. One is best for the pocket model."""
    json: bool = False
    """Print the summary as one JSON object."""

    def __post_init__(self):
        """Refuse numbers that make no sense."""
        names = ("limit", "max_prompt_tokens", "max_pixels", "max_new_tokens", "batch_size", "part_samples", "threads")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"--{name.replace('_', '-')} {value}: give 1 or more")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level, with dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


class BoxTable:
    """A folder of parquet parts of one identity; one process at a time adds to it.

    A part has its name only when it is whole and on the disk.

    Raises
    ------
    Refusal
        The place is no such folder, holds boxes of another identity, or another process is writing there.
    """

    def __init__(self, out: Path, described: Mapping[str, Any]):
        self.out, self.described = out.expanduser().absolute(), json.loads(json.dumps(described))
        self.parts: list[Path] = []

    def __enter__(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise Refusal(f"--out {self.out} is a file: the table is a folder of parts, give another name")
        self.out.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.parts = sorted(self.out.iterdir())
            for number, part in enumerate(self.parts):
                self._check(part, number)
        except BlockingIOError as held:
            os.close(self._folder)
            raise Refusal(f"--out {self.out} is being written by another process: wait, or give another") from held
        except BaseException:
            os.close(self._folder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def _name(self, number: int) -> str:
        return f"part-{number:05d}.parquet"

    def _check(self, part: Path, number: int) -> None:
        """Refuse a file that is not the part of this number, or is of another identity."""
        stored = None
        with contextlib.suppress(OSError, pl.exceptions.PolarsError, ValueError):
            stored = json.loads(pl.read_parquet_metadata(part).get(IDENTITY, "null"))
        if part.name != self._name(number) or stored is None:
            wanted = f"{self._name(number)} of a table of boxes"
            raise Refusal(
                f"--out {self.out} holds {part.name}, which is not {wanted}: remove it or give another folder"
            )
        there, here = flat(stored), flat(self.described)
        if differing := [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]:
            named = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)
            raise Refusal(f"--out {self.out} holds boxes of something else: {named}. Give another folder")

    def read(self) -> pl.DataFrame:
        """All rows, in the order of the data."""
        return pl.concat([pl.DataFrame(schema=SCHEMA), *map(pl.read_parquet, self.parts)])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a part: temporary file beside the folder → fsync → rename → fsync of the folder."""
        target = self.out / self._name(len(self.parts))
        temporary = self.out.with_name(f"{self.out.name}.partial")
        frame = pl.DataFrame(rows, schema=SCHEMA)
        try:
            with temporary.open("wb") as file:
                frame.write_parquet(file, metadata={IDENTITY: json.dumps(self.described, sort_keys=True)})
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(target)
            os.fsync(self._folder)
        except OSError as failure:
            temporary.unlink(missing_ok=True)
            raise as_refusal(failure, target) from failure
        self.parts.append(target)


@dataclass(frozen=True)
class Grounder:
    """A checkpoint that can be asked for boxes; its weights are loaded when the first sample is there."""

    config: GroundConfig
    folder: Path
    device: torch.device

    @cached_property
    def processor(self):
        """The checkpoint's processor, with this run's picture size."""
        return load_processor(self.folder, self.config.max_pixels)

    @cached_property
    def conditioner(self) -> Conditioner:
        """Around the prompt that asks for a box."""
        return conditioner_for(self.processor, AutoConfig.from_pretrained(self.folder), "ground", "sequential")

    @cached_property
    def model(self) -> nn.Module:
        """The model."""
        return load_model(self.folder, self.device)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the rows of the table."""
        config = self.config
        same = {name: getattr(config, name) for name in ("model", "revision", "batch_size", "max_pixels")}
        decided = ("max_new_tokens", "max_prompt_tokens", "part_samples", "prompt", "shuffle", "seed")
        made = identity(self.folder, self.conditioner, ExtractConfig(**same), self.device)
        return made | {name: getattr(config, name) for name in decided}

    def ask(self, samples: Sequence[Sample], bar: tqdm) -> list[dict[str, Any]]:
        """Rows of the table for one part's samples, in their order; one that cannot be asked says why."""
        rows = []
        for sample in samples:
            known = {"sample_id": sample.sample_id, "width": sample.width, "height": sample.height}
            rows.append(known | dict(zip(TRUE_COLUMNS, sample.box or (None,) * 4, strict=True)))
        lengths = {}
        for number, sample in enumerate(samples):
            try:
                counts = self.conditioner.count_tokens(sample.width, sample.height, sample.instruction)
                if counts.n_query > self.config.max_prompt_tokens:
                    raise BadSample(LONG_PROMPT)
                lengths[number] = counts.n_image + counts.n_text
            except BadSample as bad:
                rows[number]["problem"] = bad.reason
        bar.update(len(samples) - len(lengths))
        alike = sorted(lengths, key=lambda number: (lengths[number], number))
        for first in range(0, len(alike), self.config.batch_size):
            chosen = alike[first : first + self.config.batch_size]
            pairs = {}
            for number in chosen:
                try:
                    pairs[number] = decode(samples[number].source), samples[number].instruction
                except BadSample as bad:
                    rows[number]["problem"] = bad.reason
            if pairs:
                conditioner, longest = self.conditioner, self.config.max_new_tokens
                answers = generate_boxes(self.model, conditioner, list(pairs.values()), longest)
                for number, answer in zip(pairs, answers, strict=True):
                    rows[number] |= answer.columns()
            bar.update(len(chosen))
        return rows


def usable(items: Iterable[Sample | SetAside], aside: Counter) -> Iterator[Sample]:
    """The samples; rows that are none are counted by reason in ``aside``."""
    for item in items:
        if isinstance(item, SetAside):
            aside[item.reason] += item.rows
        else:
            yield item


def go_past(samples: Iterator[Sample], done: pl.DataFrame, config: GroundConfig) -> None:
    """Read the samples that are in the table already.

    Raises
    ------
    Refusal
        The data do not have them, or not in the table's order.
    """
    for number, expected in enumerate(done["sample_id"]):
        found = next(samples, None)
        if found is None or found.sample_id != expected:
            instead = "nothing" if found is None else repr(found.sample_id)
            raise Refusal(
                f"--data {config.data} have {instead} as sample {number} where --out {config.out} has {expected!r}: "
                "the data changed, give another folder"
            )


def ground(config: GroundConfig) -> int:
    """Ask for all boxes that the table lacks and say how many there are; see `GroundConfig`."""
    began = time.perf_counter()
    device = find_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    grounder = Grounder(config, find_checkpoint(config.model, config.revision), device)
    reading = {name: getattr(config, name) for name in ("prompt", "seed", "shuffle")}
    items = read(config.data, min_area=0, max_area=1, check_pixels=False, **reading)
    aside: Counter = Counter()
    samples = usable(items, aside)
    with BoxTable(config.out, grounder.describe()) as table:
        done = table.read()
        left = None if config.limit is None else max(0, config.limit - len(done))
        known = [number for number in (config.limit, Shards(config.data).count()) if number is not None]
        with tqdm(total=min(known, default=None), initial=len(done), desc="boxes", unit="sample") as bar:
            if left != 0:
                go_past(samples, done, config)
            samples = islice(samples, left)
            while part := list(islice(samples, config.part_samples)):
                table.append(grounder.ask(part, bar))
        rows = table.read()
    seconds = time.perf_counter() - began
    print_summary(config, summary_of(rows), dict(aside.most_common()), len(rows) - len(done), seconds)
    return 0


def summary_of(rows: pl.DataFrame) -> dict[str, Any]:
    """Counts of a table, and how its boxes compare with the true ones (null where no sample that was asked has one)."""
    good = rows.filter(pl.col("x1").is_not_null() & pl.col("problem").is_null())
    counts = {"samples": len(rows), "boxes": len(good), "problems": count_problems(rows["problem"])}
    scored = rows.filter(pl.col("answer").is_not_null() & pl.col("true_x1").is_not_null())
    if not len(scored):
        return counts | {"n_true": 0, "model": None, "centre_box": None}
    given = [None if box[0] is None else box for box in scored.select(BOX_COLUMNS).iter_rows()]
    truth, sizes = scored.select(TRUE_COLUMNS).rows(), scored.select("width", "height").rows()
    pairs = zip(truth, sizes, strict=True)
    shares = [(box[2] - box[0]) * (box[3] - box[1]) / (width * height) for box, (width, height) in pairs]
    floor = score_boxes(centre_boxes(sizes, sum(shares) / len(shares)), truth)
    return counts | {"n_true": len(scored), "model": score_boxes(given, truth), "centre_box": floor}


def print_summary(
    config: GroundConfig, summary: dict[str, Any], aside: dict[str, int], new: int, seconds: float
) -> None:
    """What is in the table, what was wrong, how right the boxes are."""
    if config.json:
        print(json.dumps(summary | {"out": str(config.out), "set_aside": aside, "new": new, "seconds": seconds}))
        return

    def counted(what: dict[str, int]) -> str:
        return f"{sum(what.values())}" + "".join(f"\n    {count} × {reason}" for reason, count in what.items())

    print(f"\nboxes {config.out}")
    print(f"  samples    {summary['samples']}, {summary['boxes']} with a box in the picture")
    print(f"  problems   {counted(summary['problems'])}")
    print(f"  set aside  {counted(aside)}")
    if summary["n_true"]:
        print(f"  IoU ≥ 0.5  of {summary['n_true']} samples with a true box")
        for name, score in (("model", summary["model"]), ("centre box", summary["centre_box"])):
            print(f"    {name:<10} {score['iou50']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
    print(f"  time       {seconds:.0f} s for {new} new, {new / seconds:.1f} a second with loading")


if __name__ == "__main__":
    run("python -m extract.ground", ground)
