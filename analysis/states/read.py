"""One read of a store's states for four questions: layers in groups, samples in batches, each state once.

Norms, similarity, places and the logit lens take what they need of a batch as it passes, so that memory is bounded by
a batch and by the sums of a group of layers.

Shape suffixes: ``b`` sample of a batch, ``s`` sample that is read, ``m`` token of all of them in the order of reading,
``n`` some of those tokens, ``l`` layer, ``t`` token of a sample, ``w`` width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.config import StatesConfig
from analysis.states import lens, norms, position, similarity
from probes import targets
from store.batches import Batch
from store.errors import Refusal
from store.reader import Store
from store.shards import DamagedShard

BATCH_BYTES = 16 * 2**20
"""States of a batch, as stored."""
GROUP_BYTES = 2**30
"""Sums that are kept of the layers of a group."""

TEACHERS = 4
"""The cell of the edited object has one example a sample: it is taught by so many times as many others as are read."""
LENS_SAMPLES = 256
"""Samples whose instructions pass the head: a vocabulary of 152,000 is the dearest part by far."""

SPOKEN = norms.KINDS.index("instruction")


@dataclass(frozen=True)
class Chosen:
    """Samples of the ordinary store, by row: no two of one picture."""

    read: np.ndarray
    """Read whole; the first half teaches where image tokens are."""
    others: np.ndarray
    """Of other pictures: their instructions teach where the object is, and which tokens are frequent."""
    layers: tuple[str, ...]
    cells: np.ndarray
    """Cell of the edited object of every sample of the store, int64; -1 where it is not known."""

    @property
    def all(self) -> np.ndarray:
        """Both."""
        return np.concatenate([self.read, self.others])

    @property
    def rows(self) -> dict[int, int]:
        """Row of each in its own store."""
        return {row: row for row in self.all.tolist()}

    @property
    def half(self) -> int:
        """Samples of ``read`` that teach."""
        return len(self.read) // 2


def choose(opened: Store, control: Store | None, config: StatesConfig) -> Chosen:
    """Draw the samples by the seed: at most ``config.samples`` of the split, one a picture, that all stores have."""
    table = opened.samples
    usable_s = np.logical_and.reduce([opened.valid_in(part.part) for part in opened.parts])
    layers = opened.layers
    if control is not None:
        if control.plan.width != opened.plan.width:
            raise Refusal(f"states of {control.place} are {control.plan.width} wide, {opened.plan.width} are compared")
        there = np.logical_and.reduce([control.valid_in(part.part) for part in control.parts])
        usable_s &= table["sample_id"].is_in(control.samples["sample_id"].filter(there).implode()).to_numpy()
        layers = tuple(layer for layer in layers if layer in control.layers)
    pictures = table["image_crc32c" if "image_crc32c" in table.columns else "sample_id"].rank("dense").to_numpy()
    generator = np.random.default_rng([config.seed, 1])
    drawn = generator.permutation(np.flatnonzero(usable_s))
    drawn = drawn[np.sort(np.unique(pictures[drawn], return_index=True)[1])]  # the first drawn of each picture
    inside = table["split"].eq_missing(config.split).to_numpy()[drawn]
    rows = drawn[inside][: config.samples]
    if len(rows) < 8 or not layers:
        raise Refusal(
            f"split {config.split!r} of {opened.place} has {len(rows)} pictures and {len(layers)} layers that every "
            f"store given has; 8 and 1 are needed: its splits are {', '.join(map(str, table['split'].unique()))}"
        )
    others = drawn[~np.isin(drawn, rows)][: TEACHERS * len(rows)]
    grid = targets.make(f"cell-{position.CELLS}x{position.CELLS}", table)
    return Chosen(rows, others, layers, np.where(grid.known, grid.labels, -1))


@dataclass(frozen=True)
class Tokens:
    """The tokens of the samples that are read, in the order of reading: image tokens first, then text."""

    table: pl.DataFrame
    kind_m: np.ndarray
    """Places in ``norms.KINDS``."""
    sample_m: np.ndarray
    """Which of the samples read, from 0."""
    cell_m: np.ndarray
    """Cell of an image token that is asked for its place, -1 of any other."""
    next_m: np.ndarray
    """The next token of the instruction, -1 where none follows."""
    starts: np.ndarray
    """First token of each sample, and the end."""

    @classmethod
    def of(cls, opened: Store, rows: np.ndarray, seed: int) -> "Tokens":
        """Look them up."""
        choice = opened.batches(opened.layers[:1], "all", samples=rows).choice
        following = {
            name: pl.col(name).shift(-1).over("sample", order_by="position")
            for name in ("token_id", "position", "kind")
        }
        spoken = (pl.col("kind") == "instruction") & (following["kind"] == "instruction")
        spoken &= following["position"] == pl.col("position") + 1
        after = pl.when(spoken).then(following["token_id"]).fill_null(-1)
        table = choice.tokens().with_columns(next=after).collect()
        place_s = {row: place for place, row in enumerate(rows.tolist())}
        sample_m = table["sample"].replace_strict(place_s, return_dtype=pl.Int64).to_numpy()
        code = {kind: k for k, kind in enumerate(norms.KINDS)}
        kind_m = table["kind"].replace_strict(code, default=norms.OTHER, return_dtype=pl.Int64).to_numpy()
        table_s = opened.samples[rows.tolist()]
        sides = [
            table_s[name] if name in table_s.columns else np.full(len(rows), np.nan) for name in ("width", "height")
        ]
        sizes = np.stack(sides, axis=1).astype(np.float64)[sample_m]
        boxes = table.select(pl.col("px1", "py1", "px2", "py2").cast(pl.Float64)).to_numpy()
        cell_m = np.where(kind_m == norms.KINDS.index("image"), position.cells(boxes, sizes), -1)
        # Few of each picture, drawn: a rank within the picture by random numbers.
        random_m = np.random.default_rng([seed, 2]).random(len(cell_m)) + (cell_m < 0)
        order = np.lexsort((random_m, sample_m))
        starts = np.concatenate([[0], np.cumsum(choice.extents(choice.samples))])
        rank_m = np.empty(len(order), np.int64)
        rank_m[order] = np.arange(len(order)) - starts[sample_m[order]]
        cell_m = np.where(rank_m < position.TOKENS, cell_m, -1)
        return cls(table, kind_m, sample_m, cell_m, table["next"].to_numpy().astype(np.int64), starts)

    def asked(self, half: int) -> position.Asked | None:
        """The question where image tokens are, taught by the first ``half`` of the samples; null without places."""
        taught_m, test_m = np.split(self.cell_m, self.starts[[half]])
        taught_n, asked_m = taught_m[taught_m >= 0], test_m >= 0
        if not len(taught_n) or not asked_m.any():
            return None
        images_n = self.sample_m[self.starts[half] :][asked_m]
        return position.Asked("token", test_m[asked_m], images_n, taught_n, half)


@dataclass
class Answers:
    """What one store says."""

    norms: list[pl.DataFrame] = field(default_factory=list)
    massive: list[pl.DataFrame] = field(default_factory=list)
    grams: dict[str, similarity.Grams] = field(
        default_factory=lambda: {v: similarity.Grams() for v in similarity.VIEWS}
    )
    position: list[pl.DataFrame] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Questions of places that cannot be asked, and why."""
    heard: lens.Lens | None = None
    spoken: pl.DataFrame | None = None
    """The tokens that the lens is asked of."""
    frequent: np.ndarray | None = None
    """How often each token comes next in the instructions of other samples, by its id."""


