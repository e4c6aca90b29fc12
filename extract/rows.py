"""The rows of parquet shards in OmniEdit's columns: walked in order or shuffled, and taken by place without the rest.

A place names its shard relative to the data folder, so it holds where the folder is moved. What can no longer be
read is a `SetAside` that says why; damage is met alike by a walk and by whoever takes the row later.
"""

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from extract.sources import find_shards, first_line
from store.errors import Refusal

REQUIRED = ("omni_edit_id", "task", "src_img", "edited_prompt_list")
NOT_EXTRA = (*REQUIRED, "edited_img", "width", "height", "box")

OBJECTS = "objects"
OF_OBJECTS = ("kind", "colour", "box")
"""Fields that are read of a list of objects; their masks stay on disk."""

UNREADABLE_SHARD, UNREADABLE_ROW = "shard cannot be read", "row cannot be read"
# ValueError: a file name that no system call takes; IndexError: a shard that has fewer row groups than it had.
DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError)

ROWS_AT_ONCE = 32  # about 50 MB of OmniEdit's pictures
READ_AHEAD = 1 << 20
MEMORY = 256 << 20  # a row group of OmniEdit without the edited pictures is 100 to 200 MB
OPEN_GROUPS = 8


class Place(NamedTuple):
    """Where a row lies: the shard, relative to the data folder (or the hub id), and the row in it, null for a shard."""

    file: str
    row: int | None


@dataclass(frozen=True)
class SetAside:
    """What could not be used: ``rows`` rows at ``place``, for ``reason``; a shard whose rows nobody knows is one."""

    sample_id: str | None
    place: Place
    reason: str
    detail: str = ""
    rows: int = 1


def wanted_columns(schema: pa.Schema, edited: bool) -> list[str]:
    """The columns to read: the known ones and every other scalar one (masks and pictures stay on disk)."""
    known = {*NOT_EXTRA} - ({"edited_img"} if not edited else set())
    return [item.name for item in schema if item.name in known or (item.name != "edited_img" and scalar(item.type))]


def scalar(kind: pa.DataType) -> bool:
    """Whether values of a type are text, numbers, truth values or times."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    asked = ("string", "large_string", "string_view", "integer", "floating", "decimal", "boolean", "temporal")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in asked)


def is_listed(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def object_columns(shard: pq.ParquetFile) -> list[str]:
    """The parts to read of a column ``objects`` that lists what a picture holds, as scenes have; of others none."""
    index = shard.schema_arrow.get_field_index(OBJECTS)
    listed = pa.null() if index < 0 else shard.schema_arrow.field(index).type
    if not is_listed(listed) or not pa.types.is_struct(listed.value_type):
        return []
    known = dict.fromkeys(OF_OBJECTS, pa.null()) | {item.name: item.type for item in listed.value_type}
    if not (scalar(known["kind"]) and scalar(known["colour"]) and is_listed(known["box"])):
        return []
    paths = [shard.schema.column(number).path for number in range(len(shard.schema))]
    # objects.list.element.kind: who wrote the shard named the two in the middle.
    parts = [path.split(".") for path in paths if path.startswith(f"{OBJECTS}.")]
    return [".".join(part) for part in parts if part[3:4] and part[3] in OF_OBJECTS]


class RowGroup:
    """One row group, read from its first row as far as rows are asked for; ``size`` bytes of it are in memory."""

    def __init__(self, file: Any, group: int, edited: bool, near: bool):
        # Buffered, a column is read as far as its pages are decoded. From far, few large reads are quicker.
        shard = pq.ParquetFile(file, buffer_size=READ_AHEAD if near else 0, pre_buffer=not near)
        columns = wanted_columns(shard.schema_arrow, edited) + object_columns(shard)
        self._rows = shard.metadata.row_group(group).num_rows
        self._ahead = shard.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
        self._starts: list[int] = []
        self._batches: list[pa.RecordBatch] = []
        self._sizes: list[int] = []
        self._done = 0
        self._damage: Exception | None = None

    @property
    def first(self) -> int:
        """The first row that is still in memory or ahead."""
        return self._starts[0] if self._starts else self._done

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(self._sizes)

    def read_to(self, row: int) -> None:
        """Read on until ``row`` is in memory (raises one of `DAMAGE`, again whenever it is asked)."""
        while self._done <= row:
            if self._damage is not None:
                raise self._damage
            try:
                batch = next(self._ahead)
            except StopIteration:
                self._damage = ValueError(f"the row group ends after {self._done} rows")
            except DAMAGE as damage:
                self._damage = damage
            else:
                self._starts.append(self._done)
                self._batches.append(batch)
                self._sizes.append(batch.get_total_buffer_size())
                self._done += batch.num_rows
            if self._done == self._rows:
                self._ahead = iter(())  # the reader goes, with the file and what it fetched ahead

    def cells(self, row: int) -> Iterator[tuple[str, pa.Scalar]]:
        """The columns' names and values of a row in memory."""
        at = bisect_right(self._starts, row) - 1
        batch = self._batches[at]
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            yield name, column[row - self._starts[at]]

    def forget_before(self, row: int) -> None:
        """Let the rows read first go, up to those that were read together with ``row``."""
        at = bisect_right(self._starts, row) - 1
        del self._starts[:at], self._batches[:at], self._sizes[:at]


