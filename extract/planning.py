"""From data to a plan: which samples there are, how many tokens each brings, what cannot be used and why."""

import hashlib
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tqdm import tqdm
from transformers import AutoConfig

import store
from extract.boxes import Box
from extract.capture import EMBED, FINAL
from extract.config import POCKET, PRESETS, SCENES_SEED, SHUFFLED_IMAGES, ExtractConfig
from extract.control import SHOWN, show_others
from extract.families import family_of
from extract.loading import Kit, Loaders
from extract.model import identity, load_processor
from extract.omniedit import BOX_COLUMNS, DUPLICATE, STRATA, BadSample, Checks, Sample, crc_of, judged
from extract.prompts import ground_template
from extract.review.verdicts import boxes_by_id
from extract.rows import ROWS_AT_ONCE, Place, SetAside, Shards
from extract.scenes import draw_scene
from extract.scenes.shards import ScenesConfig, is_unfinished, write_scenes
from extract.sequence import Conditioner, conditioner_for
from store.errors import Refusal
from store.plan import KINDS, hash_json

FIRST_LOOK = 64  # scenes from which the size of a store is foretold before they are all drawn
BYTES_PER_SCENE = 60_000

LONG_PROMPT = "prompt too long"
NO_BOX = "no box"
REJECTED = "rejected by a person"
NOT_LISTED = "not among the samples of the store of --boxes"
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
    "file": pl.String,
    "row": pl.Int64,
}
STRATA_SCHEMA = dict(zip(STRATA, (pl.Int64, pl.String, pl.String), strict=True))
RESULTS = ("sample", "valid", "set_aside", "verified")
"""Columns that a store's samples get later; the model's own boxes, ``vlm_…``, are others."""

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


@dataclass(frozen=True)
class Found:
    """A row that can be used, as planning keeps it: without its picture."""

    values: tuple
    """In the order of `SAMPLE_SCHEMA`."""
    extra: dict[str, Any]


def checks_of(config: ExtractConfig) -> Checks:
    """What is demanded of a row; pixels are looked at when they are needed."""
    return Checks(config.prompt, config.seed, config.min_area, config.max_area, pixels=False)


def is_store(boxes: str | None) -> bool:
    """Whether ``--boxes`` names a store, not a file of verdicts."""
    return boxes is not None and ("://" in str(boxes) or Path(boxes).is_dir())


def given_boxes(config: ExtractConfig) -> dict[str, Box | None]:
    """The boxes that ``--boxes`` names, by sample id; null where a person rejected the sample.

    Raises
    ------
    Refusal
        It is neither a file of verdicts nor a store, or a store whose boxes are not all there or are no sample's own.
    """
    if config.boxes is None:
        return {}
    if not is_store(config.boxes):
        return boxes_by_id(config.boxes)
    opened = store.open(config.boxes)
    if SHOWN in opened.samples.columns:
        raise Refusal(f"--boxes {config.boxes} is a store of shuffled images: give the ordinary one")
    if left := store.pending(config.boxes):
        raise Refusal(f"--boxes {config.boxes} is not filled yet ({len(left)} blocks are missing): finish it first")
    valid = opened.samples.filter("valid", pl.col("x1").is_not_null())
    return {sample_id: box for sample_id, *box in valid.select("sample_id", *BOX_COLUMNS).iter_rows()}


def wanted_layers(config: ExtractConfig, blocks: int) -> tuple[str, ...]:
    """The layers that ``--layers`` names, for a model of so many decoder blocks, in the model's order."""
    every = (EMBED, *map(str, range(blocks)), FINAL)
    if config.layers == "all":
        return every
    asked = set()
    for name in (name.strip() for name in config.layers.split(",")):
        ends = re.fullmatch(r"(\d+)-(\d+|final)", name) or re.fullmatch(r"(embed)-(\d+|final)", name)
        first, last = ends.groups() if ends else (name, name)
        if first not in every or last not in every or every.index(first) > every.index(last):
            raise Refusal(f"--layers names {name!r}; this model has {', '.join(every)}, and ranges such as 0-final")
        asked |= set(every[every.index(first) : every.index(last) + 1])
    return tuple(name for name in every if name in asked)


