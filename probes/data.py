"""What a sweep reads: which samples, in which order, and batches of their states, each read from disk once.

Shape suffixes: ``s`` sample, ``b`` batch, ``g`` group, ``l`` VLM layer, ``t`` token, ``w`` VLM width.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from probes import marked
from probes.specs import ORDINARY, seen
from probes.stacked import View
from store.errors import Refusal
from store.plan import hash_json
from store.shards import DamagedShard

ALIGNED = 16
"""Token axes are padded to a multiple of this: vector units take them whole, which is twice as fast on CPUs."""


@dataclass(frozen=True, eq=False)
class Split:
    """The usable samples of a store, by their positions in it, int64."""

    train: np.ndarray
    """In the order in which shares of it are taken: drawn, for a store may be sorted by task."""
    watch: np.ndarray
    """Test samples on which the error is followed and a layer may be chosen."""
    rest: np.ndarray
    """All other test samples; nothing is chosen by them."""

    @property
    def test(self) -> np.ndarray:
        """All test samples, the watched ones first."""
        return np.concatenate([self.watch, self.rest])

    def shared(self, share: float) -> np.ndarray:
        """The train samples that a probe of this share sees, at least two."""
        return self.train[: seen(share, len(self.train))]

    def coded(self, share: float) -> np.ndarray:
        """The train samples behind those of a share, as many again: what its probe codes."""
        return self.train[len(self.shared(share)) : len(self.shared(2 * share))]

    def describe(self, labels: np.ndarray) -> dict[str, Any]:
        """JSON-able: how many samples, and a hash of which and with what answers."""
        parts = {name: getattr(self, name) for name in ("train", "watch", "rest")}
        told = {name: positions.tolist() for name, positions in parts.items()}
        answers = {name: labels[positions].tolist() for name, positions in parts.items()}
        return {name: len(positions) for name, positions in parts.items()} | {"hash": hash_json([told, answers])}


def split(table: pl.DataFrame, usable: np.ndarray, watch: int, order_seed: int, place: Any = "the store") -> Split:
    """The usable samples of ``table`` (``store.samples``) by its split column.

    At most half of the test split is watched, so that there is always a rest that chose nothing.

    Raises
    ------
    Refusal
        When a split has fewer than two samples.
    """
    found = {name: np.flatnonzero(table["split"].eq_missing(name).to_numpy() & usable) for name in ("train", "test")}
    for name, positions in found.items():
        if len(positions) < 2:
            raise Refusal(
                f"{len(positions)} samples of {place} with states and an answer are in split {name!r}: training takes "
                "two in train and two in test, extract more"
            )
    test = np.random.default_rng(0).permutation(found["test"])
    watched = min(watch, len(test) // 2)
    train = np.random.default_rng([order_seed, 4]).permutation(found["train"])
    return Split(train, np.sort(test[:watched]), np.sort(test[watched:]))


def input_types(table: pl.DataFrame) -> np.ndarray:
    """The type of every sample for the control task, int64 (s,): the last word of its instruction."""
    words = table["instruction"] if "instruction" in table.columns else table["sample_id"]
    last = words.fill_null("").str.to_lowercase().str.extract(r"(\w+)\W*$", 1).fill_null("")
    return last.rank("dense").cast(pl.Int64).to_numpy()


class Source:
    """A store whose states are read, in the positions of the ordinary one.

    Raises
    ------
    Refusal
        When it holds other layers or a width of its own.
    """

    def __init__(self, opened: Any, like: Any):
        self.store, self.like = opened, like
        if opened is like:
            self.position_s = np.arange(like.plan.n_samples)
        else:
            places = {name: n for n, name in enumerate(opened.plan.samples["sample_id"])}
            self.position_s = np.array([places.get(name, -1) for name in like.plan.samples["sample_id"]], np.int64)
        if opened.plan.width != like.plan.width:
            raise Refusal(f"states of {opened.place} are {opened.plan.width} wide, of {like.place} {like.plan.width}")
        valid = np.logical_and.reduce([opened.valid_in(part.part) for part in opened.parts])
        self.usable_s = (self.position_s >= 0) & valid[self.position_s]

    @cached_property
    def n_image(self) -> np.ndarray:
        """Image tokens of every sample of this store, int64."""
        return self.store.plan.samples["n_image"].to_numpy().astype(np.int64)

    @cached_property
    def n_text(self) -> np.ndarray:
        """Prompt tokens of every sample of this store, int64."""
        return self.store.plan.samples["n_text"].to_numpy().astype(np.int64)

    def slots(self, tokens: str, without: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where a sample's tokens of a kind are among its states (image, then text): places (s, t), counts (s,).

        Those that derived array ``without`` marks are none; where it says nothing of a sample, the sample has none.

        Raises
        ------
        Refusal
            When the store has no token of that kind, or no such array over its prompt tokens.
        """
        if (tokens, without) not in self._slots:
            found = self._find(tokens)
            if without is not None:
                found = marked.unmarked(*found, marked.marks(self.store, without), self.n_image, self.n_text)
            self._slots[tokens, without] = found
        return self._slots[tokens, without]

    @cached_property
    def _slots(self) -> dict[tuple[str, str | None], tuple[np.ndarray, np.ndarray]]:
        return {}

    def _find(self, tokens: str) -> tuple[np.ndarray, np.ndarray]:
        n_text = self.n_text
        counts = {"image": self.n_image, "text": n_text, "all": self.n_image + n_text}.get(tokens)
        if counts is not None:
            first = self.n_image if tokens == "text" else np.zeros_like(counts)
            return first[:, None] + np.arange(counts.max()), counts
        table = (
            self.store.tokens.filter(pl.col("kind") == tokens).select("sample", "slot").sort("sample", "slot").collect()
        )
        if table.is_empty():
            kinds = self.store.tokens.select(pl.col("kind").unique()).collect()["kind"].to_list()
            known = ", ".join(sorted({"all", "text", *kinds}))
            raise Refusal(f"--tokens {tokens}: no token of {self.store.place} is of that kind; give one of {known}")
        sample, slot = table["sample"].to_numpy(), table["slot"].to_numpy().astype(np.int64)
        counts = np.bincount(sample, minlength=len(n_text))
        place = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.zeros((len(n_text), counts.max()), np.int64)
        places[sample, place] = self.n_image[sample] + slot
        return places, counts


