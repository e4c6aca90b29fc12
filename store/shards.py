"""Shards of a Zarr v3 array (``sharding_indexed``), written in one go and read by position.

zarr-python reads and checks the same files; it lays chunks out in Morton order, which scatters a sample. Here the
chunks of a sample follow in C order, so that one sample at one layer is one run of bytes and all its layers are one
run too: a shuffled sample is one positioned read.

Shapes: ``s`` samples, ``l`` layers, ``r`` rows of a unit (tokens), ``...`` the unit's other axes (width).
"""

import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from store.codecs import Codec, codec
from store.places import LocalPlace, Place, crc32c_of
from store.plan import ArrayPlan

ABSENT = np.uint64(2**64 - 1)
"""Offset and length, in a shard's index, of a chunk that was left out."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Threads that copy or decode: more of them take each other's caches."""

THREADS = 8
"""Threads that wait for a disk."""

REMOTE_THREADS = 32
"""Threads that wait for an object store: a request takes tens of milliseconds whatever it brings."""

SHARED_BYTES = 4 * 2**20, 64 * 1024
"""One more thread is worth its while from about this much to read, in units of about this much: of small ones most of
the time goes by in Python, which one thread at a time can run."""

GAP_BYTES = 64 * 1024
"""Bytes that are read and thrown away rather than sought over."""

RUN_BYTES = 16 * 2**20
"""Compressed units that follow each other are read together up to this much."""

OPEN_FILES = 256
"""Shards kept open by a reader."""

TOGETHER_BYTES = 512 * 1024
"""Chunks up to this much together are encoded by one call."""

MAX_LAYERS = 512
"""Layers that are read by one call: with the gaps between them as many pieces of memory as the system takes."""


class DamagedShard(ValueError):  # noqa: N818 - the shard is what is wrong, by name
    """A shard whose index is torn or does not fit the file."""


def codec_of(array: ArrayPlan) -> Codec:
    """The codec of an array's chunks."""
    return codec(array.codec, np.dtype(array.dtype), array.unit[-1], array.bits)


@dataclass(frozen=True)
class EncodedUnit:
    """One sample's unit of every layer, as it lies in a shard."""

    pieces: list[bytes | memoryview]
    lengths: np.ndarray
    """uint64 ``[l, chunks]``: 0 where a chunk is all padding and left out."""