@dataclass(frozen=True)
class Planner:
    """Lays the store out on paper: from samples with their token counts to arrays and bytes."""

    config: ExtractConfig
    folder: Path
    device: torch.device

    @cached_property
    def processor(self):
        """The checkpoint's processor, with this run's picture size."""
        return load_processor(self.folder, self.config.max_pixels)

    @cached_property
    def model_config(self):
        """The checkpoint's configuration."""
        return AutoConfig.from_pretrained(self.folder)

    @cached_property
    def conditioner(self) -> Conditioner:
        """Makes what conditions the editor."""
        positions = self.config.positions or family_of(self.model_config).own_positions
        return conditioner_for(self.processor, self.model_config, self.config.conditioning, positions)

    @cached_property
    def grounder(self) -> Conditioner:
        """Makes what asks for the box, of the picture as the editor conditions on it: the tower sees it once."""
        family = family_of(self.model_config)
        template, editor = ground_template(family), self.conditioner.editor
        return Conditioner(self.processor, template, family.own_positions, self.model_config, editor)

    def kit(self) -> Kit:
        """What loaders need."""
        conditioners = {"edit": self.conditioner} | ({"ground": self.grounder} if self.config.asks_boxes else {})
        checks, dtype = checks_of(self.config), getattr(torch, self.config.dtype)
        return Kit(checks, conditioners, dtype, given_boxes(self.config), is_store(self.config.boxes))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the bytes of the states."""
        return identity(self.folder, self.conditioner, self.config, self.device)

    def plan_of(self, samples: pl.DataFrame) -> store.Plan:
        """The plan for a samples table."""
        config, text = self.config, self.model_config.text_config
        layers = wanted_layers(config, text.num_hidden_layers)
        rows = config.attention != "none"
        return store.Plan(
            layers=layers,
            width=text.hidden_size,
            samples=samples,
            identity=self.identity,
            dtype=config.dtype,
            kinds=KINDS if config.tokens == "all" else (config.tokens,),
            attention=tuple(f"text_to_{kind}" for kind in KINDS if config.keys in ("all", kind)) if rows else (),
            attention_layers=tuple(name for name in layers if name.isdecimal()) if rows else (),
            attention_heads=text.num_attention_heads if config.attention == "heads" else None,
            codec=config.codec,
            text_codec=config.text_codec,
        )

    def draw_own_scenes(self) -> None:
        """Draw the pocket preset's own data, or finish drawing them; data of anybody else are left as they are.

        Raises
        ------
        Refusal
            The disks cannot hold what a first look says the store and the scenes will take; nothing is drawn then.
        """
        config, own = self.config, PRESETS[POCKET]
        wanted = ScenesConfig(Path(own.data), samples=max(config.limit or 0, own.limit), seed=SCENES_SEED)
        if config.data != own.data or not is_unfinished(wanted):
            return
        drawn = [draw_scene(wanted.seed, index, wanted.difficulty) for index in range(FIRST_LOOK)]
        counts = [self.conditioner.count_tokens(s.width, s.height, s.instructions[0]) for s in drawn]
        look = pl.DataFrame(counts, schema=["n_image", "n_text", "n_query"], orient="row").with_columns(
            sample_id=pl.int_range(FIRST_LOOK).cast(pl.String), split=pl.lit("train")
        )
        taken = min(config.limit or wanted.samples, wanted.samples)
        store.check_space(config.store, sum(self.plan_of(look).bytes_estimate().values()) * taken // FIRST_LOOK)
        store.check_space(own.data, BYTES_PER_SCENE * wanted.samples)
        print(f"drawing scenes into {own.data}; --data takes other data")
        write_scenes(wanted)


def read_plan(config: ExtractConfig, loaders: Loaders) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One pass over the data without the model, every picture decoded once by the loaders.

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
    rows, extras, aside, seen = [], [], [], set()
    # Once all of a store's samples are found, the rest of the data need not be read.
    listed = len(given_boxes(config)) if is_store(config.boxes) else math.inf
    limit = min(listed, math.inf if config.limit is None else config.limit)
    verdicts = _in_order(loaders, Shards(config.data).walk(config.seed if config.shuffle else None), config)
    with tqdm(total=config.limit, desc="plan", unit="sample", smoothing=0.1) as bar:
        for verdict in verdicts:
            if isinstance(verdict, Found) and verdict.values[0] in seen:
                place = Place(*verdict.values[-2:])
                verdict = SetAside(verdict.values[0], place, DUPLICATE)
            if isinstance(verdict, SetAside):
                aside.append((verdict.sample_id, *verdict.place, verdict.reason, verdict.detail, verdict.rows))
                continue
            seen.add(verdict.values[0])
            rows.append(verdict.values)
            extras.append(verdict.extra)
            bar.update()
            if len(rows) == limit:
                verdicts.close()
                break
    set_aside = pl.DataFrame(aside, schema=SET_ASIDE_SCHEMA, orient="row")
    if not rows:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in reasons_of(set_aside).items())
        raise Refusal(f"--data {config.data}: no sample can be used ({reasons or 'it has no rows'})")
    samples = pl.DataFrame(rows, schema=SAMPLE_SCHEMA, orient="row")
    brought = pl.DataFrame(extras, infer_schema_length=None)
    # Where no sample has one, nothing says what it would have been.
    unknown = [name for name in STRATA if brought.schema.get(name) == pl.Null]
    brought = brought.with_columns(pl.col(name).cast(STRATA_SCHEMA[name]) for name in unknown)
    samples = samples.hstack(brought.rename(free_name))
    return (show_others(samples) if config.control == SHUFFLED_IMAGES else samples), set_aside


def free_name(brought: str) -> str:
    """The name under which a column of the data is kept: its own, unless the store's samples have one of that name."""
    taken = brought in (*SAMPLE_SCHEMA, *RESULTS) or brought.startswith("vlm_")
    return f"data_{brought}" if taken else brought


