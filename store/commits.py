"""The commit log: one line a finished block, written last; what has no valid line does not exist for readers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Self

from store.layout import load_parts
from store.places import RECORD, Place, locate
from store.sealing import seal, unseal

FOLDER = f"{RECORD}/commits"


@dataclass(frozen=True)
class Commit:
    """A block that is whole: its files, and which of its samples could not be read."""

    block: int
    files: Mapping[str, tuple[int, str]]
    """Path within the store → size in bytes and CRC-32C (hex)."""
    set_aside: Mapping[int, str]
    """Sample index → why it has no states."""
    part: int = 0
    """The part of the store: 0 as created, others are layers that were added."""

    def line(self) -> bytes:
        """The record as one checksummed line."""
        aside = {str(sample): reason for sample, reason in self.set_aside.items()}
        record = {"block": self.block, "files": self.files, "set_aside": aside}
        return seal(record | {"part": self.part} if self.part else record)

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        """The record of a line; None if the line is torn or damaged."""
        try:
            record = unseal(line + b"\n")
            aside = {int(sample): reason for sample, reason in record["set_aside"].items()}
            files = {name: (size, crc) for name, (size, crc) in record["files"].items()}
            return cls(record["block"], files, aside, record.get("part", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Commits:
    """The valid records of a store's logs."""

    by_block: Mapping[tuple[int, int], Commit]
    """(part, block) → its record; the last one if a block was committed twice."""
    problems: list[str]
    """Damaged lines. A torn last line is what a kill leaves: its block is not committed, and that is no problem."""

    def of_part(self, part: int) -> dict[int, Commit]:
        """Block → record, ascending."""
        return {b: self.by_block[p, b] for p, b in sorted(self.by_block) if p == part}


def read(place: Place) -> Commits:
    """The committed blocks of a store, and what is wrong with its logs."""
    commits, problems = {}, []
    for name in place.names(FOLDER):
        *lines, _torn = place.read(name).split(b"\n")
        for number, line in enumerate(lines, 1):
            commit = Commit.parse(line)
            if commit is None:
                problems.append(f"{name} line {number} is damaged: the block it committed does not count")
            else:
                commits[commit.part, commit.block] = commit
    return Commits(commits, problems)


def log_file(worker: str) -> str:
    """Path, within the store, of a worker's log."""
    return f"{FOLDER}/{worker}.jsonl"


def workers(place: Place) -> list[str]:
    """Names of all workers that have a log."""
    return [PurePosixPath(name).stem for name in place.names(FOLDER)]


def pending(path: str | os.PathLike | Place, part: int = 0) -> list[int]:
    """Blocks of a part of the store at ``path`` without a valid commit, ascending: the work that is left."""
    place = locate(path)
    plan = load_parts(place)[part]
    committed = read(place).of_part(part)
    # Of layers that were dropped nothing is left to do.
    return [b for b in range(plan.n_blocks) if b not in committed] if plan.arrays else []
