"""Where a store lives: a local folder or a prefix of an object store, behind one interface.

Every touch of a disk or an object store goes through here: whole files that appear at once and are durable,
positioned reads, listings, one worker's append-only log, free space.

The interface and the local folder are here, object stores in ``store.objects``.
"""

# ruff: noqa: D102 - what is said of Place's methods holds for those that fill them in

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import urllib.parse
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

import google_crc32c
import numpy as np
import polars as pl

from store.errors import Busy, Refusal

if TYPE_CHECKING:
    import zarr.abc.store

Buffer = bytes | bytearray | memoryview | np.ndarray
"""Contiguous memory of any type."""

RECORD = "record"
"""Folder of a store with all that is not Zarr (plan, tables, commits): one, so that a stock reader that walks the
hierarchy meets one stranger."""

PARTIAL = f"{RECORD}/partial"
"""Folder of a store with files being written, before they are renamed into place, and locks; readers never look."""

CONNECTIONS = 8
"""Requests at a time where many files are read."""

MOST_PIECES = 1024
"""Pieces of memory that the system writes at a time."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def locate(path: "str | os.PathLike | Place", worker: str | None = None) -> "Place":
    """The place of a path or URL.

    Parameters
    ----------
    path
        A path, ``file://…``, ``s3://bucket/prefix``, ``gs://…`` or ``az://…``; a place is returned as it is.
    worker
        Who writes: half-written local files lie in a folder of this name. None for who only reads or writes little.

    Raises
    ------
    Refusal
        When it is no place for a store: a file, a URL of another kind, a bucket that is not there or cannot be
        reached. An object store is asked (one request, seconds at most).
    """
    if worker is not None and ("/" in worker or worker in ("", ".", "..")):
        raise Refusal(f"{worker!r} is no name for a worker: letters and digits are")
    if isinstance(path, Place):
        return path if worker is None else path.of(worker)
    # pathlib makes one slash of two.
    text = re.sub(r"^(s3|gs|az):/(?!/)", r"\1://", os.fspath(path))
    if text.startswith("file:/"):
        url = urllib.parse.urlsplit(text)
        if url.netloc not in ("", "localhost") or not url.path:
            raise Refusal(f"{text} names no folder of this machine: write file:///folder, or the folder alone")
        text = urllib.parse.unquote(url.path)
    if "://" in text:
        from store.objects import ObjectPlace

        place = ObjectPlace(text, worker)
        place.reach()
        return place
    return LocalPlace(text, worker)


def readable(size: float) -> str:
    """A byte count for people: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def check_space(path: "str | os.PathLike | Place", bytes_needed: int) -> None:
    """Refuse when the disk of ``path`` cannot hold a store of ``bytes_needed`` bytes; an object store always can.

    What a store at ``path`` already holds counts as there, so that a nearly finished store can go on.
    Creates nothing.

    Raises
    ------
    Refusal
        With the estimate and what is free.
    """
    place = locate(path)
    free = place.free()
    if free is None:
        return
    missing = bytes_needed - sum(place.sizes().values())
    if missing > free:
        raise Refusal(
            f"{place} needs an estimated {readable(missing)} more and {readable(free)} are free there: "
            "choose fewer samples or layers, or a --store on a larger disk"
        )


def as_refusal(failure: OSError, target: Path) -> Exception:
    """A full disk as a Refusal that says how to go on; any other failure unchanged."""
    if failure.errno not in _FULL:
        return failure
    return Refusal(
        f"no space left to write {target}: {os.strerror(failure.errno)}; "
        "what was committed is kept: free some space and run the same command, it goes on from there"
    )


def crc32c_of(data: Buffer, start: int = 0) -> int:
    """CRC-32C of ``data``, following what gave ``start``; nothing is copied."""
    # It takes no memoryviews, but what NumPy makes of them.
    return google_crc32c.extend(start, np.frombuffer(data, np.uint8))


