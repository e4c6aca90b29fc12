"""Laying out a store before the first pass, and growing it: metadata at full planned size, samples table, plan."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr
import zarr.errors
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store.errors import Refusal
from store.places import RECORD, LocalPlace, Place, crc32c_of, locate
from store.plan import LAYER_SEMANTICS, ArrayPlan, Plan, canonical_json, hash_parts
from store.sealing import Unsealed, seal, unseal
from store.shards import codec_of

FORMAT_VERSION = 2

PLAN_FILE = f"{RECORD}/plan.json"
LAYOUT_FILE = f"{RECORD}/layout.json"
TWINS = f"{RECORD}/twins"
"""Second copies of what no command can compute again: the plan and the tables of the planned samples."""

DERIVED = "derived"
"""Group of derived arrays, each in a group of its own inside it; before 2.1 they lay in it side by side."""
DERIVED_RECORDS = f"{RECORD}/{DERIVED}"
FORMAT_1 = {"samples": f"{RECORD}/samples.parquet", "set_aside": f"{RECORD}/set_aside.parquet"}
"""Where format 1 has its tables; since then their names carry their hash, so that growing replaces nothing."""

METADATA = "zarr.json"

LABELS_PER_CHUNK = 8192
"""Rows in a chunk of the coordinate ``sample``. Fixed, so that by the metadata of before it reads the same after the
store grew: a stock reader that comes in between, or after a kill, sees the old store."""


def table_file(kind: str, block: int) -> str:
    """Path, within the store, of a block's table; ``kind`` is tokens or results."""
    return f"{RECORD}/{kind}/{block:05d}.parquet"


def create(path: str | os.PathLike | Place, plan: Plan, set_aside: pl.DataFrame | None = None) -> Path | str:
    """Make the store that ``plan`` describes, or find it there to go on with.

    The plan is written first and the root's metadata last: what lacks either is no store, and the same call
    completes it. A store of the same identity and plan is left as it is.

    Parameters
    ----------
    path
        Folder or URL of the store.
    plan
        What it will hold.
    set_aside
        What planning could not use, one row each with at least ``reason`` (and ``rows`` where one entry stands for
        several); kept with the store, so that nothing is lost silently.

    Returns
    -------
    Path or str
        The store's folder or URL.

    Raises
    ------
    Refusal
        When the place holds something else, or a store of another identity or plan; it names the keys that differ.
        Nothing has been changed then.
    """
    place = locate(path)
    if not place.exists(PLAN_FILE):
        if stranger := next((name for name in place.names() if not name.startswith(f"{RECORD}/")), None):
            raise Refusal(f"{place} holds {stranger} and is not a store: choose another --store")
        aside = pl.DataFrame(schema={"reason": pl.String}) if set_aside is None else set_aside
        stored = _write_tables(place, [plan], aside)
        first = place.write_new(PLAN_FILE, stored)
        with alone(place):
            remove_old_tables(place)  # of other plans, that were killed or came second
        if first:
            ensure_layout(place, [plan])
            return address(place)
    # It was there, or another worker was first.
    parts = load_parts(place, laid_out=False)
    _refuse_another(place, parts, plan)
    ensure_layout(place, parts)
    return address(place)


def address(place: Place) -> Path | str:
    """A place as people name it: a folder or a URL."""
    return place.path if isinstance(place, LocalPlace) else str(place)


def load_plan(path: str | os.PathLike | Place) -> Plan:
    """The plan of an existing store, of its layers as created; see ``load_parts`` for those that were added."""
    return load_parts(path)[0]


def load_parts(path: str | os.PathLike | Place, laid_out: bool = True) -> list[Plan]:
    """The plans of all parts of an existing store: the one it was created with, then layers that were added.

    Raises
    ------
    Refusal
        When ``path`` is no store, or one of a later format.
    """
    place = locate(path)
    stored = read_plan(place)
    if laid_out and not place.exists(METADATA):
        raise Refusal(
            f"{place} was not laid out to the end: it has no {METADATA}; run the command that made it again, "
            f"or `python -m store repair {place}`"
        )
    try:
        samples = _table(place, stored["samples"])
    except Refusal:
        if read_plan(place) == stored:
            raise
        return load_parts(place, laid_out)  # it grew just now, and the table of before is gone
    parts = [Plan.restore(part, samples, stored["identity"]) for part in stored["parts"]]
    if parts[0].samples_hash != stored["parts"][0]["samples_hash"]:
        raise Refusal(f"{place}/{stored['samples']} is not the table that was planned: run `python -m store repair`")
    return parts


