"""Opening a store: samples and tokens as tables, states and attention as lazy xarray, batches for training."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import polars as pl
import xarray as xr

from store import bits, commits, runs
from store.errors import Refusal
from store.layout import Derived, address, load_parts, read_derived, read_set_aside, table_file
from store.places import Place, locate
from store.plan import KINDS, LAYER_SEMANTICS, ArrayPlan, Plan, depth
from store.shards import ShardReader
from store.tokens import TOKEN_SCHEMA

if TYPE_CHECKING:
    import torch

    from store.batches import Batches

LAZY_CHUNK_BYTES = 64 * 2**20
"""A task of a lazy query decodes about this much: xarray's own choice, inner chunks, makes millions of tasks."""


def open_store(path: str | os.PathLike | Place) -> "Store":
    """Open the store at ``path``, a folder or a URL, for reading; what is committed later is not seen.

    Raises
    ------
    Refusal
        When ``path`` is no store.
    """
    return Store(path)


class Store:
    """A store as it was when opened: committed blocks only; what is missing is NaN or null, never zero.

    It may be sent to other processes, and used after a fork.
    """

    def __init__(self, path: str | os.PathLike | Place):
        self.place = locate(path)
        # In this order: what is committed was planned before, and the store may be growing.
        found = commits.read(self.place)
        self.parts: list[Plan] = load_parts(self.place)
        self.commits = [found.of_part(part.part) for part in self.parts]
        self.log_problems = found.problems
        self._readers: dict[str, ShardReader] = {}

    def __repr__(self) -> str:
        return (
            f"<Store {self.place}: {self.valid.sum()} of {self.plan.n_samples} samples, "
            f"layers {', '.join(self.layers)}>"
        )

    @property
    def path(self) -> Path | str:
        """Its folder or URL."""
        return address(self.place)

    @property
    def plan(self) -> Plan:
        """The plan of the part that was created; ``parts`` has those of added layers, too."""
        return self.parts[0]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers of hidden states, in the order of the pass."""
        return tuple(sorted({name for part in self.parts for name in part.layers}, key=depth))

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determined the bytes."""
        return self.plan.identity

    @cached_property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the Zarr root: format_version, identity, identity_hash, layer_semantics, bits …"""
        import zarr

        return dict(zarr.open_group(self.place.zarr_store(read_only=True), mode="r").attrs)

    @cached_property
    def valid(self) -> np.ndarray:
        """Which samples have states, bool ``[s]``; see ``valid_in`` for layers that were added."""
        return self.valid_in(0)

    def valid_in(self, part: int) -> np.ndarray:
        """Which samples have the states of a part, bool ``[s]``."""
        valid = np.zeros(self.plan.n_samples, bool)
        for b, commit in self.commits[part].items():
            valid[self.plan.block(b)] = True
            valid[list(commit.set_aside)] = False
        return valid

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """What the runs that filled it told of themselves: settings, checks, where the time went."""
        return runs.read(self.place)

    @cached_property
    def derived(self) -> Mapping[str, xr.DataArray]:
        """Arrays that were added, by name, lazy; see ``store.derive``."""
        return {one.name: self._derived(one) for one in read_derived(self.place)}

    @cached_property
    def samples(self) -> pl.DataFrame:
        """One row a sample: the planned columns, the results, ``valid`` and, if it was, why it was ``set_aside``."""
        reasons = {n: reason for commit in self.commits[0].values() for n, reason in commit.set_aside.items()}
        planned = self.plan.samples.with_columns(
            valid=pl.Series(self.valid),
            set_aside=pl.Series([reasons.get(n) for n in range(self.plan.n_samples)], dtype=pl.String),
        )
        names = self.table_files("results")
        if not names:
            return planned
        try:
            results = self.place.scan_parquet(names).collect()
        except pl.exceptions.PolarsError:
            # A block without an answer has other types in that column: read one by one, which takes longer.
            results = pl.concat(self.tables("results"), how="diagonal_relaxed")
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
        found = [(ids[n], reason) for commit in self.commits[0].values() for n, reason in commit.set_aside.items()]
        later = pl.DataFrame(found, schema={"sample_id": pl.String, "reason": pl.String}, orient="row")
        both = pl.concat([read_set_aside(self.place), later], how="diagonal_relaxed")
        rows = pl.col("rows").fill_null(1) if "rows" in both.columns else pl.lit(1, pl.Int64)
        return both.with_columns(rows.alias("rows"))

    @property
    def tokens(self) -> pl.LazyFrame:
        """One row a token of every committed sample, see ``store.tokens``; ``sample`` is the row in ``samples``."""
        names = self.table_files("tokens")
        return self.place.scan_parquet(names) if names else pl.LazyFrame(schema=TOKEN_SCHEMA)

    @cached_property
    def hidden(self) -> xr.Dataset:
        """Hidden states, lazy float32: variables ``image`` and ``text``, dims (sample, layer, token, width).

        NaN past a sample's tokens. Both variables have the longer one's tokens; ``ds.text.isel(token=slice(n))``
        touches only what it names.
        """
        return self._dataset("hidden", KINDS, self.layers)

    @cached_property
    def attention(self) -> xr.Dataset:
        """Rows of the instruction's tokens, lazy float32: ``text_to_image``, ``text_to_text``.

        Dims (sample, layer, query, token), with ``head`` before ``query`` if heads were kept. Empty if none were.
        """
        layers = sorted({name for part in self.parts for name in part.attention_layers}, key=depth)
        return self._dataset("attention", ("text_to_image", "text_to_text"), layers)

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
        layout: str = "padded",
        words: Sequence[str] | None = None,
        pin: bool | None = None,
        memory: int = 512 * 2**20,
    ) -> "Batches":
        """Batches of the valid samples for training, the next ones read while this one is used.

        What is returned can be iterated, sent to the workers of a ``torch.utils.data.DataLoader`` (with
        ``batch_size=None``; each takes its share), and resumed: ``state_dict`` and ``load_state_dict``.

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
        layout
            ``padded``: states ``[b, l, t, w]`` and a mask. ``ragged``: values ``[l, n, w]``, sample after sample, and
            offsets ``[b + 1]``.
        words
            Only tokens of these words of the instruction, compared without case.
        pin
            Pinned memory, for copies to a GPU beside its work; if not given, where CUDA is.
        memory
            Bytes that batches being read ahead may take.

        Returns
        -------
        Batches
            Of ``Batch``: ``states``, ``mask`` or ``offsets``, and ``sample [b]``, as torch tensors; padding is zero.

        Raises
        ------
        Refusal
            When a layer, a split or a kind of tokens is not there, or a named sample is not valid.
        """
        from store.batches import Batches, Choice

        choice = Choice(self, layers, tokens, words, layout, dtype, samples, split)
        return Batches(choice, batch_size, shuffle, seed, epochs, drop_last, pin, memory)

    def read(
        self,
        samples: Sequence[int],
        layers: str | Sequence[str],
        tokens: str = "all",
        dtype: str | None = None,
        words: Sequence[str] | None = None,
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """States of named samples at once: ``(states [s, l, t, w], mask [s, t])``; parameters as of ``batches``."""
        from store.batches import Choice

        batch = Choice(self, layers, tokens, words, "padded", dtype, samples).read()
        return batch.states, batch.mask

    def select(
        self,
        layers: str | Sequence[str],
        tokens: str = "all",
        *,
        words: Sequence[str] | None = None,
        samples: Sequence[int] | None = None,
        split: str | None = None,
    ) -> xr.DataArray:
        """Chosen tokens of chosen samples as one long lazy array, float32, dims (token, layer, width).

        Every token brings what the token table says of it as coordinates (``sample``, ``position``, ``kind``, ``word``,
        ``text``, ``row``, ``col`` …), so that ``.groupby("sample").mean()`` and ``.sel`` do the rest. Parameters as of
        ``batches``.

        Examples
        --------
        >>> store.select("final", "instruction", words=["leftmost"]).mean("token")      # doctest: +SKIP
        """
        from store.batches import Choice, select

        return select(Choice(self, layers, tokens, words, "ragged", "float32", samples, split))

    def table_files(self, kind: str) -> list[str]:
        """Parquet files of the committed blocks, in block order; ``kind`` is tokens or results."""
        names = {b: table_file(kind, b) for b in sorted(self.commits[0])}
        return [name for b, name in names.items() if name in self.commits[0][b].files]

    def tables(self, kind: str) -> list[pl.DataFrame]:
        """Tables of the committed blocks, in block order; ``kind`` is tokens or results."""
        return self.place.read_parquet(self.table_files(kind))

    def reader(self, name: str) -> ShardReader:
        """The direct reader of array ``name``; for callers that want bits and own their buffers."""
        if name not in self._readers:
            part = next(part for part in self.parts if name in part.arrays)
            counts, array = part.counts(name), part.arrays[name]
            extents = [
                counts[dim] if dim in counts else np.full(part.n_samples, size)
                for dim, size in zip(array.dims[2:], array.unit, strict=True)
            ]
            self._readers[name] = ShardReader(self.place, array, part.rows, np.stack(extents, axis=1))
        return self._readers[name]

    def __getstate__(self) -> dict[str, Any]:
        # Lazy arrays and tables are cheap to make again, and dear to send.
        return {"place": self.place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["place"])

    def _dataset(self, group: str, names: Sequence[str], layers: Sequence[str]) -> xr.Dataset:
        variables = {}
        for variable in names:
            stored = [
                (part, f"{part.group(group)}/{variable}")
                for part in self.parts
                if f"{part.group(group)}/{variable}" in part.arrays
            ]
            if not stored:
                continue
            extents = np.max([part.arrays[name].shape[2:] for part, name in stored], axis=0)
            pieces = [
                _lazy(_Stored(self.reader(name), part, self.valid_in(part.part)), part, extents)
                for part, name in stored
            ]
            held = [layer for part, name in stored for layer in part.arrays[name].layers]
            array = stored[0][0].arrays[stored[0][1]]
            whole = _in_order(da.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0], held, layers)
            variables[variable] = (array.dims, whole, {"bits": array.bits})
        coordinates = {"sample": self.plan.samples["sample_id"].to_numpy(), "layer": np.array(layers, dtype=str)}
        return xr.Dataset(variables, coordinates if variables else {}, {"layer_semantics": LAYER_SEMANTICS})

    def _derived(self, one: Derived) -> xr.DataArray:
        import zarr

        array = zarr.open_array(self.place.zarr_store(read_only=True), path=one.path, mode="r")
        lazy = da.from_array(array, chunks=one.shards or one.chunks, name=False)
        coordinates = {dim: list(values) for dim, values in one.coordinates.items()}
        if one.dims[0] == "sample":
            # Rows that growth left unused are no samples; samples that came later have none of it.
            rows = self.plan.rows[: one.samples]
            lazy = lazy[rows] if len(rows) != lazy.shape[0] else lazy
            if later := self.plan.n_samples - one.samples:
                missing = da.full((later, *lazy.shape[1:]), np.nan, dtype=lazy.dtype)
                lazy = da.concatenate([lazy, missing.rechunk({0: lazy.chunksize[0]})])
            coordinates["sample"] = self.plan.samples["sample_id"].to_numpy()
        return xr.DataArray(lazy, coordinates, one.dims, name=one.name, attrs=dict(one.attributes))


class _Stored:
    """What Dask slices: one array of a store, decoded to float32, NaN where nothing is."""

    dtype = np.dtype(np.float32)

    def __init__(self, reader: ShardReader, plan: Plan, valid: np.ndarray):
        self.reader, self.array, self.valid = reader, reader.array, valid
        self.counts = plan.counts(self.array.name)
        longest = {dim: int(n.max()) for dim, n in self.counts.items()}
        unit = (max(longest.get(dim, n), n) for dim, n in zip(self.array.dims[2:], self.array.unit, strict=True))
        self.shape = (plan.n_samples, self.array.shape[1], *unit)
        self.ndim = len(self.shape)

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        key += (slice(None),) * (self.ndim - len(key))
        samples, layers = (np.atleast_1d(np.arange(n)[k]) for n, k in zip(self.shape[:2], key[:2], strict=True))
        tail = list(key[2:])
        size = list(self.shape[2:])
        if self.array.dims[2] == "token" and isinstance(tail[0], slice) and (tail[0].step or 1) > 0:
            # What lies behind the last token asked for is not read.
            start, stop, step = tail[0].indices(size[0])
            size[0], tail[0] = max(start, stop), slice(start, max(start, stop), step)
        out = np.full((len(samples), len(layers), *size), self.array.fill, self.array.dtype)
        there = np.flatnonzero(self.valid[samples])
        if there.size and len(layers) and size[0]:
            whole = there.size == len(samples)
            read = out if whole else out[there]
            self.reader.read_into(read, samples[there], layers)
            if not whole:
                out[there] = read
        values = bits.to_float32(out)
        for dim, counts in self.counts.items():
            axis = self.array.dims.index(dim)
            past = np.arange(values.shape[axis]) >= counts[samples][:, None]
            past = past.reshape([len(samples)] + [-1 if n == axis else 1 for n in range(1, self.ndim)])
            np.copyto(values, np.nan, where=past)
        scalar = tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key[:2])
        return values[(*scalar, *tail)]


def _lazy(stored: _Stored, plan: Plan, extents: Sequence[int]) -> da.Array:
    """As Dask array of ``extents`` (axes 2 …), in tasks of whole samples of one layer."""
    array = stored.array
    fitting = max(1, LAZY_CHUNK_BYTES // (4 * int(np.prod(stored.shape[2:]))))
    together = max(n for n in range(1, plan.samples_per_block + 1) if plan.samples_per_block % n == 0 and n <= fitting)
    starts = [n for block in plan.blocks for n in range(block.start, block.stop, together)]
    samples = tuple(np.diff([*starts, plan.n_samples]).tolist())
    chunks = (samples, (1,) * array.shape[1], *((n,) for n in stored.shape[2:]))
    lazy = da.from_array(stored, chunks=chunks, name=False, fancy=False, asarray=False, meta=np.empty(0, np.float32))
    for axis, size in enumerate(extents, 2):
        if past := int(size) - lazy.shape[axis]:
            shape = tuple(past if n == axis else size for n, size in enumerate(lazy.shape))
            chunks = tuple(past if n == axis else size for n, size in enumerate(lazy.chunks))
            lazy = da.concatenate([lazy, da.full(shape, np.nan, dtype=np.float32, chunks=chunks)], axis=axis)
    return lazy


def _in_order(lazy: da.Array, held: Sequence[str], layers: Sequence[str]) -> da.Array:
    """Layers in the order of the pass, NaN where an array does not have one."""
    if list(held) == list(layers):
        return lazy
    missing = da.full(
        (lazy.shape[0], 1, *lazy.shape[2:]), np.nan, dtype=lazy.dtype, chunks=(lazy.chunks[0], 1, *lazy.chunks[2:])
    )
    found = [lazy[:, held.index(name)][:, None] if name in held else missing for name in layers]
    return da.concatenate(found, axis=1)


def find_layers(store: Store, layers: str | Sequence[str]) -> list[str]:
    """Layers by name, as asked for.

    Raises
    ------
    Refusal
        When there is none, or one is not in the store.
    """
    names = [layers] if isinstance(layers, str) else [str(layer) for layer in layers]
    unknown = [name for name in names if name not in store.layers]
    if unknown or not names:
        raise Refusal(
            f"layer {', '.join(unknown) or '(none)'} is not in {store.place}: it has {', '.join(store.layers)}"
        )
    return names


def find_array(store: Store, kind: str, layer: str) -> tuple[Plan, ArrayPlan, int]:
    """The part and the array of hidden states that have a layer's tokens of a kind, and the layer's index there.

    Raises
    ------
    Refusal
        When the store keeps no such states.
    """
    for part in store.parts:
        array = part.arrays.get(f"{part.group('hidden')}/{kind}")
        if array is not None and layer in array.layers:
            return part, array, array.layers.index(layer)
    raise Refusal(f"{store.place} keeps no states of {kind} tokens at layer {layer!r}: see `python -m store inspect`")
