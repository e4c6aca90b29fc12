"""Laying out a store before the first pass: metadata at full planned size, the samples table, the plan."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr
import zarr.errors
from zarr.codecs import BloscCodec

from store import files
from store.errors import Refusal
from store.plan import LAYER_SEMANTICS, ArrayPlan, Plan
from store.shards import BLOSC_BLOCK

FORMAT_VERSION = 1

PLAN_FILE = f"{files.RECORD}/plan.json"
SET_ASIDE_FILE = f"{files.RECORD}/set_aside.parquet"
SAMPLES_FILE = f"{files.RECORD}/samples.parquet"


def table_file(kind: str, block: int) -> str:
    """Path, within the store, of a block's table; ``kind`` is tokens or results."""
    return f"{files.RECORD}/{kind}/{block:05d}.parquet"


def create(path: str | os.PathLike, plan: Plan, set_aside: pl.DataFrame | None = None) -> Path:
    """Make the store that ``plan`` describes, or find it there to go on with.

    Built beside its place and renamed into it, so that a partial one never looks whole. A store of the same
    identity and plan is left as it is.

    Parameters
    ----------
    path
        Folder of the store.
    plan
        What it will hold.
    set_aside
        What planning could not use, one row each with at least ``reason`` (and ``rows`` where one entry stands for
        several); kept with the store, so that nothing is lost silently.

    Returns
    -------
    Path
        The store's folder.

    Raises
    ------
    Refusal
        When the place holds something else, or a store of another identity or plan; it names the keys that differ.
        Nothing has been changed then.
    """
    folder = files.locate(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        _refuse_another(folder, plan)
        return folder
    files.make_folder(folder.parent)
    draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        lay_out(draft, plan)
        with (draft / SET_ASIDE_FILE).open("wb") as file:
            (pl.DataFrame(schema={"reason": pl.String}) if set_aside is None else set_aside).write_parquet(file)
            os.fsync(file.fileno())
        draft.rename(folder)
        files.sync_folder(folder.parent)
    except OSError as failure:
        if folder.is_dir() and any(folder.iterdir()):  # another worker was first: its store must be the same
            _refuse_another(folder, plan)
            return folder
        raise files.as_refusal(failure, folder) from failure
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def load_plan(path: str | os.PathLike) -> Plan:
    """The plan of an existing store.

    Raises
    ------
    Refusal
        When ``path`` is no store, or one of a later format.
    """
    folder = files.locate(path)
    if not (folder / PLAN_FILE).is_file():
        raise Refusal(f"{folder} is not a store: it has no {PLAN_FILE}; give the folder that `python -m extract` wrote")
    stored = json.loads((folder / PLAN_FILE).read_text())
    if stored["format_version"] > FORMAT_VERSION:
        raise Refusal(
            f"{folder} has format version {stored['format_version']} this code reads up to {FORMAT_VERSION}: update it"
        )
    return Plan.restore(stored["plan"], pl.read_parquet(folder / SAMPLES_FILE), stored["identity"])


def lay_out(draft: Path, plan: Plan) -> None:
    """Write, into the new folder ``draft``, everything that a store has before its first block."""
    attributes = {
        "format_version": FORMAT_VERSION,
        "identity": dict(plan.identity),
        "identity_hash": plan.identity_hash,
        "plan_hash": plan.plan_hash,
        "layer_semantics": LAYER_SEMANTICS,
        "bits": plan.dtype,
    }
    root = zarr.create_group(draft, attributes=attributes)
    for name in sorted({name.split("/")[0] for name in plan.arrays}):
        group = root.create_group(name)
        layers = plan.layers if name == "hidden" else plan.attention_layers
        for dim, values in (("sample", plan.samples["sample_id"].to_list()), ("layer", list(layers))):
            # Strings of no fixed length: the fixed-length type has no Zarr v3 specification yet.
            array = group.create_array(dim, shape=(len(values),), dtype=str, dimension_names=(dim,), compressors=None)
            array[:] = np.array(values, dtype=object)
    for array in plan.arrays.values():
        _lay_out_array(root, array)
    with warnings.catch_warnings():
        # Consolidated metadata is zarr-python's own addition to v3. It spares xarray a walk through every folder,
        # and whoever does not know it ignores it.
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(draft)
    (draft / files.RECORD).mkdir()
    stored = {"format_version": FORMAT_VERSION, "plan": plan.describe(), "identity": dict(plan.identity)}
    (draft / PLAN_FILE).write_text(json.dumps(stored, indent=1, ensure_ascii=False))
    plan.samples.write_parquet(draft / SAMPLES_FILE)
    for place in [draft, *draft.rglob("*")]:
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _lay_out_array(root: zarr.Group, array: ArrayPlan) -> None:
    blosc = BloscCodec(
        typesize=np.dtype(array.dtype).itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=BLOSC_BLOCK
    )
    root.create_array(
        array.name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=array.inner,
        shards=array.shard,
        compressors=None if array.codec == "none" else blosc,
        fill_value=array.fill,
        dimension_names=array.dims,
        attributes={"bits": array.bits},
    )


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    """A nested dict as one level, with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}.{name}").items()}


def _refuse_another(folder: Path, plan: Plan) -> None:
    if not (folder / PLAN_FILE).is_file():
        raise Refusal(f"{folder} exists and is not a store: choose another --store")
    stored = json.loads((folder / PLAN_FILE).read_text())
    asked = json.loads(json.dumps({"plan": plan.describe(), "identity": dict(plan.identity)}))
    here, there = ({**_flat(of["plan"], "plan"), **_flat(of["identity"], "identity")} for of in (asked, stored))
    differing = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if stored["format_version"] != FORMAT_VERSION:
        here["format_version"], there["format_version"] = FORMAT_VERSION, stored["format_version"]
        differing.insert(0, "format_version")
    if differing:
        named = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)
        raise Refusal(f"{folder} is a store of something else: {named}. Choose another --store or delete that one")