@dataclass(frozen=True, eq=False)
class Read:
    """One batch as it was read: samples in positions of the ordinary store, and states of every source."""

    samples: np.ndarray
    states: Mapping[str, Tensor]
    """By source: (b, l, t, w) in the store's dtype, image tokens first."""


@dataclass
class Told:
    """What reading cost."""

    nbytes: int = 0
    """Bytes of states handed out."""
    busy: float = 0.0
    """Seconds that reading took, mostly beside the training."""
    waited: float = 0.0
    """Seconds that the training waited for it."""


@dataclass(frozen=True, eq=False)
class Feed:
    """Reads what a wave of probes needs, each state once.

    ``layers`` and ``tokens`` (image, text or all) are what is read, by source.
    """

    sources: Mapping[str, Source]
    layers: Mapping[str, Sequence[str]]
    tokens: str
    told: Told = field(default_factory=Told)

    def batches(
        self, samples: np.ndarray, batch: int, *, steps: int | None = None, seed: int = 0, start: int = 0
    ) -> Iterator[Read]:
        """Batches of ``samples``: once in their order, or ``steps`` shuffled ones from number ``start`` on."""
        batch = min(batch, len(samples))
        epochs = 1 if steps is None else -(-steps // (len(samples) // batch))
        streams = {}
        for name, layers in self.layers.items():
            source = self.sources[name]
            streams[name] = source.store.batches(
                layers,
                self.tokens,
                batch,
                steps is not None,
                seed,
                samples=source.position_s[samples],
                epochs=epochs,
                drop_last=steps is not None,
            )
            streams[name].position = start
        orders = next(iter(streams.values()))
        back = np.full(orders.choice.store.plan.n_samples, -1)
        back[orders.choice.samples] = samples
        iterators = {name: iter(stream) for name, stream in streams.items()}
        try:
            for _ in range(start, len(orders) if steps is None else steps):
                began = time.perf_counter()
                found = {name: self._next(name, stream) for name, stream in iterators.items()}
                self.told.waited += time.perf_counter() - began
                self.told.nbytes += sum(one.states.nbytes for one in found.values())
                yield Read(
                    back[next(iter(found.values())).sample.numpy()], {name: one.states for name, one in found.items()}
                )
                del found  # or its memory could not be used again
        finally:
            for stream in iterators.values():
                stream.close()
            self.told.busy += sum(stream.busy for stream in streams.values())

    def _next(self, source: str, stream: Iterator[Any]) -> Any:
        try:
            return next(stream)
        except DamagedShard as damage:
            raise Refusal(str(damage)) from None
        except OSError as failure:
            place = self.sources[source].store.place
            raise Refusal(f"{place} cannot be read ({failure}): `python -m store verify` tells what is whole") from None


class Views:
    """What stacks read of one batch, each normalised and gathered once."""

    def __init__(self, feed: Feed, read: Read, device: str, dtype: torch.dtype):
        self.feed, self.read, self.device, self.dtype = feed, read, device, dtype
        self._normalised: dict[str, Tensor] = {}
        self._chosen: dict[tuple[str, str, str | None], tuple[Tensor, Tensor | None]] = {}

    def normalised(self, source: str) -> Tensor:
        """All states of a source, mean 0 and variance 1 over the width: (l, b, t, w)."""
        if source not in self._normalised:
            states_lbtw = self.read.states[source].to(self.device, non_blocking=True).transpose(0, 1)
            normal_lbtw = functional.layer_norm(states_lbtw.float(), states_lbtw.shape[-1:])
            # A state with one value that is no number has none left after the norm: one value of each tells.
            sound_lb = normal_lbtw[..., 0].isfinite().all(-1)
            if not sound_lb.all():
                self._unsound(source, ~sound_lb.cpu().numpy())
            self._normalised[source] = normal_lbtw.to(self.dtype)
        return self._normalised[source]

    def _unsound(self, source: str, unsound_lb: np.ndarray) -> NoReturn:
        origin = self.feed.sources[source]
        layers = [name for name, some in zip(self.feed.layers[source], unsound_lb.any(1), strict=True) if some]
        places = origin.position_s[self.read.samples[unsound_lb.any(0)]]
        names = origin.store.plan.samples["sample_id"][places].to_list()
        raise Refusal(
            f"states of {origin.store.place} are not finite at layer {', '.join(layers)} of {len(names)} samples, e.g. "
            f"{names[0]}: `python -m store verify` lists them; extract them again"
        )

    def chosen(self, source: str, tokens: str, without: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens of a kind (l, b, t, w), and where they are padding, as 0 and −inf (b, t); None if nowhere."""
        if (source, tokens, without) not in self._chosen:
            origin, states_lbtw = self.feed.sources[source], self.normalised(source)
            samples = origin.position_s[self.read.samples]
            places_bt, counts_b = (part[samples] for part in origin.slots(tokens, without))
            longest = counts_b.max()
            inside_bt = np.arange(-(-longest // ALIGNED) * ALIGNED) < counts_b[:, None]
            if tokens == self.feed.tokens and without is None:
                missing = inside_bt.shape[1] - states_lbtw.shape[2]
                states_lbtw = functional.pad(states_lbtw, (0, 0, 0, missing)) if missing else states_lbtw
            else:
                before_b = origin.n_image[samples] if self.feed.tokens == "text" else 0
                index_bt = np.zeros(inside_bt.shape, np.int64)
                index_bt[:, :longest] = (places_bt[:, :longest].T - before_b).T
                index_bt *= inside_bt
                index_bt = torch.from_numpy(index_bt).to(self.device)
                index = index_bt[None, :, :, None].expand(len(states_lbtw), -1, -1, states_lbtw.shape[-1])
                states_lbtw = states_lbtw.gather(2, index)
            closed_bt = None
            if not inside_bt.all():
                closed_bt = torch.from_numpy(np.where(inside_bt, np.float32(0), np.float32(-np.inf))).to(self.device)
            self._chosen[source, tokens, without] = states_lbtw, closed_bt
        return self._chosen[source, tokens, without]

    def view(
        self,
        source: str,
        tokens: str,
        groups: Sequence[Sequence[str]],
        keys: int | None,
        without: str | None = None,
    ) -> View:
        """The states that each group of a stack reads: its layers together."""
        held = list(self.feed.layers[source])
        index_gl = [[held.index(name) for name in layers] for layers in groups]
        states_lbtw, closed_bt = self.chosen(source, tokens, without)
        flat = [place for places in index_gl for place in places]
        if flat == list(range(flat[0], flat[0] + len(flat))):
            taken = states_lbtw[flat[0] : flat[0] + len(flat)]
        else:
            taken = states_lbtw[torch.tensor(flat, device=states_lbtw.device)]
        g, l = len(index_gl), len(index_gl[0])  # noqa: E741
        states_glbtw = taken.view(g, l, *taken.shape[1:])
        if keys is None:
            return View(states_glbtw, None if closed_bt is None else closed_bt.expand(g, l, -1, -1))
        origin = self.feed.sources[source]
        counts_b = origin.slots(tokens, without)[1][origin.position_s[self.read.samples]]
        index_lbt = torch.from_numpy(drawn(self.read.samples, counts_b, l, keys // l)).to(self.device).transpose(0, 1)
        index = index_lbt[None, ..., None].expand(g, -1, -1, -1, states_glbtw.shape[-1])
        return View(states_glbtw.gather(3, index), None)


def drawn(samples: np.ndarray, counts_b: np.ndarray, layers: int, keys: int) -> np.ndarray:
    """``keys`` tokens of every sample and layer, drawn without repetition, always the same of a sample: (b, l, t)."""
    chosen = [
        [generator.permutation(count)[:keys] for _ in range(layers)]
        for generator, count in zip(map(np.random.default_rng, samples), counts_b, strict=True)
    ]
    return np.sort(np.array(chosen), axis=-1)


def sources_of(opened: Any, controls: Mapping[str, Any]) -> dict[str, Source]:
    """The ordinary store and its control stores as sources, by name."""
    return {name: Source(one, opened) for name, one in {ORDINARY: opened, **controls}.items()}
