"""The extraction itself: plan → one pass over every sample → verified store, with a bar, a summary and resumption."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig

import store
from extract.boxes import Box, generate_boxes
from extract.capture import EMBED, FINAL, Pass, single_pass
from extract.config import POCKET, PRESETS, SCENES_SEED, ExtractConfig
from extract.model import find_checkpoint, identity, load_model, load_processor
from extract.omniedit import AREA, BadSample, Sample
from extract.planning import read_plan, read_samples, reasons_of
from extract.prompts import GROUND_TEMPLATE, editing_template
from extract.scenes import draw_scene
from extract.scenes.shards import ScenesConfig, is_unfinished, write_scenes
from extract.sequence import Batch, Conditioner
from store.errors import Refusal

BOX_COLUMNS = ("x1", "y1", "x2", "y2")
NO_ANSWER = "the model gave no box"
FIRST_LOOK = 64  # scenes from which the size of a store is foretold before they are all drawn
BYTES_PER_SCENE = 60_000


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time within ``with`` to ``stage``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began


@dataclass(frozen=True)
class Extractor:
    """A loaded model with its two ways of being asked: as condition encoder, and for the box."""

    config: ExtractConfig
    model: nn.Module
    conditioner: Conditioner
    grounder: Conditioner
    plan: store.Plan
    """The part of the store that is filled: its layers, kinds and attention rows are kept."""
    clock: Clock

    def ask_boxes(self, pairs: Sequence[tuple]) -> list[Box | None]:
        """The model's own boxes, in source pixels; None where its answer holds none."""
        with self.clock("boxes"):
            answers = generate_boxes(self.model, self.grounder, pairs, self.config.max_new_tokens)
        return [answer.box for answer in answers]

    def encode(self, pairs: Sequence[tuple], names: Sequence[str]) -> list[dict]:
        """States, attention rows and token tables of a batch, as `store.Writer`'s ``add`` takes them, per sample."""
        with self.clock("prepare"):
            prepared = [self.conditioner.prepare(*pair, name) for pair, name in zip(pairs, names, strict=True)]
            batch = self.conditioner.collate(prepared).to(self.model.device)
        plan, mask = self.plan, batch.query_mask
        rows = {"row_layers": plan.attention_layers, "query_mask": mask} if plan.attention else {}
        mode = ("mean" if plan.attention_heads is None else "heads") if plan.attention else None
        with self.clock("forward"):
            done = single_pass(self.model, batch.inputs, plan.layers, mode, **rows)
            given = [self._kept(done, batch, number) for number in range(len(pairs))]
        if plan.part:  # layers that are added have the tokens of those that were there
            return given
        return [one | {"tokens": sample.tokens} for one, sample in zip(given, prepared, strict=True)]

    def _kept(self, done: Pass, batch: Batch, number: int) -> dict[str, np.ndarray]:
        """What is kept of one sample of a pass, moved to the CPU."""
        masks = {"image": batch.image_mask[number], "text": batch.text_mask[number]}
        kept = {}
        for kind in self.plan.kinds if self.plan.layers else ():
            kept[kind] = done.hidden[:, number, masks[kind]].cpu().view(torch.uint16).numpy()
        if done.rows is not None:
            own = done.rows[number][..., : int(batch.query_mask[number].sum()), :]
            kept |= {name: own[..., masks[name.removeprefix("text_to_")]].cpu().numpy() for name in self.plan.attention}
        return kept


