"""Is a store whole? Coverage, sizes, checksums, indices and values; and a hash of what it holds."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr

from store import bits, commits, files
from store.errors import Refusal
from store.layout import load_plan, table_file
from store.plan import ArrayPlan, Plan, canonical_json, rows_as_bytes
from store.reader import Store
from store.shards import DamagedShard, ShardReader, decode_index, index_bytes


@dataclass(frozen=True)
class Report:
    """What ``verify`` found."""

    ok: bool
    """Every planned block is committed and nothing is wrong."""
    samples: int
    """Samples with states."""
    planned: int
    """Samples of the plan."""
    set_aside: int
    """Samples that could not be read, by their commit."""
    blocks: int
    """Committed blocks."""
    planned_blocks: int
    identity_hash: str
    content_hash: str
    """sha256 of the committed values and tables: one for any order of work, number of workers, interruptions,
    codec and block size."""
    damaged_blocks: list[int] = field(default_factory=list)
    """Committed blocks that are not as they were committed."""
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(path: str | os.PathLike) -> Report:
    """Read the whole store at ``path`` and compare it with its plan and its commits.

    Raises
    ------
    Refusal
        When ``path`` is no store. Damage is reported, not raised.
    """
    folder = files.locate(path)
    try:
        plan = load_plan(folder)
    except Refusal:
        raise
    except Exception as failure:
        problem = f"the plan or the samples table does not read: {failure}"
        return Report(False, 0, 0, 0, 0, 0, "", "", problems=[problem])
    store = Store(folder)
    problems = list(_layout_problems(folder, plan)) + commits.read(folder)[1]
    missing = [b for b in range(plan.n_blocks) if b not in store.commits]
    if missing:
        shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
        problems.append(
            f"{len(missing)} of {plan.n_blocks} blocks are not committed: {shown}; run the same command again"
        )
    content = hashlib.sha256(canonical_json([plan.layers, plan.width, plan.dtype]).encode())
    readers = {name: ShardReader(folder, array, plan.rows(name)) for name, array in plan.arrays.items()}
    damaged = []
    for b in sorted(store.commits):
        found = list(_file_problems(folder, plan, store.commits[b], store.valid))
        found += _value_problems(plan, plan.block(b), store.valid, readers, content) if not found else []
        problems += [f"block {b}: {problem}" for problem in found]
        damaged += [b] if found else []
    if not damaged:
        _hash_tables(store, content)
    return Report(
        ok=not problems,
        samples=int(store.valid.sum()),
        planned=plan.n_samples,
        set_aside=sum(len(commit.set_aside) for commit in store.commits.values()),
        blocks=len(store.commits),
        planned_blocks=plan.n_blocks,
        identity_hash=plan.identity_hash,
        content_hash=content.hexdigest(),
        damaged_blocks=damaged,
        problems=problems,
    )


def _layout_problems(folder: Path, plan: Plan) -> Iterator[str]:
    """Differences between the Zarr metadata and tables written at the start and the plan."""
    # Each array's own metadata, and the copy in the root that stock readers look at first.
    for consolidated in (False, True):
        try:
            root = zarr.open_group(folder, mode="r", use_consolidated=consolidated)
            for key, value in (("identity_hash", plan.identity_hash), ("plan_hash", plan.plan_hash)):
                if root.attrs.get(key) != value:
                    yield f"the root's {key} is {root.attrs.get(key)} and the plan's is {value}: they changed"
            for name, array in plan.arrays.items():
                yield from _array_problems(root, name, array, plan)
        except Exception as failure:
            yield f"the Zarr metadata does not read: {failure}"


def _array_problems(root: zarr.Group, name: str, array: ArrayPlan, plan: Plan) -> Iterator[str]:
    there = root[name]
    for key, value in (
        ("shape", array.shape),
        ("chunks", array.inner),
        ("shards", array.shard),
        ("dtype", array.dtype),
    ):
        if getattr(there, key) != value:
            yield f"{name}/zarr.json has {key} {getattr(there, key)} and the plan {value}"
    group = name.split("/")[0]
    for dim, values in (("sample", plan.samples["sample_id"].to_list()), ("layer", list(array.layers))):
        if root[f"{group}/{dim}"][:].tolist() != values:
            yield f"the coordinate {group}/{dim} is not the plan's"


def _expected_files(plan: Plan, block: int, samples: range, valid: np.ndarray) -> set[str]:
    there = [n for n in samples if valid[n]]
    shards = {array.shard_file(n // array.shard[0]) for array in plan.arrays.values() for n in there}
    return shards | ({table_file("tokens", block), table_file("results", block)} if there else set())


def _file_problems(folder: Path, plan: Plan, commit: commits.Commit, valid: np.ndarray) -> Iterator[str]:
    expected = _expected_files(plan, commit.block, plan.block(commit.block), valid)
    for name in sorted(expected ^ set(commit.files)):
        yield f"{name} {'is not in its commit' if name in expected else 'should not be in its commit'}"
    for name, (size, checksum) in commit.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is gone"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes and was committed with {size}"
        elif (now := files.checksum_of(path)) != checksum:
            yield f"{name} has checksum {now} and was committed with {checksum}: it was changed"


def _value_problems(
    plan: Plan, samples: range, valid: np.ndarray, readers: dict[str, ShardReader], content: Any
) -> Iterator[str]:
    """Check indices and values, and feed the values to ``content``, sample by sample."""
    for name, array in plan.arrays.items():
        yield from _index_problems(readers[name], array, samples, valid)
    for sample in samples:
        content.update(b"+" if valid[sample] else b"-")
        for name, array in plan.arrays.items() if valid[sample] else ():
            whole = np.full((1, len(array.layers), *array.unit), array.fill, array.dtype)
            try:
                readers[name].read_into(whole, [sample], range(len(array.layers)))
            except (DamagedShard, OSError) as damage:
                yield str(damage)
                continue
            counts = plan.counts(name)
            real = tuple(slice(int(counts[dim][sample])) if dim in counts else slice(None) for dim in array.dims[2:])
            values = np.ascontiguousarray(whole[0][(slice(None), *real)])
            content.update(hashlib.blake2b(values.data).digest())
            for layer, values_r in zip(array.layers, values, strict=True):
                if not bits.is_finite(values_r):
                    yield f"{name} of sample {sample} at layer {layer!r} is not finite"
                if name.startswith("hidden/") and bits.has_zero_row(values_r):
                    yield f"{name} of sample {sample} at layer {layer!r} has a state that is zero throughout"


def _index_problems(reader: ShardReader, array: ArrayPlan, samples: range, valid: np.ndarray) -> Iterator[str]:
    for shard in sorted({n // array.shard[0] for n in samples}):
        members = range(max(samples.start, shard * array.shard[0]), min(samples.stop, (shard + 1) * array.shard[0]))
        if not valid[members.start : members.stop].any():
            continue
        path = reader.folder / array.shard_file(shard)
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - index_bytes(array)))
            try:
                runs = decode_index(array, file.read(), size)
            except DamagedShard as damage:
                yield f"{array.shard_file(shard)}: {damage}"
                continue
        for sample in members:
            lengths = runs[sample % array.shard[0], :, 1]
            whole = -(-int(reader.rows[sample]) // array.inner[2]) * array.chunk_bytes
            fits = (lengths == whole).all() if array.codec == "none" else (lengths > 0).all()
            if not (fits if valid[sample] else (lengths == 0).all()):
                yield f"{array.shard_file(shard)}: its index does not hold what sample {sample} should have"


def _hash_tables(store: Store, content: Any) -> None:
    samples = store.samples.drop("set_aside")  # why a sample failed may name a place or a time
    for table in (samples.select(sorted(samples.columns)), *map(pl.read_parquet, store.table_files("tokens"))):
        content.update(rows_as_bytes(table.select(sorted(table.columns))))