def encode_unit(array: ArrayPlan, chunk_codec: Codec, values_lr: np.ndarray) -> EncodedUnit:
    """Encode ``[l, r, …]`` in the array's dtype, ``r`` up to the unit's rows; other axes may be short as well."""
    n_layers, rows = values_lr.shape[:2]
    filled = -(-rows // array.inner[2]) * array.inner[2]
    lengths = np.zeros((n_layers, array.chunks_per_unit), np.uint64)
    pieces: list[bytes | memoryview] = []
    if array.codec == "none" and values_lr.shape[2:] == array.unit[1:]:
        # Written from where they are: a copy of them costs about as much as writing does.
        padding = np.full((filled - rows, *array.unit[1:]), array.fill, array.dtype).tobytes()
        for values_r in values_lr:
            pieces += [np.ascontiguousarray(values_r).reshape(-1).view(np.uint8).data, padding]
    elif array.codec == "none":
        pieces = [_padded(array, values_lr, filled, bytearray).data]
    else:
        # Of large chunks one at a time: several passes over one stay in the cache.
        step = max(1, TOGETHER_BYTES // (filled * array.row_bytes))
        for start in range(0, n_layers, step):
            pieces += chunk_codec.encode_each(_padded(array, values_lr[start : start + step], filled, scratch))
    if array.codec == "none":
        lengths[:, : filled // array.inner[2]] = array.chunk_bytes
    else:
        lengths[:, 0] = [len(chunk) for chunk in pieces]
    return EncodedUnit(pieces, lengths)


def _padded(
    array: ArrayPlan, values_lr: np.ndarray, filled: int, memory: Callable[[int], bytearray | memoryview]
) -> np.ndarray:
    """Values ``[l, r, …]`` with the fill value behind them up to ``filled`` rows and the unit's other extents."""
    shape = (len(values_lr), filled, *array.unit[1:])
    if values_lr.shape == shape and values_lr.flags.c_contiguous:
        return values_lr
    padded = np.frombuffer(memory(math.prod(shape) * np.dtype(array.dtype).itemsize), array.dtype).reshape(shape)
    if values_lr.shape[2:] == shape[2:]:
        padded[:, values_lr.shape[1] :] = array.fill
    else:
        padded[:] = array.fill
    padded[tuple(map(slice, values_lr.shape))] = values_lr
    return padded


class ShardFile:
    """One shard being written: units are appended as they come, then the index."""

    def __init__(self, array: ArrayPlan, file: Any):
        self.array, self.file = array, file
        self._end = 0
        outer = (array.shard[0], array.shard[1], array.chunks_per_unit)
        self._offsets, self._lengths = np.zeros(outer, np.uint64), np.zeros(outer, np.uint64)

    def put(self, place: int, unit: EncodedUnit) -> None:
        """Append one sample, the ``place``-th of the shard."""
        layers = unit.lengths.shape[0]
        flat = unit.lengths.reshape(-1)
        self._offsets[place, :layers] = (np.cumsum(flat) - flat + np.uint64(self._end)).reshape(unit.lengths.shape)
        self._lengths[place, :layers] = unit.lengths
        self._end += int(flat.sum())
        self.file.write(*unit.pieces)

    def commit(self) -> tuple[int, str]:
        """Write the index and give the file its name: its size and CRC-32C."""
        index = np.stack([self._offsets, self._lengths], axis=-1)
        index[self._lengths == 0] = ABSENT
        stored = index.astype("<u8").tobytes()
        self.file.write(stored)
        self.file.write(crc32c_of(stored).to_bytes(4, "little"))
        return self.file.commit()


def index_bytes(array: ArrayPlan) -> int:
    """Size of a shard's index with its checksum, at the end of the file."""
    return array.shard[0] * array.shard[1] * array.chunks_per_unit * 16 + 4


def decode_index(array: ArrayPlan, tail: bytes, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of every (sample, layer) from the last bytes of a shard of ``size`` bytes.

    Returns
    -------
    pair of ndarray of int64, shape [s, l]
        Offset and length in bytes; length 0 where the sample is absent.

    Raises
    ------
    DamagedShard
        When the checksum fails, or chunks lie outside the file or apart from each other.
    """
    if len(tail) != index_bytes(array):
        raise DamagedShard(f"too short for its index: {size} bytes")
    if crc32c_of(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise DamagedShard("its index fails its checksum")
    entries = np.frombuffer(tail[:-4], "<u8").reshape(array.shard[0], array.shard[1], array.chunks_per_unit, 2)
    absent = entries[..., 0] == ABSENT
    lengths = np.where(absent, 0, entries[..., 1]).astype(np.int64)
    offsets = np.where(absent, 0, entries[..., 0]).astype(np.int64)
    start = offsets[..., 0]
    expected = start[..., None] + np.cumsum(lengths, axis=-1) - lengths
    if (lengths < 0).any() or (offsets + lengths > size - len(tail)).any() or ((expected != offsets) & ~absent).any():
        raise DamagedShard("its index points outside the file or to scattered chunks")
    return start, lengths.sum(axis=-1)


class _Index:
    """Where every unit of one cell of the grid lies, filled shard by shard as they are first asked for."""

    def __init__(self, array: ArrayPlan):
        size = (-(-array.shape[0] // array.shard[0]) * array.shard[0], array.shard[1])
        # Zeros cost memory only where a shard was looked at.
        self.offsets, self.lengths = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.known = np.zeros(size[0] // array.shard[0], bool)


class ShardReader:
    """Positioned reads of units, or rows of them, into memory that the caller owns. Threads and forks may share one.

    Parameters
    ----------
    place
        The store.
    array
        The array to read.
    rows
        int64 ``[s]``: the array's row of every sample.
    extents
        int64 ``[s, n]``: shape of every sample's values at one layer (axes 2 … of the array).
    """

    def __init__(self, place: Place, array: ArrayPlan, rows: np.ndarray, extents: np.ndarray):
        self.place, self.array, self.rows, self.extents = place, array, rows, extents
        self._indices: dict[tuple[int, ...], _Index] = {}
        self._files: dict[str, BinaryIO] = {}
        self._names: dict[tuple[int, tuple[int, ...]], str] = {}
        self._hot = hasattr(os, "RWF_NOWAIT")

    def __reduce__(self) -> tuple:
        # To another process goes what it takes to read, not what was read and is open.
        return ShardReader, (self.place, self.array, self.rows, self.extents)

    @cached_property
    def codec(self) -> Codec:
        """The array's codec."""
        return codec_of(self.array)

    def locate(
        self, samples: np.ndarray, layers: Sequence[int], cell: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offset and length of the units of samples at layers, int64 ``[s, l]`` each.

        Raises
        ------
        DamagedShard
            When a shard is missing, is damaged or lacks one of the samples.
        """
        index = self._indices.get(cell)
        if index is None:
            index = self._indices.setdefault(cell, _Index(self.array))
        rows = self.rows[samples]
        shards = rows // self.array.shard[0]
        if not index.known[shards].all():
            unknown = np.unique(shards[~index.known[shards]])
            threads = THREADS if isinstance(self.place, LocalPlace) else REMOTE_THREADS
            _each(lambda shard: self._learn(index, shard, cell), unknown.tolist(), threads)
        picked = rows[:, None], np.asarray(layers)
        lengths = index.lengths[picked]
        if lengths.size and not lengths.min():
            lacking = int(samples[np.flatnonzero((lengths == 0).any(1))[0]])
            path = self.array.shard_file(int(self.rows[lacking]) // self.array.shard[0], cell)
            raise DamagedShard(f"{self.place}/{path}: sample {lacking} is not in it; {_HINT}")
        return index.offsets[picked], lengths

    def _learn(self, index: _Index, shard: int, cell: tuple[int, ...]) -> None:
        name, array = self.array.shard_file(shard, cell), self.array
        try:
            offsets, lengths = decode_index(array, *self.place.read_tail(name, index_bytes(array)))
        except DamagedShard as damage:
            raise DamagedShard(f"{self.place}/{name}: {damage}; {_HINT}") from None
        except FileNotFoundError:
            raise DamagedShard(f"{self.place}/{name} is not there; {_HINT}") from None
        place = slice(shard * array.shard[0], (shard + 1) * array.shard[0])
        index.offsets[place], index.lengths[place] = offsets, lengths
        index.known[shard] = True

    def read_rows(
        self,
        out: np.ndarray,
        base: np.ndarray,
        stride: int,
        samples: np.ndarray,
        layers: Sequence[int],
        first: np.ndarray | None,
        rows: np.ndarray,
    ) -> None:
        """Read runs of whole rows (tokens) of hidden states.

        Run ``i`` is rows ``first[i]`` to ``first[i] + rows[i]`` of sample ``samples[i]``; at the ``j``-th layer it
        goes to byte ``base[i] + j * stride`` of ``out``.

        Parameters
        ----------
        out
            uint8 ``[n]``, contiguous.
        base, samples, first, rows
            int64 ``[i]``, in any order; ``first`` None stands for zeros.
        layers
            Indices on the array's second axis.

        Raises
        ------
        DamagedShard
            When a shard is damaged or lacks a sample.
        """
        unit = self.array.unit[0]
        last = rows if first is None else first + rows
        if last.size and last.max() > unit:
            first = np.zeros_like(rows) if first is None else first
            for k in range(-(-int(last.max()) // unit)):
                begin, end = np.maximum(first, k * unit), np.minimum(last, (k + 1) * unit)
                here = begin < end
                shifted = base + (begin - first) * self.array.row_bytes
                cell = (k, *[0] * (len(self.array.unit) - 1))
                self._read_cell(
                    out, shifted[here], stride, samples[here], layers, begin[here] - k * unit, (end - begin)[here], cell
                )
        else:
            self._read_cell(out, base, stride, samples, layers, first, rows, (0,) * len(self.array.unit))

    def _read_cell(
        self,
        out: np.ndarray,
        base: np.ndarray,
        stride: int,
        samples: np.ndarray,
        layers: Sequence[int],
        first: np.ndarray | None,
        rows: np.ndarray,
        cell: tuple[int, ...],
    ) -> None:
        offsets, lengths = self.locate(samples, layers, cell)
        jobs = _Jobs(self, memoryview(out), base, stride, samples, first, rows, offsets, lengths, cell)
        raw = self.array.codec == "none"
        # By shard and place, so that the disk is read forwards.
        order = np.argsort(self.rows[samples], kind="stable").tolist()
        if not isinstance(self.place, LocalPlace):
            _each(jobs.fetch, order, REMOTE_THREADS)
            return
        threads = _threads_for(int(rows.sum()) * self.array.row_bytes * len(layers), len(samples) * len(layers))
        # What the page cache has comes first; the rest is asked of the disk all at once, and then waited for.
        if self._hot:
            order = _share(jobs.copy_hot if raw else jobs.decode_hot, order, threads)
        if order:
            jobs.ask_ahead(order)
            _share(jobs.copy if raw else jobs.decode, order, threads)

    def read_into(self, out_slr: np.ndarray, samples: Sequence[int], layers: Sequence[int]) -> None:
        """Fill ``out_slr[i, j]`` with the values of sample i at layer j; what lies past them is left as it is.

        Parameters
        ----------
        out_slr
            ``[s, l, r, …]``, C-contiguous, in the array's dtype; it may have fewer rows than a sample.
        samples, layers
            Indices, in any order.

        Raises
        ------
        DamagedShard
            When a shard is damaged or lacks a sample.
        """
        samples = np.asarray(samples, np.int64)
        if not samples.size or not len(layers):
            return
        if out_slr.shape[3:] == self.array.unit[1:]:
            stride = out_slr.strides[1]
            base = np.arange(len(samples), dtype=np.int64) * out_slr.strides[0]
            rows = np.minimum(self.extents[samples, 0], out_slr.shape[2])
            self.read_rows(out_slr.reshape(-1).view(np.uint8), base, stride, samples, layers, None, rows)
            return
        threads = CORES if isinstance(self.place, LocalPlace) else REMOTE_THREADS
        _each(lambda i: self._read_units(out_slr[i], int(samples[i]), layers), range(len(samples)), threads)

    def _read_units(self, out_lr: np.ndarray, sample: int, layers: Sequence[int]) -> None:
        """All cells of one sample of an array that is ragged along several axes (attention)."""
        array = self.array
        extents = [min(n, size) for n, size in zip(self.extents[sample], out_lr.shape[1:], strict=True)]
        unit = np.empty(array.unit, array.dtype)
        one = np.array([sample], np.int64)
        for cell, place in array.units(extents):
            offsets, lengths = self.locate(one, layers, cell)
            whole = tuple(slice(part.stop - part.start) for part in place)
            for j in range(len(layers)):
                encoded = self._bytes(self.array.shard_file(*self._shard(sample), cell), offsets[0, j], lengths[0, j])
                self._decode_into(encoded, unit, sample, cell)
                out_lr[(j, *place)] = unit[whole]

    def bytes_by_layer(self, names: Iterable[str]) -> np.ndarray:
        """Bytes of the chunks of every layer in some shards, int64 ``[l]``."""
        total = np.zeros(self.array.shard[1], np.int64)
        for name in names:
            total += decode_index(self.array, *self.place.read_tail(name, index_bytes(self.array)))[1].sum(axis=0)
        return total

    def _shard(self, sample: int) -> tuple[int]:
        return (int(self.rows[sample]) // self.array.shard[0],)

    def _bytes(self, name: str, offset: int, length: int) -> bytes:
        data = self.place.read_range(name, int(offset), int(length))
        if len(data) != length:
            raise DamagedShard(f"{self.place}/{name} ends before byte {offset + length}; {_HINT}")
        return data

    def _decode_into(self, encoded: Any, out: np.ndarray, sample: int, cell: tuple[int, ...]) -> None:
        try:
            self.codec.decode_into(encoded, out, self.array.inner[2])
        except ValueError as failure:
            name = self.array.shard_file(*self._shard(sample), cell)
            raise DamagedShard(
                f"{self.place}/{name}: a chunk of sample {sample} does not decode ({failure}); {_HINT}"
            ) from None

    def name(self, shard: int, cell: tuple[int, ...]) -> str:
        """``ArrayPlan.shard_file``, remembered: it is asked for with every batch."""
        key = (shard, cell)
        if key not in self._names:
            self._names[key] = self.array.shard_file(shard, cell)
        return self._names[key]

    def open(self, name: str) -> BinaryIO:
        """A local shard, kept open; whoever has it may read from it when it is no longer kept."""
        file = self._files.get(name)
        if file is None:
            try:
                file = (self.place.path / name).open("rb", buffering=0)
            except FileNotFoundError:
                raise DamagedShard(f"{self.place}/{name} is not there; {_HINT}") from None
            if len(self._files) >= OPEN_FILES:
                # Others may be reading from it: it is closed when the last of them lets go.
                self._files.pop(next(iter(self._files)), None)
            self._files[name] = file
        return file


_HINT = "`python -m store verify` tells what is whole"


@dataclass
class _Jobs:
    """The runs of one ``read_rows`` call; each method does run ``i``."""

    reader: ShardReader
    out: memoryview
    base: np.ndarray
    stride: int
    samples: np.ndarray
    first: np.ndarray | None
    rows: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    cell: tuple[int, ...]

    def __post_init__(self) -> None:
        array = self.reader.array
        self.wanted = (self.rows * array.row_bytes).tolist()
        self.shards = (self.reader.rows[self.samples] // array.shard[0]).tolist()
        self.names = {shard: self.reader.name(shard, self.cell) for shard in set(self.shards)}
        self.base = self.base.tolist()
        self.raw = array.codec == "none"
        self.before = 0
        if self.raw:
            self.before = 0 if self.first is None else self.first * array.row_bytes
            short = self.lengths.min(axis=1, initial=2**62) < self.rows * array.row_bytes + self.before
            if short.any():
                i = int(np.flatnonzero(short)[0])
                raise DamagedShard(
                    f"{self.reader.place}/{self.name(i)}: sample {self.samples[i]} has fewer tokens in it than were "
                    f"planned; {_HINT}"
                )

    @cached_property
    def starts(self) -> list[list[int]]:
        """First byte of every run at every layer."""
        return (self.offsets + np.reshape(self.before, (-1, 1))).tolist()

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Bytes of every run at every layer."""
        return [[size] * self.lengths.shape[1] for size in self.wanted] if self.raw else self.lengths.tolist()

    def name(self, i: int) -> str:
        """Path of a run's shard."""
        return self.names[self.shards[i]]

    def _target(self, i: int, j: int) -> memoryview:
        begin = self.base[i] + j * self.stride
        return self.out[begin : begin + self.wanted[i]]

    def _near(self, i: int) -> Iterator[tuple[int, int, range]]:
        """Layers of a run that nearly follow each other on disk: first byte, bytes, and which they are."""
        starts, sizes, first = self.starts[i], self.sizes[i], 0
        for j in range(1, len(starts) + 1):
            if (
                j == len(starts)
                or not 0 <= starts[j] - starts[j - 1] - sizes[j - 1] <= GAP_BYTES
                or starts[j] + sizes[j] - starts[first] > RUN_BYTES
                or j - first == MAX_LAYERS
            ):
                yield starts[first], starts[j - 1] + sizes[j - 1] - starts[first], range(first, j)
                first = j

    def ask_ahead(self, order: list[int]) -> None:
        """Have the disk begin with all of it: waiting for one run after the other is then waiting for the slowest."""
        if not hasattr(os, "posix_fadvise"):
            return
        for i in order:
            file = self.reader.open(self.name(i))
            for begin, size, _ in self._near(i):
                os.posix_fadvise(file.fileno(), begin, size, os.POSIX_FADV_WILLNEED)

    def _not_at_once(self, failure: OSError) -> int:
        """What was read when the system said that the page cache does not have it: nothing. Raises other failures."""
        if not isinstance(failure, BlockingIOError):
            if failure.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise failure
            self.reader._hot = False  # this file system cannot tell
        return 0

    def copy_hot(self, order: Iterable[int]) -> list[int]:
        """Copy the runs of uncompressed rows that the page cache has; those that it has not, or not whole."""
        layers, stride, preadv, flags = self.offsets.shape[1], max(1, self.stride), os.preadv, os.RWF_NOWAIT
        out, base, wanted, shards = self.out, self.base, self.wanted, self.shards
        files = {shard: self.reader.open(name) for shard, name in self.names.items()}
        descriptors = {shard: file.fileno() for shard, file in files.items()}
        starts, cold = (self.offsets[:, 0] + self.before).tolist(), []
        sizes, gaps, regular = wanted, [], []
        if layers > 1:
            # Layers that follow each other, each with the same padding behind its rows: all but a few strange ones.
            ends = self.offsets[:, :-1] + self.lengths[:, :-1]
            padding = self.lengths[:, 0] - np.asarray(wanted)
            alike = (ends == self.offsets[:, 1:]).all(axis=1) & (self.lengths == self.lengths[:, :1]).all(axis=1)
            regular = (alike & (padding <= GAP_BYTES) & (layers <= MAX_LAYERS)).tolist()
            gaps = padding.tolist()
            sizes = (self.lengths[:, 0] * layers - padding).tolist()
        # There are many and small ones: this loop is as bare as it can be.
        for i in order:
            size, begin = wanted[i], base[i]
            if not size:
                continue
            if layers == 1:
                pieces = [out[begin : begin + size]]
            elif not regular[i]:
                cold.append(i)
                continue
            else:
                pieces = [out[place : place + size] for place in range(begin, begin + layers * stride, stride)]
                if gaps[i]:
                    spread = [_JUNK[: gaps[i]]] * (2 * layers - 1)
                    spread[::2] = pieces
                    pieces = spread
            try:
                read = preadv(descriptors[shards[i]], pieces, starts[i], flags)
            except OSError as failure:
                read = self._not_at_once(failure)
            if read != sizes[i]:
                cold.append(i)
        return cold

    def copy(self, order: Iterable[int]) -> list[int]:
        """Scatter runs of uncompressed rows, whether the page cache has them or not."""
        for i in order:
            wanted, starts = self.wanted[i], self.starts[i]
            if not wanted:
                continue
            file = self.reader.open(self.name(i))
            for begin, _, layers in self._near(i):
                pieces, end = [], begin
                for j in layers:
                    if starts[j] > end:
                        pieces.append(_JUNK[: starts[j] - end])
                    pieces.append(self._target(i, j))
                    end = starts[j] + wanted
                self._fill(file, pieces, begin)
        return []

    def _fill(self, file: BinaryIO, pieces: list[memoryview], offset: int) -> None:
        while pieces:
            read = os.preadv(file.fileno(), pieces, offset)
            if not read:
                raise DamagedShard(f"{file.name} ends before byte {offset + sum(map(len, pieces))}; {_HINT}")
            offset += read
            # Signals and some network file systems cut long reads.
            while pieces and read >= len(pieces[0]):
                read -= len(pieces.pop(0))
            if pieces:
                pieces[0] = pieces[0][read:]

    def decode_hot(self, order: Iterable[int]) -> list[int]:
        """Decode the compressed runs that the page cache has; those that it has not, or not whole."""
        cold = []
        for i in order:
            if not self._decode_run(i, at_once=True):
                cold.append(i)
        return cold

    def decode(self, order: Iterable[int]) -> list[int]:
        """Decode compressed runs, whether the page cache has them or not."""
        for i in order:
            self._decode_run(i, at_once=False)
        return []

    def _decode_run(self, i: int, at_once: bool) -> bool:
        file, starts, sizes = self.reader.open(self.name(i)), self.starts[i], self.sizes[i]
        for begin, size, layers in self._near(i) if self.wanted[i] else ():
            encoded = scratch(size)
            if not at_once:
                self._fill(file, [encoded], begin)
            else:
                try:
                    read = os.preadv(file.fileno(), [encoded], begin, os.RWF_NOWAIT)
                except OSError as failure:
                    read = self._not_at_once(failure)
                if read != size:
                    return False
            for j in layers:
                place = starts[j] - begin
                self._decode(i, j, encoded[place : place + sizes[j]])
        return True

    @cached_property
    def _decoded(self) -> list[tuple[int, tuple[int, ...], int]]:
        """Where the values of a run begin in ``out``, their shape, and how many rows of the unit come before them."""
        itemsize, rest = np.dtype(self.reader.array.dtype).itemsize, self.reader.array.unit[1:]
        firsts = [0] * len(self.base) if self.first is None else self.first.tolist()
        shapes = [(n, *rest) for n in self.rows.tolist()]
        return list(zip([begin // itemsize for begin in self.base], shapes, firsts, strict=True))

    @cached_property
    def _values(self) -> np.ndarray:
        return np.frombuffer(self.out, self.reader.array.dtype)

    def _decode(self, i: int, j: int, encoded: Any) -> None:
        begin, shape, first = self._decoded[i]
        begin += j * self.stride // self._values.itemsize
        target = self._values[begin : begin + math.prod(shape)].reshape(shape)
        if not first:
            self.reader._decode_into(encoded, target, self.samples[i], self.cell)
        else:
            unit = np.empty((first + shape[0], *shape[1:]), target.dtype)
            self.reader._decode_into(encoded, unit, self.samples[i], self.cell)
            target[:] = unit[first:]

    def fetch(self, i: int) -> None:
        """One run, from an object store."""
        if not self.wanted[i]:
            return
        reader = self.reader
        found = reader.place.read_ranges(self.name(i), self.starts[i], self.sizes[i])
        for j, (data, size) in enumerate(zip(found, self.sizes[i], strict=True)):
            if len(data) != size:
                end = self.starts[i][j] + size
                raise DamagedShard(f"{reader.place}/{self.name(i)} ends before byte {end}; {_HINT}")
            if self.raw:
                self._target(i, j)[:] = data
            else:
                self._decode(i, j, data)


def _threads_for(size: int, units: int) -> int:
    """How many threads are to copy or decode ``size`` bytes in so many units."""
    each, unit = SHARED_BYTES
    return min(CORES, size // each) if size >= units * unit else 1


def _share(work: Callable[[Iterator[int]], list[int]], items: Iterable[int], threads: int) -> list[int]:
    """What ``work`` makes of ``items``, which several threads take one by one; this thread is one of them."""
    items = list(items)
    taken = iter(items)
    others = [_pool().submit(work, taken) for _ in range(min(threads, len(items)) - 1)]
    try:
        found = work(taken)
    finally:
        # None is left writing to memory that the caller may use for something else.
        wait(others)
    return found + [one for other in others for one in other.result()]


def _each(work: Callable[[int], None], items: Iterable[int], threads: int) -> None:
    """``work`` on every one of ``items``, by several threads."""

    def some(taken: Iterator[int]) -> list[int]:
        for item in taken:
            work(item)
        return []

    _share(some, items, threads)


def scratch(size: int) -> memoryview:
    """Memory of this thread until it asks again: fresh memory costs page faults, which cap reading."""
    if len(getattr(_SCRATCH, "memory", b"")) < size:
        _SCRATCH.memory = bytearray(size)
    return memoryview(_SCRATCH.memory)[:size]


_SCRATCH = threading.local()

_JUNK = memoryview(bytearray(GAP_BYTES))

_POOLS: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    # By process: the threads of a pool do not survive a fork.
    if os.getpid() not in _POOLS:
        _POOLS.clear()
        _POOLS[os.getpid()] = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="shards")
    return _POOLS[os.getpid()]
