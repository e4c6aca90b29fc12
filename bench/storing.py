"""The store beside plain files, memory maps, other formats and other codecs of the same values.

Codecs, sizes, shuffled batches from memory and from disk, writing, verification, and opening a large store.

Shape suffixes: ``b`` sample of a batch, ``l`` layer, ``t`` token, ``w`` width.
"""

import contextlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import polars as pl
import torch
import xarray as xr

import store
from bench import rivals
from bench.config import Sizes
from bench.measure import (
    Row,
    StillWarm,
    Turns,
    drop_from_memory,
    figure_row,
    missing_row,
    peak_of_writing,
    rate_row,
    size_row,
    time_row,
)
from bench.rivals import CODECS, HDF5, KEEPERS, MAPS, READERS, Ask, PaddedMap, Rival, Unavailable, Values
from store import bits
from store.codecs import CODECS as STORED
from store.codecs import LOSSY
from store.codecs import codec as codec_of
from store.commits import FOLDER, Commit
from store.layout import table_file
from store.synthetic import synthetic_plan

STORE_CODECS = tuple(name for name in STORED if name not in LOSSY)
"""Lossless codecs of a store: what is read, written and verified."""

WARM_GOAL = {"none": 0.9, "zstd": 0.5, "planes": 0.5}
"""Shuffled batches over a warm memory map."""
PIPELINE_GOAL = 3.0
"""Shuffled batches over the best general Zarr pipeline on the same folder."""
COLD_GOAL = {"some": 2.0, "one": 10.0}
"""Prompts of some layers and of one layer, from disk, over a memory map."""
WRITE_GOAL = 0.7
"""Writing uncompressed over one plain file."""

BLOSC = "Blosc zstd-1, byte shuffle"
"""What the speed of every codec is compared with: the usual choice for arrays."""


def make_up(folder: Path, sizes: Sizes) -> Values:
    """States like those of a 7B model: mantissas are noise, channels differ, and a few are massive."""
    plan = synthetic_plan(
        sizes.made_samples,
        image=sizes.made_image,
        text=sizes.made_text,
        width=sizes.made_width,
        layers=tuple(map(str, range(sizes.made_layers))),
        samples_per_block=32,
    )
    kinds = [
        ["image"] * n_image + ["instruction"] * n_text for n_image, n_text in plan.samples["n_image", "n_text"].rows()
    ]
    tables = [pl.DataFrame({"position": range(len(one)), "kind": one}) for one in kinds]
    folder.mkdir()
    values = Values(plan, folder, tables)
    random = np.random.default_rng(0)
    channels_w = random.lognormal(0, 0.6, plan.width).astype(np.float32)
    channels_w[random.choice(plan.width, 6, replace=False)] *= 200
    noise = torch.Generator().manual_seed(0)
    for kind in values.counts:
        out = values.map(kind, "w+")
        for sample, n in enumerate(values.counts[kind]):
            tokens_lt1 = random.lognormal(0, 0.2, (len(plan.layers), n, 1)).astype(np.float32)
            states = torch.randn((len(plan.layers), int(n), plan.width), generator=noise)
            states *= torch.from_numpy(channels_w) * torch.from_numpy(tokens_lt1)
            out[sample, :, :n] = states.to(torch.bfloat16).view(torch.uint16).numpy()
        out.flush()
    return values


def read_back(path: Path, folder: Path) -> Values:
    """The states of a store, without its attention rows."""
    opened = store.open(path)
    plan = replace(opened.plan, attention=(), attention_layers=(), attention_heads=None)
    tables = opened.tokens.collect().sort("sample", "position").partition_by("sample", maintain_order=True)
    folder.mkdir()
    values = Values(plan, folder, [table.drop("sample") for table in tables])
    for kind in values.counts:
        out = values.map(kind, "w+")
        states, _mask = opened.read(range(plan.n_samples), list(opened.layers), kind)
        out[:] = states.view(torch.uint16).numpy()
        out.flush()
    return values


