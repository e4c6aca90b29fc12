"""What a stage of the recipe is given and makes, and the shelf where every result lies whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from extract.omniedit import decode
from store.places import as_refusal

RECORD = "record.json"
UNFINISHED, REPLACED = ".partial", ".replaced"


@dataclass(frozen=True)
class Given:
    """One sample as a stage gets it: what the stages before told, and the pictures that they made."""

    number: int
    seed: int
    """Of this sample and stage."""
    told: Mapping[str, Any]
    files: Mapping[str, Path]

    def picture(self, name: str) -> Image.Image:
        """A picture of an earlier stage, RGB."""
        return decode(self.files[name].read_bytes())


@dataclass(frozen=True)
class Made:
    """What a stage adds to a sample: JSON-able values, and RGB pictures by name."""

    told: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


Work = Callable[[Given], Made]
"""One stage's work on one sample; raises `extract.omniedit.BadSample` for what cannot be used."""


@runtime_checkable
class Paid(Protocol):
    """Work that may cost money and holds connections."""

    spent: float
    """Money so far."""

    def close(self) -> None:
        """End the connections."""


class Model(Protocol):
    """Who does a stage's work."""

    def describe(self) -> Mapping[str, Any]:
        """Everything that decides what it makes, JSON-able, without loading weights."""

    def load(self) -> Work:
        """Ready to work; asked only if there is work to do, and let go of after the stage."""


@dataclass(frozen=True)
class Stage:
    """A named step of the recipe and its model."""

    name: str
    model: Model


@dataclass(frozen=True)
class Result:
    """What lies on the shelf for one sample and stage; ``aside`` is (reason, detail) where it failed."""

    told: Mapping[str, Any]
    files: Mapping[str, Path]
    aside: tuple[str, str] | None
    digest: str
    """The sha256 (hex) of all of it."""


class Shelf:
    """Results by stage and sample, each in a folder that has its name only when all of it is on the disk."""

    def __init__(self, root: Path):
        self.root = root

    def folder(self, stage: str, number: int) -> Path:
        """Where a result lies."""
        return self.root / stage / f"{number:06d}"

    def find(self, stage: str, number: int, fingerprint: str) -> Result | None:
        """The result of this fingerprint; null if there is none, or it is damaged."""
        folder = self.folder(stage, number)
        try:
            encoded = (folder / RECORD).read_bytes()
            record = json.loads(encoded)
            if record["fingerprint"] != fingerprint:
                return None
            for name, digest in record["files"].items():
                if hashlib.sha256((folder / f"{name}.png").read_bytes()).hexdigest() != digest:
                    return None
            files = {name: folder / f"{name}.png" for name in record["files"]}
            aside = None if record["aside"] is None else (record["aside"]["reason"], record["aside"]["detail"])
            return Result(record["told"], files, aside, hashlib.sha256(encoded).hexdigest())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(
        self, stage: str, number: int, fingerprint: str, made: Made, aside: tuple[str, str] | None = None
    ) -> Result:
        """Put a result on the shelf, in place of an older one (raises `Refusal` where the disk has no room)."""
        target = self.folder(stage, number)
        unfinished = target.with_name(target.name + UNFINISHED)
        try:
            unfinished.mkdir(parents=True)
            files = {}
            for name, picture in made.pictures.items():
                stream = BytesIO()
                picture.convert("RGB").save(stream, "PNG", compress_level=3)
                files[name] = hashlib.sha256(stream.getvalue()).hexdigest()
                write(unfinished / f"{name}.png", stream.getvalue())
            told = {"fingerprint": fingerprint, "told": dict(made.told), "files": files}
            told["aside"] = None if aside is None else {"reason": aside[0], "detail": aside[1]}
            write(unfinished / RECORD, json.dumps(told, sort_keys=True, allow_nan=False).encode())
            exchange(unfinished, target)
        except OSError as failure:
            raise as_refusal(failure, target) from failure
        found = self.find(stage, number, fingerprint)
        if found is None:
            raise OSError(f"{target} does not hold what was written to it")
        return found

    def clean(self) -> None:
        """Remove what a kill left unfinished."""
        for left in [*self.root.glob(f"*/*{UNFINISHED}"), *self.root.glob(f"*/*{REPLACED}")]:
            shutil.rmtree(left)


def write(path: Path, content: bytes) -> None:
    """A file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def exchange(made: Path, target: Path) -> None:
    """Give a finished folder its name; an older one of that name goes, as a whole."""
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        target.rename(replaced)
    made.rename(target)
    if replaced.exists():
        shutil.rmtree(replaced)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
