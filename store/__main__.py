"""``python -m store``: routes to verify, repair, inspect, du, copy and drop."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from store.commandline import route


@dataclass(frozen=True)
class StoreConfig:
    """A store, and how to print about it."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder or URL (s3://bucket/name) of the store."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class InspectConfig(StoreConfig):
    """What to show of a store."""

    sample: int | None = None
    """Row of the samples table to show; the first with states if not given."""


@dataclass(frozen=True)
class UsageConfig(StoreConfig):
    """What to count of a store."""

    by_layer: bool = False
    """Count every layer of an array as well."""


@dataclass(frozen=True)
class CopyConfig:
    """What to copy of a store, and how to keep it there. Killed, the same command goes on."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the store."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the new store."""
    split: str | None = None
    """Only samples of this split."""
    limit: int | None = None
    """Only so many samples, the first."""
    layers: str | None = None
    """Layers by name, with commas between; all if not given."""
    kinds: str | None = None
    """Kinds of tokens, image or text or both with a comma between; all if not given."""
    attention: bool = True
    """Attention rows of the kept layers as well."""
    codec: str | None = None
    """Codec of image states: none, zstd (any Zarr reader), planes (smaller, needs this package), int8 or fp8 (lossy);
    as in the store if not given."""
    text_codec: str | None = None
    """Codec of text states; as in the store if not given."""


@dataclass(frozen=True)
class DropConfig:
    """What to take out of a store."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the store."""
    array: Annotated[str, tyro.conf.Positional]
    """derived/NAME, hidden/image, hidden/text, attention/text_to_image or attention/text_to_text."""


def verify(config: StoreConfig) -> int:
    """Check that a store is whole: coverage, sizes, checksums, indices, values. Exit code 0 only then."""
    from store.verification import verify

    report = verify(config.store)
    if config.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
        return 0 if report.ok else 1
    print(f"{'ok' if report.ok else 'NOT OK'}: {report.samples} of {report.planned} samples", end="")
    print(f", {report.set_aside} set aside, {report.blocks} of {report.planned_blocks} blocks committed")
    print(f"content {report.content_hash}\nidentity {report.identity_hash}")
    for problem in report.problems:
        print(f"problem: {problem}")
    return 0 if report.ok else 1


def repair(config: StoreConfig) -> int:
    """Mend a store: rewrite its metadata, and give damaged blocks back as work for the command that filled it."""
    from store.repair import repair

    report = repair(config.store)
    if config.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        print(f"{report.blocks} of {report.planned_blocks} blocks are whole", end="")
        print("" if report.ok else ": run the command that filled the store again, it does the others")
    return 0 if report.ok else 1


def inspect(config: InspectConfig) -> None:
    """Show shapes, layers, norms per layer and one sample with its tokens."""
    from store.inspection import describe

    found = describe(config.store, config.sample)
    if config.json:
        print(json.dumps(found, ensure_ascii=False, default=str))
        return
    print(f"{found['path']}: {found['samples']} of {found['planned']} samples", end="")
    print(f", {found['blocks']} of {found['planned_blocks']} blocks, format {found['format_version']}")
    for name, array in found["arrays"].items():
        dims = ", ".join(f"{dim} {size}" for dim, size in zip(array["dims"], array["shape"], strict=True))
        print(f"  {name:<24} {dims}  {array['dtype']}, {array['codec']}, shards of {array['shard'][0]} samples")
    for name, derived in found["derived"].items():
        dims = ", ".join(f"{dim} {size}" for dim, size in zip(derived["dims"], derived["shape"], strict=True))
        print(f"  {'derived/' + name:<24} {dims}  {derived['dtype']}")
    print("layer     mean norm: image      text   massive dimensions (times the median one)")
    for layer, norms in found["norms"].items():
        massive = {one["dim"]: one["ratio"] for ones in found["massive"][layer].values() for one in ones}
        shown = ", ".join(f"{dim} (x {ratio:.0f})" for dim, ratio in sorted(massive.items(), key=lambda one: -one[1]))
        print(
            f"  {layer:<8} {norms.get('image', float('nan')):>15.2f} {norms.get('text', float('nan')):>9.2f}   {shown}"
        )
    if found["sample"]:
        tokens = found["sample"].pop("tokens")
        print("sample " + ", ".join(f"{name}={value!r}" for name, value in found["sample"].items()))
        for token in tokens:
            print("  " + ", ".join(f"{name}={value!r}" for name, value in token.items() if value is not None))


def du(config: UsageConfig) -> None:
    """Show bytes of the values and on disk, by array and, if asked, by layer."""
    from store.inspection import disk_usage
    from store.places import readable

    usage = disk_usage(config.store, config.by_layer)
    if config.json:
        print(json.dumps(usage))
        return
    for name, part in usage.items():
        print(
            f"{name:<24} raw {readable(part['raw']):>10}  disk {readable(part['disk']):>10}  ratio {part['ratio']:.3f}"
        )
        for layer, size in part.get("layers", {}).items():
            print(f"  layer {layer:<32} disk {readable(size):>10}")
    print(f"{usage['total']['files']} files")


def copy(config: CopyConfig) -> None:
    """Copy a part of a store, or all of it with another codec, to a new store."""
    import numpy as np

    from store.errors import Refusal
    from store.growth import copy
    from store.reader import open_store

    store = open_store(config.store)
    chosen = np.flatnonzero(store.valid)
    if config.split is not None:
        chosen = chosen[(store.samples["split"] == config.split).to_numpy()[chosen]]
    chosen = chosen[: config.limit]
    if not chosen.size:
        raise Refusal(
            f"nothing to copy: {config.store} has no samples of --split {config.split} --limit {config.limit}"
        )

    def names(given: str | None) -> list[str] | None:
        return None if given is None else [name.strip() for name in given.split(",")]

    place = copy(
        config.store,
        config.target,
        samples=chosen,
        layers=names(config.layers),
        kinds=names(config.kinds),
        attention=None if config.attention else (),
        codec=config.codec,
        text_codec=config.text_codec,
        progress=True,
    )
    print(f"{place}: {chosen.size} samples")


def drop(config: DropConfig) -> None:
    """Take an array out of a store and free its bytes; the rest is not touched."""
    from store.growth import drop

    drop(config.store, config.array)
    print(f"{config.array} is no longer in {config.store}")


COMMANDS = {"verify": verify, "repair": repair, "inspect": inspect, "du": du, "copy": copy, "drop": drop}

if __name__ == "__main__":
    route("python -m store", "Look at a store of hidden states, check it, mend it, copy it.", COMMANDS)