def read_plan(place: Place) -> dict[str, Any]:
    """What ``record/plan.json`` says: format_version, samples, set_aside (paths), identity and parts.

    Raises
    ------
    Refusal
        When there is none, it is damaged, or of a later format.
    """
    try:
        text = place.read(PLAN_FILE)
    except FileNotFoundError:
        raise Refusal(
            f"{place} is not a store: it has no {PLAN_FILE}; give the folder or URL that `python -m extract` wrote"
        ) from None
    try:
        stored = json.loads(text)
        version = stored["format_version"]
        if version > FORMAT_VERSION:
            raise Refusal(f"{place} has format version {version}, this code reads up to {FORMAT_VERSION}: update it")
        if version > 1:
            return unseal(text)
        return {**stored, **FORMAT_1, "parts": [stored["plan"]]}
    except (ValueError, KeyError, TypeError) as failure:
        raise Refusal(f"{place}/{PLAN_FILE} is damaged ({failure}): run `python -m store repair {place}`") from None


def format_version(place: Place) -> int:
    """The version of the format that a store says it has."""
    return read_plan(place)["format_version"]


def read_set_aside(place: Place) -> pl.DataFrame:
    """What planning could not use, with ``reason``."""
    return _table(place, read_plan(place)["set_aside"])


def grow(
    path: str | os.PathLike | Place,
    plan: Plan,
    set_aside: pl.DataFrame | None = None,
) -> list[Plan]:
    """Plan the samples and layers of ``plan`` that the store lacks; what it has is not touched.

    New samples (by ``sample_id``) follow the old ones, and begin a block of their own; samples that ``plan`` does
    not name stay. New layers become a part of their own. Afterwards ``pending`` names the blocks to fill. Growing
    again by the same plan changes nothing.

    Parameters
    ----------
    path
        A store; one is created if there is none.
    plan
        Of the same identity, width, dtype and block size. Its codecs and kinds of tokens count for new layers.
    set_aside
        What planning could not use this time.

    Returns
    -------
    list of Plan
        All parts, as they are now.

    Raises
    ------
    Refusal
        When the store is of another identity, width, dtype or block size, or keeps other attention rows of the
        layers asked for. Nothing has been changed then.
    """
    place = locate(path)
    if not place.exists(PLAN_FILE):
        create(place, plan, set_aside)
        return load_parts(place)
    with alone(place):
        return _grow(place, plan, set_aside)


def _grow(place: Place, plan: Plan, set_aside: pl.DataFrame | None) -> list[Plan]:
    parts = load_parts(place, laid_out=False)
    _refuse_differing(place, _shared(parts[0]), _shared(plan))
    for part in parts if plan.attention else ():
        if part.attention and part.attention_heads != plan.attention_heads:
            raise Refusal(f"{place} keeps attention of {_heads(part)}: add layers with the same, not {_heads(plan)}")
        both = [name for name in plan.attention_layers if name in part.attention_layers]
        if both and (lacking := [rows for rows in plan.attention if rows not in part.attention]):
            raise Refusal(f"{place} keeps no rows {lacking[0]} of layer {both[0]}, and rows cannot be added to a layer")
    known = parts[0].samples
    fresh = plan.samples.filter(~pl.col("sample_id").is_in(known["sample_id"].implode()))
    samples, counts = known, parts[0].generations or (known.height,)
    if fresh.height:
        try:
            samples = pl.concat([known, fresh], how="diagonal_relaxed")
        except pl.exceptions.PolarsError as failure:
            raise Refusal(f"the new samples do not fit the table of {place}: {failure}") from None
        counts = (*counts, fresh.height)
    grown = [
        dataclasses.replace(part, samples=samples, generations=counts, extents=part.unit_extents) for part in parts
    ]
    layers = tuple(name for name in plan.layers if not any(name in part.layers for part in parts))
    rows = tuple(name for name in plan.attention_layers if not any(name in part.attention_layers for part in parts))
    if layers or rows:
        attention = plan.attention if rows else ()
        added = {"layers": layers, "attention": attention, "attention_layers": rows, "part": len(parts), "extents": {}}
        grown.append(dataclasses.replace(plan, samples=samples, generations=counts, **added))
    before = read_set_aside(place)
    aside = (
        before
        if set_aside is None
        else pl.concat([before, set_aside], how="diagonal_relaxed").unique(maintain_order=True)
    )
    if hash_parts(grown) == hash_parts(parts) and format_version(place) == FORMAT_VERSION and aside.equals(before):
        if not _is_laid_out(place, parts):
            lay_out(place, parts)
        remove_old_tables(place)
        return parts
    replace_parts(place, grown, aside)
    return grown


