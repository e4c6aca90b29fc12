"""Other ways to keep the same states and gather batches of them, and other codecs: what the store is measured beside.

A rival keeps only what is asked of it, while a store holds all layers and kinds; both ours and those that read our
folder carry that. Each has the ways that its library offers, of which the fastest is measured, and gives the very bits
that ours gives: that is checked before it is timed.

Shape suffixes: ``s``/``b`` sample, ``l`` layer, ``t`` token, ``w`` width.
"""
# ruff: noqa: D102 - what a rival overrides says what it is in `Rival`

import contextlib
import functools
import gzip
import importlib
import io
import itertools
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import datasets
import numcodecs
import numpy as np
import polars as pl
import safetensors.torch
import torch
import zarr

import store

THREADS = 4
"""Of the ways that gather samples in threads: zarr-python's own default concurrency of decoding on few cores."""

TENSORSTORE_CACHE = 32 * 2**20

CHUNK = 64
"""Samples of a safetensors chunk."""


class Unavailable(Exception):  # noqa: N818 - a fact about this machine, which becomes a row
    """A rival that is not installed or cannot read what it is given."""


def need(module: str) -> ModuleType:
    """A package that the project does not depend on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as failure:
        raise Unavailable("not installed") from failure


@dataclass(frozen=True)
class Ask:
    """What a batch holds: which tokens, as ``Store.batches`` names them, of which layers, that follow each other."""

    tokens: str
    layers: range

    @property
    def kinds(self) -> tuple[str, ...]:
        """Arrays that the tokens are in, in the order of the batch."""
        return ("image", "text") if self.tokens == "all" else (self.tokens,)

    @property
    def cut(self) -> slice:
        """The layers as a slice."""
        return slice(self.layers.start, self.layers.stop)


class Values:
    """bfloat16 bits of all samples in plain files, one padded array ``[s, l, t, w]`` a kind: where all else is from.

    Parameters
    ----------
    plan
        Of a store of these values.
    folder
        Where ``image.bin`` and ``text.bin`` are.
    tables
        The token table of every sample.
    """

    def __init__(self, plan: store.Plan, folder: Path, tables: Sequence[pl.DataFrame]):
        self.plan, self.folder, self.tables = plan, folder, tables
        self.counts = {kind: plan.samples[f"n_{kind}"].to_numpy().astype(np.int64) for kind in ("image", "text")}

    @functools.cached_property
    def longest(self) -> dict[str, int]:
        """Tokens of the longest sample by kind."""
        return {kind: int(counts.max()) for kind, counts in self.counts.items()}

    def path(self, kind: str) -> Path:
        """The file of a kind."""
        return self.folder / f"{kind}.bin"

    def map(self, kind: str, mode: str = "r") -> np.memmap:
        """That file, mapped anew."""
        shape = (self.plan.n_samples, len(self.plan.layers), self.longest[kind], self.plan.width)
        return np.memmap(self.path(kind), np.uint16, mode, shape=shape)

    @functools.cached_property
    def maps(self) -> dict[str, np.memmap]:
        """Both, mapped once."""
        return {kind: self.map(kind) for kind in self.counts}

    def let_go(self) -> None:
        """Close what is mapped: pages that someone has mapped stay in memory."""
        self.__dict__.pop("maps", None)

    def states(self, kind: str, sample: int, layers: slice = slice(None)) -> np.ndarray:
        """The real states of a sample ``[l, t, w]``, a view."""
        return self.maps[kind][sample, layers, : self.counts[kind][sample]]

    def given(self, sample: int) -> dict[str, Any]:
        """A sample as ``Block.add`` takes it, in memory of its own."""
        kinds = {kind: self.states(kind, sample).copy() for kind in self.counts}
        return {"tokens": self.tables[sample], **kinds}

    def head(self, n: int) -> "Values":
        """The first samples alone, which lie at the start of the same files."""
        plan = replace(self.plan, samples=self.plan.samples.head(n), generations=(), extents={})
        head = Values(plan, self.folder, self.tables[:n])
        # The longest of all, so that the strides stay those of the files.
        head.longest = self.longest
        return head

    def shape(self, ask: Ask, ids: np.ndarray) -> tuple[int, int, int, int]:
        """Shape of a batch ``[b, l, t, w]``."""
        tokens = sum(self.counts[kind][ids] for kind in ask.kinds)
        return len(ids), len(ask.layers), int(tokens.max()), self.plan.width

    def raw(self, ask: Ask, ids: np.ndarray | slice = slice(None)) -> int:
        """Bytes of what is asked, without padding."""
        return sum(int(self.counts[kind][ids].sum()) for kind in ask.kinds) * len(ask.layers) * self.plan.width * 2


class Rival:
    """What is asked of some values, kept in a folder in another way, and the ways to gather a batch of it."""

    name: ClassVar[str]

    def __init__(self, values: Values, ask: Ask, folder: Path):
        self.values, self.ask, self.folder = values, ask, folder
        self.open()

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        """Keep it; nothing to do for those that read what is there."""

    def open(self) -> None:
        """Whatever is done once before the first batch."""

    def states(self, kind: str, sample: int) -> np.ndarray:
        """The states asked of one sample, ``[l, t, w]`` uint16."""
        raise NotImplementedError

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        """Put the states of one sample where they belong in a batch."""
        out_bltw[place, :, tokens] = self.states(kind, sample)

    def gather(self, ids: np.ndarray, threads: int = 1, out_bltw: np.ndarray | None = None) -> np.ndarray:
        """A batch ``[b, l, t, w]``, zero past a sample's tokens; new memory unless ``out_bltw`` is given."""
        fresh = out_bltw is None
        out_bltw = np.zeros(self.values.shape(self.ask, ids), np.uint16) if fresh else out_bltw

        def one(place: int) -> None:
            sample, end = int(ids[place]), 0
            for kind in self.ask.kinds:
                start, end = end, end + int(self.values.counts[kind][sample])
                self.put(out_bltw, place, slice(start, end), kind, sample)
            if not fresh:
                out_bltw[place, :, end:] = 0

        if threads == 1:
            for place in range(len(ids)):
                one(place)
        else:
            list(_pool(threads).map(one, range(len(ids))))
        return out_bltw

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """The calls worth trying, by a word for each."""
        return {
            "sample by sample": self.gather,
            f"samples in {THREADS} threads": functools.partial(self.gather, threads=THREADS),
        }

    def fastest(self, ids: np.ndarray) -> str:
        """The fastest of the ways, by one try on some samples; all must agree."""
        seconds, expected = {}, None
        for way, gather in self.ways().items():
            given = gather(ids)
            expected = given if expected is None else expected
            if not np.array_equal(given, expected):
                raise RuntimeError(f"{self.name}: {way} gives other bits")
            began = time.perf_counter()
            gather(ids)
            seconds[way] = time.perf_counter() - began
        return min(seconds, key=seconds.__getitem__)

    def drop_padding(self, out_blw: np.ndarray, ids: np.ndarray, kind: str) -> list[np.ndarray]:
        """Padded samples ``[b, l, t, w]`` as a list of ``[l, t, w]`` of their own lengths."""
        return [states[:, :n] for states, n in zip(out_blw, self.values.counts[kind][ids], strict=True)]

    def join(self, found: dict[str, list[np.ndarray]], ids: np.ndarray) -> np.ndarray:
        """A batch of states that were read by kind, all samples at once."""
        out_bltw = np.zeros(self.values.shape(self.ask, ids), np.uint16)
        for place in range(len(ids)):
            end = 0
            for kind in self.ask.kinds:
                states = found[kind][place]
                start, end = end, end + states.shape[1]
                out_bltw[place, :, start:end] = states
        return out_bltw


