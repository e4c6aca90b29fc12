"""What is added to a store later, and taken from it: derived arrays, dropped arrays, copies of a part.

Adding samples and layers is ``store.grow``, in ``layout``, since it is planning.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
import zarr
from tqdm import tqdm
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store import commits
from store.batches import Choice
from store.errors import Refusal
from store.layout import (
    DERIVED,
    DERIVED_RECORDS,
    METADATA,
    Derived,
    alone,
    create,
    create_derived,
    derived_members,
    lay_out,
    load_parts,
    metadata,
    read_derived,
    read_set_aside,
    remove_old_tables,
    replace_parts,
)
from store.places import Place, locate
from store.plan import ATTENTION, KINDS, Plan, canonical_json, depth, hash_parts
from store.reader import Store
from store.writer import Writer

CHUNK_BYTES = 2**20
"""A chunk of a derived array holds whole samples up to about this much."""

SHARD_BYTES = 64 * 2**20
"""A shard of a derived array, uncompressed: what is held in memory while it is written."""

BLOSC_BYTES = 512 * 1024
"""Blocks that are shuffled and compressed together: masses come out 8 % smaller than by Blosc's own choice, and are
encoded twice and decoded four times as fast."""


def derive(
    path: str | os.PathLike | Place,
    name: str,
    dims: Sequence[str],
    shape: Sequence[int],
    dtype: str = "float32",
    *,
    coordinates: Mapping[str, Sequence[str]] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> "Deriving":
    """Add an array that was computed from the store, such as a proxy's attention; nothing else is touched.

    It is there once ``with`` is left without an error, whole; before that nobody sees it.

    Parameters
    ----------
    path
        A store.
    name
        Its name: ``Store.derived[name]``, and a Zarr group of its own, ``derived/<name>``, with its coordinates.
    dims, shape
        Names and sizes of its axes, whatever those of other derived arrays are. If the first is ``sample``, it must be
        as long as the store has samples, and values are written for some samples after the other.
    dtype
        float16, float32 or float64: what is missing reads as NaN.
    coordinates
        Labels of axes.
    attributes
        What it was made from, JSON-able: a probe's hash, the command …

    Raises
    ------
    Refusal
        When the name is taken or not one, or a size is wrong.

    Examples
    --------
    >>> with store.derive(path, "mass", ("sample", "layer"), (n, 28), attributes={"probe": "ab12…"}) as out:
    ...     for batch in ...:                                          # doctest: +SKIP
    ...         out.write(mass_sl)                                     # the next samples, in order
    """
    return Deriving(path, name, dims, shape, dtype, coordinates or {}, attributes or {})


class Deriving:
    """A derived array in the making; made by ``derive``."""

    def __init__(
        self,
        path: str | os.PathLike | Place,
        name: str,
        dims: Sequence[str],
        shape: Sequence[int],
        dtype: str,
        coordinates: Mapping[str, Sequence[str]],
        attributes: Mapping[str, Any],
    ):
        self.place = locate(path).of(f"derive-{name}")
        self.parts = load_parts(self.place)
        plan = self.parts[0]
        for given in (name, *dims):
            if not given.replace("-", "").replace("_", "").replace(".", "").isalnum() or given.startswith("."):
                raise Refusal(f"{given!r} is no name for a derived array or its axes: use letters, digits and - _ .")
        canonical_json(dict(attributes))  # what is no JSON is said now, not when all is written
        if dtype not in ("float16", "float32", "float64"):
            raise Refusal(
                f"dtype {dtype!r} of {name}: choose float16, float32 or float64, which have a NaN for what is missing"
            )
        if len(dims) != len(shape) or len(set(dims)) != len(dims) or not dims or min(shape) < 1:
            raise Refusal(f"dims {tuple(dims)} and shape {tuple(shape)} of {name} do not make an array")
        if "sample" in dims[1:] or (dims[0] == "sample" and shape[0] != plan.n_samples):
            raise Refusal(f"{name}: the axis sample comes first and is {plan.n_samples} long in {self.place}")
        others = list(read_derived(self.place))
        if any(other.name == name for other in others):
            raise Refusal(f"derived/{name} is in {self.place} already: drop it first, or choose another name")
        shared = [other for other in others if other.group == DERIVED]
        # An array and the coordinates of its axes lie in one folder.
        axes = {"sample", *dims, *(dim for other in shared for dim in other.dims)}
        if clash := ({name} & {METADATA, *axes}) | ({METADATA} & {*dims}):
            raise Refusal(f"{clash.pop()!r} would be the name of a derived array and of something else: choose another")
        for dim, labels in coordinates.items():
            if dim not in dims or len(labels) != shape[list(dims).index(dim)]:
                raise Refusal(f"the coordinate {dim} of {name} has {len(labels)} labels: dims {dims}, shape {shape}")
            if dim == "sample" and list(labels) != plan.samples["sample_id"].to_list():
                raise Refusal(f"the axis sample of {name} has other labels than {self.place}: leave them out")
        by_sample = dims[0] == "sample"
        shape = (plan.n_rows if by_sample else shape[0], *shape[1:])
        chunks, shards = tuple(shape), None
        if by_sample:
            sample_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
            together = max(1, min(CHUNK_BYTES // sample_bytes, shape[0]))
            chunks = (together, *shape[1:])
            fitting = max(1, SHARD_BYTES // (sample_bytes * together))
            shards = (min(fitting, -(-shape[0] // together)) * together, *shape[1:])
        # Samples are labelled by the store, for it may grow.
        labels = {dim: [str(label) for label in labels] for dim, labels in coordinates.items() if dim != "sample"}
        self.derived = Derived(
            name,
            tuple(dims),
            shape,
            chunks,
            shards,
            dtype,
            dict(attributes),
            labels,
            plan.n_samples,
            {},
            f"{DERIVED}/{name}",
        )
        for other in shared:
            _refuse_unaligned(self.derived, other)
        self._rows = plan.rows
        self._written = 0
        self._files: dict[str, tuple[int, str]] = {}
        self._filling: np.ndarray | None = None
        self._shard = 0

    def write(self, values: np.ndarray) -> None:
        """Write the values of the next samples ``[s, …]``; of all at once if there is no axis ``sample``.

        Raises
        ------
        ValueError
            When their shape is not the planned one.
        """
        derived, values = self.derived, np.asarray(values, self.derived.dtype)
        if values.shape[1:] != derived.shape[1:]:
            raise ValueError(f"{derived.name}: values are {values.shape}, planned {derived.dims} = {derived.shape}")
        if derived.shards is None:
            if values.shape != derived.shape or self._files:
                raise ValueError(f"{derived.name}: write all of {derived.shape} at once, these are {values.shape}")
            self._write(0, values)
            self._written = derived.samples
            return
        if self._written + len(values) > derived.samples:
            raise ValueError(f"{derived.name}: {self._written + len(values)} samples of {derived.samples} were written")
        rows = self._rows[self._written : self._written + len(values)]
        for shard in np.unique(rows // derived.shards[0]).tolist():
            here = rows // derived.shards[0] == shard
            if shard != self._shard:
                self._finish()
                self._shard = shard
            if self._filling is None:
                self._filling = np.full(derived.shards, np.nan, derived.dtype)
            self._filling[rows[here] % derived.shards[0]] = values[here]
        self._written += len(values)

    def _finish(self) -> None:
        if self._filling is not None:
            self._write(self._shard, self._filling)
        self._filling = None

    def _write(self, shard: int, values: np.ndarray) -> None:
        """Encode one shard (or the one chunk) as zarr-python does, and write the file whole."""
        memory, derived = MemoryStore(), dataclasses.replace(self.derived, shape=values.shape)
        create_derived(zarr.create_group(memory), derived, BLOSC_BYTES)[...] = values
        inside = "/".join([derived.path, "c"] + ["0"] * values.ndim)
        encoded = sync(memory.get(inside, default_buffer_prototype()))
        if encoded is None:  # nothing but NaN
            return
        name = "/".join([derived.path, "c", str(shard)] + ["0"] * (values.ndim - 1))
        self._files[name] = self.place.write_whole(name, [encoded.to_bytes()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and self._written == self.derived.samples:
            self._finish()
            done = self.derived = dataclasses.replace(self.derived, files=dict(sorted(self._files.items())))
            with alone(self.place):
                parts, document = load_parts(self.place), f"{done.path}/{METADATA}"
                for name in set(self.place.names(f"{done.path}/c")) - done.files.keys():
                    self.place.remove(name)  # of one of this name that was killed
                # By these two files it can be read, and a kill may come before the rest.
                self.place.write_whole(document, [metadata(parts, [done])[document]])
                self.place.write_whole(done.record_file, [done.record()])
                lay_out(self.place, parts)
            return
        for name in self._files:
            self.place.remove(name)
        if kind is None:
            raise ValueError(
                f"derived/{self.derived.name} has {self._written} of {self.derived.samples} samples: it was not added"
            )


def _refuse_unaligned(derived: Derived, shared: Derived) -> None:
    """Refuse other axes than an array of before 2.1 has: xarray opens a group inside another only if they agree."""
    sizes = dict(zip(shared.dims, shared.shape, strict=True))
    for dim, size in zip(derived.dims, derived.shape, strict=True):
        if dim == "sample" or dim not in sizes:
            continue
        there, here = (one.coordinates.get(dim) for one in (shared, derived))
        if size != sizes[dim] or (there and here and list(there) != list(here)):
            raise Refusal(
                f"the axis {dim} of {derived.name} ({size}) is not that of derived/{shared.name} ({sizes[dim]}), which "
                "lies beside it as stores of format 2.0 had it: drop that one and derive it again, or rename the axis"
            )


def drop(path: str | os.PathLike | Place, name: str) -> None:
    """Take an array out of a store and free its bytes; killed, the same call goes on.

    Parameters
    ----------
    path
        A store that no writer is at.
    name
        ``derived/<name>``, ``hidden/image``, ``hidden/text``, ``attention/text_to_image`` or
        ``attention/text_to_text``; of all layers.

    Raises
    ------
    Refusal
        When there is no such array, it is the last one, or a writer is at work.
    """
    place = locate(path)
    kind, _, variable = name.partition("/")
    with alone(place), contextlib.ExitStack() as stack:
        parts = load_parts(place, laid_out=False)
        for worker in commits.workers(place):
            stack.callback(place.log(commits.log_file(worker)).close)
        if kind == DERIVED:
            if variable not in [one.name for one in read_derived(place)] and not place.names(name):
                raise Refusal(f"{name} is not in {place}: it has {', '.join(_names(place, parts))}")
            remove_derived(place, parts, variable)
            return
        known = {"hidden": KINDS, "attention": ATTENTION}
        gone = [f"{part.group(kind)}/{variable}" for part in parts if variable in known.get(kind, ())]
        left = [found for part in parts for found in part.arrays if found not in gone]
        # Files of an array that is not planned any more are what a killed drop left.
        if not any(found in part.arrays for part in parts for found in gone) and not any(map(place.names, gone)):
            raise Refusal(f"{name} is not in {place}: it has {', '.join(_names(place, parts))}")
        if not any(found in parts[0].arrays for found in left):
            raise Refusal(f"{name} is the last array of {place}: delete the store instead")
        without = [_without(part, kind, variable) for part in parts]
        if hash_parts(without) != hash_parts(parts):
            replace_parts(place, without, read_set_aside(place))
        else:
            lay_out(place, parts)
            remove_old_tables(place)
        for found in gone:
            group = found.split("/")[0]
            place.remove_tree(found if any(other.split("/")[0] == group for other in left) else group)


def remove_derived(place: Place, parts: Sequence[Plan], name: str) -> None:
    """Take a derived array out, and the coordinates that no other one has."""
    place.remove(f"{DERIVED_RECORDS}/{name}.json")
    lay_out(place, parts)
    sweep_derived(place, name)
    # Last: while it is there, the same call goes on.
    place.remove_tree(f"{DERIVED}/{name}")
    if not place.names(DERIVED):
        place.remove_tree(DERIVED)


def sweep_derived(place: Place, *kept: str) -> None:
    """Remove arrays and coordinates that no record names, but for ``kept``. Call it while ``alone``.

    Arrays in the making have no metadata yet, and get them and their record while ``alone``.
    """
    left = list(read_derived(place))
    paths = [name.split("/") for name in place.names(DERIVED)]
    found = {member for _, member, *rest in paths if rest[-1:] == [METADATA]}
    for member in found - derived_members(left) - {*kept}:
        place.remove_tree(f"{DERIVED}/{member}")
    if not left:
        place.remove(f"{DERIVED}/{METADATA}")


def _names(place: Place, parts: Sequence[Plan]) -> list[str]:
    return [
        *(name for part in parts for name in part.arrays),
        *(f"{DERIVED}/{one.name}" for one in read_derived(place)),
    ]


def _without(part: Plan, kind: str, variable: str) -> Plan:
    if f"{part.group(kind)}/{variable}" not in part.arrays:
        return part
    changes: dict[str, Any] = {"extents": part.unit_extents}
    if kind == "hidden":
        kinds = tuple(name for name in part.kinds if name != variable)
        changes |= {"kinds": kinds} if kinds else {"layers": ()}
    else:
        rows = tuple(name for name in part.attention if name != variable)
        changes |= {"attention": rows} if rows else {"attention": (), "attention_layers": ()}
    return dataclasses.replace(part, **changes)


def copy(
    source: str | os.PathLike | Place,
    target: str | os.PathLike | Place,
    *,
    samples: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    attention: Sequence[str] | None = None,
    codec: str | None = None,
    text_codec: str | None = None,
    progress: bool = False,
) -> Path | str:
    """Copy a part of a store, or all of it with other codecs, to a new store; killed, the same call goes on.

    Parameters
    ----------
    source, target
        Folders or URLs.
    samples
        Rows of ``Store.samples``, all with states if not given.
    layers, kinds, attention
        What is kept; all if not given. Attention rows are kept of the kept layers.
    codec, text_codec
        Other codecs; a lossy one changes the values.
    progress
        Show a bar.

    Returns
    -------
    Path or str
        The new store. Derived arrays are not copied.

    Raises
    ------
    Refusal
        When something asked for is not in the store, or ``target`` holds something else.
    """
    store = Store(source)
    plan = store.plan
    kinds = tuple(kinds if kinds is not None else plan.kinds)
    held = sorted({name for part in store.parts for name in part.attention_layers}, key=depth)
    if attention is None:
        attention = [rows for rows in ATTENTION if any(rows in part.attention for part in store.parts)]
    attention = tuple(attention)
    attention_layers = tuple(name for name in (held if layers is None else layers) if name in held) if attention else ()
    for rows, layer in itertools.product(attention, attention_layers):
        if not any(rows in part.attention and layer in part.attention_layers for part in store.parts):
            raise Refusal(f"{store.place} keeps no rows {rows} of layer {layer!r}: choose other layers or rows")
    heads = next((part.attention_heads for part in store.parts if part.attention), None)
    choices = {}
    if layers := tuple(layers if layers is not None else store.layers):
        choices = {kind: Choice(store, layers, kind, layout="ragged", samples=samples) for kind in kinds}
    # Tokens and results are those of part 0.
    needed = {0}.union(*(choice.parts for choice in choices.values()))
    needed |= {part.part for part in store.parts if attention and set(part.attention_layers) & set(attention_layers)}
    valid = np.logical_and.reduce([store.valid_in(number) for number in needed])
    chosen = np.flatnonzero(valid) if samples is None else np.asarray(samples, np.int64)
    if lacking := [n for n in chosen.tolist() if not 0 <= n < plan.n_samples or not valid[n]]:
        raise Refusal(f"sample {lacking[0]} of {store.place} has not all that is to be copied: choose others")
    wanted = dataclasses.replace(
        plan,
        samples=plan.samples[chosen],
        layers=layers,
        kinds=kinds,
        attention=attention if attention_layers else (),
        attention_layers=attention_layers,
        attention_heads=heads,
        codec=codec or plan.codec,
        text_codec=text_codec or plan.text_codec,
        generations=(),
        extents={},
    )
    path = create(target, wanted, read_set_aside(store.place))
    results = store.samples.drop([*plan.samples.columns, "valid", "set_aside"], strict=False)
    results = results.hstack([store.samples[name] for name in _replaced(store)])
    with Writer(path) as writer:
        bar = tqdm(total=len(chosen), desc="copying", unit="sample", disable=not progress)
        for b in writer.blocks():
            with writer.block(b) as block:
                members = chosen[block.samples.start : block.samples.stop]
                tokens = dict(_tokens(store, members))
                for sample, origin in zip(block.samples, members.tolist(), strict=True):
                    given = {kind: _bits(choice, origin) for kind, choice in choices.items()}
                    given |= {rows: _rows(store, rows, attention_layers, origin) for rows in wanted.attention}
                    block.add(sample, tokens=tokens[origin], values=results.row(origin, named=True), **given)
                    bar.update()
        bar.close()
    return path


def _replaced(store: Store) -> list[str]:
    """Planned columns whose place results have taken."""
    tables = store.tables("results")
    found = {name for table in tables for name in table.columns} - {"sample"}
    return [name for name in store.plan.samples.columns if name in found]


def _bits(choice: Choice, sample: int) -> np.ndarray:
    values = choice.read(np.array([sample])).values
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _rows(store: Store, rows: str, layers: Sequence[str], sample: int) -> np.ndarray:
    found = []
    for layer in layers:
        part = next(part for part in store.parts if rows in part.attention and layer in part.attention_layers)
        name = f"{part.group('attention')}/{rows}"
        out = np.empty((1, 1, *part.extent(name, sample)), np.float16)
        store.reader(name).read_into(out, [sample], [part.attention_layers.index(layer)])
        found.append(out[0, 0])
    return np.stack(found)


def _tokens(store: Store, samples: np.ndarray) -> Iterator[tuple[int, pl.DataFrame]]:
    found = store.tokens.filter(pl.col("sample").is_in(samples.tolist())).collect()
    for (sample,), table in found.partition_by("sample", as_dict=True, maintain_order=True).items():
        yield sample, table.drop("sample", "slot")