def measure(values: Values, label: str, sizes: Sizes, epochs: int, turns: Turns, scratch: Path) -> list[Row]:
    """All rows of states that are called ``label``."""
    n_layers = len(values.plan.layers)
    middle = n_layers // 2
    one, some = range(middle, middle + 1), range(min(sizes.prompt_layers, n_layers))
    rows = _codecs(values, label, sizes, turns)
    stores = {codec: scratch / f"{codec}.zarr" for codec in STORE_CODECS}
    for codec, path in stores.items():
        store.create(path, _plan(values, codec))
        _fill(path, map(values.given, range(values.plan.n_samples)))
    rows += _sizes(values, stores, label)
    for ask in (Ask("all", one), Ask("text", some)):
        rows += _warm(values, stores, f"{label}: shuffled {_say(ask, sizes)}", ask, sizes, epochs, turns, scratch)
    for ask, goal in ((Ask("text", some), "some"), (Ask("text", one), "one")):
        part = f"{label}: shuffled from disk, {_say(ask, sizes)}"
        rows += _cold(values, stores, part, ask, COLD_GOAL[goal], sizes, turns)
    for path in stores.values():
        shutil.rmtree(path)
    return rows + _writing(values, f"{label}: writing", sizes, turns, scratch)


def _say(ask: Ask, sizes: Sizes) -> str:
    tokens = {"all": "all tokens", "text": "prompts"}[ask.tokens]
    return f"{tokens} of {sizes.gathered} samples, {len(ask.layers)} layer{'s' if len(ask.layers) > 1 else ''}"


def _plan(values: Values, name: str) -> store.Plan:
    """With the codec for both kinds: text is raw by default, and a compressed store is to be all compressed."""
    return replace(values.plan, codec=name, text_codec=name)


def _fill(path: Path, given: Iterator[Mapping[str, Any]]) -> None:
    with store.Writer(path) as writer:
        for b in range(writer.plan.n_blocks):
            with writer.block(b) as block:
                for sample in block.samples:
                    block.add(sample, **next(given))


# Codecs.


class _Ours:
    """A codec of the store, as the codecs of others are measured."""

    size = staticmethod(len)

    def __init__(self, name: str, width: int):
        self.codec = codec_of(name, np.dtype(np.uint16), width, "bfloat16")

    def encode(self, rows_tw: np.ndarray) -> bytes:
        return self.codec.encode(rows_tw)

    def decode(self, encoded: bytes, out_tw: np.ndarray) -> None:
        self.codec.decode_into(encoded, out_tw, len(out_tw))


def _codecs(values: Values, label: str, sizes: Sizes, turns: Turns) -> list[Row]:
    """Size, speed on one core, and error of every codec on image states, a chunk a sample and layer."""
    chunks = _chunks(values, sizes.codec_bytes)
    made: dict[str, Callable[[], Any]] = {
        f"store, {name}": lambda name=name: _Ours(name, values.plan.width) for name in (*STORE_CODECS, *LOSSY)
    }
    encoded, codecs, missing = {}, {}, {}
    for name, make in (made | CODECS).items():
        try:
            codecs[name] = make()
        except Unavailable as why:
            missing[name] = str(why)
            continue
        encoded[name] = [codecs[name].encode(chunk) for chunk in chunks]
    outs = [np.empty_like(chunk) for chunk in chunks]
    raw, errors = sum(chunk.nbytes for chunk in chunks), {}

    def decode(name: str) -> None:
        for one, out in zip(encoded[name], outs, strict=True):
            codecs[name].decode(one, out)

    for name in codecs:
        decode(name)
        if name.removeprefix("store, ") in LOSSY:
            errors[name] = _errors(chunks, outs)
        elif not all(np.array_equal(out, chunk) for out, chunk in zip(outs, chunks, strict=True)):
            raise RuntimeError(f"{name} gives other bits than it was given")
    with _one_core():
        encoding = turns.take({name: lambda of=of: list(map(of.encode, chunks)) for name, of in codecs.items()})
        decoding = turns.take({name: lambda name=name: decode(name) for name in codecs})

    entropy = _entropy(chunks)
    bound, rows = f"order-0 bound, 16 / {entropy:.2f} bits", []
    part = f"{label}: codecs on {raw / 1e6:.0f} MB of image states"
    for name, codec in codecs.items():
        ratio = raw / sum(map(codec.size, encoded[name]))
        rows.append(figure_row(f"{part}, ratio", name, ratio, "×", bound, 16 / entropy, "more"))
    for what, seconds in (("encoding", encoding), ("decoding", decoding)):
        for name in codecs:
            rows.append(rate_row(f"{part}, {what} on one core", name, raw, seconds[name], BLOSC, seconds[BLOSC]))
    naive = _errors(chunks, [_int8_by_token(chunk) for chunk in chunks])
    for name, found in errors.items():
        for of, error in found.items():
            row = (f"{part}, error", f"{name}, {of}", 100 * error, "%", "int8, a scale a token", 100 * naive[of])
            rows.append(figure_row(*row, "less"))
    rows += [missing_row(f"{part}, ratio", name, bound, why) for name, why in missing.items()]
    return rows