class PaddedMap(Rival):
    """The plain good way: one memory map a kind, ``[sample, layer, token, width]``, a slice a sample."""

    name = "memory map, padded"

    def open(self) -> None:
        self.maps = {kind: self.values.map(kind) for kind in self.ask.kinds}

    def states(self, kind: str, sample: int) -> np.ndarray:
        return self.maps[kind][sample, self.ask.cut, : self.values.counts[kind][sample]]

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return {"sample by sample": self.gather}


class ThreadedMap(PaddedMap):
    """The same, in threads."""

    name = "memory map, threads"

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return {f"{n} threads": functools.partial(self.gather, threads=n) for n in (2, THREADS)}


class ReusedMap(PaddedMap):
    """The same into one buffer that every batch is gathered in: no page faults, and a batch lives until the next."""

    name = "memory map, reused buffer"

    def open(self) -> None:
        super().open()
        self.buffer = np.zeros(0, np.uint16)

    def reuse(self, ids: np.ndarray) -> np.ndarray:
        """A batch that is overwritten by the next."""
        shape = self.values.shape(self.ask, ids)
        size = int(np.prod(shape))
        if size > self.buffer.size:
            self.buffer = np.zeros(size, np.uint16)
        return self.gather(ids, out_bltw=self.buffer[:size].reshape(shape))

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return {"sample by sample": self.reuse}