class Shards:
    """The rows of the parquet shards of one split.

    Footers are read when they are first needed and kept; of the rows, those read last stay in memory, so that blocks
    of one row group do not read it again. An object serves one thread.

    Parameters
    ----------
    data
        A folder of parquet shards (at any depth), one shard, or a hub id (never downloaded whole).
    split
        In a folder, shards named ``<split>-*`` are preferred if there are any.
    edited
        Read the edited pictures too.
    memory
        Bytes of decoded rows to keep; at least the last few rows are, and what a single page (or the dictionary) of a
        column holds comes on top. A row group of the hub is fetched whole.

    Raises
    ------
    Refusal
        There is no shard.
    """

    def __init__(self, data: str | Path, split: str = "train", edited: bool = False, memory: int = MEMORY):
        self.data, self.edited, self.memory = data, edited, memory
        self._files = find_shards(data, split)
        self._footers: dict[str, tuple[np.ndarray, list[str]] | str] = {}
        self._groups: OrderedDict[tuple[str, int], RowGroup] = OrderedDict()

    def rows(self, places: Sequence[Place]) -> Iterator[dict[str, Any] | SetAside]:
        """The rows at ``places`` in the order asked, or why one cannot be had.

        Rows of one row group are read together, so ask for a block at once; nothing is raised for lost or bad data.
        """
        for first in range(0, len(places), ROWS_AT_ONCE):
            window = places[first : first + ROWS_AT_ONCE]
            found = {place: self._row(place) for place in sorted(window)}
            yield from (found[place] for place in window)

    def walk(self, seed: int | None = None) -> Iterator[tuple[Place, dict[str, Any]] | SetAside]:
        """All rows in order, or permuted by ``seed``.

        Of shards here the row groups of all are permuted, of the hub's the shards (a shard of OmniEdit is 200 rows);
        and the rows of each row group.

        Raises
        ------
        Refusal
            At once: no shard that was looked into (here all, of the hub's the first) has the required columns.
        """
        draw = None if seed is None else np.random.default_rng(seed)
        names = looked_into = list(self._files.names)
        parts = [names]
        if not self._files.near:
            order = range(len(names)) if draw is None else draw.permutation(len(names))
            looked_into, parts = names[:1], [[names[which]] for which in order]
        footers = [self._footer(name) for name in looked_into]
        sound = [columns for _, columns in (footer for footer in footers if not isinstance(footer, str))]
        if not any(set(REQUIRED) <= set(columns) for columns in sound):
            damaged = f"{len(footers) - len(sound)} of {len(footers)} are damaged"
            columns = ", ".join(REQUIRED)
            raise Refusal(f"{self.data} has no usable parquet shard: {damaged}; {columns} are required columns")
        return self._walk(parts, draw)

    def count(self) -> int | None:
        """Rows of all shards that can be read; null of the hub's, where looking is slow."""
        if not self._files.near:
            return None
        footers = [self._footer(name) for name in self._files.names]
        return sum(int(footer[0][-1]) for footer in footers if not isinstance(footer, str))

    def fingerprint(self) -> str:
        """The sha256 (hex) of the shards' names and sizes, here with their numbers of rows: the same data, not read."""
        told = []
        for name in self._files.names:
            footer = self._footer(name) if self._files.near else ""
            rows = None if isinstance(footer, str) else int(footer[0][-1])
            told.append((name, self._files.size(name), rows))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _walk(self, parts: list[list[str]], draw: np.random.Generator | None) -> Iterator[Any]:
        for names in parts:
            groups = []
            for name in names:
                footer = self._footer(name)
                if isinstance(footer, str):
                    yield SetAside(None, Place(name, None), UNREADABLE_SHARD, footer)
                    continue
                groups += [(name, int(start), int(end)) for start, end in pairwise(footer[0])]
            for which in range(len(groups)) if draw is None else draw.permutation(len(groups)):
                name, start, end = groups[which]
                order = np.arange(end - start) if draw is None else draw.permutation(end - start)
                places = [Place(name, start + row) for row in order.tolist()]
                for place, row in zip(places, self.rows(places), strict=True):
                    yield row if isinstance(row, SetAside) else (place, row)

    def _footer(self, name: str) -> tuple[np.ndarray, list[str]] | str:
        """Where each row group of a shard starts (and the last ends) and the shard's columns, or what is wrong."""
        if name not in self._footers:
            try:
                with pq.ParquetFile(self._files.open(name)) as shard:
                    counts = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
                    self._footers[name] = np.cumsum([0, *counts]), shard.schema_arrow.names
            except DAMAGE as error:
                self._footers[name] = self._said(error)
        return self._footers[name]

    def _row(self, place: Place) -> dict[str, Any] | SetAside:
        if place.file not in self._files.names:
            return SetAside(None, place, UNREADABLE_SHARD, f"there is no {place.file}")
        footer = self._footer(place.file)
        if isinstance(footer, str):
            return SetAside(None, place, UNREADABLE_SHARD, footer)
        starts, _ = footer
        if not 0 <= place.row < starts[-1]:
            return SetAside(None, place, UNREADABLE_SHARD, f"it has {starts[-1]} rows")
        group = bisect_right(starts, place.row) - 1
        within = place.row - int(starts[group])
        try:
            held = self._read(place.file, group, within)
        except DAMAGE as error:
            return SetAside(None, place, UNREADABLE_SHARD, self._said(error))
        row = {}
        for name, cell in held.cells(within):
            try:
                row[name] = cell.as_py()
                if name == OBJECTS and row[name] is None and is_listed(cell.type):
                    row[name] = []  # a column of that name with anything but lists is the data's own
            except (pa.ArrowException, ValueError, OverflowError) as error:  # no UTF-8, a date that no calendar has
                known = row.get("omni_edit_id")
                known = None if known is None else str(known)
                return SetAside(known, place, UNREADABLE_ROW, f"column {name!r}: {error}")
        return row

    def _read(self, name: str, group: int, row: int) -> RowGroup:
        """The row group with ``row`` of it in memory; it becomes the one used last and older ones make room for it."""
        held = self._groups.pop((name, group), None)
        if held is None or row < held.first:
            held = RowGroup(self._files.open(name), group, self.edited, self._files.near)
        self._groups[name, group] = held
        held.read_to(row)
        while len(self._groups) > OPEN_GROUPS or (len(self._groups) > 1 and self._size() > self.memory):
            self._groups.popitem(last=False)
        if held.size > self.memory:
            held.forget_before(row)
        return held

    def _size(self) -> int:
        return sum(group.size for group in self._groups.values())

    def _said(self, error: Exception) -> str:
        """An error's first line without the folder: it is kept in tables that do not depend on where the data lie."""
        return first_line(error).replace(f"{self._files.root}/", "")