def read(opened: Store, chosen: Chosen, rows: dict[int, int], head: lens.Head | None, seed: int) -> Answers:
    """Read a store's states once, group of layers by group; ``rows`` says where it has each sample chosen."""
    own, others = (np.array([rows[row] for row in part.tolist()]) for part in (chosen.read, chosen.others))
    tokens, answers = Tokens.of(opened, own, seed), Answers()
    places = tokens.asked(chosen.half)
    objects = Objects.of(chosen, others, tokens)
    if places is None:
        answers.absent["token"] = "the store has no places of image tokens"
    if objects is None:
        answers.absent["object"] = "the store has no boxes of objects beside instructions, or no other pictures"
    if head is not None and (tokens.next_m >= 0).any():
        heard_m = (tokens.kind_m == SPOKEN) & (tokens.sample_m < LENS_SAMPLES)
        answers.heard = lens.Lens(head, chosen.layers, tokens.next_m[heard_m])
        answers.spoken = tokens.table.filter(pl.Series(heard_m))
        answers.frequent = frequent(opened, others, head.vocabulary)
    groups = grouped(chosen.layers, opened.plan.width, len(own))
    total = len(groups) * (len(own) + (0 if objects is None else len(objects.rows)))
    with tqdm(total=total, unit="sample", desc=f"states of {opened.place}", leave=False) as bar:
        for layers in groups:
            group = Group(opened, layers, tokens, chosen.half, answers.heard, seed)
            group.read(own, bar)
            answers.norms.append(group.lengths.table())
            answers.massive.append(group.lengths.massive())
            for view, grams in answers.grams.items():
                grams.add(layers, group.views.of(view))
            if places is not None:
                places.told.append(np.concatenate(group.decoder.told, axis=2))
            if objects is not None:
                objects.read(opened, layers, group.views.of("instruction"), seed, bar)
    asked = [places, None if objects is None else objects.asked]
    answers.position = [one.table(chosen.layers) for one in asked if one is not None]
    return answers