class Place(ABC):
    """Files under names such as ``record/plan.json``. To other processes goes its address, nothing that is open.

    ``str()`` of it is the path or URL. All names are relative and stay within it (``Refusal`` otherwise).
    Threads may share one. Forks may share a local one; object stores refuse in a fork, where obstore would hang.

    Every method raises FileNotFoundError for a file that is not there unless it says otherwise, and those of an
    object store raise Refusal for what repeating did not mend: one line with the URL and what to do.
    """

    worker: str
    holds: bool
    """Whether ``claim`` keeps others away."""

    @abstractmethod
    def of(self, worker: str) -> Self:
        """The same place, written by ``worker``."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> Buffer:
        """``length`` bytes from ``start`` on; fewer where the file ends before."""

    @abstractmethod
    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        """Several ranges of one file; on an object store at a time, near ones as one."""

    @abstractmethod
    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """The last ``length`` bytes (all if it has fewer) and the size of the file."""

    @abstractmethod
    def checksum(self, name: str) -> str:
        """CRC-32C of a file, 8 hex digits."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.size(name) is not None

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below ``folder``, by name; what is in ``PARTIAL`` is left out."""

    def names(self, folder: str = "") -> list[str]:
        """Names of all files below ``folder``, sorted; what is in ``PARTIAL`` is left out."""
        return sorted(self.sizes(folder))

    @abstractmethod
    def open_whole(self, name: str) -> "WholeFile":
        """A file to be written piece by piece."""

    def write_whole(self, name: str, pieces: Iterable[Buffer]) -> tuple[int, str]:
        """Write one file that is either whole and durable under its name or not there; replaces one of that name.

        Returns
        -------
        tuple of int and str
            Size in bytes and CRC-32C (8 hex digits) of what was written.

        Raises
        ------
        Refusal
            When the disk, the quota or the file size limit is full; nothing is left of the file then.
        """
        with self.open_whole(name) as file:
            for piece in pieces:
                file.write(piece)
            return file.commit()

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file, whole and durable, unless there is one of that name: False then."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; none may be there."""

    @abstractmethod
    def remove_tree(self, folder: str) -> None:
        """Remove all below ``folder``, on a disk at once; nothing may be there."""

    @abstractmethod
    def remove_partial(self) -> None:
        """Remove what this worker left half written, and on a disk what others did who were killed.

        Call it where no one else can be this worker.
        """

    @abstractmethod
    def log(self, name: str) -> "Log":
        """Open one worker's log for appending.

        Raises
        ------
        Refusal
            When another writer has it, or the object store lacks conditional puts.
        """

    @abstractmethod
    def claim(self, name: str) -> "Claim | None":
        """Hold ``name`` against other processes until it is closed or this process ends; None if another holds it.

        On an object store nobody can hold anything: everybody gets it.
        """

    @abstractmethod
    def zarr_store(self, read_only: bool) -> "zarr.abc.store.Store":
        """What zarr-python opens."""

    @abstractmethod
    def scan_parquet(self, names: Sequence[str]) -> pl.LazyFrame:
        """Tables, one after the other, read when collected."""

    def read_parquet(self, names: Sequence[str]) -> list[pl.DataFrame]:
        """Tables, several read at a time."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(lambda name: pl.read_parquet(io.BytesIO(self.read(name))), names))

    @abstractmethod
    def free(self) -> int | None:
        """Free bytes; None if there is no limit that could be known."""


class WholeFile(ABC):
    """A file in the making. It is there, whole and durable, once committed; left ``with`` before, nothing is.

    ``write`` and ``commit`` raise Refusal when the disk is full.
    """

    def __init__(self) -> None:
        self._size, self._checksum = 0, 0

    def write(self, *pieces: Buffer) -> None:
        """Append; takes memory for a few pieces of an upload at most."""
        views = [view.cast("B") for piece in pieces if (view := memoryview(piece)).nbytes]
        self._write(views)
        for view in views:
            self._size, self._checksum = self._size + len(view), crc32c_of(view, self._checksum)

    def commit(self) -> tuple[int, str]:
        """Give it its name, for good: size in bytes and CRC-32C (8 hex digits)."""
        self._commit()
        return self._size, f"{self._checksum:08x}"

    @abstractmethod
    def discard(self) -> None:
        """Leave nothing of it, unless it is committed."""

    @abstractmethod
    def _write(self, views: list[memoryview]) -> None: ...

    @abstractmethod
    def _commit(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class Log(ABC):
    """One worker's log of lines: each is durable once appended, and only one writer at a time gets to append."""

    @abstractmethod
    def read(self) -> bytes:
        """All whole lines."""

    @abstractmethod
    def append(self, line: bytes) -> None:
        """Add a line (with its end) and make it durable; if that fails, the log is as before.

        Raises
        ------
        Refusal
            When the disk is full, or another writer of this name has appended meanwhile.
        """

    @abstractmethod
    def replace(self, lines: Iterable[bytes]) -> None:
        """Put other lines in place of all, at once."""

    @abstractmethod
    def check(self) -> None:
        """Refuse if another writer of this name has appended: what it committed must not be overwritten."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the log."""