class RaggedMap(PaddedMap):
    """One memory map a kind without padding: samples one behind the other."""

    name = "memory map, ragged"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        for kind in ask.kinds:
            with (folder / f"{kind}.bin").open("wb") as file:
                for sample in range(values.plan.n_samples):
                    file.write(np.ascontiguousarray(values.states(kind, sample, ask.cut)).data)

    def open(self) -> None:
        self.maps = {kind: np.memmap(self.folder / f"{kind}.bin", np.uint16, "r") for kind in self.ask.kinds}
        self.unit = len(self.ask.layers) * self.values.plan.width
        self.ends = {kind: np.cumsum(self.values.counts[kind]) * self.unit for kind in self.ask.kinds}

    def states(self, kind: str, sample: int) -> np.ndarray:
        n, end = int(self.values.counts[kind][sample]), int(self.ends[kind][sample])
        return self.maps[kind][end - n * self.unit : end].reshape(len(self.ask.layers), n, -1)


class ZarrPython(Rival):
    """The store's own folder through zarr-python and its default codec pipeline."""

    name = "zarr-python"
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def open(self) -> None:
        self.cut = self.ask.cut
        paths = {kind: self.folder / "hidden" / kind for kind in self.ask.kinds}
        with zarr.config.set({"codec_pipeline.path": self.pipeline}), _may_not_read():
            self.arrays = {kind: zarr.open_array(path, mode="r") for kind, path in paths.items()}
            for kind in self.arrays:
                self.states(kind, 0)

    def states(self, kind: str, sample: int) -> np.ndarray:
        return self.arrays[kind][sample, self.cut, : int(self.values.counts[kind][sample])]

    def orthogonal(self, ids: np.ndarray) -> np.ndarray:
        """One orthogonal selection for the whole batch."""
        found = {}
        for kind, array in self.arrays.items():
            most = int(self.values.counts[kind][ids].max())
            found[kind] = self.drop_padding(array.oindex[ids, self.cut, :most], ids, kind)
        return self.join(found, ids)

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return super().ways() | {"one orthogonal selection": self.orthogonal}


class Zarrs(ZarrPython):
    """The store's own folder through zarr-python and the zarrs codec pipeline."""

    name = "zarrs"
    pipeline = "zarrs.ZarrsCodecPipeline"

    def open(self) -> None:
        need("zarrs")
        with warnings.catch_warnings():
            # Of an array that it cannot read it warns, and lets zarr-python's own pipeline do it.
            warnings.filterwarnings("error", "Array is unsupported by ZarrsCodecPipeline")
            super().open()