def _in_order(
    loaders: Loaders, rows: Iterable[tuple[Place, Mapping[str, Any]] | SetAside], config: ExtractConfig
) -> Iterator[Found | SetAside]:
    """What becomes of every row, in the order of the rows, a bounded number of them at the loaders."""
    waiting: deque = deque()
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        waiting.append(loaders.submit(judge, some, config))
        if len(waiting) > 2 * loaders.processes:
            yield from loaders.result(waiting.popleft())[0]
    while waiting:
        yield from loaders.result(waiting.popleft())[0]


def judge(
    kit: Kit, rows: Sequence[tuple[Place, Mapping[str, Any]] | SetAside], config: ExtractConfig
) -> list[Found | SetAside]:
    """What becomes of each row: checked, its picture decoded, its tokens counted; done by a loader."""
    checks, conditioner = replace(kit.checks, pixels=True), kit.conditioners["edit"]
    verdicts = []
    for row in rows:
        found = row if isinstance(row, SetAside) else judged(row[1], row[0], checks)
        if isinstance(found, Sample):
            try:
                counts = conditioner.count_tokens(found.width, found.height, found.instruction)
                n_query = counts.n_query if config.queries == "instruction" else counts.n_text
                if counts.n_query > config.max_prompt_tokens:
                    raise BadSample(LONG_PROMPT, f"{counts.n_query} tokens")
                box = kit.boxes.get(found.sample_id, found.box)
                if box is None and found.sample_id in kit.boxes:
                    raise BadSample(REJECTED)
                if kit.listed and found.sample_id not in kit.boxes:
                    raise BadSample(NOT_LISTED)
                if box is None and not config.vlm_boxes:
                    raise BadSample(NO_BOX, "the data bring none and --no-vlm-boxes was given")
                if box is None and not config.asks_boxes:
                    raise Refusal(
                        f"sample {found.sample_id!r} brings no box, and --control {config.control} asks no model for "
                        "one: give --boxes with the ordinary store (or a file of verdicts), or --no-vlm-boxes to set "
                        "such rows aside, as the ordinary store then must, too"
                    )
                values = (
                    found.sample_id,
                    found.task,
                    found.instruction,
                    found.width,
                    found.height,
                    *counts[:2],
                    n_query,
                    *(box or (None,) * 4),
                    split_of(found.sample_id, config.seed, config.held_out),
                    crc_of(found.source),
                    *found.place,
                )
                found = Found(values, dict(found.extra))
            except BadSample as bad:
                found = SetAside(found.sample_id, found.place, bad.reason, bad.detail)
        verdicts.append(found)
    return verdicts


def selection(config: ExtractConfig) -> dict[str, Any]:
    """What decides which samples a store is planned with; by it, a resumed run knows that it need not plan again."""
    names = ("limit", "prompt", "shuffle", "seed", "min_area", "max_area", "held_out", "max_prompt_tokens")
    asked = {name: getattr(config, name) for name in (*names, "vlm_boxes", "queries")}
    looked_at = None if config.boxes is None else hash_json(given_boxes(config))
    shown = {"control": config.control} if config.control == SHUFFLED_IMAGES else {}
    return asked | {"data": Shards(config.data).fingerprint(), "boxes": looked_at} | shown


def reasons_of(set_aside: pl.DataFrame) -> dict[str, int]:
    """How many rows were set aside for each reason, most first."""
    counted = set_aside.group_by("reason").agg(pl.col("rows").sum()).sort("rows", "reason", descending=[True, False])
    return dict(counted.iter_rows())