def replace_parts(place: Place, parts: Sequence[Plan], set_aside: pl.DataFrame) -> None:
    """Write another plan: from the moment it is there readers go by it. Then the metadata for stock readers."""
    stored = _write_tables(place, parts, set_aside)
    before = read_plan(place)
    place.write_whole(PLAN_FILE, [stored])
    lay_out(place, parts)
    remove_old_tables(place, [before[key] for key in FORMAT_1])


def remove_old_tables(place: Place, before: Sequence[str] = ()) -> None:
    """Remove tables of planned samples that the plan does not name (any more). Call it while ``alone``.

    On an object store, where nobody is alone, only those that are named: others may be of a plan in the making.
    """
    found = list(before)
    if isinstance(place, LocalPlace):
        here = [path.name for folder in (RECORD, TWINS) for path in place.path.joinpath(folder).glob("*.parquet")]
        found += [f"{RECORD}/{name}" for name in here if name.startswith(tuple(FORMAT_1))]
    stored = read_plan(place)
    for name in {*found} - {stored[key] for key in FORMAT_1}:
        place.remove(twin(name))
        place.remove(name)


@contextlib.contextmanager
def alone(place: Place) -> Iterator[None]:
    """Keep other processes from changing the plan and what is laid out meanwhile; on an object store nobody can."""
    if not place.exists(PLAN_FILE) and not place.exists(twin(PLAN_FILE)):
        read_plan(place)  # says what it is not
    while (claim := place.claim("plan")) is None:
        time.sleep(0.02)
    try:
        yield
    finally:
        claim.close()


def ensure_layout(place: Place, parts: Sequence[Plan]) -> None:
    """Write the Zarr metadata if they are not there or not of what the record has, as a kill in time can leave them."""
    if not _is_laid_out(place, parts):
        with alone(place):
            lay_out(place, load_parts(place, laid_out=False))


def _is_laid_out(place: Place, parts: Sequence[Plan]) -> bool:
    if format_version(place) < FORMAT_VERSION:
        return True
    # The root is written last and has a copy of all.
    expected = {METADATA: metadata(parts, list(read_derived(place)))[METADATA], twin(PLAN_FILE): place.read(PLAN_FILE)}
    return all(place.size(name) == len(data) and place.read(name) == data for name, data in expected.items())


def lay_out(place: Place, parts: Sequence[Plan]) -> None:
    """Write the Zarr metadata and coordinates, their checksums, and the root, which has a copy of it all, last."""
    found = metadata(parts, list(read_derived(place)))
    sums = checksums(found)
    root = found.pop(METADATA)
    found[twin(PLAN_FILE)] = place.read(PLAN_FILE)
    for name, data in found.items():
        # What is the same is left alone: a reader may be at it.
        if place.size(name) != len(data) or place.read(name) != data:
            place.write_whole(name, [data])
    place.write_whole(LAYOUT_FILE, [seal({"files": sums})])
    place.write_whole(METADATA, [root])