class TensorStore(Rival):
    """The store's own folder through TensorStore, which keeps shard indices if it is given a cache."""

    name = "TensorStore"

    def open(self) -> None:
        tensorstore = need("tensorstore")
        self.batch = tensorstore.Batch
        self.arrays = {}
        # It keeps decoded chunks as well: where much of what is asked fits, memory would be measured and not reading.
        small = self.values.raw(self.ask) < 4 * TENSORSTORE_CACHE
        for cache in (0,) if small else (0, TENSORSTORE_CACHE):
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache}})
            for kind in self.ask.kinds:
                with _may_not_read():
                    path = str(self.folder / "hidden" / kind)
                    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
                    spec |= {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
                    self.arrays[kind, cache] = tensorstore.open(spec, context=context, read=True).result()
                    self.arrays[kind, cache][0, self.ask.cut, :1].read().result()

    def slices(self, ids: np.ndarray, cache: int, together: bool) -> np.ndarray:
        """A slice a sample, all asked for before the first is waited for."""
        batch = self.batch() if together else None
        asked = {
            kind: [
                self.arrays[kind, cache][int(sample), self.ask.cut, : int(self.values.counts[kind][sample])].read(
                    batch=batch
                )
                for sample in ids
            ]
            for kind in self.ask.kinds
        }
        if batch is not None:
            batch.submit()
        return self.join({kind: [one.result() for one in ones] for kind, ones in asked.items()}, ids)

    def orthogonal(self, ids: np.ndarray, cache: int) -> np.ndarray:
        """One index array for the whole batch."""
        found = {}
        for kind in self.ask.kinds:
            most = int(self.values.counts[kind][ids].max())
            read = self.arrays[kind, cache][ids.tolist(), self.ask.cut, :most].read().result()
            found[kind] = self.drop_padding(read, ids, kind)
        return self.join(found, ids)

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        ways = {}
        for cache in sorted({cache for _, cache in self.arrays}):
            kept = f", {cache >> 20} MiB cache" if cache else ""
            ways[f"a future a sample{kept}"] = functools.partial(self.slices, cache=cache, together=False)
            ways[f"a future a sample, batched{kept}"] = functools.partial(self.slices, cache=cache, together=True)
            ways[f"one index array{kept}"] = functools.partial(self.orthogonal, cache=cache)
        return ways


class ZarrItself(ZarrPython):
    """A Zarr array as zarr-python writes it when it is told the chunk only: no shards, its default codec."""

    name = "Zarr as zarr-python writes it"
    compressors: ClassVar[Any] = "auto"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        for kind in ask.kinds:
            shape = (values.plan.n_samples, len(ask.layers), values.longest[kind], values.plan.width)
            array = zarr.create_array(
                folder / "hidden" / kind,
                shape=shape,
                dtype="uint16",
                chunks=(1, 1, *shape[2:]),
                compressors=cls.compressors,
            )
            for sample in range(values.plan.n_samples):
                states = values.states(kind, sample, ask.cut)
                array[sample, :, : states.shape[1]] = states
        sync(folder)

    def open(self) -> None:
        super().open()
        self.cut = slice(None)


class ZarrRaw(ZarrItself):
    """The same without a codec."""

    name = "Zarr as zarr-python writes it, raw"
    compressors = None


class HDF5(Rival):
    """One HDF5 dataset a kind, not chunked."""

    name = "HDF5 (h5py)"
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        with need("h5py").File(folder / "states.h5", "w") as file:
            for kind in ask.kinds:
                shape = (values.plan.n_samples, len(ask.layers), values.longest[kind], values.plan.width)
                options = cls.options | ({"chunks": (1, 1, *shape[2:])} if cls.options else {})
                dataset = file.create_dataset(kind, shape, np.uint16, **options)
                for sample in range(values.plan.n_samples):
                    states = values.states(kind, sample, ask.cut)
                    dataset[sample, :, : states.shape[1]] = states
        sync(folder)

    def open(self) -> None:
        self.file = need("h5py").File(self.folder / "states.h5")

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        count = tokens.stop - tokens.start
        self.file[kind].read_direct(out_bltw, np.s_[sample, :, :count], np.s_[place, :, tokens])

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        # The library has one lock: threads only wait for each other.
        return {"read_direct": self.gather}


class HDF5Gzip(HDF5):
    """One HDF5 dataset a kind, a chunk a sample and layer, with its usual filters."""

    name = "HDF5 (h5py), shuffle + gzip-1"
    options: ClassVar[dict[str, Any]] = {"shuffle": True, "compression": "gzip", "compression_opts": 1}


class LayerFiles(Rival):
    """Raw memory-mapped shards of tokens, one a layer, as dictionary_learning and saev keep them."""

    name = "raw file a layer, mapped (dictionary_learning, saev)"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        for kind in ask.kinds:
            for layer in ask.layers:
                with (folder / f"{kind}-{layer}.bin").open("wb") as file:
                    for sample in range(values.plan.n_samples):
                        file.write(values.states(kind, sample, slice(layer, layer + 1)).data)

    def open(self) -> None:
        width = self.values.plan.width
        self.maps = {
            kind: [
                np.memmap(self.folder / f"{kind}-{layer}.bin", np.uint16, "r").reshape(-1, width)
                for layer in self.ask.layers
            ]
            for kind in self.ask.kinds
        }
        self.ends = {kind: np.cumsum(self.values.counts[kind]) for kind in self.ask.kinds}

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        end = int(self.ends[kind][sample])
        for layer, mapped in enumerate(self.maps[kind]):
            out_bltw[place, layer, tokens] = mapped[end - (tokens.stop - tokens.start) : end]


class Safetensors(Rival):
    """Padded chunks of samples, a file a layer and chunk, as llamascopium keeps them."""

    name = "safetensors chunks (llamascopium)"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        for start in range(0, values.plan.n_samples, CHUNK):
            for layer in ask.layers:
                chunk = {
                    kind: torch.from_numpy(np.array(values.maps[kind][start : start + CHUNK, layer]))
                    for kind in ask.kinds
                }
                chunk = {kind: states.view(torch.bfloat16) for kind, states in chunk.items()}
                safetensors.torch.save_file(chunk, folder / f"{layer}-{start // CHUNK}.safetensors")

    def open(self) -> None:
        self.files = {
            (layer, chunk): safetensors.safe_open(self.folder / f"{layer}-{chunk}.safetensors", "pt")
            for layer in self.ask.layers
            for chunk in range(-(-self.values.plan.n_samples // CHUNK))
        }

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        chunk, row = divmod(sample, CHUNK)
        for place_l, layer in enumerate(self.ask.layers):
            states = self.files[layer, chunk].get_slice(kind)[row, : tokens.stop - tokens.start]
            out_bltw[place, place_l, tokens] = states.view(torch.uint16).numpy()


class SQLite(Rival):
    """A table of serialized tensors, a row a sample and layer, as vlm-lens keeps them, but with the index it lacks."""

    name = "SQLite blobs (vlm-lens)"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        with contextlib.closing(sqlite3.connect(folder / "states.db")) as connection, connection:
            connection.execute(
                "create table tensors (kind, sample, layer, tensor blob, primary key (kind, sample, layer))"
            )
            for kind in ask.kinds:
                for sample in range(values.plan.n_samples):
                    for layer in ask.layers:
                        blob = io.BytesIO()
                        states = values.states(kind, sample, slice(layer, layer + 1))[0]
                        torch.save(torch.from_numpy(states.copy()).view(torch.bfloat16), blob)
                        row = (kind, sample, layer, blob.getvalue())
                        connection.execute("insert into tensors values (?, ?, ?, ?)", row)

    def open(self) -> None:
        self.connection = sqlite3.connect(self.folder / "states.db")

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        asked = "select tensor from tensors where kind = ? and sample = ? order by layer"
        for layer, (blob,) in enumerate(self.connection.execute(asked, (kind, sample))):
            states = torch.load(io.BytesIO(blob), weights_only=True)
            out_bltw[place, layer, tokens] = states.view(torch.uint16).numpy()

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return {"sample by sample": self.gather}


class Arrow(Rival):
    """Rows of a datasets table, a padded column a layer, as SAELens keeps them. Unless asked, uint16 come as int64."""

    name = "Arrow rows (SAELens)"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        columns, features = {}, {}
        for kind in ask.kinds:
            for layer in ask.layers:
                columns[f"{kind}-{layer}"] = list(values.maps[kind][:, layer])
                features[f"{kind}-{layer}"] = datasets.Array2D((values.longest[kind], values.plan.width), "uint16")
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder / "rows")

    def open(self) -> None:
        rows = datasets.load_from_disk(str(self.folder / "rows")).with_format("numpy", dtype=np.uint16)
        columns = {kind: [f"{kind}-{layer}" for layer in self.ask.layers] for kind in self.ask.kinds}
        self.rows = {kind: rows.select_columns(names) for kind, names in columns.items()}

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        for layer, states in enumerate(self.rows[kind][sample].values()):
            out_bltw[place, layer, tokens] = states[: tokens.stop - tokens.start]

    def together(self, ids: np.ndarray) -> np.ndarray:
        """All rows of a batch by one call."""
        found = {}
        for kind, rows in self.rows.items():
            stacked = np.stack(list(rows[ids.tolist()].values()), axis=1)
            found[kind] = self.drop_padding(stacked, ids, kind)
        return self.join(found, ids)

    def ways(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        return super().ways() | {"rows together": self.together}


class GzipFiles(Rival):
    """A gzip file a sample, as SpecForge keeps them."""

    name = "gzip file a sample (SpecForge)"

    @classmethod
    def write(cls, values: Values, ask: Ask, folder: Path) -> None:
        def one(sample: int) -> None:
            states = {kind: torch.from_numpy(values.states(kind, sample, ask.cut).copy()) for kind in ask.kinds}
            with gzip.open(folder / f"data_{sample}.ckpt.gz", "wb", compresslevel=6) as file:
                torch.save({kind: of.view(torch.bfloat16) for kind, of in states.items()}, file)

        list(_pool(2).map(one, range(values.plan.n_samples)))

    def put(self, out_bltw: np.ndarray, place: int, tokens: slice, kind: str, sample: int) -> None:
        raise NotImplementedError("a file holds all kinds")

    def gather(self, ids: np.ndarray, threads: int = 1) -> np.ndarray:
        def one(sample: int) -> dict[str, np.ndarray]:
            with gzip.open(self.folder / f"data_{sample}.ckpt.gz") as file:
                states = torch.load(io.BytesIO(file.read()), weights_only=True)
            return {kind: of.view(torch.uint16).numpy() for kind, of in states.items()}

        samples = list((map if threads == 1 else _pool(threads).map)(one, ids.tolist()))
        return self.join({kind: [one[kind] for one in samples] for kind in self.ask.kinds}, ids)


MAPS = (PaddedMap, RaggedMap, ReusedMap, ThreadedMap)
READERS = (ZarrPython, Zarrs, TensorStore)
"""General readers of the store's own folder."""
KEEPERS = (ZarrItself, HDF5, HDF5Gzip, LayerFiles, Safetensors, SQLite, Arrow, GzipFiles)


def sync(folder: Path) -> None:
    """Make every file in a folder durable, for writers that leave that to others."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


@contextlib.contextmanager
def _may_not_read():
    """A general reader may lack a codec or a feature, and each says so by an error of its own."""
    try:
        yield
    except Exception as failure:
        said = " ".join(str(failure).split())
        raise Unavailable(f"cannot read it: {type(failure).__name__}: {said[:80]}") from failure


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rival")


# Codecs. Each has ``encode(rows_tw) -> encoded``, ``size(encoded)`` and ``decode(encoded, out_tw)``.


class FromNumcodecs:
    """A codec of numcodecs, by its id and options."""

    def __init__(self, codec_id: str, **options: Any):
        with _may_lack():
            self.codec = numcodecs.get_codec({"id": codec_id} | options)
        self.size = len

    def encode(self, rows_tw: np.ndarray) -> bytes:
        """The bytes that numcodecs makes of the rows."""
        return self.codec.encode(np.ascontiguousarray(rows_tw).reshape(-1))

    def decode(self, encoded: bytes, out_tw: np.ndarray) -> None:
        """Straight into the output."""
        self.codec.decode(encoded, out=out_tw.reshape(-1))


class FromZipNN:
    """ZipNN in its bfloat16 mode, which takes and gives bytes."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.codec = need("zipnn").ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
        self.size = len

    def encode(self, rows_tw: np.ndarray) -> bytes:
        """ZipNN reorders its input in place, so it gets a copy."""
        return self.codec.compress(rows_tw.tobytes())

    def decode(self, encoded: bytes, out_tw: np.ndarray) -> None:
        """By one copy more."""
        out_tw.reshape(-1)[:] = np.frombuffer(self.codec.decompress(encoded), np.uint16)


class FromHDF5:
    """Filters of HDF5 on a file in memory."""

    def __init__(self, **options: Any):
        self.h5py, self.options, self.names = need("h5py"), options, itertools.count()

    def encode(self, rows_tw: np.ndarray) -> Any:
        """A file in memory with one chunk."""
        # Files in memory share their names with all others of the process; rdcc_nbytes: nothing stays decoded.
        name = f"{id(self)}-{next(self.names)}"
        file = self.h5py.File(name, "w", driver="core", backing_store=False, rdcc_nbytes=0)
        dataset = file.create_dataset("rows", data=rows_tw, chunks=rows_tw.shape, **self.options)
        file.flush()
        return dataset

    def size(self, encoded: Any) -> int:
        """Of the chunk, without what a file has besides."""
        return encoded.id.get_storage_size()

    def decode(self, encoded: Any, out_tw: np.ndarray) -> None:
        """Straight into the output."""
        encoded.read_direct(out_tw)


CODECS: dict[str, Callable[[], Any]] = {
    "Blosc zstd-1, byte shuffle": functools.partial(FromNumcodecs, "blosc", cname="zstd", clevel=1, shuffle=1),
    "Blosc zstd-3, byte shuffle": functools.partial(FromNumcodecs, "blosc", cname="zstd", clevel=3, shuffle=1),
    "Blosc lz4, byte shuffle": functools.partial(FromNumcodecs, "blosc", cname="lz4", clevel=1, shuffle=1),
    "Blosc zstd-1, bit shuffle": functools.partial(FromNumcodecs, "blosc", cname="zstd", clevel=1, shuffle=2),
    "Blosc zstd-3, bit shuffle": functools.partial(FromNumcodecs, "blosc", cname="zstd", clevel=3, shuffle=2),
    "Blosc lz4, bit shuffle": functools.partial(FromNumcodecs, "blosc", cname="lz4", clevel=1, shuffle=2),
    "zstd-1 (numcodecs)": functools.partial(FromNumcodecs, "zstd", level=1),
    "gzip-1 (numcodecs)": functools.partial(FromNumcodecs, "gzip", level=1),
    "pcodec": functools.partial(FromNumcodecs, "pcodec"),
    "ZipNN, bfloat16": FromZipNN,
    "HDF5 shuffle + gzip-1": functools.partial(FromHDF5, shuffle=True, compression="gzip", compression_opts=1),
    "HDF5 shuffle + lzf": functools.partial(FromHDF5, shuffle=True, compression="lzf"),
}


@contextlib.contextmanager
def _may_lack():
    try:
        yield
    except (ImportError, numcodecs.errors.UnknownCodecError) as failure:
        raise Unavailable("not installed") from failure