def _chunks(values: Values, wanted: int) -> list[np.ndarray]:
    """Image states of single samples and layers ``[t, w]``, from all over, of about ``wanted`` bytes."""
    places = np.random.default_rng(0).permutation(values.plan.n_samples * len(values.plan.layers))
    chunks, size = [], 0
    for place in places:
        sample, layer = divmod(int(place), len(values.plan.layers))
        chunks.append(values.states("image", sample)[layer].copy())
        size += chunks[-1].nbytes
        if size >= wanted:
            break
    return chunks


def _entropy(chunks: Sequence[np.ndarray]) -> float:
    """Order-0 entropy of all values together, in bits: what no coder of single values beats."""
    counts = sum(np.bincount(chunk.reshape(-1), minlength=2**16) for chunk in chunks)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _int8_by_token(rows_tw: np.ndarray) -> np.ndarray:
    exact = bits.to_float32(rows_tw)
    scale = np.abs(exact).max(axis=1, keepdims=True) / 127
    return bits.from_float32(np.round(exact / scale) * scale)


def _errors(chunks: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> dict[str, float]:
    """Relative RMS error over all values, which massive channels rule, and of the median channel."""
    exact, found = (bits.to_float32(np.concatenate(ones)).astype(np.float64) for ones in (chunks, given))
    wrong_w, all_w = ((found - exact) ** 2).sum(axis=0), (exact**2).sum(axis=0)
    of_channels = float(np.median(np.sqrt(wrong_w / np.maximum(all_w, 1e-300))))
    return {"all values": float(np.sqrt(wrong_w.sum() / all_w.sum())), "the median channel": of_channels}


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread and those that it starts on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# Sizes.


def _sizes(values: Values, stores: Mapping[str, Path], label: str) -> list[Row]:
    rows = []
    raw = values.raw(Ask("all", range(len(values.plan.layers))))
    for codec, path in stores.items():
        usage = store.disk_usage(path)
        on_disk = sum(usage[name]["disk"] for name in values.plan.arrays)
        rows.append(size_row(f"{label}: on disk", f"arrays, {codec}", on_disk, "raw values", raw))
    return rows


# Batches.


def _warm(
    values: Values,
    stores: Mapping[str, Path],
    part: str,
    ask: Ask,
    sizes: Sizes,
    epochs: int,
    turns: Turns,
    scratch: Path,
) -> list[Row]:
    """Epochs of ``Store.batches`` over the same batches gathered by others, all in the page cache."""
    opened = {codec: store.open(path) for codec, path in stores.items()}
    order = [given.sample.numpy() for given in _shuffled(next(iter(opened.values())), ask, sizes, epochs)]
    plain = PaddedMap(values, ask, values.folder)
    contenders: dict[str, Callable[[], None]] = {}
    for codec, one in opened.items():
        for ids, given in zip(order, _shuffled(one, ask, sizes, epochs), strict=True):
            _check(given.states.view(torch.uint16).numpy(), plain.gather(ids), f"the store, {codec}")
        # Opened once, as the maps are: a training run goes through it epoch after epoch.
        batches = _shuffled(one, ask, sizes, epochs)
        contenders[f"store, {codec}"] = lambda batches=batches: _exhaust(batches)
    ways, missing = {}, {}

    def add(name: str, kind: type[Rival], folder: Path) -> None:
        try:
            kind.write(values, ask, folder)
            rival = kind(values, ask, folder)
        except Unavailable as why:
            missing[name] = str(why)
            return
        ways[name] = rival.fastest(order[0][:8])
        gather = rival.ways()[ways[name]]
        _check(gather(order[0]), plain.gather(order[0]), name)
        contenders[name] = lambda: _exhaust(torch.from_numpy(gather(ids)).view(torch.bfloat16) for ids in order)

    kept = scratch / "rivals"
    for kind in (*MAPS, *KEEPERS):
        folder = kept / kind.__name__
        folder.mkdir(parents=True)
        add(kind.name, kind, folder)
    readers = {codec: {f"{kind.name}, {codec} store": kind for kind in READERS} for codec in stores}
    for codec, path in stores.items():
        for name, kind in readers[codec].items():
            add(name, kind, path)

    seconds = turns.take(contenders)
    size = sum(values.raw(ask, ids) for ids in order)

    def row(name: str, baseline: str, goal: float | None = None, note: str = "") -> Row:
        return rate_row(part, name, size, seconds[name], baseline, seconds[baseline], goal=goal, note=note)

    def quickest(names: Sequence[str]) -> str:
        return min(names, key=lambda name: np.median(seconds[name]))

    fresh = quickest([kind.name for kind in MAPS[:2]])
    rows = []
    for codec in stores:
        name = f"store, {codec}"
        rows += [row(name, baseline, WARM_GOAL[codec]) for baseline in (fresh, rivals.ReusedMap.name)]
        if general := [reader for reader in readers[codec] if reader in seconds]:
            best = quickest(general)
            rows.append(row(name, best, PIPELINE_GOAL, ways[best]))
        else:
            rows.append(missing_row(part, name, "the best general Zarr pipeline", "none reads it"))
    rows += [row(name, fresh, note=ways[name]) for name in seconds if name in ways and name != fresh]
    rows += [missing_row(part, name, fresh, why) for name, why in missing.items()]
    shutil.rmtree(kept)
    return rows


def _shuffled(opened: store.Store, ask: Ask, sizes: Sizes, epochs: int) -> Iterator[store.Batch]:
    layers = [opened.layers[layer] for layer in ask.layers]
    return opened.batches(layers, ask.tokens, sizes.gathered, shuffle=True, seed=0, epochs=epochs, drop_last=True)


def _exhaust(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def _check(given_bltw: np.ndarray, expected_bltw: np.ndarray, name: str) -> None:
    if not np.array_equal(given_bltw, expected_bltw):
        raise RuntimeError(f"{name} gives other bits than a memory map")


def _cold(
    values: Values, stores: Mapping[str, Path], part: str, ask: Ask, goal: float, sizes: Sizes, turns: Turns
) -> list[Row]:
    """One epoch with nothing in the page cache; files are opened, and what opening reads is forgotten, before."""
    order = [given.sample.numpy() for given in _shuffled(store.open(stores["none"]), ask, sizes, 1)]
    values.let_go()

    def ours(path: Path) -> float:
        opened = store.open(path)
        return _from_disk(_files(path), lambda: _exhaust(_shuffled(opened, ask, sizes, 1)))

    def theirs(kind: type[Rival], folder: Path, way: str) -> float:
        gather = kind(values, ask, folder).ways()[way]
        return _from_disk(_files(folder), lambda: [gather(ids) for ids in order])

    contenders = {f"store, {codec}": lambda path=path: ours(path) for codec, path in stores.items()}
    ways, missing = {}, {}
    for kind, folder in ((PaddedMap, values.folder), *((kind, stores["none"]) for kind in READERS)):
        name = kind.name if kind is PaddedMap else f"{kind.name}, none store"
        try:
            way = kind(values, ask, folder).fastest(order[0][:8])
        except Unavailable as why:
            missing[name] = str(why)
            continue
        ways[name] = way
        contenders[name] = lambda kind=kind, folder=folder, way=way: theirs(kind, folder, way)
    try:
        seconds = turns.take(contenders)
    except StillWarm as why:
        return [missing_row(part, name, PaddedMap.name, str(why)) for name in (*contenders, *missing)]
    size = sum(values.raw(ask, ids) for ids in order)
    rows = []
    for name in seconds:
        if name != PaddedMap.name:
            promised = goal if name == "store, none" else None
            base = PaddedMap.name, seconds[PaddedMap.name]
            rows.append(rate_row(part, name, size, seconds[name], *base, goal=promised, note=ways.get(name, "")))
    return rows + [missing_row(part, name, PaddedMap.name, why) for name, why in missing.items()]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _from_disk(paths: Sequence[Path], work: Callable[[], object]) -> float:
    drop_from_memory(paths)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Writing.


def _writing(values: Values, part: str, sizes: Sizes, turns: Turns, scratch: Path) -> list[Row]:
    """The same samples, from memory, durable when the clock stops; then verification of what was written."""
    everything = Ask("all", range(len(values.plan.layers)))
    wanted = np.cumsum([values.raw(everything, slice(n, n + 1)) for n in range(values.plan.n_samples)])
    head = values.head(1 + int(np.searchsorted(wanted[:-1], sizes.written_bytes)))
    given = [head.given(sample) for sample in range(head.plan.n_samples)]
    plain_file, folder = scratch / "written.bin", scratch / "written"

    def write_plain() -> float:
        plain_file.unlink(missing_ok=True)
        began = time.perf_counter()
        with plain_file.open("wb", buffering=0) as file:
            for one in given:
                for kind in head.counts:
                    rest = one[kind].reshape(-1).view(np.uint8).data
                    while rest:
                        rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def write_store(codec: str) -> float:
        path = scratch / f"written-{codec}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        store.create(path, _plan(head, codec))
        began = time.perf_counter()
        _fill(path, iter(given))
        return time.perf_counter() - began

    def write_theirs(kind: type[Rival]) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        began = time.perf_counter()
        kind.write(head, everything, folder)
        return time.perf_counter() - began

    baseline = "one plain file, fsync"
    contenders = {baseline: write_plain}
    contenders |= {f"store, {codec}": lambda codec=codec: write_store(codec) for codec in STORE_CODECS}
    missing = {}
    for kind in (HDF5, rivals.ZarrItself, rivals.ZarrRaw):
        try:
            write_theirs(kind)
            contenders[kind.name] = lambda kind=kind: write_theirs(kind)
        except Unavailable as why:
            missing[kind.name] = str(why)
    seconds = Turns(min(turns.repeats, 3), turns.least_seconds).take(contenders)
    raw, rows = head.raw(everything), []
    for name in list(contenders)[1:]:
        goal = WRITE_GOAL if name == "store, none" else None
        rows.append(rate_row(part, name, raw, seconds[name], baseline, seconds[baseline], goal=goal))
    rows += [missing_row(part, name, baseline, why) for name, why in missing.items()]

    written = scratch / "written-zstd.zarr"
    checksums, paths = "CRC-32C of its files", _files(written)
    seconds = turns.take({checksums: lambda: [_checksum(path) for path in paths], "verify": lambda: _verify(written)})
    size = sum(path.stat().st_size for path in paths)
    rows.append(rate_row(f"{part}, verification", "verify", size, seconds["verify"], checksums, seconds[checksums]))
    for path in (folder, *(scratch / f"written-{codec}.zarr" for codec in STORE_CODECS)):
        shutil.rmtree(path)
    plain_file.unlink()
    return rows


def _verify(path: Path) -> None:
    report = store.verify(path)
    if not report.ok:
        raise RuntimeError(f"the store that is measured is not whole: {report.problems[:3]}")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(2**20):
            checksum = google_crc32c.extend(checksum, data)
    return checksum


def memory(values: Values, label: str, scratch: Path) -> list[Row]:
    """Peak memory of a process that writes the first block, one sample in its hands, over the block's raw values."""
    block = values.plan.block(0)
    raw = values.raw(Ask("all", range(len(values.plan.layers))), slice(block.start, block.stop))
    part, rows = f"{label}: memory of a process that writes a block of {len(block)}", []
    for codec in STORE_CODECS:
        path = scratch / "peak.zarr"
        # A process of its own, and not a fork: what this one has touched would count.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peak = process.submit(peak_of_writing, path, _plan(values, codec)).result()
        row = part, f"store, {codec}, peak over what it began with"
        baseline = "the block's raw values"
        rows.append(
            missing_row(*row, baseline, "no /proc here") if peak is None else size_row(*row, peak, baseline, raw)
        )
        shutil.rmtree(path)
    return rows


# Opening.


def opening(sizes: Sizes, turns: Turns, scratch: Path) -> list[Row]:
    """Opening a store of the size of the whole study, with its records and result tables but none of its states."""
    n, n_layers = sizes.opened_samples, sizes.opened_layers
    layers = ("embed", *map(str, range(n_layers - 1)))
    plan = synthetic_plan(n, image=(210, 250), text=(24, 40), width=3584, layers=layers, samples_per_block=64)
    path = scratch / "large.zarr"
    store.create(path, plan)
    n_files = len(_files(path)) + _commit_everything(path, plan)
    part, baseline = f"opening {n:,} samples × {n_layers} layers", "xarray.open_zarr, hidden"

    def samples() -> None:
        table = store.open(path).samples
        if not (table.height == n and table["valid"].all() and table["vlm_x1"].null_count() == 0):
            raise RuntimeError("the large store that is opened lacks samples")

    contenders = {
        baseline: lambda: xr.open_zarr(path, group="hidden"),
        "store.open": lambda: store.open(path),
        "store.open, .samples": samples,
        "store.open, .hidden": lambda: store.open(path).hidden,
    }
    seconds = turns.take(contenders)
    shutil.rmtree(path)
    rows = [time_row(part, name, seconds[name], baseline, seconds[baseline]) for name in list(contenders)[1:]]
    return [*rows, figure_row(part, "files of the full store", n_files, "", "a file a sample", n, "less")]


def _commit_everything(path: Path, plan: store.Plan) -> int:
    """Write the records of all blocks and their tables of results; how many files the store would have besides."""
    lines, n_files = [], 1
    for b in range(plan.n_blocks):
        block = plan.block(b)
        results = path / table_file("results", b)
        results.parent.mkdir(parents=True, exist_ok=True)
        boxes = {name: [float(sample) for sample in block] for name in ("vlm_x1", "vlm_y1", "vlm_x2", "vlm_y2")}
        pl.DataFrame({"sample": list(block), **boxes}).write_parquet(results)
        shards = {
            array.shard_file(shard)
            for array in plan.arrays.values()
            for shard in range(block.start // array.shard[0], -(-block.stop // array.shard[0]))
        }
        named = sorted({*shards, table_file("results", b), table_file("tokens", b)})
        lines.append(Commit(b, {name: (results.stat().st_size, "00000000") for name in named}, {}).line())
        n_files += len(named)
    log = path / FOLDER / "0.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"".join(lines))
    return n_files
