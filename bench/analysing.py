"""One pass over the attention mass of a whole study: beside its reading alone, the disk, plain NumPy and a cluster.

The masses are made up, written into a store by ``store.derive`` and read from disk, not from memory. What reads them
runs in a process of its own, for its memory.

Shape suffixes: ``s`` sample, ``h`` head, ``q`` query, ``l`` layer, ``k`` rank.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

import store
from analysis.blocks import over_blocks
from analysis.census import PARTS, Census, census, votes
from bench.config import AnalysisSizes
from bench.measure import Row, StillWarm, drop_from_memory, figure_row, in_process, own_memory, rate_row, time_row
from store.growth import Deriving
from store.scheduler import connect
from store.shards import CORES
from store.synthetic import synthetic_plan

DIMS = ("sample", "head", "query", "layer")
NAME = "mass"
DISTINCT = 4
"""Shards that are drawn; all others but the last are copies of them."""
DROP = 0.2
"""What makes a head decisive here: between those that are drawn peaked and those that are not."""
READING_GOAL = 0.5
"""The pass over reading and decoding alone."""
MEMORY_GOAL = 4e9
"""Bytes that the process of the pass may have."""
WORKERS = 2
READ_BYTES = 8 * 2**20

PASS, DASK = "census and votes", f"census and votes, Dask local:{WORKERS}"
READING, DISK, PLAIN = "reading and decoding alone", "reading the files alone", "plain NumPy, masses in memory"


@dataclass(frozen=True)
class Took:
    """What a contender took."""

    seconds: float
    peak: int = 0
    """Bytes of its process, at most."""
    digest: str = ""
    """Of all that it found."""
    started: float = 0.0
    """Seconds of them until the cluster was there."""


def measure(sizes: AnalysisSizes, repeats: int, scratch: Path) -> list[Row]:
    """All rows of a run of ``--analysis``."""
    path = scratch / "masses.zarr"
    make_up(path, sizes)
    contenders: dict[str, Callable[[], Took]] = {
        DISK: lambda: in_process(_files_alone, path),
        READING: lambda: in_process(_reading_alone, path),
        PASS: lambda: in_process(_census, path, None),
        DASK: lambda: in_process(_census, path, f"local:{WORKERS}"),
        PLAIN: lambda: in_process(_plain, path, sizes.plain),
    }
    took: dict[str, list[Took]] = {name: [] for name in contenders}
    note = "from disk"
    for turn in range(repeats):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            try:
                drop_from_memory(_files(path))
            except StillWarm as why:
                note = f"not from disk: {why}"
            took[name].append(contenders[name]())
    return _rows(sizes, path, took, note)


def _rows(sizes: AnalysisSizes, path: Path, took: dict[str, list[Took]], note: str) -> list[Row]:
    part = f"attention mass, {sizes.samples:,} samples × {sizes.heads} heads × {sizes.queries} queries × "
    part += f"{sizes.layers} layers"
    seconds = {name: np.array([one.seconds for one in of]) for name, of in took.items()}
    size, stored = 2 * int(np.prod(sizes.shape)), sum(file.stat().st_size for file in _files(path))
    same = {one.digest for one in (*took[PASS], *took[DASK])}
    started = np.median([one.started for one in took[DASK]])
    told = f"same bytes: {'yes' if len(same) == 1 else 'NO'}; {started:.1f} s of it to start"
    alone = size / sizes.samples
    return [
        rate_row(part, PASS, size, seconds[PASS], READING, seconds[READING], goal=READING_GOAL, note=note),
        rate_row(part, f"{PASS}, bytes of files", stored, seconds[PASS], DISK, seconds[DISK]),
        rate_row(part, f"{READING}, bytes of files", stored, seconds[READING], DISK, seconds[DISK]),
        rate_row(part, PASS, alone, seconds[PASS] / sizes.samples, PLAIN, seconds[PLAIN] / sizes.plain),
        figure_row(
            part,
            f"{PASS}, peak memory",
            max(one.peak for one in took[PASS]) / 1e9,
            "GB",
            "the masses",
            size / 1e9,
            "less",
            goal=MEMORY_GOAL / size,
            note=f"{MEMORY_GOAL / 1e9:.0f} GB are allowed",
        ),
        time_row(part, DASK, seconds[DASK], f"{PASS}, {CORES} threads", seconds[PASS], note=told),
    ]


# Masses.


def make_up(path: Path, sizes: AnalysisSizes) -> None:
    """A store with masses like those of proxies: every second head looks at one layer first, some samples have none."""
    store.create(path, synthetic_plan(sizes.samples, samples_per_block=64))
    random = np.random.default_rng(0)
    with _Copying(path, NAME, DIMS, sizes.shape, "float16", {}, {"made": "up"}) as out:
        together = out.derived.shards[0]
        drawn = [_masses(min(together, sizes.samples), sizes, random) for _ in range(DISTINCT)]
        for shard, start in enumerate(range(0, sizes.samples, together)):
            out.write(drawn[shard % DISTINCT][: sizes.samples - start])


def _masses(n: int, sizes: AnalysisSizes, random: np.random.Generator) -> np.ndarray:
    """Masses ``[s, h, q, l]``: shares of layers; queries of a head are alike."""
    _, n_heads, n_queries, n_layers = sizes.shape
    scores_shql = 0.3 * random.standard_normal((n, n_heads, n_queries, n_layers), np.float32)
    scores_shql += random.standard_normal((n, n_heads, 1, n_layers), np.float32)
    peaked_h = np.arange(0, n_heads, 2)
    scores_shql[:, peaked_h, :, random.integers(0, n_layers, len(peaked_h))] += 6
    np.exp(scores_shql, out=scores_shql)
    mass_shql = (scores_shql / scores_shql.sum(-1, keepdims=True)).astype(np.float16)
    mass_shql[random.random(n) < 0.01] = np.nan
    return mass_shql


class _Copying(Deriving):
    """Encodes a few shards and writes their bytes again for the others, which takes a fraction of the time."""

    def _write(self, shard: int, values: np.ndarray) -> None:
        last = (self.derived.samples - 1) // self.derived.shards[0]
        if shard < DISTINCT or shard == last:
            super()._write(shard, values)
            return
        rest = ["0"] * (values.ndim - 1)
        model, name = ("/".join([self.derived.path, "c", str(n), *rest]) for n in (shard % DISTINCT, shard))
        self._files[name] = self.place.write_whole(name, [self.place.read(model)])


def _files(path: Path) -> list[Path]:
    return [file for file in (path / "derived").rglob("*") if file.is_file()]


def _parts(n: int) -> np.ndarray:
    return np.random.default_rng(1).choice(np.array([0, 1, -1], np.int8), n, p=(0.7, 0.25, 0.05))


# Contenders; each runs in a process of its own.


def _files_alone(path: Path) -> Took:
    def read(file: Path) -> None:
        buffer = bytearray(READ_BYTES)
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    files, began = _files(path), time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(read, files))
    return Took(time.perf_counter() - began)


def _reading_alone(path: Path) -> Took:
    mass = store.open(path).derived[NAME]
    began = time.perf_counter()
    for _ in over_blocks(_nothing, mass):
        pass
    return Took(time.perf_counter() - began)


def _nothing(values: np.ndarray, samples: slice) -> None:
    """What is done to blocks when they are only read."""


def _census(path: Path, dask: str | None) -> Took:
    mass, began = store.open(path).derived[NAME], time.perf_counter()
    with connect(dask) if dask else contextlib.nullcontext() as client:
        started = time.perf_counter() - began
        found = census(mass, _parts(len(mass)), dask=client.scheduler.address if client else None)
    decisive_h = found.ranked_phqk[0, :, :, :2].mean(1) @ (1, -1) > DROP
    vote = votes(found, decisive_h)
    seconds = time.perf_counter() - began
    if not decisive_h.any() or (vote.l_star_s < 0).all():
        raise RuntimeError("the masses that are measured have no decisive heads")
    return Took(seconds, own_memory("VmHWM"), _digest(found), started)


def _digest(found: Census) -> str:
    digest = hashlib.sha256()
    for field in fields(found):
        if isinstance(value := getattr(found, field.name), np.ndarray):
            for rows in np.array_split(value, max(1, value.nbytes // 2**26)):
                digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _plain(path: Path, n: int) -> Took:
    """What a few lines of NumPy take for the same, without votes, over masses that are in memory already."""
    mass_shql, parts_s = store.open(path).derived[NAME][:n].values, _parts(n)
    began = time.perf_counter()
    mass_shql = mass_shql.astype(np.float32)
    there_s = np.isfinite(mass_shql).all((1, 2, 3))
    ranked_shqk = np.sort(mass_shql, -1)[..., ::-1]
    for part in PARTS:
        of = there_s & (parts_s == part)
        ranked_shqk[of].mean(0, dtype=np.float64)
        mass_shql[of].mean(0, dtype=np.float64)
    (ranked_shqk[..., 0] - ranked_shqk[..., 1]).mean(-1)
    mass_shql.sum(2).argmax(-1)
    return Took(time.perf_counter() - began)