def checksums(found: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    """Bytes and CRC32C of each of the files of ``metadata``, as ``LAYOUT_FILE`` keeps them."""
    return {name: (len(data), f"{crc32c_of(data):08x}") for name, data in sorted(found.items())}


def metadata(parts: Sequence[Plan], derived: Sequence["Derived"] = ()) -> dict[str, bytes]:
    """Every Zarr metadata document and coordinate chunk of a store, by path."""
    plan, memory = parts[0], MemoryStore()
    attributes = {
        "format_version": FORMAT_VERSION,
        "identity": dict(plan.identity),
        "identity_hash": plan.identity_hash,
        "plan_hash": hash_parts(parts),
        "layer_semantics": LAYER_SEMANTICS,
        "bits": plan.dtype,
    }
    root = zarr.create_group(memory, attributes=attributes)
    for part in parts:
        for kind, layers in (("hidden", part.layers), ("attention", part.attention_layers)):
            if any(name.startswith(f"{part.group(kind)}/") for name in part.arrays):
                _coordinates(root.create_group(part.group(kind)), sample=sample_labels(plan), layer=list(layers))
        for array in part.arrays.values():
            _lay_out_array(root, array)
    if derived:
        group, coordinates = root.create_group(DERIVED), {}
        for one in derived:
            if one.dims[0] == "sample":
                # As many rows as its coordinate: what came before the store grew has no values for the later ones.
                one = dataclasses.replace(one, shape=(plan.n_rows, *one.shape[1:]))
                labels = {"sample": sample_labels(plan), **one.coordinates}
            else:
                labels = one.coordinates
            if one.group == DERIVED:
                coordinates |= labels
            else:
                _coordinates(root.create_group(one.group), **labels)
            create_derived(root, one)
        _coordinates(group, **coordinates)
    with warnings.catch_warnings():
        # Consolidated metadata is zarr-python's own addition to v3. It spares xarray a walk through every folder,
        # and whoever does not know it ignores it.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(memory)
    found = dict(sync(_documents(memory)))
    # zarr-python puts members in an order of the moment: of two who lay out at once, each must write the same bytes.
    documents = {name: json.loads(data) for name, data in found.items() if name.endswith(METADATA)}
    return found | {name: json.dumps(one, indent=2, sort_keys=True).encode() for name, one in documents.items()}


def sample_labels(plan: Plan) -> list[str]:
    """The sample coordinate of the arrays: ids by row, empty where growth left a row unused."""
    labels = np.full(plan.n_rows, "", dtype=object)
    labels[plan.rows] = plan.samples["sample_id"].to_list()
    return labels.tolist()


async def _documents(memory: MemoryStore) -> list[tuple[str, bytes]]:
    names = [name async for name in memory.list()]
    return [(name, (await memory.get(name, default_buffer_prototype())).to_bytes()) for name in names]


def _coordinates(group: zarr.Group, **coordinates: Sequence[str]) -> None:
    for dim, values in coordinates.items():
        # Strings of no fixed length: the fixed-length type has no Zarr v3 specification yet.
        size = (len(values),) if dim != "sample" else (LABELS_PER_CHUNK,)
        array = group.create_array(
            dim, shape=(len(values),), chunks=size, dtype=str, dimension_names=(dim,), compressors=None
        )
        array[:] = np.array(values, dtype=object)


def _lay_out_array(root: zarr.Group, array: ArrayPlan) -> None:
    root.create_array(
        array.name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.inner,
        shards=array.shard,
        compressors=codec_of(array).zarr_compressors() or None,
        fill_value=array.fill,
        dimension_names=array.dims,
        attributes={"bits": array.bits},
    )


@dataclasses.dataclass(frozen=True)
class Derived:
    """An array that was computed from the store and added to it; see ``store.derive``."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    """Its first axis has as many rows as the store had when it was added, if that is ``sample``."""
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    dtype: str
    attributes: Mapping[str, Any]
    """What it was made from, for people and for checks: a probe's hash, a command …"""
    coordinates: Mapping[str, Sequence[str]]
    """Labels of axes, by dimension."""
    samples: int
    """Samples the store had when it was added."""
    files: Mapping[str, tuple[int, str]]
    """Path within the store → size in bytes and CRC-32C (hex)."""
    group: str = DERIVED
    """Zarr group that it and its coordinates lie in; records from before 2.1 do not say."""

    @property
    def path(self) -> str:
        """Its Zarr path."""
        return f"{self.group}/{self.name}"

    @property
    def record_file(self) -> str:
        """Path of its record, within the store: once it is there, the array is."""
        return f"{DERIVED_RECORDS}/{self.name}.json"

    def record(self) -> bytes:
        """The record, sealed."""
        return seal(dataclasses.asdict(self))

    @classmethod
    def parse(cls, line: bytes) -> "Derived":
        """The derived array of a record.

        Raises
        ------
        Unsealed
            When the record is not as it was written.
        Refusal
            When a later format wrote it.
        """
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in unseal(line).items()}
        if unknown := given.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise Refusal(
                f"the record of derived/{given.get('name')} has {', '.join(sorted(unknown))}, which a later format "
                "wrote: update this code"
            )
        return cls(**given | {"files": {name: (size, crc) for name, (size, crc) in given["files"].items()}})


