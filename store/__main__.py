"""``python -m store``: routes to verify, repair, inspect and du."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from store.commandline import route


@dataclass(frozen=True)
class StoreConfig:
    """A store, and how to print about it."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder of the store."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class InspectConfig(StoreConfig):
    """What to show of a store."""

    sample: int | None = None
    """Row of the samples table to show; the first with states if not given."""


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
    print("layer     mean norm: image      text")
    for layer, norms in found["norms"].items():
        print(f"  {layer:<8} {norms.get('image', float('nan')):>15.2f} {norms.get('text', float('nan')):>9.2f}")
    if found["sample"]:
        tokens = found["sample"].pop("tokens")
        print("sample " + ", ".join(f"{name}={value!r}" for name, value in found["sample"].items()))
        for token in tokens:
            print("  " + ", ".join(f"{name}={value!r}" for name, value in token.items() if value is not None))


def du(config: StoreConfig) -> None:
    """Show bytes of the values and on disk, by array."""
    from store.files import readable
    from store.inspection import disk_usage

    usage = disk_usage(config.store)
    if config.json:
        print(json.dumps(usage))
        return
    for name, part in usage.items():
        print(
            f"{name:<24} raw {readable(part['raw']):>10}  disk {readable(part['disk']):>10}  ratio {part['ratio']:.3f}"
        )


COMMANDS = {"verify": verify, "repair": repair, "inspect": inspect, "du": du}

if __name__ == "__main__":
    route("python -m store", "Look at a store of hidden states and check it.", COMMANDS)