def wanted_layers(config: ExtractConfig, blocks: int) -> tuple[str, ...]:
    """The layers that ``--layers`` names, for a model of so many decoder blocks, in the model's order."""
    every = (EMBED, *map(str, range(blocks)), FINAL)
    if config.layers == "all":
        return every
    asked = [name.strip() for name in config.layers.split(",")]
    if unknown := [name for name in asked if name not in every]:
        raise Refusal(f"--layers names {unknown[0]!r}; this model has {', '.join(every)}")
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
    def conditioner(self) -> Conditioner:
        """Counts tokens; has no model."""
        return Conditioner(
            self.processor, editing_template(), self.config.positions, AutoConfig.from_pretrained(self.folder)
        )

    def plan_of(self, samples: pl.DataFrame) -> store.Plan:
        """The plan for a samples table."""
        config, text = self.config, AutoConfig.from_pretrained(self.folder).text_config
        layers = wanted_layers(config, text.num_hidden_layers)
        rows = config.attention != "none"
        return store.Plan(
            layers=layers,
            width=text.hidden_size,
            samples=samples,
            identity=identity(self.folder, self.conditioner, config, self.device),
            kinds=("image", "text") if config.tokens == "all" else ("text",),
            attention=("text_to_image", "text_to_text") if rows else (),
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


def planned_samples(config: ExtractConfig, plan: store.Plan) -> Iterator[tuple[int, Sample | str]]:
    """The planned samples in the plan's order with their row, or the reason why one cannot be had any more.

    Data that changed since the plan was made show as samples that are missing or have other bytes; they are set
    aside, not mixed in.
    """
    ids = plan.samples["sample_id"].to_list()
    place = 0
    for item in read_samples(config, check_pixels=False):
        if place == len(ids):
            return
        if isinstance(item, Sample) and item.sample_id == ids[place]:
            yield place, item
            place += 1
    for left in range(place, len(ids)):
        yield left, "the data no longer hold it in the planned order"


def fill_block(
    extractor: Extractor, valid: np.ndarray, block, members: Sequence[tuple[int, Sample | str]], bar
) -> None:
    """Extract one block: batches of alike length, the model's own boxes first where they decide what is kept.

    ``valid`` says which samples have states in the part that was created; it counts when layers are added.
    """
    config, clock, plan = extractor.config, extractor.clock, extractor.plan
    ready = []
    for number, sample in members:
        try:
            if isinstance(sample, str):
                raise BadSample(sample)
            if plan.part and not valid[number]:
                raise BadSample("it has no states of the layers that were there first")
            with clock("decode"):
                ready.append((number, sample, sample.image))
        except BadSample as bad:
            block.set_aside(number, str(bad))
            bar.update()
    counts = plan.samples.select(total=pl.col("n_image") + pl.col("n_text"))["total"]
    ready.sort(key=lambda one: (counts[one[0]], one[0]))
    for first in range(0, len(ready), config.batch_size):
        batch = ready[first : first + config.batch_size]
        values: dict[int, dict] = {number: {} for number, _, _ in batch}
        if config.vlm_boxes and not plan.part:
            boxes = extractor.ask_boxes([(image, sample.instruction) for _, sample, image in batch])
            kept = []
            for one, box in zip(batch, boxes, strict=True):
                number, sample, _ = one
                said = zip(BOX_COLUMNS, box or (None,) * 4, strict=True)
                values[number] |= {f"vlm_{name}": value for name, value in said}
                if sample.box is None and (reason := unusable(box, sample, config)):
                    block.set_aside(number, reason)
                    bar.update()
                    continue
                values[number] |= dict(zip(BOX_COLUMNS, sample.box or box, strict=True))
                kept.append(one)
            batch = kept
        if not batch:
            continue
        pairs = [(image, sample.instruction) for _, sample, image in batch]
        given = extractor.encode(pairs, [sample.sample_id for _, sample, _ in batch])
        with clock("write"):
            for (number, _, _), one in zip(batch, given, strict=True):
                block.add(number, **one, values=values[number])
        bar.update(len(batch))


def unusable(box: Box | None, sample: Sample, config: ExtractConfig) -> str | None:
    """Why the model's box cannot stand for the true one, or None where it can [ABP §4.1]."""
    if box is None:
        return NO_ANSWER
    share = (box[2] - box[0]) * (box[3] - box[1]) / (sample.width * sample.height)
    return None if config.min_area <= share <= config.max_area else f"{AREA} ({share:.5f})"


def extract(config: ExtractConfig) -> int:
    """Plan, extract, verify; the exit code is 0 only when every planned block is committed and sound."""
    clock = Clock()
    began = time.perf_counter()
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(available if config.device == "auto" else config.device)
    if device.type == "cuda" and available == "cpu":
        raise Refusal("--device cuda: torch sees no CUDA device on this machine; --device cpu works everywhere")
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_checkpoint(config.model, config.revision)
    planner = Planner(config, folder, device)
    with clock("scenes"):
        planner.draw_own_scenes()
    with clock("plan"):
        samples, set_aside = read_plan(config, planner.conditioner)
        plan = planner.plan_of(samples)
    estimate = plan.bytes_estimate()
    print_plan(plan, set_aside, estimate, config.limit)
    if config.dry_run:
        return 0
    store.check_space(config.store, sum(estimate.values()))
    if config.grow:
        store.grow(config.store, plan, set_aside)
    else:
        store.create(config.store, plan, set_aside)
    extractor = None
    for part in store.load_parts(config.store):
        if store.pending(config.store, part.part):
            if extractor is None:
                with clock("load"):
                    extractor = make_extractor(config, folder, device, part, clock)
            extract_blocks(replace(extractor, plan=part))
    with clock("verify"):
        report = store.verify(config.store)
    print_summary(config, clock, time.perf_counter() - began, report)
    return 0 if report.ok else 1


def make_extractor(
    config: ExtractConfig, folder: Path, device: torch.device, plan: store.Plan, clock: Clock
) -> Extractor:
    """Load the model and set up both conditioners."""
    model = load_model(folder, device)
    processor = load_processor(folder, config.max_pixels)
    return Extractor(
        config,
        model,
        Conditioner(processor, editing_template(), config.positions, model.config),
        Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config),
        plan,
        clock,
    )


