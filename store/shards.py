"""Shards of a Zarr v3 array (``sharding_indexed``), written in one piece and read by position.

zarr-python reads and checks the same files; it lays chunks out in Morton order, which scatters a sample. Here
chunks follow in C order, so that one sample at one layer is one run of bytes and all its layers are one run too:
a shuffled sample is one positioned read.

Shapes: ``s`` samples, ``l`` layers, ``r`` rows of a unit (tokens), ``...`` the unit's other axes (width).
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Blosc

from store.plan import ArrayPlan

ABSENT = np.uint64(2**64 - 1)
"""Offset and length, in a shard's index, of a chunk that was left out."""

BLOSC_BLOCK = 512 * 1024
"""Blosc's own block size cuts a chunk so small that byte-shuffled zstd gains nothing; this keeps 1.44x."""

THREADS = 8
MAX_PIECES = 512  # buffers of one preadv; the system's limit is 1,024


class DamagedShard(ValueError):  # noqa: N818 - the shard is what is wrong, by name
    """A shard whose index is torn or does not fit the file."""


class ShardBuilder:
    """One shard in the making: units are encoded as they come, in any order, and written whole."""

    def __init__(self, array: ArrayPlan, pool: ThreadPoolExecutor | None = None):
        self.array = array
        self._encode = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=BLOSC_BLOCK).encode
        self._map = pool.map if pool else map
        self._chunks: dict[int, tuple[list[bytes | memoryview], np.ndarray]] = {}

    def put(self, place: int, values_lr: np.ndarray) -> None:
        """Encode one sample, the ``place``-th of the shard.

        Parameters
        ----------
        values_lr
            ``[l, r, …]`` in the array's dtype, ``r`` up to the unit's rows; chunks past ``r`` are left out.
        """
        array = self.array
        rows = values_lr.shape[1]
        chunks = -(-rows // array.inner[2])
        padded = np.empty((len(array.layers), chunks * array.inner[2], *array.unit[1:]), array.dtype)
        padded[:, :rows] = values_lr
        padded[:, rows:] = array.fill
        lengths = np.zeros((len(array.layers), array.chunks_per_unit), np.uint64)
        if array.codec == "none":
            lengths[:, :chunks] = array.chunk_bytes
            self._chunks[place] = [padded.reshape(-1).view(np.uint8).data], lengths
        else:
            encoded = [bytes(chunk) for chunk in self._map(self._encode, padded)]
            lengths[:, 0] = [len(chunk) for chunk in encoded]
            self._chunks[place] = encoded, lengths

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The file: chunks in C order, the index, its checksum."""
        array = self.array
        lengths = np.zeros((array.shard[0], len(array.layers), array.chunks_per_unit), np.uint64)
        for place in sorted(self._chunks):
            encoded, lengths[place] = self._chunks[place]
            yield from encoded
        flat = lengths.reshape(-1)
        index = np.stack([np.cumsum(flat) - flat, flat], axis=-1)
        index[flat == 0] = ABSENT
        yield (stored := index.astype("<u8").tobytes())
        yield google_crc32c.value(stored).to_bytes(4, "little")


def index_bytes(array: ArrayPlan) -> int:
    """Size of a shard's index with its checksum, at the end of the file."""
    return array.shard[0] * len(array.layers) * array.chunks_per_unit * 16 + 4


def decode_index(array: ArrayPlan, tail: bytes, size: int) -> np.ndarray:
    """Runs of every (sample, layer) from the last bytes of a shard of ``size`` bytes.

    Returns
    -------
    ndarray of int64, shape [s, l, 2]
        Offset and length in bytes; length 0 where the sample is absent.

    Raises
    ------
    DamagedShard
        When the checksum fails, or chunks lie outside the file or apart from each other.
    """
    if len(tail) != index_bytes(array):
        raise DamagedShard(f"too short for its index: {size} bytes")
    if google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise DamagedShard("its index fails its checksum")
    entries = np.frombuffer(tail[:-4], "<u8").reshape(array.shard[0], len(array.layers), array.chunks_per_unit, 2)
    absent = entries[..., 0] == ABSENT
    lengths = np.where(absent, 0, entries[..., 1]).astype(np.int64)
    offsets = np.where(absent, 0, entries[..., 0]).astype(np.int64)
    start = offsets[..., 0]
    expected = start[..., None] + np.cumsum(lengths, axis=-1) - lengths
    if (lengths < 0).any() or (offsets + lengths > size - len(tail)).any() or ((expected != offsets) & ~absent).any():
        raise DamagedShard("its index points outside the file or to scattered chunks")
    return np.stack([start, lengths.sum(axis=-1)], axis=-1)


class ShardReader:
    """Positioned reads of whole units into arrays that the caller owns. Threads may share one.

    Parameters
    ----------
    folder
        The store.
    array
        The array to read.
    rows
        int64 ``[s]``: rows that each sample has.
    cached_shards
        Indices kept; one takes 16 bytes a sample and layer.
    """

    def __init__(self, folder: Path, array: ArrayPlan, rows: np.ndarray, cached_shards: int = 4096):
        self.folder, self.array, self.rows = folder, array, rows
        self._indices: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_shards, self._lock = cached_shards, threading.Lock()
        self._decode = Blosc().decode

    def __reduce__(self) -> tuple:
        # To another process of a Dask cluster goes what it takes to read, not the lock and what was read.
        return ShardReader, (self.folder, self.array, self.rows, self._cached_shards)

    def read_into(self, out_slr: np.ndarray, samples: Sequence[int], layers: Sequence[int]) -> None:
        """Fill ``out_slr[i, j, :n]`` with the first ``n = min(rows, r)`` rows of sample i at layer j.

        What lies past a sample's rows is left as it is.

        Parameters
        ----------
        out_slr
            ``[s, l, r, …]``, C-contiguous, in the array's dtype.
        samples, layers
            Indices, in any order.

        Raises
        ------
        DamagedShard
            When a shard is damaged or lacks a sample; FileNotFoundError when it is not there.
        """
        samples = np.asarray(samples, np.int64)
        # By shard and place, so that the disk is read forwards; a thread gets neighbours.
        order = np.argsort(samples, kind="stable")
        parts = np.array_split(order, min(THREADS, max(1, len(order) // 4)))
        jobs = [part for part in parts if len(part)]
        if len(jobs) == 1:
            self._read_part(out_slr, samples, layers, jobs[0])
        else:
            list(_pool().map(lambda part: self._read_part(out_slr, samples, layers, part), jobs))

    def _read_part(self, out_slr: np.ndarray, samples: np.ndarray, layers: Sequence[int], part: np.ndarray) -> None:
        array = self.array
        scratch = bytearray(array.chunk_bytes)
        shards = samples[part] // array.shard[0]
        for cut in np.split(np.arange(len(part)), np.flatnonzero(np.diff(shards)) + 1):
            shard = int(shards[cut[0]])
            path = self.folder / array.shard_file(shard)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                runs = self._index(shard, descriptor)
                for i in part[cut]:
                    sample = int(samples[i])
                    runs_l = runs[sample % array.shard[0]][list(layers)]
                    if (runs_l[:, 1] == 0).any():
                        raise DamagedShard(f"sample {sample} is not in it")
                    if array.codec == "none":
                        self._read_raw(descriptor, runs_l, out_slr[i], int(self.rows[sample]), scratch)
                    else:
                        self._read_encoded(descriptor, runs_l, out_slr[i], int(self.rows[sample]))
            except DamagedShard as damage:
                raise DamagedShard(f"{path}: {damage}; `python -m store verify` tells what is whole") from None
            finally:
                os.close(descriptor)

    def _index(self, shard: int, descriptor: int) -> np.ndarray:
        with self._lock:
            if shard in self._indices:
                self._indices.move_to_end(shard)
                return self._indices[shard]
        size = os.fstat(descriptor).st_size
        tail = index_bytes(self.array)
        runs = decode_index(self.array, os.pread(descriptor, tail, max(0, size - tail)), size)
        with self._lock:
            self._indices[shard] = runs
            if len(self._indices) > self._cached_shards:
                self._indices.popitem(last=False)
        return runs

    def _read_raw(self, descriptor: int, runs_l: np.ndarray, out_lr: np.ndarray, rows: int, scratch: bytearray) -> None:
        """Scatter layers that follow each other on disk into the output by one system call."""
        rows = min(rows, out_lr.shape[1])
        wanted = rows * self.array.row_bytes
        pieces: list = []
        begin = end = gap = 0
        for j, (offset, length) in enumerate(runs_l.tolist()):
            if length < wanted:
                raise DamagedShard(f"a unit has {length} bytes of {wanted}")
            if offset != end or gap > len(scratch) or len(pieces) > MAX_PIECES:
                _fill(descriptor, pieces, begin)
                pieces = []
            if not pieces:
                begin = offset
            elif gap:
                pieces.append(memoryview(scratch)[:gap])
            pieces.append(out_lr[j, :rows].reshape(-1).view(np.uint8))
            gap, end = length - wanted, offset + length
        _fill(descriptor, pieces, begin)

    def _read_encoded(self, descriptor: int, runs_l: np.ndarray, out_lr: np.ndarray, rows: int) -> None:
        rows = min(rows, out_lr.shape[1])
        for j, (offset, length) in enumerate(runs_l.tolist()):
            encoded = os.pread(descriptor, length, offset)
            try:
                unit = np.frombuffer(self._decode(encoded), self.array.dtype).reshape(self.array.unit)
            except (RuntimeError, ValueError) as failure:
                raise DamagedShard(f"a chunk does not decode ({failure})") from None
            out_lr[j, :rows] = unit[:rows]


def _fill(descriptor: int, pieces: list, offset: int) -> None:
    wanted = sum(len(piece) for piece in pieces)
    if wanted and os.preadv(descriptor, pieces, offset) != wanted:
        raise DamagedShard(f"ends before byte {offset + wanted}")


_POOLS: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    # By process: the threads of a pool do not survive a fork.
    if os.getpid() not in _POOLS:
        _POOLS[os.getpid()] = ThreadPoolExecutor(THREADS, thread_name_prefix="shards")
    return _POOLS[os.getpid()]
