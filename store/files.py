"""Every touch of the disk: places, atomic durable writes, free space. An object store would be added here."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import google_crc32c

from store.errors import Refusal

RECORD = "record"
"""Folder of a store with all that is not Zarr (plan, tables, commits): one, so that a stock reader that walks the
hierarchy meets one stranger."""

PARTIAL = f"{RECORD}/partial"
"""Folder of a store where files are written before they are renamed into place; readers never look there."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def locate(path: str | os.PathLike) -> Path:
    """The folder of a store; refuses URLs, for which there is no writer yet."""
    if "://" in str(path):
        raise Refusal(f"{path} is a URL: this version keeps stores in local folders only, give a path")
    return Path(path).expanduser().absolute()


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, each durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write_whole(target: Path, pieces: Iterable[bytes | memoryview], partial: Path) -> tuple[int, str]:
    """Write ``pieces`` as one file that is either whole and durable under its name or not there.

    Temporary file in ``partial`` (same file system) → fsync → rename → fsync of the folder.

    Returns
    -------
    tuple of int and str
        Size in bytes and CRC-32C (8 hex digits) of what was written.

    Raises
    ------
    Refusal
        When the disk, the quota or the file size limit is full; the temporary file is gone by then.
    """
    temporary = partial / f"{target.name}.{os.getpid()}"
    size, checksum = 0, 0
    try:
        make_folder(partial)
        with temporary.open("wb", buffering=0) as file:
            for piece in pieces:
                write_all(file.fileno(), piece)
                size, checksum = size + len(piece), _extend(checksum, piece)
            os.fsync(file.fileno())
        make_folder(target.parent)
        temporary.rename(target)
        sync_folder(target.parent)
    except OSError as failure:
        temporary.unlink(missing_ok=True)
        raise as_refusal(failure, target) from failure
    return size, f"{checksum:08x}"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """``os.write`` until all of ``data`` is written: a nearly full disk takes a part and says so."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def as_refusal(failure: OSError, target: Path) -> Exception:
    """A full disk as a Refusal that says how to go on; any other failure unchanged."""
    if failure.errno not in _FULL:
        return failure
    return Refusal(
        f"no space left to write {target}: {os.strerror(failure.errno)}; "
        "what was committed is kept: free some space and run the same command, it goes on from there"
    )


def _extend(checksum: int, data: bytes | memoryview) -> int:
    if isinstance(data, bytes):
        return google_crc32c.extend(checksum, data)
    # It takes nothing but bytes: a small copy at a time stays in the cache, a whole one costs page faults.
    for start in range(0, len(data), 1 << 18):
        checksum = google_crc32c.extend(checksum, bytes(data[start : start + (1 << 18)]))
    return checksum


def checksum_of(path: Path, piece: int = 1 << 20) -> str:
    """CRC-32C of a file, 8 hex digits."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(piece):
            checksum = google_crc32c.extend(checksum, data)
    return f"{checksum:08x}"


def size_on_disk(path: Path) -> int:
    """Bytes of all files under ``path``; 0 if there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def readable(size: float) -> str:
    """A byte count for people: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def check_space(path: str | os.PathLike, bytes_needed: int) -> None:
    """Refuse when the disk of ``path`` cannot hold a store of ``bytes_needed`` bytes.

    What a store at ``path`` already holds counts as there, so that a nearly finished store can go on.
    Creates nothing.

    Raises
    ------
    Refusal
        With the estimate and what is free.
    """
    folder = locate(path)
    missing = bytes_needed - size_on_disk(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise Refusal(
            f"{path} needs an estimated {readable(missing)} more and {readable(free)} are free on {folder}: "
            "choose fewer samples or layers, or a --store on a larger disk"
        )
