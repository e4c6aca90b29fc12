"""Hidden states as torch tensors: chosen layers, samples and tokens, read at once or batch by batch.

Shapes: ``s``/``b`` samples, ``l`` layers, ``t`` tokens, ``w`` width, ``n`` tokens of all samples of a batch.
"""

import hashlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
import polars as pl
import torch
import xarray as xr

from store.errors import Refusal
from store.plan import canonical_json
from store.reader import LAZY_CHUNK_BYTES, Store, find_array, find_layers
from store.tokens import words_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

AHEAD = 1
"""Batches read ahead of the one in use: more take more memory, and longer before the first memory is used again."""

QUICK_SECONDS = 2e-3
"""A batch that is read in less is not worth a thread: handing it over costs a good part of that."""


@dataclass(frozen=True)
class Batch:
    """States of some samples, padded to the longest of them."""

    states: torch.Tensor
    """``[b, l, t, w]``, bfloat16 or float32; zero where ``mask`` is False."""
    mask: torch.Tensor
    """bool ``[b, t]``: which tokens are real."""
    sample: torch.Tensor
    """int64 ``[b]``: rows of ``Store.samples``."""


@dataclass(frozen=True)
class RaggedBatch:
    """States of some samples, one after the other."""

    values: torch.Tensor
    """``[l, n, w]``, bfloat16 or float32."""
    offsets: torch.Tensor
    """int64 ``[b + 1]``: sample ``i`` has tokens ``offsets[i]`` to ``offsets[i + 1]``."""
    sample: torch.Tensor
    """int64 ``[b]``: rows of ``Store.samples``."""


