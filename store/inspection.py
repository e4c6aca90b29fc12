"""What a store holds, for people: shapes, norms and one sample (``inspect``), bytes by array and layer (``du``)."""

import os
from typing import Any

import numpy as np
import polars as pl

from store import bits
from store.errors import Refusal
from store.layout import format_version, read_derived
from store.places import RECORD, Place, locate
from store.plan import Plan
from store.reader import Store, open_store
from store.shards import index_bytes

ROWS = 32
"""Samples that norms and massive dimensions are taken from."""

MASSIVE = 50.0
"""A dimension is called massive if its root mean square is this many times that of the median dimension."""

MOST_MASSIVE = 4
"""Massive dimensions that are shown of a layer."""


def describe(path: str | os.PathLike | Place, sample: int | None = None) -> dict[str, Any]:
    """Shapes, layers, norms and massive dimensions by layer, and one sample with its tokens, JSON-able.

    Parameters
    ----------
    path
        A store.
    sample
        Row of the samples table to show; the first valid one if not given.
    """
    store = open_store(path)
    there = np.flatnonzero(store.valid)
    if sample is None and there.size:
        sample = int(there[0])
    if sample is not None and not 0 <= sample < store.plan.n_samples:
        raise Refusal(f"sample {sample} is not in {store.place}: it has {store.plan.n_samples}")
    return {
        "path": str(store.place),
        "format_version": format_version(store.place),
        "identity": dict(store.identity),
        "identity_hash": store.plan.identity_hash,
        "samples": int(store.valid.sum()),
        "planned": store.plan.n_samples,
        "generations": list(store.plan.generations or (store.plan.n_samples,)),
        "blocks": sum(map(len, store.commits)),
        "planned_blocks": sum(part.n_blocks for part in store.parts),
        "layers": list(store.layers),
        "arrays": {
            name: {
                "dims": list(array.dims),
                "shape": list(array.shape),
                "layers": list(array.layers),
                "inner_chunk": list(array.inner),
                "shard": list(array.shard),
                "dtype": array.bits,
                "codec": array.codec,
            }
            for part in store.parts
            for name, array in part.arrays.items()
        },
        "derived": {
            one.name: {"dims": list(one.dims), "shape": list(one.shape), "dtype": one.dtype, **one.attributes}
            for one in read_derived(store.place)
        },
        **_statistics(store),
        "sample": None if sample is None else _one(store, sample),
    }


def _statistics(store: Store) -> dict[str, Any]:
    """By layer and kind of token: the mean L2 norm of a state, and the massive dimensions."""
    norms: dict[str, dict[str, float]] = {layer: {} for layer in store.layers}
    massive: dict[str, dict[str, list[dict[str, float]]]] = {layer: {} for layer in store.layers}
    for part in store.parts:
        there = np.flatnonzero(store.valid_in(part.part))
        samples = there[np.linspace(0, there.size - 1, min(ROWS, there.size)).astype(int)]
        for kind in part.kinds if samples.size and part.layers else ():
            for index, layer in enumerate(part.layers):
                values = _real(store, part, kind, samples, index)
                norms[layer][kind] = float(np.linalg.norm(values, axis=-1).mean())
                rms = np.sqrt(np.square(values).mean(axis=0))
                ratio = rms / max(float(np.median(rms)), np.finfo(np.float32).tiny)
                most = np.argsort(-ratio, kind="stable")[:MOST_MASSIVE]
                massive[layer][kind] = [{"dim": int(d), "ratio": float(ratio[d])} for d in most if ratio[d] >= MASSIVE]
    return {"norms": norms, "massive": massive}


def _real(store: Store, part: Plan, kind: str, samples: np.ndarray, layer: int) -> np.ndarray:
    """The real tokens' states of some samples at one layer, float32 ``[n, w]``."""
    name = f"{part.group('hidden')}/{kind}"
    counts, array = part.counts(name)["token"][samples], part.arrays[name]
    out = np.zeros((len(samples), 1, int(counts.max()), part.width), array.dtype)
    store.reader(name).read_into(out, samples, [layer])
    return bits.to_float32(out[:, 0][np.arange(out.shape[2]) < counts[:, None]])


def _one(store: Store, sample: int) -> dict[str, Any]:
    tokens = store.tokens.filter(pl.col("sample") == sample).collect()
    return {"row": sample, **store.samples.row(sample, named=True), "tokens": tokens.to_dicts()}


def disk_usage(path: str | os.PathLike | Place, by_layer: bool = False) -> dict[str, dict[str, Any]]:
    """Bytes of the committed values and their bytes on disk, by array and in total; tables count as they are.

    Parameters
    ----------
    path
        A store.
    by_layer
        Also the bytes of every layer of an array, from the indices of its shards (``layers``).
    """
    store = open_store(path)
    usage: dict[str, dict[str, Any]] = {}
    share = {
        name: size for part in store.commits for commit in part.values() for name, (size, _) in commit.files.items()
    }
    for part in store.parts:
        kept = part.bytes_raw(store.valid_in(part.part))
        for name, array in part.arrays.items():
            files = {file: size for file, size in share.items() if file.startswith(f"{name}/c/")}
            usage[name] = {"raw": kept[name], "disk": sum(files.values())}
            if by_layer:
                lengths = store.reader(name).bytes_by_layer(sorted(files))
                usage[name]["layers"] = dict(zip(array.layers, lengths.tolist(), strict=True))
                usage[name]["index"] = len(files) * index_bytes(array)
    for name in ("tokens", "results"):
        size = sum(n for file, n in share.items() if file.startswith(f"{RECORD}/{name}/"))
        usage[name] = {"raw": size, "disk": size}
    for one in read_derived(store.place):
        raw = int(np.prod(one.shape)) * np.dtype(one.dtype).itemsize
        usage[f"derived/{one.name}"] = {"raw": raw, "disk": sum(size for size, _ in one.files.values())}
    everything = locate(path).sizes()
    usage["total"] = {key: sum(part[key] for part in usage.values()) for key in ("raw", "disk")}
    usage["total"] |= {"disk": sum(everything.values()), "files": len(everything)}
    for part in usage.values():
        part["ratio"] = round(part["raw"] / part["disk"], 3) if part["disk"] else 1.0
    return usage