class Claim:
    """Something held against other processes."""

    def close(self) -> None:
        """Let go of it."""


class LocalPlace(Place):
    """A folder of a file system; it need not be there yet.

    Attributes
    ----------
    path
        The folder, absolute.
    """

    holds = True

    def __init__(self, path: str | os.PathLike, worker: str | None = None):
        self.path = Path(path).expanduser().absolute()
        self.worker = worker or "unnamed"
        if self.path.exists() and not self.path.is_dir():
            raise Refusal(f"{self.path} is a file: a store is a folder, give another path")

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"LocalPlace({str(self)!r})"

    def of(self, worker: str) -> Self:
        return type(self)(self.path, worker)

    def _file(self, name: str) -> Path:
        return self.path / within(self, name)

    def read(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self.read_ranges(name, [start], [length])[0]

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        with self._file(name).open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), length, start) for start, length in zip(starts, lengths, strict=True)]

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        with self._file(name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), length, max(0, size - length)), size

    def checksum(self, name: str) -> str:
        checksum = 0
        with self._file(name).open("rb", buffering=0) as file:
            while data := file.read(2**20):
                checksum = crc32c_of(data, checksum)
        return f"{checksum:08x}"

    def size(self, name: str) -> int | None:
        try:
            return self._file(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        for parent, _, files in os.walk(self._file(folder) if folder else self.path):
            for path in (Path(parent, file) for file in files):
                name = path.relative_to(self.path).as_posix()
                if not name.startswith(f"{PARTIAL}/"):
                    with contextlib.suppress(FileNotFoundError):  # removed while we walk
                        found[name] = path.stat().st_size
        return found

    def open_whole(self, name: str) -> WholeFile:
        return _LocalFile(self._file(name), self._partial)

    @property
    def _partial(self) -> Path:
        return self._file(f"{PARTIAL}/files/{self.worker}")

    def write_new(self, name: str, data: bytes) -> bool:
        with _LocalFile(self._file(name), self._partial) as file:
            file.write(data)
            return file.commit_new()

    def remove(self, name: str) -> None:
        path = self._file(name)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)

    def remove_tree(self, folder: str) -> None:
        path, gone = self._file(folder), self._partial / uuid.uuid4().hex
        with contextlib.suppress(FileNotFoundError):
            if not gone.is_relative_to(path):  # all of it goes at once, so that a kill leaves nothing by halves
                path.stat()
                _make_folder(gone.parent)
                path.rename(gone)
                _sync_folder(path.parent)
                path = gone
            shutil.rmtree(path, ignore_errors=True)

    def remove_partial(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        for path in self._file(f"{PARTIAL}/files").glob("*/*"):
            if path.is_dir():  # was being removed
                shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(FileNotFoundError):  # its folder went meanwhile
                if file := _lock(path):
                    path.unlink(missing_ok=True)
                    file.close()

    def log(self, name: str) -> Log:
        return _LocalLog(self, name)

    def claim(self, name: str) -> Claim | None:
        path = self._file(f"{PARTIAL}/claims/{name}")
        _make_folder(path.parent)
        file = _lock(path)
        return file and _LocalClaim(path, file)

    def zarr_store(self, read_only: bool) -> "zarr.abc.store.Store":
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def scan_parquet(self, names: Sequence[str]) -> pl.LazyFrame:
        # A folder's name may have brackets or stars in it.
        return pl.scan_parquet([self._file(name) for name in names], glob=False, missing_columns="insert")

    def free(self) -> int:
        folder = self.path
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


class _LocalFile(WholeFile):
    """Temporary file in ``partial`` (same file system) → fsync → rename → fsync of the folder."""

    def __init__(self, target: Path, partial: Path):
        super().__init__()
        self._target = target
        try:
            _make_folder(partial)
            # Locked while it is being written: what is not was left by a killed process. Who finds out has it for a
            # moment.
            while (file := _lock(temporary := partial / uuid.uuid4().hex)) is None:
                pass
            self._file, self._temporary = file, temporary
        except OSError as failure:
            raise as_refusal(failure, target) from failure

    def _write(self, views: list[memoryview]) -> None:
        with self._discarding():
            for start in range(0, len(views), MOST_PIECES):
                several = views[start : start + MOST_PIECES]
                written = os.writev(self._file.fileno(), several)
                for view in several:  # a nearly full disk takes a part and says so
                    _write_all(self._file.fileno(), view[written:])
                    written = max(0, written - len(view))

    def _commit(self) -> None:
        with self._discarding():
            self._finish()
            self._temporary.rename(self._target)
            self._file.close()
            _sync_folder(self._target.parent)

    def commit_new(self) -> bool:
        """Give it its name if that is free."""
        with self._discarding():
            self._finish()
            try:
                os.link(self._temporary, self._target)
            except FileExistsError:
                return False
            _sync_folder(self._target.parent)
            return True

    def _finish(self) -> None:
        os.fsync(self._file.fileno())
        _make_folder(self._target.parent)

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            self.discard()
            raise as_refusal(failure, self._target) from failure

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _LocalLog(Log):
    """A file, held open and locked."""

    def __init__(self, place: LocalPlace, name: str):
        self._place, self._name, self._path = place, name, place._file(name)
        _make_folder(self._path.parent)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        file = _lock(self._path)
        if file is None:
            raise busy(self._place, self._name)
        file.truncate(whole_lines(file.read()))
        file.seek(0, os.SEEK_END)
        _sync_folder(self._path.parent)
        return file

    def read(self) -> bytes:
        return self._path.read_bytes()

    def append(self, line: bytes) -> None:
        start = self._file.tell()
        try:
            _write_all(self._file.fileno(), line)
            os.fsync(self._file.fileno())
        except OSError as failure:
            self._file.truncate(start)
            self._file.seek(start)
            raise as_refusal(failure, self._path) from failure

    def replace(self, lines: Iterable[bytes]) -> None:
        self._place.write_whole(self._name, lines)
        with self._file:
            self._file = self._open()

    def check(self) -> None:
        """Nobody can have: the file is locked."""

    def close(self) -> None:
        self._file.close()


class _LocalClaim(Claim):
    def __init__(self, path: Path, file: io.FileIO):
        self._path, self._file = path, file

    def close(self) -> None:
        # Before the lock goes: whoever opened it by then finds that it is gone, and makes another.
        self._path.unlink(missing_ok=True)
        self._file.close()


def _lock(path: Path) -> io.FileIO | None:
    """``path``, made if need be, open and locked until closed or the process ends; None if another has it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        file.close()  # it was replaced or removed between opening and locking


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, each durable."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _write_all(descriptor: int, view: bytes | memoryview) -> None:
    """``os.write`` until all is written: a nearly full disk takes a part and says so."""
    view = memoryview(view)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(target: Path, data: bytes) -> int:
    """Write one file that is not of a store, whole and durable or not at all; its size."""
    partial = target.parent / ".partial"
    with _LocalFile(target, partial) as file:
        file.write(data)
        size, _ = file.commit()
    with contextlib.suppress(OSError):  # another file may be being written there
        partial.rmdir()
    return size


def whole_lines(data: bytes) -> int:
    """Bytes of a log up to the end of its last whole line: a torn one is what a kill leaves."""
    return data.rfind(b"\n") + 1


def busy(place: Place, name: str) -> Busy:
    """Why log ``name`` cannot be had."""
    return Busy(f"a writer named {PurePosixPath(name).stem!r} is at work on {place}: give every worker its own name")


def within(place: Place, name: str) -> str:
    """``name``, if it cannot lead out of ``place``."""
    if {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
        raise Refusal(f"{name!r} is not the name of a file in {place}")
    return name