class Choice:
    """Which layers, tokens and samples are read, and in which form; parameters as of ``Store.batches``.

    What was asked is checked here, not at the first batch.
    """

    def __init__(
        self,
        store: Store,
        layers: str | Sequence[str],
        tokens: str = "all",
        words: Sequence[str] | None = None,
        layout: str = "padded",
        dtype: str | None = None,
        samples: Sequence[int] | None = None,
        split: str | None = None,
    ):
        if layout not in ("padded", "ragged"):
            raise Refusal(f"layout {layout!r} is not known: choose padded or ragged")
        if (dtype or store.plan.dtype) not in DTYPES:
            raise Refusal(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.store, self.layout, self.dtype = store, layout, dtype
        self._kind, self._words = tokens, words
        self.layers = find_layers(store, layers)
        self.kinds = {"image": ["image"], "text": ["text"], "all": ["image", "text"]}.get(tokens, ["text"])
        # Layers that follow each other in one array are read together: (part, array, layers there, place here).
        self.runs: dict[str, list[tuple[str, list[int], int]]] = {kind: [] for kind in self.kinds}
        self.parts = set()
        for kind, runs in self.runs.items():
            for place, layer in enumerate(self.layers):
                part, array, index = find_array(store, kind, layer)
                self.parts.add(part.part)
                if runs and runs[-1][0] == array.name:
                    runs[-1][1].append(index)
                else:
                    runs.append((array.name, [index], place))
        self.counts = {kind: store.plan.samples[f"n_{kind}"].to_numpy().astype(np.int64) for kind in self.kinds}
        self.chosen_slots = None
        if words is not None or tokens not in ("image", "text", "all"):
            self._choose_slots()
        self.samples = self._choose_samples(samples, split)

    def tokens(self) -> pl.LazyFrame:
        """The chosen tokens of the chosen samples as the token table has them, in the order in which they are read."""
        order = pl.LazyFrame({"sample": self.samples}).with_row_index("_place")
        found = self._table().join(order, on="sample").with_columns(_text=pl.col("kind") != "image")
        return found.sort("_place", "_text", "slot").drop("_place", "_text")

    def _table(self) -> pl.LazyFrame:
        table = self.store.tokens
        if self._kind not in ("image", "text", "all"):
            table = table.filter(pl.col("kind") == self._kind)
        elif self._kind != "all":
            table = table.filter((pl.col("kind") == "image") == (self._kind == "image"))
        return table if self._words is None else words_of(table, self.store.plan.samples, self._words)

    def _choose_slots(self) -> None:
        """Runs of text slots that follow each other, sample by sample."""
        tokens, words = self._kind, self._words
        if tokens in ("image", "all"):
            raise Refusal("words are words of the instruction: ask for tokens='instruction' (or 'text') with them")
        found = self._table().select("sample", "slot").sort("sample", "slot").collect()
        if found.is_empty():
            kinds = self.store.tokens.select(pl.col("kind").unique()).collect()["kind"].to_list()
            asked = f"of the words {', '.join(words)}" if words is not None else f"of kind {tokens!r}"
            known = ", ".join(sorted({"all", "text", *kinds}))
            raise Refusal(f"no token is {asked} in {self.store.place}: it has the kinds {known}")
        sample, slot = found["sample"].to_numpy(), found["slot"].to_numpy().astype(np.int64)
        starts = np.flatnonzero(np.diff(sample, prepend=-1) | (np.diff(slot, prepend=-2) != 1))
        rows = np.diff([*starts, len(slot)])
        n = self.store.plan.n_samples
        self.counts["text"] = np.bincount(sample, minlength=n)
        runs = np.bincount(sample[starts], minlength=n)
        before = np.cumsum(self.counts["text"]) - self.counts["text"]
        # first slot, rows, and place among the sample's chosen tokens of every run; runs of a sample from `pointer`.
        self.chosen_slots = (slot[starts], rows, starts - before[sample[starts]], np.cumsum(runs) - runs, runs)

    def _choose_samples(self, samples: Sequence[int] | None, split: str | None) -> np.ndarray:
        store = self.store
        valid = np.logical_and.reduce([store.valid_in(part) for part in sorted(self.parts)])
        if samples is None:
            chosen = np.flatnonzero(valid)
        else:
            chosen = np.asarray(samples, np.int64)
            outside = chosen[(chosen < 0) | (chosen >= store.plan.n_samples)]
            if outside.size:
                raise Refusal(f"sample {outside[0]} is not in {store.place}, which has {store.plan.n_samples}")
            missing = chosen[~valid[chosen]]
            if missing.size:
                why = store.samples["set_aside"][int(missing[0])] or "its block is not committed"
                raise Refusal(
                    f"{missing.size} of the samples have no states, e.g. {missing[0]} ({why}): ask for `valid` ones"
                )
        if split is None:
            return chosen
        of_split = store.plan.samples["split"].to_numpy() == split
        if not of_split.any():
            raise Refusal(
                f"split {split!r} is not in {store.place}: it has {store.plan.samples['split'].unique().to_list()}"
            )
        return chosen[of_split[chosen]]

    def extents(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of every sample, int64 ``[s]``."""
        return sum(self.counts[kind][samples] for kind in self.kinds)

    def bytes_of(self, samples: np.ndarray) -> int:
        """Bytes of the states of samples as they are read."""
        extents = self.extents(samples)
        tokens = int(extents.max(initial=0)) * len(samples) if self.layout == "padded" else int(extents.sum())
        return tokens * len(self.layers) * self.store.plan.width * (2 if self.store.plan.dtype == "bfloat16" else 4)

    def read(self, samples: np.ndarray | None = None, memory: torch.Tensor | None = None) -> Batch | RaggedBatch:
        """States of samples (all chosen ones if not given), in ``memory`` (uint8 ``[n]``, large enough) if given."""
        samples = self.samples if samples is None else samples
        bfloat16 = self.store.plan.dtype == "bfloat16"
        extents, layers, width = self.extents(samples), len(self.layers), self.store.plan.width
        row, longest = width * (2 if bfloat16 else 4), int(extents.max(initial=0))
        offsets = np.concatenate([[0], np.cumsum(extents)])
        if self.layout == "padded":
            base, stride = np.arange(len(samples), dtype=np.int64) * (layers * longest * row), longest * row
            shape: tuple[int, ...] = (len(samples), layers, longest, width)
        else:
            base, stride = offsets[:-1] * row, int(offsets[-1]) * row
            shape = (layers, int(offsets[-1]), width)
        size = self.bytes_of(samples)
        memory = torch.from_numpy(np.empty(size, np.uint8)) if memory is None else memory[:size]
        for kind in self.kinds if size else ():
            self._read_kind(kind, memory.numpy(), base, stride, samples, row)
            base = base + self.counts[kind][samples] * row
        states = memory.view(torch.bfloat16 if bfloat16 else torch.float32).view(shape)
        sample = torch.tensor(samples)
        if self.layout == "ragged":
            return RaggedBatch(self._as_asked(states), torch.from_numpy(offsets), sample)
        bits = memory.numpy().view(np.uint16 if bfloat16 else np.float32).reshape(shape)
        for i, extent in enumerate(extents.tolist()):
            if extent < longest:
                bits[i, :, extent:] = 0
        mask = torch.from_numpy(np.arange(longest) < extents[:, None])
        return Batch(self._as_asked(states), mask, sample)

    def _as_asked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.dtype is None else tensor.to(DTYPES[self.dtype])

    def _read_kind(
        self, kind: str, out: np.ndarray, base: np.ndarray, stride: int, samples: np.ndarray, row: int
    ) -> None:
        first, rows = None, self.counts[kind][samples]
        if kind == "text" and self.chosen_slots is not None:
            slot, length, placed, pointer, runs = self.chosen_slots
            owner = np.repeat(np.arange(len(samples)), runs[samples])
            steps = np.arange(len(owner)) - np.repeat(np.cumsum(runs[samples]) - runs[samples], runs[samples])
            run = pointer[samples][owner] + steps
            first, rows, base, samples = slot[run], length[run], base[owner] + placed[run] * row, samples[owner]
        for array, indices, place in self.runs[kind]:
            self.store.reader(array).read_rows(out, base + place * stride, stride, samples, indices, first, rows)


def select(choice: Choice) -> xr.DataArray:
    """The tokens of a ragged float32 ``Choice`` as a lazy array; see ``Store.select``."""
    store, extents = choice.store, choice.extents(choice.samples)
    table = choice.tokens().collect()
    sizes = np.cumsum(extents) * (len(choice.layers) * store.plan.width * 4) // LAZY_CHUNK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(extents)]
    pieces = []
    for begin, end in itertools.pairwise(cuts):
        shape = (int(extents[begin:end].sum()), len(choice.layers), store.plan.width)
        values = dask.delayed(_values)(choice, choice.samples[begin:end])
        pieces.append(da.from_delayed(values, shape, np.float32))
    lazy = da.concatenate(pieces)
    coordinates: dict[str, Any] = {name: ("token", table[name].to_numpy()) for name in table.columns}
    coordinates["sample_id"] = ("token", store.plan.samples["sample_id"].to_numpy()[table["sample"].to_numpy()])
    return xr.DataArray(lazy, coordinates | {"layer": choice.layers}, ("token", "layer", "width"), name="states")


def _values(choice: Choice, samples: np.ndarray) -> np.ndarray:
    return choice.read(samples).values.numpy().transpose(1, 0, 2)


class Batches(torch.utils.data.IterableDataset):
    """Batches of a ``Choice``, in an order that is a function of the seed and the epoch alone; see ``Store.batches``.

    Each iteration goes on where the last one was left; one that came to its end starts over.
    """

    def __init__(
        self,
        choice: Choice,
        batch_size: int,
        shuffle: bool,
        seed: int,
        epochs: int,
        drop_last: bool,
        pin: bool | None,
        memory: int,
    ):
        if batch_size < 1 or epochs < 1:
            raise Refusal(f"batch_size {batch_size} and epochs {epochs} must be at least 1")
        if pin and not torch.cuda.is_available():
            raise Refusal("pinned memory is CUDA's, and torch sees no CUDA device here: leave pin=None, it finds out")
        self.choice, self.batch_size, self.shuffle, self.seed = choice, batch_size, shuffle, seed
        self.epochs, self.drop_last, self.pin, self.memory = epochs, drop_last, pin, memory
        count = len(choice.samples)
        self.per_epoch = count // batch_size if drop_last else -(-count // batch_size)
        self.position = 0
        """Batches that were handed out."""
        self.busy = 0.0
        """Seconds that reading took, mostly beside whoever uses the batches."""
        self._running: Generator[Batch | RaggedBatch, None, None] | None = None
        self._quick = False
        self._buffers = _Buffers(pin)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __iter__(self) -> Generator[Batch | RaggedBatch, None, None]:
        if self.position >= len(self):
            self.position = 0
        # A worker of a DataLoader takes its share; the loader puts the shares together in order.
        worker = torch.utils.data.get_worker_info()
        return self._run(worker.id if worker else 0, worker.num_workers if worker else 1)

    def __next__(self) -> Batch | RaggedBatch:
        if self._running is None:
            self._running = iter(self)
        try:
            return next(self._running)
        except StopIteration:
            self._running = None
            raise

    def close(self) -> None:
        """Stop reading ahead, if ``next`` was used."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_running": None, "_buffers": _Buffers(self.pin)}

    def state_dict(self) -> dict[str, Any]:
        """Where this stands, JSON-able: an iteration after ``load_state_dict`` goes on with the next batch."""
        return {"position": self.position, "order": self._order_hash()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of batches of the same samples, batch size, order and seed.

        Raises
        ------
        Refusal
            When the state is of others.
        """
        if state["order"] != self._order_hash():
            raise Refusal("this state is of other batches: samples, batch_size, shuffle, seed or drop_last differ")
        self.position, self._running = int(state["position"]), None

    def _order_hash(self) -> str:
        settings = canonical_json([self.batch_size, self.shuffle, self.seed, self.drop_last])
        return hashlib.sha256(settings.encode() + self.choice.samples.tobytes()).hexdigest()[:16]

    def ids(self, start: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Samples of every batch from number ``start`` on."""
        order, of_epoch = None, None
        for number in range(start, len(self), step):
            epoch, place = divmod(number, self.per_epoch)
            if epoch != of_epoch:
                samples, of_epoch = self.choice.samples, epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(samples) if self.shuffle else samples
            yield order[place * self.batch_size : (place + 1) * self.batch_size]

    def _run(self, worker: int, workers: int) -> Generator[Batch | RaggedBatch, None, None]:
        ids, buffers = self.ids(self.position + worker, workers), self._buffers
        typical = max(1, self.choice.bytes_of(self.choice.samples[: self.batch_size]))
        ahead = max(1, min(AHEAD, self.memory // typical))

        def load(one: np.ndarray) -> tuple[Batch | RaggedBatch, bool]:
            began = time.perf_counter()
            batch = self.choice.read(one, buffers.take(self.choice.bytes_of(one)))
            took = time.perf_counter() - began
            self.busy += took
            return batch, took < QUICK_SECONDS

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reading:
            loading: deque = deque()
            try:
                while True:
                    while not self._quick and len(loading) < ahead and (one := next(ids, None)) is not None:
                        loading.append(reading.submit(load, one))
                    if loading:
                        batch, self._quick = loading.popleft().result()
                    elif (one := next(ids, None)) is not None:
                        batch, self._quick = load(one)
                    else:
                        return
                    self.position += workers
                    yield batch
                    del batch  # or its memory could not be used again
            finally:
                reading.shutdown(wait=True, cancel_futures=True)


class _Buffers:
    """Memory for batches, used again once nobody holds the batch: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, pin: bool | None):
        self.pin = pin
        self.held: list[np.ndarray] = []

    def take(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes that no living tensor has a part in."""
        if torch.cuda.is_available() if self.pin is None else self.pin:
            # torch keeps pinned memory for itself until the copies from it are done.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for place in range(len(self.held)):
            # Two references: the list's, and the one to count by. A tensor over the memory is a third.
            if self.held[place].size >= size and sys.getrefcount(self.held[place]) == 2:
                return torch.from_numpy(self.held[place])
        # What has become too small goes; what is in use lives on with its batch.
        self.held = [one for one in self.held if one.size >= size]
        self.held.append(np.empty(size + size // 8, np.uint8))
        return torch.from_numpy(self.held[-1])
