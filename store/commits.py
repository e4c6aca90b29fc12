"""The commit log: one line a finished block, written last; what has no valid line does not exist for readers."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import google_crc32c

from store import files
from store.errors import Refusal
from store.layout import load_plan
from store.plan import canonical_json

FOLDER = f"{files.RECORD}/commits"


@dataclass(frozen=True)
class Commit:
    """A block that is whole: its files, and which of its samples could not be read."""

    block: int
    files: Mapping[str, tuple[int, str]]
    """Path within the store → size in bytes and CRC-32C (hex)."""
    set_aside: Mapping[int, str]
    """Sample index → why it has no states."""

    def line(self) -> bytes:
        """The record as one checksummed line."""
        aside = {str(sample): reason for sample, reason in self.set_aside.items()}
        record = {"block": self.block, "files": self.files, "set_aside": aside}
        checksum = google_crc32c.value(canonical_json(record).encode())
        return (canonical_json(record | {"crc32c": f"{checksum:08x}"}) + "\n").encode()

    @classmethod
    def parse(cls, line: bytes) -> Self | None:
        """The record of a line; None if the line is torn or damaged."""
        try:
            record = json.loads(line)
            checksum = record.pop("crc32c")
            if f"{google_crc32c.value(canonical_json(record).encode()):08x}" != checksum:
                return None
            aside = {int(sample): reason for sample, reason in record["set_aside"].items()}
            return cls(record["block"], {name: (size, crc) for name, (size, crc) in record["files"].items()}, aside)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def read(folder: Path) -> tuple[dict[int, Commit], list[str]]:
    """The committed blocks of a store, and what is wrong with its logs.

    A torn last line is what a kill leaves: its block is not committed, and that is no problem of the log.
    """
    commits, problems = {}, []
    for log in sorted((folder / FOLDER).glob("*.jsonl")):
        *lines, _torn = log.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            commit = Commit.parse(line)
            if commit is None:
                problems.append(f"{FOLDER}/{log.name} line {number} is damaged: the block it committed does not count")
            else:
                commits[commit.block] = commit
    return commits, problems


def pending(path: str | os.PathLike) -> list[int]:
    """Blocks of the store at ``path`` without a valid commit, ascending: the work that is left."""
    plan = load_plan(path)
    commits, _ = read(files.locate(path))
    return [b for b in range(plan.n_blocks) if b not in commits]


class Log:
    """One worker's log, held open and locked: a second writer under the same name is refused."""

    def __init__(self, folder: Path, worker: str):
        self.path = folder / FOLDER / f"{worker}.jsonl"
        files.make_folder(self.path.parent)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise Refusal(f"a writer named {worker!r} is at work on {folder}: give every worker its own name") from None
        self._drop_torn_line()
        files.sync_folder(self.path.parent)

    def _drop_torn_line(self) -> None:
        written = self.path.read_bytes()
        whole = written.rfind(b"\n") + 1
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)

    def append(self, commit: Commit) -> None:
        """Write the record and make it durable; when the disk is full, the log is as before."""
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        try:
            files.write_all(self._descriptor, commit.line())
            os.fsync(self._descriptor)
        except OSError as failure:
            os.ftruncate(self._descriptor, start)
            os.lseek(self._descriptor, start, os.SEEK_SET)
            raise files.as_refusal(failure, self.path) from failure

    def keep(self, blocks: set[int]) -> None:
        """Drop every line that is damaged or commits another block; the log is replaced whole."""
        kept = [commit for line in self.path.read_bytes().splitlines() if (commit := Commit.parse(line))]
        lines = [commit.line() for commit in kept if commit.block in blocks]
        files.write_whole(self.path, lines, self.path.parents[2] / files.PARTIAL)

    def close(self) -> None:
        """Let go of the log."""
        os.close(self._descriptor)