def extract_blocks(extractor: Extractor) -> None:
    """Fill the blocks that are left of the extractor's part, with a bar over their samples."""
    config, plan = extractor.config, extractor.plan
    valid = store.open(config.store).valid
    done, source = 0, planned_samples(config, plan)
    left = sum(len(plan.block(b)) for b in store.pending(config.store, plan.part))
    described = "extract" if plan.part == 0 else f"extract part {plan.part}"
    with (
        store.Writer(config.store, config.worker, plan.part) as writer,
        tqdm(total=plan.n_samples, initial=plan.n_samples - left, desc=described, unit="sample") as bar,
    ):
        for b in writer.blocks():
            if b < done:  # another worker gave it up; the data are read from the start again
                done, source = 0, planned_samples(config, plan)
            with extractor.clock("read"):
                while done <= b:
                    members = [next(source) for _ in plan.block(done)]
                    done += 1
            with writer.block(b) as block:
                fill_block(extractor, valid, block, members, bar)
        with extractor.clock("write"):
            writer.flush()


def print_plan(plan: store.Plan, set_aside: pl.DataFrame, estimate: dict[str, int], limit: int | None) -> None:
    """What is going to be written, before anything is."""
    raw = plan.bytes_raw()
    tokens = plan.samples.select(pl.col("n_image").sum(), pl.col("n_text").sum()).row(0)
    print(
        f"plan: {plan.n_samples} samples, {tokens[0]} image and {tokens[1]} prompt tokens, "
        f"layers {' '.join(plan.layers)}"
    )
    for name, size in estimate.items():
        print(f"  {name:<24} {raw[name] / 1e9:9.3f} GB raw, about {size / 1e9:9.3f} GB on disk")
    print(
        f"  {'total':<24} {sum(raw.values()) / 1e9:9.3f} GB raw, about {sum(estimate.values()) / 1e9:9.3f} GB on disk"
    )
    for reason, count in reasons_of(set_aside).items():
        print(f"  set aside: {count} × {reason}")
    if limit is not None and plan.n_samples < limit:
        print(f"  the data hold fewer usable samples than --limit {limit}")


def print_summary(config: ExtractConfig, clock: Clock, seconds: float, report: store.Report) -> None:
    """What is on disk, what was set aside and why, where the time went."""
    opened = store.open(config.store)
    on_disk = store.disk_usage(config.store)["total"]["disk"]
    valid = opened.samples.filter(pl.col("valid"))
    tokens = int(valid["n_image"].sum() + valid["n_text"].sum())
    raw = sum(sum(part.bytes_raw(opened.valid_in(part.part)).values()) for part in opened.parts)
    print(f"\nstore {config.store}")
    print(f"  samples    {len(valid)} of {report.planned} planned ({tokens} tokens, {len(opened.layers)} layers)")
    print(f"  size       {raw / 1e9:.3f} GB raw, {on_disk / 1e9:.3f} GB on disk")
    aside = reasons_of(opened.set_aside)
    print(
        f"  set aside  {sum(aside.values())}" + "".join(f"\n    {count} × {reason}" for reason, count in aside.items())
    )
    if config.vlm_boxes and len(valid):
        said = valid.filter(pl.col("vlm_x1").is_not_null())
        print(f"  boxes      the model answered with a box for {len(said)} of {len(valid)}")
    busy = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in sorted(clock.seconds.items(), key=lambda s: -s[1]))
    print(f"  time       {seconds:.0f} s: {busy}")
    verdict = "verified" if report.ok else "NOT whole: " + "; ".join(report.problems[:5])
    print(f"  {verdict}, content {report.content_hash[:16]}")
