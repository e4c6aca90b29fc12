"""A store's size, writing, shuffled batches and verification, over plain files and a memory map of the same values.

Shape suffixes: ``s`` sample, ``l`` layer, ``r`` row of a unit (token or query).
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import store
from bench.config import Sizes
from bench.measure import Row, Turns, rate_row, size_row
from store import files
from store.synthetic import synthetic_plan, synthetic_store

KEYWORDS = {"hidden/image": "image", "hidden/text": "text"}
KEYWORDS |= {f"attention/{name}": name for name in ("text_to_image", "text_to_text")}


def make_up(path: Path, sizes: Sizes) -> Path:
    """A store of random states as wide as a 7B model's: their mantissas are noise, as a model's are."""
    plan = synthetic_plan(
        sizes.made_samples,
        image=(100, 160),
        text=(20, 44),
        width=sizes.made_width,
        layers=tuple(map(str, range(sizes.made_layers))),
        samples_per_block=64,
    )
    return synthetic_store(path, plan)


def measure(path: Path, label: str, sizes: Sizes, turns: Turns, scratch: Path) -> list[Row]:
    """All rows of one store, called ``label``."""
    part, opened = f"store: {label}", store.open(path)
    usage = store.disk_usage(path)
    arrays = [usage[name] for name in opened.plan.arrays]
    on_disk, raw = (sum(array[key] for array in arrays) for key in ("disk", "raw"))
    rows = [size_row(part, "arrays on disk", on_disk, "raw values", raw)]
    rows += _writing(opened, part, raw, turns, scratch)
    middle = opened.layers[len(opened.layers) // 2]
    for kind, layers in (("text", [middle]), ("text", list(opened.layers)), ("image", [middle])):
        rows += _batches(opened, part, kind, layers, sizes, turns, scratch / "plain")
    paths = [file for file in path.rglob("*") if file.is_file()]
    checksums = "CRC-32C of its files"
    contenders = {checksums: lambda: [files.checksum_of(file) for file in paths], "verify": lambda: _verify(path)}
    seconds = turns.take(contenders)
    return [*rows, rate_row(part, "verify", on_disk, seconds["verify"], checksums, seconds[checksums])]


def _verify(path: Path) -> None:
    report = store.verify(path)
    if not report.ok:
        raise RuntimeError(f"the store that is measured is not whole: {report.problems[:3]}")


def _read_back(opened: store.Store) -> list[dict[str, Any]]:
    """Every sample as ``Block.add`` takes it."""
    plan = opened.plan
    tables = opened.tokens.collect().sort("sample", "position").partition_by("sample", maintain_order=True)
    given: list[dict[str, Any]] = [{"tokens": table.drop("sample")} for table in tables]
    for name, array in plan.arrays.items():
        whole = np.zeros((plan.n_samples, *array.shard[1:]), array.dtype)
        opened.reader(name).read_into(whole, range(plan.n_samples), range(len(array.layers)))
        counts = plan.counts(name)
        for sample in range(plan.n_samples):
            real = [slice(int(counts[dim][sample])) if dim in counts else slice(None) for dim in array.dims[1:]]
            given[sample][KEYWORDS[name]] = np.ascontiguousarray(whole[sample][tuple(real)])
    return given


def _writing(opened: store.Store, part: str, raw: int, turns: Turns, scratch: Path) -> list[Row]:
    plan, target, plain_file = opened.plan, scratch / "written.zarr", scratch / "written.bin"
    given = _read_back(opened)

    def write() -> float:
        shutil.rmtree(target, ignore_errors=True)
        store.create(target, plan)
        began = time.perf_counter()
        with store.Writer(target) as writer:
            for b in range(plan.n_blocks):
                with writer.block(b) as block:
                    for sample in block.samples:
                        block.add(sample, **given[sample])
        return time.perf_counter() - began

    def write_plain() -> float:
        plain_file.unlink(missing_ok=True)
        began = time.perf_counter()
        with plain_file.open("wb", buffering=0) as file:
            for one in given:
                for name in KEYWORDS.values():
                    if name in one:
                        files.write_all(file.fileno(), one[name].reshape(-1).view(np.uint8).data)
            os.fsync(file.fileno())
        return time.perf_counter() - began

    name, baseline = "write, durable", "one plain file, fsync"
    seconds = turns.take({baseline: write_plain, name: write})
    shutil.rmtree(target)
    plain_file.unlink()
    return [rate_row(part, name, raw, seconds[name], baseline, seconds[baseline])]


def _batches(
    opened: store.Store, part: str, kind: str, layers: Sequence[str], sizes: Sizes, turns: Turns, plain_file: Path
) -> list[Row]:
    """Epochs of ``Store.batches`` over the same batches gathered from a warm memory map."""
    array, counts = opened.plan.arrays[f"hidden/{kind}"], opened.plan.counts(f"hidden/{kind}")["token"]
    plain_slrw = np.memmap(plain_file, array.dtype, "w+", shape=(opened.plan.n_samples, *array.shard[1:]))
    for b in range(opened.plan.n_blocks):
        block = opened.plan.block(b)
        opened.reader(array.name).read_into(plain_slrw[block.start : block.stop], block, range(len(array.layers)))
    first = opened.layers.index(layers[0])
    chosen = slice(first, first + len(layers))

    def from_store():
        return opened.batches(layers, kind, sizes.batch, shuffle=True, seed=0, epochs=sizes.epochs)

    order = [given.sample.numpy() for given in from_store()]

    def from_map():
        for ids in order:
            out = np.zeros((len(ids), len(layers), counts[ids].max(), opened.plan.width), array.dtype)
            for place, sample in enumerate(ids):
                out[place, :, : counts[sample]] = plain_slrw[sample, chosen, : counts[sample]]
            yield torch.from_numpy(out).view(torch.bfloat16)

    def exhaust(batches) -> None:
        for _ in batches():
            pass

    for given, plain in zip(from_store(), from_map(), strict=True):
        if not torch.equal(given.states.view(torch.uint16), plain.view(torch.uint16)):
            raise RuntimeError(f"{array.name} of {opened.path} and its memory map differ")
    name = f"shuffled {kind}, {len(layers)} layer{'s' if len(layers) > 1 else ''}"
    baseline = "warm memory map"
    seconds = turns.take({baseline: lambda: exhaust(from_map), name: lambda: exhaust(from_store)})
    size = int(sum(counts[ids].sum() for ids in order)) * len(layers) * array.row_bytes
    plain_file.unlink()
    return [rate_row(part, name, size, seconds[name], baseline, seconds[baseline])]
