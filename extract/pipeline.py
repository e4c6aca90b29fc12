"""The pass over planned samples: read → prepare → run → move → write, every stage beside the others, all bounded.

A thread reads rows and hands them, a batch at a time, to the loaders; this thread runs the model and does nothing
else that takes long; another takes what leaves the device and gives it to the store's writer, which has threads of
its own. Batches are a block's samples by length, so the same plan gives the same batches to any number of workers.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import store
from extract.boxes import Answer, Box, ask_boxes
from extract.capture import Pass, look, single_pass
from extract.config import ExtractConfig
from extract.loading import Loaders, Planned, planned_of, prepare, rows_at
from extract.moving import Mover, Moving
from extract.omniedit import AREA, BOX_COLUMNS
from extract.rows import Place, Shards
from extract.sequence import Batch, Conditioner, Prepared
from extract.writing import Ran, Writing
from store.errors import Refusal

NO_ANSWER = "the model gave no box"
NOT_THERE_FIRST = "it has no states of the layers that were there first"
WAITING = 2  # batches that have run and wait to be written

TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
"""Most that a sample's states of a layer may differ, in a batch and alone: norm of the difference over the norm."""
LARGEST = 1e9  # a difference that is none, for JSON has no infinity


@dataclass
class Clock:
    """Seconds that each stage was busy, of all its threads and processes together."""

    seconds: Counter = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time within ``with`` to ``stage``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        with self._lock:
            self.seconds[stage] += seconds


@dataclass(frozen=True)
class Check:
    """A sample that was run in a batch and alone."""

    sample_id: str
    layer: str
    """Where it differs most."""
    difference: float
    """Norm of the difference over the norm, of all its kept tokens at that layer."""


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
    checks: list[Check] = field(default_factory=list)

    @property
    def asks_boxes(self) -> bool:
        """Whether the model is asked for boxes, too: of samples, not once more of layers that are added."""
        return self.config.asks_boxes and not self.plan.part

    @property
    def purposes(self) -> tuple[str, ...]:
        """What inputs are needed for."""
        return ("edit", "ground") if self.asks_boxes else ("edit",)

    @torch.no_grad()
    def look(self, ready: Sequence[dict[str, Prepared]]) -> BaseModelOutputWithPooling:
        """What the vision tower makes of the pictures, for both questions."""
        pixels = self.conditioner.pixels([one["edit"] for one in ready])
        return look(self.model, {name: values.to(self.model.device) for name, values in pixels.items()})

    def ask(self, ready: Sequence[dict[str, Prepared]], features: BaseModelOutputWithPooling) -> list[Answer]:
        """The model's own boxes, in source pixels."""
        grounds = [one["ground"] for one in ready]
        return ask_boxes(self.model, grounds, self.grounder, self.config.max_new_tokens, features)

    def run(
        self, ready: Sequence[Prepared], features: BaseModelOutputWithPooling | None = None
    ) -> tuple[Pass, torch.Tensor]:
        """One pass over a batch: what it gave, and per sample how many tokens of each kind were kept, ``[b, kind]``."""
        batch = self.conditioner.collate(ready)
        if features is not None:
            del batch.inputs["pixel_values"]
        counts, keep = kept_tokens(batch, self.plan.kinds)
        batch = batch.to(self.model.device)
        plan = self.plan
        rows = (
            {"row_layers": plan.attention_layers, "query_mask": self.asked(batch), "rows": row_mode(plan)}
            if plan.attention
            else {}
        )
        done = single_pass(
            self.model, batch.inputs, plan.layers, keep=keep.to(self.model.device), features=features, **rows
        )
        return done, counts

    def asked(self, of: Batch) -> torch.Tensor:
        """The tokens whose attention rows are kept, bool ``[b, t]``."""
        return of.query_mask if self.config.queries == "instruction" else of.text_mask

    def check(self, ready: Sequence[Prepared], hidden_lnd: torch.Tensor, counts: torch.Tensor) -> None:
        """Run the batch's shortest sample, which has the most padding, alone: its states must be the same.

        Raises
        ------
        Refusal
            They are not: what is stored would depend on what else was in the batch.
        """
        if not self.plan.layers:
            return
        shortest = int(counts.sum(1).argmin())
        end = counts.sum(1).cumsum(0)[shortest]
        among = hidden_lnd[:, end - counts[shortest].sum() : end].float()
        alone, _ = self.run(ready[shortest : shortest + 1])
        norms = among.flatten(1).norm(dim=1)
        if not (norms.isfinite() & (norms > 0)).all():
            return  # the writer refuses such states, and names the place
        apart = (among - alone.hidden.float()).flatten(1).norm(dim=1).nan_to_num(nan=float("inf")) / norms
        worst = int(apart.argmax())
        one = Check(ready[shortest].sample_id, self.plan.layers[worst], min(float(apart[worst]), LARGEST))
        self.checks.append(one)
        if one.difference > TOLERANCE[self.model.dtype]:
            raise Refusal(
                f"sample {one.sample_id!r} has other states at layer {one.layer} alone than in its batch: they differ "
                f"by {one.difference:.3g} of their norm, {TOLERANCE[self.model.dtype]} is allowed; try --batch-size 1"
            )