def create_derived(root: zarr.Group, derived: Derived, block_bytes: int = 0) -> zarr.Array:
    """The Zarr array of a derived array; the size of Blosc's blocks matters for encoding only."""
    return root.create_array(
        derived.path,
        shape=derived.shape,
        dtype=derived.dtype,
        chunks=derived.chunks,
        shards=derived.shards,
        compressors=BloscCodec(
            cname="zstd", clevel=1, shuffle="shuffle", typesize=np.dtype(derived.dtype).itemsize, blocksize=block_bytes
        ),
        fill_value=np.nan,
        dimension_names=derived.dims,
        attributes=dict(derived.attributes),
    )


def read_derived(place: Place) -> Iterator[Derived]:
    """The derived arrays that are whole."""
    for name in place.names(DERIVED_RECORDS):
        with contextlib.suppress(Unsealed):  # `verify` names it
            yield Derived.parse(place.read(name))


def derived_members(derived: Iterable[Derived]) -> set[str]:
    """What lies in the group ``derived`` for these arrays: themselves or their groups, and coordinates they share."""
    return {name for one in derived for name in (one.name, *(one.dims if one.group == DERIVED else ()))}


def twin(name: str) -> str:
    """Path of the second copy of a file of the record."""
    return name.replace(RECORD, TWINS, 1)


def _table(place: Place, name: str) -> pl.DataFrame:
    """A table of the plan, or its twin where it is damaged; `verify` names the damage and `repair` mends it."""
    sealed = re.search(r"-([0-9a-f]{16})\.parquet$", name)  # its name has its hash, from format 2 on
    reason = "it is not there"
    for path in (name, twin(name)) if sealed else (name,):
        try:
            data = place.read(path)
            # Damage is not to be parsed: one bit can ask for any amount of memory.
            if sealed and sealed[1] != hashlib.sha256(data).hexdigest()[:16]:
                reason = "its bytes are not those that its name has the hash of"
                continue
            return pl.read_parquet(io.BytesIO(data))
        except FileNotFoundError:
            continue
        except pl.exceptions.PolarsError as failure:
            reason = str(failure).splitlines()[0] if str(failure) else "it does not read"
    raise Refusal(f"{place}/{name} is damaged ({reason}): run `python -m store repair {place}`")


def _write_tables(place: Place, parts: Sequence[Plan], set_aside: pl.DataFrame) -> bytes:
    """Write the tables of the planned samples, with their twins: the plan that names them, sealed."""
    stored: dict[str, Any] = {"format_version": FORMAT_VERSION, "identity": dict(parts[0].identity)}
    for key, table in (("samples", parts[0].samples), ("set_aside", set_aside)):
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        stored[key] = f"{RECORD}/{key}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.parquet"
        for name in (twin(stored[key]), stored[key]):
            if place.size(name) != len(buffer.getvalue()):
                place.write_whole(name, [buffer.getvalue()])
    return seal({**stored, "parts": [part.describe() for part in parts]})


def _heads(plan: Plan) -> str:
    return "the mean of heads" if plan.attention_heads is None else f"{plan.attention_heads} heads"


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    """A nested dict as one level, with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}.{name}").items()}


def _shared(plan: Plan) -> dict[str, Any]:
    """What all parts of a store have in common."""
    fields = {name: getattr(plan, name) for name in ("width", "dtype", "samples_per_block")}
    return json.loads(canonical_json(fields | {"identity": dict(plan.identity)}))


def _refuse_another(place: Place, stored: Sequence[Plan], plan: Plan) -> None:
    def comparable(of: Plan) -> dict[str, Any]:
        # Where a store has grown decides where its samples lie, not what they are.
        described = {k: v for k, v in of.describe().items() if k not in ("generations", "extents")}
        return json.loads(canonical_json({"plan": described, "identity": dict(of.identity)}))

    _refuse_differing(place, comparable(stored[0]), comparable(plan))


def _refuse_differing(place: Place, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    there, here = ({k: v for name, part in of.items() for k, v in _flat(part, name).items()} for of in (stored, asked))
    differing = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if differing:
        named = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)
        raise Refusal(f"{place} is a store of something else: {named}. Choose another --store or delete that one")
