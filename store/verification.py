"""Is a store whole? Coverage, sizes, checksums, indices and values; and a hash of what it holds."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import zarr

from store import bits, runs
from store.commits import Commit
from store.errors import Refusal
from store.layout import (
    DERIVED_RECORDS,
    FORMAT_1,
    LAYOUT_FILE,
    METADATA,
    PLAN_FILE,
    Derived,
    checksums,
    derived_members,
    format_version,
    metadata,
    read_derived,
    read_plan,
    sample_labels,
    table_file,
    twin,
)
from store.places import Place, crc32c_of, locate
from store.plan import ArrayPlan, Plan, canonical_json, depth, hash_parts, rows_as_bytes
from store.reader import Store
from store.sealing import Unsealed, unseal
from store.shards import DamagedShard, decode_index, index_bytes

THREADS = 4
"""Blocks that are checked at a time."""


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
    """Committed blocks, of all parts."""
    planned_blocks: int
    identity_hash: str
    content_hash: str
    """sha256 of the committed values and tables: one for any order of work, number of workers, interruptions,
    codec, block size, and for a store made at once or grown."""
    damaged_blocks: list[tuple[int, int]] = field(default_factory=list)
    """Committed blocks that are not as they were committed, as (part, block)."""
    damaged_derived: list[str] = field(default_factory=list)
    """Derived arrays that are not as they were added."""
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(path: str | os.PathLike | Place) -> Report:
    """Read the whole store at ``path`` and compare it with its plan and its commits.

    Raises
    ------
    Refusal
        When ``path`` is no store. Damage is reported, not raised.
    """
    place = locate(path)
    if not place.exists(PLAN_FILE) and not place.exists(twin(PLAN_FILE)):
        read_plan(place)  # says what it is not
    problems = list(_record_problems(place))
    try:
        store = Store(place)
    except (Refusal, ValueError, KeyError, TypeError) as failure:
        return Report(False, 0, 0, 0, 0, 0, "", "", problems=problems or [str(failure)])
    plan = store.plan
    problems += [*_layout_problems(store), *store.log_problems]
    content = hashlib.sha256(canonical_json([plan.width, plan.dtype]).encode())
    damaged, digests = [], {}
    for part in store.parts:
        missing = [b for b in range(part.n_blocks) if part.arrays and b not in store.commits[part.part]]
        if missing:
            shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
            named = f"{part.n_blocks} blocks" + (f" of the added layers {', '.join(part.layers)}" if part.part else "")
            problems.append(f"{len(missing)} of {named} are not committed: {shown}; run the same command again")
        committed = store.commits[part.part]
        check = partial(_check_block, store, part, store.valid_in(part.part))
        with ThreadPoolExecutor(THREADS, "verify") as pool:
            for b, (found, of_samples) in zip(committed, pool.map(check, committed.values()), strict=True):
                named = f"block {b}" + (f" of part {part.part}" if part.part else "")
                problems += [f"{named}: {problem}" for problem in found]
                damaged += [(part.part, b)] if found else []
                for sample, found_digests in of_samples.items():
                    digests.setdefault(sample, {}).update(found_digests)
    for sample in sorted(digests):
        content.update(b"+" if store.valid[sample] else b"-")
        for (name, layer), digest in sorted(digests[sample].items(), key=lambda item: (item[0][0], depth(item[0][1]))):
            content.update(f"{name} {layer}".encode() + digest)
    if not damaged:
        _hash_tables(store, content)
    problems += [f"{name} is damaged: a note of a run, `repair` removes it" for name in runs.damaged(place)]
    lost, found = [], list(_derived_problems(place))
    for name, problem in found:
        lost += [] if name in lost else [name]
        problems.append(f"derived {name}: {problem}")
    return Report(
        ok=not problems,
        samples=int(store.valid.sum()),
        planned=plan.n_samples,
        set_aside=sum(len(commit.set_aside) for commit in store.commits[0].values()),
        blocks=sum(map(len, store.commits)),
        planned_blocks=sum(part.n_blocks for part in store.parts),
        identity_hash=plan.identity_hash,
        content_hash=content.hexdigest(),
        damaged_blocks=damaged,
        damaged_derived=lost,
        problems=problems,
    )


def _record_problems(place: Place) -> Iterator[str]:
    """The plan and the tables of planned samples, and their twins."""
    names = [PLAN_FILE]
    try:
        stored = read_plan(place)
        if stored["format_version"] == 1:
            return
        names += [stored[key] for key in FORMAT_1]
    except Refusal as refusal:
        yield str(refusal)
    for name in names:
        copies = {}
        for path in (name, twin(name)):
            try:
                copies[path] = place.read(path)
            except FileNotFoundError:
                yield f"{path} is not there"
                continue
            if name != PLAN_FILE and hashlib.sha256(copies[path]).hexdigest()[:16] not in name:
                yield f"{path} is not what its name says: it was changed"
            if name == PLAN_FILE:
                try:
                    unseal(copies[path])
                except Unsealed as damage:
                    yield f"{path}: {damage}"
        if len(copies) == 2 and copies[name] != copies[twin(name)]:
            yield f"{name} and its twin {twin(name)} differ"


def _layout_problems(store: Store) -> Iterator[str]:
    """Differences between the Zarr metadata that was written and the plan."""
    place = store.place
    version = format_version(place)
    if version > 1:
        try:
            sums = unseal(place.read(LAYOUT_FILE))["files"]
        except (FileNotFoundError, Unsealed) as failure:
            # What was laid out follows from the plan: the rest that is damaged is named all the same.
            sums = checksums(metadata(store.parts, list(read_derived(place))))
            yield f"{LAYOUT_FILE}: {failure}"
        known = {METADATA, *derived_members(read_derived(place))}
        for member in sorted({name.split("/")[1] for name in sums if name.startswith("derived/")} - known):
            yield f"derived/{member} was laid out, and no record in {DERIVED_RECORDS} names it: `repair` removes it"
        for name, (size, checksum) in sums.items():
            try:
                data = place.read(name)
            except FileNotFoundError:
                yield f"{name} is not there"
                continue
            if (len(data), f"{crc32c_of(data):08x}") != (size, checksum):
                yield f"{name} is not what was laid out: it was changed"
    # Each array's own metadata, and the copy in the root that stock readers look at first.
    for consolidated in (False, True):
        try:
            root = zarr.open_group(place.zarr_store(read_only=True), mode="r", use_consolidated=consolidated)
            expected = {"identity_hash": store.plan.identity_hash, "format_version": version}
            expected |= {"plan_hash": hash_parts(store.parts)} if version > 1 else {}
            for key, value in expected.items():
                if root.attrs.get(key) != value:
                    yield f"the root's {key} is {root.attrs.get(key)} and the plan's is {value}: they changed"
            for part in store.parts:
                for name, array in part.arrays.items():
                    yield from _array_problems(root, name, array, part)
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
            yield f"{name} has {key} {getattr(there, key)} and was planned with {value}"
    if tuple(there.metadata.dimension_names or ()) != array.dims:
        yield f"{name} has dimensions {there.metadata.dimension_names} and was planned with {array.dims}"
    if there.attrs.get("bits") != array.bits:
        yield f"{name} says its bits are {there.attrs.get('bits')} and they are {array.bits}"
    group = root[name.rsplit("/", 1)[0]]
    for dim, values in (("sample", sample_labels(plan)), ("layer", list(array.layers))):
        if group[dim][:].tolist() != values:
            yield f"{name}: the coordinate {dim} is not the plan's"


def _check_block(
    store: Store, part: Plan, valid: np.ndarray, commit: Commit
) -> tuple[list[str], dict[int, dict[tuple[str, str], bytes]]]:
    """What is wrong with a block; and per sample the digest of its values by variable and layer."""
    b = commit.block
    problems = list(_file_problems(store.place, part, commit, valid))
    digests: dict[int, dict[tuple[str, str], bytes]] = {sample: {} for sample in part.block(b)}
    for name, array in part.arrays.items() if not problems else ():
        problems += _index_problems(store, part, array, part.block(b), valid)
        variable = "/".join([name.split("/")[0].split("_")[0], name.split("/")[1]])
        for sample in part.block(b) if not problems else ():
            if not valid[sample]:
                continue
            values = np.empty((1, len(array.layers), *part.extent(name, sample)), array.dtype)
            try:
                store.reader(name).read_into(values, [sample], range(len(array.layers)))
            except (DamagedShard, OSError) as damage:
                problems.append(str(damage))
                continue
            hidden = name.startswith("hidden")
            whole = bits.is_finite(values) and not (hidden and bits.has_zero_row(values))
            for layer, values_r in zip(array.layers, values[0], strict=True):
                digests[sample][variable, layer] = hashlib.blake2b(values_r.reshape(-1).view(np.uint8).data).digest()
                if whole:
                    continue
                if not bits.is_finite(values_r):
                    problems.append(f"{name} of sample {sample} at layer {layer!r} is not finite")
                if hidden and bits.has_zero_row(values_r):
                    problems.append(f"{name} of sample {sample} at layer {layer!r} has a state that is zero throughout")
    return problems, digests


def _file_problems(place: Place, part: Plan, commit: Commit, valid: np.ndarray) -> Iterator[str]:
    block = part.block(commit.block)
    unknown = [sample for sample in commit.set_aside if sample not in block]
    if unknown:
        yield f"its commit sets aside the samples {unknown}, which are not its own"
    expected = set()
    if valid[block.start : block.stop].any():
        expected = {table_file(kind, commit.block) for kind in ("tokens", "results")} if part.part == 0 else set()
        for name, array in part.arrays.items():
            for sample in block:
                if valid[sample]:
                    shard = int(part.rows[sample]) // array.shard[0]
                    expected |= {array.shard_file(shard, cell) for cell, _ in array.units(part.extent(name, sample))}
    if missing := sorted(expected - set(commit.files)):
        yield f"its commit lacks {missing[0]}"
    # Arrays that were dropped since are not missed.
    yield from file_problems(place, {name: commit.files[name] for name in sorted(expected & set(commit.files))})


def file_problems(place: Place, files: dict[str, tuple[int, str]]) -> Iterator[str]:
    """Files that are not there, or not of the size and checksum they were committed with."""
    for name, (size, checksum) in files.items():
        found = place.size(name)
        if found is None:
            yield f"{name} is not there"
        elif found != size:
            yield f"{name} has {found} bytes and was committed with {size}"
        elif (now := place.checksum(name)) != checksum:
            yield f"{name} has checksum {now} and was committed with {checksum}: it was changed"


def _index_problems(
    store: Store, part: Plan, array: ArrayPlan, samples: Sequence[int], valid: np.ndarray
) -> Iterator[str]:
    """Whether the index of every shard has what its samples should have, and nothing of those set aside."""
    cells: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    for sample in samples:
        for cell, _ in array.units(part.extent(array.name, sample)) if valid[sample] else ():
            name = array.shard_file(int(part.rows[sample]) // array.shard[0], cell)
            cells.setdefault(name, (cell, []))[1].append(sample)
    for name, (cell, members) in cells.items():
        try:
            _, lengths = decode_index(array, *store.place.read_tail(name, index_bytes(array)))
        except (DamagedShard, OSError) as damage:
            yield f"{name}: {damage}"
            continue
        should = np.zeros(array.shard[0], bool)
        places = part.rows[members] % array.shard[0]
        should[places] = True
        if (lengths[~should] > 0).any() or (lengths[should] == 0).any():
            yield f"{name}: its index does not hold the samples that it should"
        if array.codec == "none":
            for sample, place in zip(members, places, strict=True):
                rows = min(part.extent(array.name, sample)[0] - cell[0] * array.unit[0], array.unit[0])
                if (lengths[place] != -(-rows // array.inner[2]) * array.chunk_bytes).any():
                    yield f"{name}: its index does not hold what sample {sample} should have"


def _derived_problems(place: Place) -> Iterator[tuple[str, str]]:
    for record in place.names(DERIVED_RECORDS):
        name = record.removeprefix(f"{DERIVED_RECORDS}/").removesuffix(".json")
        try:
            derived = Derived.parse(place.read(record))
        except (Unsealed, TypeError, KeyError) as failure:
            yield name, f"its record does not read: {failure}"
            continue
        for problem in file_problems(place, dict(derived.files)):
            yield name, problem


def _hash_tables(store: Store, content: Any) -> None:
    samples = store.samples.drop("set_aside")  # why a sample failed may name a place or a time
    for table in (samples, *store.tables("tokens")):
        content.update(rows_as_bytes(table.select(sorted(table.columns))))
