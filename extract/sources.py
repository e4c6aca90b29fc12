"""Where parquet shards lie: a folder here, or a data set of the hub. They are found and opened; nothing is read yet.

Both kinds give ``names`` in order, relative to ``root``, and ``open`` and ``size`` by name. ``near`` says whether small
reads are cheap: of shards that are far, only those are looked into whose turn has come.
"""

import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from store.errors import Refusal

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_shards(data: str | Path, split: str) -> "LocalShards | HubShards":
    """The shards of one split at a path or of a hub id.

    Raises
    ------
    Refusal
        There are none.
    """
    path = Path(data).expanduser()
    if path.exists():
        return LocalShards(path, split)
    if HUB_ID.fullmatch(str(data)):
        return HubShards(str(data), split)
    raise Refusal(f"there are no data at {data}: give a folder of parquet shards, a parquet file or a hub id")


class LocalShards:
    """The parquet shards in a folder (at any depth), or one; named ``<split>-*`` if there are such."""

    near = True

    def __init__(self, path: Path, split: str):
        self.root = str(path.parent if path.is_file() else path)
        # A link that leads nowhere is a shard that cannot be read; a folder is only where others lie.
        files = [path] if path.is_file() else [file for file in path.rglob("*.parquet") if not file.is_dir()]
        files = [file for file in files if file.name.startswith(f"{split}-")] or files
        if not files:
            raise Refusal(f"{path} has no parquet shard in it")
        # A name of bytes that are no UTF-8 is shown with escapes: it has to fit into tables.
        named = {
            os.fsencode(file.relative_to(self.root).as_posix()).decode(errors="backslashreplace"): file
            for file in files
        }
        self._files = dict(sorted(named.items()))
        self.names = self._files.keys()

    def open(self, name: str) -> pa.NativeFile:
        """The shard for reading."""
        return pa.OSFile(os.fspath(self._files[name]))

    def size(self, name: str) -> int | None:
        """Its bytes; null where it is gone."""
        file = self._files[name]
        return file.stat().st_size if file.exists() else None


class HubShards:
    """The parquet shards of one split of a hub data set, at the commit that the hub has now."""

    near = False

    def __init__(self, name: str, split: str):
        import datasets
        from fsspec.core import url_to_fs

        try:
            of_splits = datasets.load_dataset_builder(name).config.data_files
            urls = list(of_splits[split])
            self._system = url_to_fs(urls[0])[0]
            paths = sorted(self._system._strip_protocol(url) for url in urls)
            self.root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120 - not of this disk
            found = self._system.find(self.root, detail=True)  # one listing, not a question a file
        except Exception as error:  # offline, unknown, private, no such split: all the same to the reader
            said = first_line(error)
            raise Refusal(f"{name} is neither a folder here nor a data set that the hub gives: {said}") from error
        if other := [path for path in paths if not path.endswith(".parquet")]:
            raise Refusal(f"{name} is not kept in parquet ({other[0]}); convert it, and give the folder")
        self._files = {path[len(self.root) :].lstrip("/"): path for path in paths}
        self._sizes = {shard: found.get(path, {}).get("size") for shard, path in self._files.items()}
        self.names = self._files.keys()

    def open(self, name: str) -> "Unbroken":
        """The shard for reading, a range at a time."""
        return Unbroken(lambda: self._system.open(self._files[name], "rb", cache_type="none"), f"{self.root}/{name}")

    def size(self, name: str) -> int | None:
        """Its bytes, as the listing has them."""
        return self._sizes[name]


class Unbroken:
    """A remote file. A connection that fails for good is a `Refusal`, never mistaken for damage to the data."""

    def __init__(self, opened, name: str):
        self._name = name
        self._file = self._tried(opened)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes."""
        return self._tried(lambda: self._file.read(size))

    def _tried(self, step) -> Any:
        try:
            return step()
        except Exception as error:  # every transport has its own kinds
            raise Refusal(f"{self._name} broke off: {first_line(error)}; the same command goes on") from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
