"""Opening a store: samples and tokens as tables, states and attention as lazy xarray, batches for training."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import polars as pl
import xarray as xr

from store import bits, commits, files
from store.errors import Refusal
from store.layout import SET_ASIDE_FILE, load_plan, table_file
from store.plan import LAYER_SEMANTICS, Plan
from store.shards import ShardReader
from store.tokens import TOKEN_SCHEMA

if TYPE_CHECKING:
    import torch

    from store.batches import Batch

LAZY_CHUNK_BYTES = 64 * 2**20
"""A task of a lazy query decodes about this much: xarray's own choice, inner chunks, makes millions of tasks."""


def open_store(path: str | os.PathLike) -> "Store":
    """Open the store at ``path`` for reading; what is committed later is not seen.

    Raises
    ------
    Refusal
        When ``path`` is no store.
    """
    return Store(path)


class Store:
    """A store as it was when opened: committed blocks only; what is missing is NaN or null, never zero."""

    def __init__(self, path: str | os.PathLike):
        self.path: Path = files.locate(path)
        self.plan: Plan = load_plan(path)
        self.commits, _ = commits.read(self.path)
        self._readers: dict[str, ShardReader] = {}
        self.valid: np.ndarray = np.zeros(self.plan.n_samples, bool)
        for b, commit in self.commits.items():
            self.valid[self.plan.block(b)] = True
            self.valid[list(commit.set_aside)] = False

    def __repr__(self) -> str:
        return (
            f"<Store {self.path}: {self.valid.sum()} of {self.plan.n_samples} samples, layers {', '.join(self.layers)}>"
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers of hidden states, in order."""
        return self.plan.layers

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determined the bytes."""
        return self.plan.identity

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the Zarr root: format_version, identity, identity_hash, layer_semantics, bits …"""
        import zarr

        return dict(zarr.open_group(self.path, mode="r").attrs)

    @property
    def derived(self) -> Mapping[str, xr.DataArray]:
        """Arrays added later, by name; none in this format version."""
        return MappingProxyType({})

    @cached_property
    def samples(self) -> pl.DataFrame:
        """One row a sample: the planned columns, the results, ``valid`` and, if it was, why it was ``set_aside``."""
        reasons = {n: reason for commit in self.commits.values() for n, reason in commit.set_aside.items()}
        planned = self.plan.samples.with_columns(
            valid=pl.Series(self.valid),
            set_aside=pl.Series([reasons.get(n) for n in range(self.plan.n_samples)], dtype=pl.String),
        )
        tables = [pl.read_parquet(path) for path in self.table_files("results")]
        if not tables:
            return planned
        results = pl.concat(tables, how="diagonal_relaxed")
        # A result takes the place of a planned column of its name: the plan can only have held a stand-in.
        kept = planned.drop([name for name in results.columns if name in planned.columns])
        indexed = kept.with_columns(sample=pl.int_range(pl.len(), dtype=pl.Int64))
        return indexed.join(results, on="sample", how="left", maintain_order="left").drop("sample")

    @cached_property
    def set_aside(self) -> pl.DataFrame:
        """One row for all that could not be used: while planning (no row in ``samples``) and while extracting.

        Columns ``reason``, ``rows`` (1 unless an entry stands for a whole file), ``sample_id`` where known, and what
        else the planner brought.
        """
        ids = self.plan.samples["sample_id"]
        found = [(ids[n], reason) for commit in self.commits.values() for n, reason in commit.set_aside.items()]
        later = pl.DataFrame(found, schema={"sample_id": pl.String, "reason": pl.String}, orient="row")
        both = pl.concat([pl.read_parquet(self.path / SET_ASIDE_FILE), later], how="diagonal_relaxed")
        rows = pl.col("rows").fill_null(1) if "rows" in both.columns else pl.lit(1, pl.Int64)
        return both.with_columns(rows.alias("rows"))

    @property
    def tokens(self) -> pl.LazyFrame:
        """One row a token of every committed sample, see ``store.tokens``; ``sample`` is the row in ``samples``."""
        paths = self.table_files("tokens")
        return pl.scan_parquet(paths, missing_columns="insert") if paths else pl.LazyFrame(schema=TOKEN_SCHEMA)

    @cached_property
    def hidden(self) -> xr.Dataset:
        """Hidden states, lazy float32: variables ``image`` and ``text``, dims (sample, layer, token, width).

        NaN past a sample's tokens. Both variables have the longer one's tokens; ``ds.text.isel(token=slice(n))``
        touches only what it names.
        """
        return self._dataset("hidden", self.plan.layers)

    @cached_property
    def attention(self) -> xr.Dataset:
        """Rows of the instruction's tokens, lazy float32: ``text_to_image``, ``text_to_text``.

        Dims (sample, layer, query, token), with ``head`` before ``query`` if heads were kept. Empty if none were.
        """
        return self._dataset("attention", self.plan.attention_layers)

    def batches(
        self,
        layers: str | Sequence[str],
        tokens: str = "all",
        batch_size: int = 64,
        shuffle: bool = False,
        seed: int = 0,
        *,
        split: str | None = None,
        samples: Sequence[int] | None = None,
        epochs: int = 1,
        drop_last: bool = False,
        dtype: str | None = None,
    ) -> "Iterator[Batch]":
        """Batches of the valid samples for training, the next one read while this one is used.

        Parameters
        ----------
        layers
            One or more layer names.
        tokens
            ``image``, ``text`` (all others), ``all`` (image, then text), or a kind of the token table such as
            ``instruction``; each in the order of the sequence.
        batch_size, shuffle, seed, epochs, drop_last
            As usual; the order is a function of ``seed`` and the epoch alone.
        split
            Only samples of this split.
        samples
            Only these rows of ``samples``, in this order unless shuffled.
        dtype
            ``float32`` or ``bfloat16``; as stored if not given.

        Yields
        ------
        Batch
            ``states [b, l, t, w]``, ``mask [b, t]``, ``sample [b]`` as torch tensors; padding is zero.

        Raises
        ------
        Refusal
            When a layer, a split or a kind of tokens is not there, or a named sample is not valid.
        """
        from store.batches import batches

        return batches(self, layers, tokens, batch_size, shuffle, seed, split, samples, epochs, drop_last, dtype)

    def read(
        self, samples: Sequence[int], layers: str | Sequence[str], tokens: str = "all", dtype: str | None = None
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """States of named samples at once: ``(states [s, l, t, w], mask [s, t])``; parameters as of ``batches``."""
        from store.batches import read

        return read(self, samples, layers, tokens, dtype)

    def table_files(self, kind: str) -> list[Path]:
        """Parquet files of the committed blocks, in block order; ``kind`` is tokens or results."""
        names = {b: table_file(kind, b) for b in sorted(self.commits)}
        return [self.path / name for b, name in names.items() if name in self.commits[b].files]

    def reader(self, name: str) -> ShardReader:
        """The direct reader of array ``name``; for callers that want bits and own their buffers."""
        if name not in self._readers:
            self._readers[name] = ShardReader(self.path, self.plan.arrays[name], self.plan.rows(name))
        return self._readers[name]

    def _dataset(self, group: str, layers: tuple[str, ...]) -> xr.Dataset:
        variables = {}
        for name, array in self.plan.arrays.items():
            if name.startswith(f"{group}/"):
                lazy = _lazy(_StoredArray(self.reader(name), self.plan.counts(name), self.valid), self.plan)
                variables[name.split("/")[1]] = (array.dims, lazy, {"bits": array.bits})
        coordinates = {"sample": self.plan.samples["sample_id"].to_numpy(), "layer": np.array(layers, dtype=str)}
        return xr.Dataset(variables, coordinates if variables else {}, {"layer_semantics": LAYER_SEMANTICS})


class _StoredArray:
    """What Dask slices: one array of a store within its own shard extent, decoded to float32, NaN where nothing is."""

    dtype = np.dtype(np.float32)

    def __init__(self, reader: ShardReader, counts: Mapping[str, np.ndarray], valid: np.ndarray):
        self.reader, self.array, self.counts, self.valid = reader, reader.array, counts, valid
        self.shape = (*self.array.shape[:2], *self.array.unit)
        self.ndim = len(self.shape)

    def __getitem__(self, key: tuple[int | slice, ...]) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        key += (slice(None),) * (self.ndim - len(key))
        samples, layers = (np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape[:2], key[:2], strict=True))
        out = np.full((len(samples), len(layers), *self.array.unit), self.array.fill, self.array.dtype)
        there = np.flatnonzero(self.valid[samples])
        if there.size and len(layers):
            read = out[there]
            self.reader.read_into(read, samples[there], layers)
            out[there] = read
        values = bits.to_float32(out)
        for dim, counts in self.counts.items():
            axis = self.array.dims.index(dim)
            past = np.arange(self.shape[axis]) >= counts[samples][:, None]
            past = past.reshape([len(samples)] + [-1 if n == axis else 1 for n in range(1, self.ndim)])
            np.copyto(values, np.nan, where=past)
        scalar = tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key[:2])
        return values[(*scalar, *key[2:])]


def _lazy(stored: _StoredArray, plan: Plan) -> da.Array:
    array = stored.array
    unit_bytes = 4 * int(np.prod(array.unit))
    fitting = max(1, LAZY_CHUNK_BYTES // unit_bytes)
    together = max(n for n in range(1, plan.samples_per_block + 1) if plan.samples_per_block % n == 0 and n <= fitting)
    lazy = da.from_array(
        stored, chunks=(together, 1, *array.unit), name=False, fancy=False, asarray=False, meta=np.empty(0, np.float32)
    )
    axis = array.dims.index("token")
    past = array.shape[axis] - stored.shape[axis]
    if not past:
        return lazy
    shape = tuple(past if n == axis else size for n, size in enumerate(stored.shape))
    chunks = tuple(past if n == axis else size for n, size in enumerate(lazy.chunks))
    return da.concatenate([lazy, da.full(shape, np.nan, dtype=np.float32, chunks=chunks)], axis=axis)


def check_layers(store: Store, layers: str | Sequence[str]) -> list[int]:
    """Indices of layers by name."""
    names = [layers] if isinstance(layers, str) else [str(layer) for layer in layers]
    unknown = [name for name in names if name not in store.layers]
    if unknown or not names:
        raise Refusal(
            f"layer {', '.join(unknown) or '(none)'} is not in {store.path}: it has {', '.join(store.layers)}"
        )
    return [store.layers.index(name) for name in names]
