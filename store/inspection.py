"""What a store holds, for people: shapes, norms and one sample (``inspect``), bytes by array (``du``)."""

import os
from typing import Any

import numpy as np
import polars as pl

from store import bits, files
from store.errors import Refusal
from store.reader import Store, open_store

ROWS = 32
"""Samples that the norms are taken from."""


def describe(path: str | os.PathLike, sample: int | None = None) -> dict[str, Any]:
    """Shapes, layers, norms per layer and one sample with its tokens, JSON-able.

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
        raise Refusal(f"sample {sample} is not in {store.path}: it has {store.plan.n_samples}")
    return {
        "path": str(store.path),
        "format_version": store.attrs["format_version"],
        "identity": dict(store.identity),
        "identity_hash": store.plan.identity_hash,
        "samples": int(store.valid.sum()),
        "planned": store.plan.n_samples,
        "blocks": len(store.commits),
        "planned_blocks": store.plan.n_blocks,
        "layers": list(store.layers),
        "arrays": {
            name: {
                "dims": list(array.dims),
                "shape": list(array.shape),
                "inner_chunk": list(array.inner),
                "shard": list(array.shard),
                "dtype": array.bits,
                "codec": array.codec,
            }
            for name, array in store.plan.arrays.items()
        },
        "norms": _norms(store, there[np.linspace(0, there.size - 1, min(ROWS, there.size)).astype(int)]),
        "sample": None if sample is None else _one(store, sample),
    }


def _norms(store: Store, samples: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean L2 norm of a token's state by layer and array."""
    norms: dict[str, dict[str, float]] = {layer: {} for layer in store.layers}
    for kind in store.plan.kinds if samples.size else ():
        array = store.plan.arrays[f"hidden/{kind}"]
        counts = store.plan.counts(array.name)["token"][samples]
        real = np.arange(array.unit[0]) < counts[:, None]
        for index, layer in enumerate(store.layers):
            out = np.zeros((len(samples), 1, *array.unit), array.dtype)
            store.reader(array.name).read_into(out, samples, [index])
            norms[layer][kind] = float(np.linalg.norm(bits.to_float32(out[:, 0]), axis=-1)[real].mean())
    return norms


def _one(store: Store, sample: int) -> dict[str, Any]:
    tokens = store.tokens.filter(pl.col("sample") == sample).collect()
    return {"row": sample, **store.samples.row(sample, named=True), "tokens": tokens.to_dicts()}


def disk_usage(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Bytes of the committed values and their bytes on disk, by array and in total; tables count as they are."""
    store = open_store(path)
    usage: dict[str, dict[str, float]] = {}
    share = {name: size for commit in store.commits.values() for name, (size, _) in commit.files.items()}
    kept = store.plan.bytes_raw(store.valid)
    for name in store.plan.arrays:
        usage[name] = {"raw": kept[name], "disk": sum(n for file, n in share.items() if file.startswith(f"{name}/"))}
    for name in ("tokens", "results"):
        size = sum(n for file, n in share.items() if file.startswith(f"{files.RECORD}/{name}/"))
        usage[name] = {"raw": size, "disk": size}
    usage["total"] = {key: sum(part[key] for part in usage.values()) for key in ("raw", "disk")}
    usage["total"]["disk"] = files.size_on_disk(store.path)
    for part in usage.values():
        part["ratio"] = round(part["raw"] / part["disk"], 3) if part["disk"] else 1.0
    return usage