def grouped(layers: Sequence[str], width: int, samples: int) -> list[tuple[str, ...]]:
    """Layers in groups whose sums fit into GROUP_BYTES, at least one each."""
    each = 8 * width**2 + 4 * samples * width * (len(norms.KINDS) + len(similarity.VIEWS))
    size = max(1, GROUP_BYTES // each)
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


class Group:
    """One read of some layers of a store: each batch is handed to all who want of it."""

    def __init__(
        self, opened: Store, layers: Sequence[str], tokens: Tokens, half: int, hearing: lens.Lens | None, seed: int
    ):
        self.opened, self.layers, self.tokens, self.half, self.hearing = opened, layers, tokens, half, hearing
        width, samples = opened.plan.width, len(tokens.starts) - 1
        self.lengths = norms.Norms(layers, tokens.kind_m, tokens.sample_m, samples, width)
        self.views = similarity.Views(samples, len(layers), width)
        self.decoder = position.Decoder(len(layers), width)
        asked_m, generator = tokens.cell_m >= 0, np.random.default_rng([seed, 3])
        self.shuffled_m = tokens.cell_m.copy()
        self.shuffled_m[asked_m] = position.shuffled_within(tokens.cell_m[asked_m], tokens.sample_m[asked_m], generator)

    def read(self, rows: np.ndarray, bar: tqdm) -> None:
        """Read the samples at ``rows``: first those that teach, then the others."""
        begin = 0
        for part in (rows[: self.half], rows[self.half :]):
            for batch in batches(self.opened, self.layers, "all", part):
                self._add(batch, begin)
                begin += len(batch.sample)
                bar.update(len(batch.sample))

    def _add(self, batch: Batch, begin: int) -> None:
        samples = slice(begin, begin + len(batch.sample))
        span = slice(*self.tokens.starts[[samples.start, samples.stop]])
        kinds_bt = torch.full(batch.mask.shape, norms.PADDING)
        kinds_bt[batch.mask] = torch.from_numpy(self.tokens.kind_m[span].copy())
        states_bltw = batch.states.float()
        self.lengths.add(states_bltw, kinds_bt, span, samples)
        refuse_unsound(self.opened, self.layers, self.lengths.norms_lm[:, span])
        self.views.add(states_bltw, kinds_bt, samples)
        self._place(states_bltw, batch.mask, span, begin < self.half)
        if self.hearing is not None and begin < LENS_SAMPLES:
            self._hear(batch.states, kinds_bt, begin)

    def _place(self, states_bltw: Tensor, mask_bt: Tensor, span: slice, teaching: bool) -> None:
        cells_m, shuffled_m = self.tokens.cell_m[span], self.shuffled_m[span]
        asked_m = cells_m >= 0
        if not asked_m.any():
            return
        asked_bt = mask_bt.clone()
        asked_bt[mask_bt] = torch.from_numpy(asked_m)
        states_lnw = states_bltw.transpose(0, 1)[:, asked_bt].numpy()
        if teaching:
            self.decoder.fit(states_lnw, cells_m[asked_m], shuffled_m[asked_m])
        elif self.decoder.taught:
            self.decoder.predict(states_lnw)

    def _hear(self, states_bltw: Tensor, kinds_bt: Tensor, begin: int) -> None:
        spoken_bt = kinds_bt == SPOKEN
        spoken_bt[LENS_SAMPLES - begin :] = False
        first = int((self.tokens.kind_m[: self.tokens.starts[begin]] == SPOKEN).sum())
        for place, layer in enumerate(self.layers):
            states_nw = states_bltw[:, place][spoken_bt]
            self.hearing.add(layer, states_nw, slice(first, first + len(states_nw)))


@dataclass
class Objects:
    """Where the edited object is, of the instructions' mean states: taught on other samples, asked of those read."""

    rows: np.ndarray
    """Samples that teach."""
    cells: np.ndarray
    """Their objects' cells."""
    asked_s: np.ndarray
    """Which of the samples read are asked, bool."""
    asked: position.Asked

    @classmethod
    def of(cls, chosen: Chosen, others: np.ndarray, tokens: Tokens) -> "Objects | None":
        """The question, or null where nothing can teach it or be asked."""
        taught, cells = chosen.cells[chosen.others], chosen.cells[chosen.read]
        rows, taught = others[taught >= 0], taught[taught >= 0]
        spoken_s = np.bincount(tokens.sample_m[tokens.kind_m == SPOKEN], minlength=len(cells)) > 0
        asked_s = (cells >= 0) & spoken_s
        if not len(rows) or not asked_s.any():
            return None
        asked = position.Asked("object", cells[asked_s], np.flatnonzero(asked_s), taught, len(rows))
        return cls(rows, taught, asked_s, asked)

    def read(self, opened: Store, layers: Sequence[str], means_slw: np.ndarray, seed: int, bar: tqdm) -> None:
        """Teach some layers by the states of other samples, and ask the mean states of those read."""
        decoder = position.Decoder(len(layers), opened.plan.width)
        shuffled = np.random.default_rng([seed, 4]).permutation(self.cells)
        begin = 0
        for batch in batches(opened, layers, "instruction", self.rows):
            own = slice(begin, begin := begin + len(batch.sample))
            count_b = batch.mask.sum(1)
            there_b = (count_b > 0).numpy()
            means_blw = batch.states.float().sum(2) / count_b.clamp(min=1)[:, None, None]
            means_lbw = means_blw.transpose(0, 1).numpy()[:, there_b]
            refuse_unsound(opened, layers, means_lbw)
            decoder.fit(means_lbw, self.cells[own][there_b], shuffled[own][there_b])
            bar.update(len(batch.sample))
        decoder.predict(means_slw[self.asked_s].transpose(1, 0, 2))
        self.asked.told.append(decoder.told[0])


def refuse_unsound(opened: Store, layers: Sequence[str], values: np.ndarray) -> None:
    """Refuse layers (the first axis) of which some value is not finite; norms and means tell of every state."""
    unsound = [layer for layer, own in zip(layers, values, strict=True) if not np.isfinite(own).all()]
    if unsound:
        raise Refusal(
            f"states of {opened.place} are not finite at layer {', '.join(unsound)}: `python -m store verify "
            f"{opened.place}` tells which; extract them again"
        )


def batches(opened: Store, layers: Sequence[str], tokens: str, rows: np.ndarray) -> Iterator[Batch]:
    """Batches of these samples in their order, of at most BATCH_BYTES or one sample."""
    choice = opened.batches(layers, tokens, samples=rows).choice
    size = BATCH_BYTES * len(rows) // max(1, choice.bytes_of(rows))
    try:
        yield from opened.batches(layers, tokens, max(1, min(len(rows), size)), samples=rows)
    except DamagedShard as damage:
        raise Refusal(str(damage)) from None
    except OSError as failure:
        raise Refusal(
            f"{opened.place} cannot be read ({failure}): `python -m store verify` tells what is whole"
        ) from None


def frequent(opened: Store, rows: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often each token follows another one in the instructions of these samples, int64 (vocabulary,)."""
    table = opened.tokens.filter(pl.col("kind") == "instruction", pl.col("sample").is_in(rows.tolist()))
    ids = table.filter(pl.col("position") > pl.col("position").min().over("sample")).select("token_id").collect()
    return np.bincount(ids["token_id"].drop_nulls().to_numpy(), minlength=vocabulary)