def row_mode(plan: store.Plan) -> str:
    """Whether attention rows are averaged over heads."""
    return "mean" if plan.attention_heads is None else "heads"


def kept_tokens(batch: Batch, kinds: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts ``[b, kind]`` of kept tokens, and their places among the batch's: by sample, then kind, then position."""
    masks = batch.masks
    masks_bkt = torch.stack([masks[kind] for kind in kinds], dim=1)
    sample, _, position = masks_bkt.nonzero(as_tuple=True)
    return masks_bkt.sum(2), sample * masks_bkt.shape[2] + position


def batches_of(plan: store.Plan, b: int, size: int) -> list[list[int]]:
    """The samples of block ``b`` as batches of alike length."""
    counts = plan.samples["n_image"] + plan.samples["n_text"]
    members = sorted(plan.block(b), key=lambda sample: (counts[sample], sample))
    return [members[first : first + size] for first in range(0, len(members), size)]


@dataclass
class _Loading:
    """A batch on its way to the model."""

    block: int
    samples: list[int]
    last: bool
    future: Future


class Filling:
    """Fills blocks of a store with what a model gives; see the module.

    Parameters
    ----------
    extractor
        The model and what is kept.
    loaders
        Made with the extractor's kit.
    writing
        Of the extractor's part.
    advance
        Called with the number of samples that went to the writer, and now and then with 0.
    checked
        Called after each sample that was run alone.
    """

    def __init__(
        self,
        extractor: Extractor,
        loaders: Loaders,
        writing: Writing,
        advance: Callable[[int], None],
        checked: Callable[[], None],
    ):
        self.extractor, self.loaders, self.writing = extractor, loaders, writing
        self.advance, self.checked = advance, checked
        config, plan = extractor.config, extractor.plan
        self.shards = Shards(config.data)
        self.planned: list[Planned] = planned_of(plan.samples)
        self.places = [Place(*row) for row in plan.samples.select("file", "row").iter_rows()]
        self.valid = store.open(config.store).valid if plan.part else None
        self.mover = Mover(extractor.model.device)
        self._loading: queue.Queue = queue.Queue(max(2, 2 * loaders.processes))
        self._done: queue.Queue = queue.Queue(WAITING)
        self._failure: BaseException | None = None
        self._stopping = threading.Event()

    def fill(self) -> None:
        """Fill blocks as they come; when this returns they are committed. Raises what went wrong in any stage."""
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._read, self._write)
        ]
        for thread in threads:
            thread.start()
        checked = 1
        try:
            for number, item in enumerate(self._items(), 1):
                done = self._run(item, check=number == checked)
                # The first, the second, the fourth …: often while little is lost, seldom when it has held for long.
                checked *= 2 if number == checked else 1
                self._put(self._done, done)
            self._put(self._done, None)
        except BaseException as failure:
            self._fail(failure)
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        for stage, seconds in self.writing.finish().items():
            self.extractor.clock.add(stage, seconds)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        self._stopping.set()

    def _put(self, waiting: queue.Queue, item: Any) -> None:
        """Wait for room, unless another stage has failed."""
        while not self._stopping.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
        raise _Stopped

    def _get(self, waiting: queue.Queue) -> Any:
        while not self._stopping.is_set():
            try:
                return waiting.get(timeout=0.1)
            except queue.Empty:
                self.advance(0)
        raise _Stopped

    def _read(self) -> None:
        """Rows of one block after the other, to the loaders."""
        clock, plan, config = self.extractor.clock, self.extractor.plan, self.extractor.config
        for b in self.writing.blocks():
            members = list(plan.block(b))
            with clock("read"):
                rows = dict(zip(members, rows_at(self.shards, [self.places[n] for n in members]), strict=True))
            batches = batches_of(plan, b, config.batch_size)
            for number, samples in enumerate(batches, 1):
                wanted = [n for n in samples if self.valid is None or self.valid[n]]
                given = [self.planned[n] for n in wanted], [rows[n] for n in wanted], self.extractor.purposes
                work = self.loaders.submit(prepare, *given)
                self._put(self._loading, _Loading(b, samples, number == len(batches), work))
        self._put(self._loading, None)

    def _items(self) -> Iterator[_Loading]:
        while (item := self._get(self._loading)) is not None:
            yield item

    def _run(self, item: _Loading, check: bool) -> tuple[Ran, Moving | None]:
        """Ask the model for the boxes, where that is wanted, and run the pass."""
        extractor, clock = self.extractor, self.extractor.clock
        with clock("wait for inputs"):
            found, seconds = self.loaders.result(item.future)
        clock.add("prepare", seconds)
        done = Ran(item.block, item.last, {})
        ready, prepared = [], iter(found)
        for sample in item.samples:
            one = NOT_THERE_FIRST if self.valid is not None and not self.valid[sample] else next(prepared)
            if isinstance(one, str):
                done.aside[sample] = one
            else:
                ready.append((sample, one, {}))
        features = None
        if extractor.asks_boxes and ready:
            with clock("boxes"):
                features = extractor.look([one for _, one, _ in ready])
                usable = self._with_boxes(ready, features, done.aside)
            # Of fewer pictures the tower runs once more, which is rare.
            features, ready = (features if len(usable) == len(ready) else None), usable
        if not ready:
            return done, None
        done.samples, inputs, done.values = map(list, zip(*ready, strict=True))
        done.prepared = [one["edit"] for one in inputs]
        with clock("pass"):
            captured, counts = extractor.run(done.prepared, features)
            if check:
                extractor.check(done.prepared, captured.hidden, counts)
                self.checked()
            done.counts = counts.numpy()
            leaving = {"hidden": captured.hidden} if extractor.plan.layers else {}
            if captured.rows is not None:
                leaving["rows"] = captured.rows.half()
            moving = self.mover.move(leaving, self._get)
        # Pixels have been seen; the rest goes with the states.
        done.prepared = [replace(one, pixels={}) for one in done.prepared]
        return done, moving

    def _with_boxes(self, ready: list, features: BaseModelOutputWithPooling, aside: dict[int, str]) -> list:
        """Those of which there is a box, with their values; the model's own stands in where the data bring none."""
        config, samples = self.extractor.config, self.extractor.plan.samples
        kept = []
        answers = self.extractor.ask([one for _, one, _ in ready], features)
        for (sample, one, values), answer in zip(ready, answers, strict=True):
            true = samples.select(BOX_COLUMNS).row(sample)
            values |= {f"vlm_{name}": value for name, value in answer.columns().items()}
            if true[0] is None and (reason := unusable(answer.box, *self.planned[sample][2:4], config)):
                aside[sample] = reason
                continue
            values |= dict(zip(BOX_COLUMNS, answer.box if true[0] is None else true, strict=True))
            kept.append((sample, one, values))
        return kept

    def _write(self) -> None:
        """What has run, to whoever writes."""
        clock = self.extractor.clock
        while (done := self._get(self._done)) is not None:
            ran, moving = done
            with clock("move"):
                arrays = {} if moving is None else moving.arrays()
            with clock("wait for the writer"):
                self.writing.take(ran, arrays, (lambda: None) if moving is None else moving.release)
            self.advance(len(ran.samples) + len(ran.aside))


class _Stopped(Exception):  # noqa: N818 - another stage has the reason
    """Another stage failed."""


def unusable(box: Box | None, width: int, height: int, config: ExtractConfig) -> str | None:
    """Why the model's box cannot stand for the true one, or None where it can [ABP §4.1]."""
    if box is None:
        return NO_ANSWER
    share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
    return None if config.min_area <= share <= config.max_area else f"{AREA} ({share:.5f})"
