"""A store on S3, or what speaks like it.

obstore takes endpoint, region and keys from the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY`` …), in every process anew: a pickled place has none of them.
"""

# ruff: noqa: D102 - what is said of Place's methods holds for those that fill them in

import contextlib
import errno
import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import obstore
import polars as pl
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from store.errors import Refusal
from store.places import PARTIAL, Buffer, Claim, Log, Place, WholeFile, busy, crc32c_of, whole_lines, within

if TYPE_CHECKING:
    import zarr.abc.store

PIECE = 8 * 2**20
"""Bytes that are read or sent at a time. An upload has at most 10,000 parts, so this allows files of 80 GB."""

# The first contact answers soon: a wrong endpoint shows as a connection that fails. Later a server that was there is
# waited for: 100 ms, doubled up to 15 s, for as long as signed requests are good. A piece may take two minutes.
_FIRST_CONTACT = {
    "client_options": {"connect_timeout": "5s", "timeout": "10s"},
    "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=8)},
}
_LATER = {
    "client_options": {"connect_timeout": "5s", "read_timeout": "2min", "timeout": "5min"},
    "retry_config": {"max_retries": 30, "retry_timeout": timedelta(minutes=4)},
}

UPLOADS = 4
"""Pieces of a file on their way at a time."""

_URL = re.compile(r"(s3|gs|az)://([a-zA-Z0-9][\w.-]*)((?:/[\w.=+ -]+)*)/?", re.ASCII)
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_PAST_END = "status code: 416"


class ObjectPlace(Place):
    """A prefix of an object store. Tested with S3; gs and az go the same ways, untested.

    Attributes
    ----------
    url
        ``s3://bucket/prefix``.
    """

    holds = False

    def __init__(self, url: str, worker: str | None = None):
        match = _URL.fullmatch(url)
        if not match or {".", ".."} & set(url.split("/")):
            raise Refusal(
                f"{url} is no place for a store: give a folder or s3://bucket/prefix (or gs://, az://), "
                "with letters, digits, spaces and . _ - = + in its names"
            )
        self.url, self.worker = url.rstrip("/"), worker or "unnamed"
        self._patient: Any = None
        self._conditional = False

    def __reduce__(self) -> tuple:
        return type(self), (self.url, self.worker)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"ObjectPlace({self.url!r})"

    def of(self, worker: str) -> Self:
        return type(self)(self.url, worker)

    def reach(self) -> None:
        """Ask for a first name, with little patience.

        Raises
        ------
        Refusal
            When the bucket is not there, not to be reached, or not for these keys.
        """
        with self._refusing():
            next(obstore.list(self._connect(_FIRST_CONTACT), chunk_size=1), None)

    def _connect(self, patience: dict[str, Any]) -> Any:
        global _started_in
        _started_in = _started_in or os.getpid()
        if _started_in != os.getpid():
            raise Refusal(
                f"{self} was in use when this process was forked, and cannot be used here: start processes by spawn "
                'or forkserver, as in DataLoader(…, multiprocessing_context="forkserver")'
            )
        endpoint = _endpoint()
        if endpoint and not re.match(r"https?://[^/]", endpoint):
            raise Refusal(f"{self}: AWS_ENDPOINT_URL is {endpoint}: it begins with https:// or http://")
        options = {**patience["client_options"], "allow_http": endpoint.startswith("http://")}
        with self._refusing():
            return from_url(self.url, client_options=options, retry_config=patience["retry_config"])

    @property
    def _store(self) -> Any:
        if self._patient is None or _started_in != os.getpid():
            self._patient = self._connect(_LATER)
        return self._patient

    @contextlib.contextmanager
    def _refusing(self, name: str = "") -> Iterator[None]:
        """What obstore raises as FileNotFoundError or a Refusal of one line."""
        try:
            yield
        except (BaseError, OSError) as failure:
            raise self._translated(failure, name) from failure

    def _translated(self, failure: Exception, name: str) -> Exception:
        told = " ".join(str(failure).split("Debug source")[0].split())
        keys, endpoint = _KEYS[self.url[:2]], _endpoint() or "its endpoint"
        if "NoSuchBucket" in told or "ContainerNotFound" in told:
            return Refusal(f"{self}: there is no such bucket at {endpoint}: make it, or correct the URL")
        if isinstance(failure, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{name}")
        if "169.254." in told or "metadata.google" in told or "must be specified" in told:
            return Refusal(f"{self}: no keys: set {keys}")
        if re.search(r"status code: 40[13]", told) or isinstance(failure, PermissionDeniedError | UnauthenticatedError):
            code = re.search(r"<Code>(\w+)</Code>", told)
            why = f" ({code[1]})" if code else ""
            return Refusal(f"{self}: {endpoint} refuses these keys{why}: check {keys}, and what they may do")
        if "error sending request" in told:
            return Refusal(f"{self}: {endpoint} cannot be reached: check AWS_ENDPOINT_URL and the network")
        return Refusal(
            f"{self}: {told[:300].rstrip(': ')}; what was committed is kept: mend this and run the same command again"
        )

    def read(self, name: str) -> bytes:
        with self._refusing(name):
            return bytes(obstore.get(self._store, within(self, name)).bytes())

    def read_range(self, name: str, start: int, length: int) -> Buffer:
        if not length:
            return b""
        with self._refusing(name):
            try:
                return obstore.get_range(self._store, within(self, name), start=start, length=length)
            except BaseError as failure:
                if _PAST_END in str(failure):
                    return b""
                raise

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        with self._refusing(name):
            try:
                if all(lengths):  # it takes no empty ones
                    return obstore.get_ranges(self._store, within(self, name), starts=starts, lengths=lengths)
            except BaseException as failure:
                # Ranges past the end: the server says no, or obstore panics, which is no Exception.
                if _PAST_END not in str(failure) and type(failure).__name__ != "PanicException":
                    raise
        return [self.read_range(name, start, length) for start, length in zip(starts, lengths, strict=True)]

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        with self._refusing(name):
            try:
                got = obstore.get(self._store, within(self, name), options={"range": {"suffix": length}})
                return bytes(got.bytes()), got.meta["size"]
            except BaseError:
                # An empty file has no last bytes, and Azure no ranges from the end.
                size = obstore.head(self._store, name)["size"]
        return bytes(self.read_range(name, max(0, size - length), min(size, length))), size

    def checksum(self, name: str) -> str:
        checksum = 0
        with self._refusing(name):
            for data in obstore.get(self._store, within(self, name)).stream(min_chunk_size=PIECE):
                checksum = crc32c_of(data, checksum)
        return f"{checksum:08x}"

    def size(self, name: str) -> int | None:
        try:
            with self._refusing(name):
                return obstore.head(self._store, within(self, name))["size"]
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = self._list(within(self, folder) if folder else None)
        return {name: size for name, size in found.items() if not name.startswith(f"{PARTIAL}/")}

    def _list(self, folder: str | None) -> dict[str, int]:
        with self._refusing():
            pages = obstore.list(self._store, folder, chunk_size=1000)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

    def open_whole(self, name: str) -> WholeFile:
        return _ObjectFile(self, name)

    def write_new(self, name: str, data: bytes) -> bool:
        self._check_conditions()
        with self._refusing(name):
            try:
                obstore.put(self._store, within(self, name), data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._refusing(name):
            obstore.delete(self._store, within(self, name))

    def remove_tree(self, folder: str) -> None:
        if found := list(self._list(within(self, folder))):
            with self._refusing():
                obstore.delete(self._store, found)

    def remove_partial(self) -> None:
        """Nothing to do: an upload that is not completed is no file."""

    def log(self, name: str) -> Log:
        self._check_conditions()
        return _ObjectLog(self, name)

    def claim(self, name: str) -> Claim:
        return Claim()

    def zarr_store(self, read_only: bool) -> "zarr.abc.store.Store":
        from zarr.storage import ObjectStore

        return ObjectStore(self._store, read_only=read_only)

    def scan_parquet(self, names: Sequence[str]) -> pl.LazyFrame:
        # polars has the same client, which reads the same environment; its own search for keys reads more.
        urls = [f"{self}/{within(self, name)}" for name in names]
        return pl.scan_parquet(urls, glob=False, credential_provider=None, missing_columns="insert")

    def free(self) -> None:
        return None

    def _check_conditions(self) -> None:
        """Find out, on a file of its own, whether puts can be made conditional on what they replace."""
        if self._conditional:
            return
        name = f"{PARTIAL}/conditions-{uuid.uuid4().hex}"

        def put(data: bytes, mode: Any) -> dict[str, str]:
            return _version(obstore.put(self._store, name, data, mode=mode, use_multipart=False))

        with self._refusing(name):
            try:
                first = put(b"1", "create")
                put(b"2", first)
                for mode, refused in (("create", AlreadyExistsError), (first, PreconditionError)):
                    with contextlib.suppress(refused):
                        put(b"3", mode)
                        raise Refusal(
                            f"{self}: this object store ignores the conditions of a put (If-Match, If-None-Match), "
                            "so two writers could undo each other's work: use one that has them, "
                            "or write to a local folder and copy it"
                        )
            finally:
                self.remove(name)
        self._conditional = True


_started_in: int | None = None
"""The process in which obstore has its threads: they do not survive a fork, and calls would wait for them."""


class _ObjectFile(WholeFile):
    """One put, or an upload in parts that appears when it is completed."""

    def __init__(self, place: ObjectPlace, name: str):
        super().__init__()
        self._place, self._name, self._open = place, within(place, name), True
        self._mark = {"upload": uuid.uuid4().hex}
        with place._refusing(name):
            self._file = obstore.open_writer(
                place._store, name, attributes=self._mark, buffer_size=PIECE, max_concurrency=UPLOADS
            )

    def _write(self, views: list[memoryview]) -> None:
        with self._place._refusing(self._name):
            for view in views:
                self._file.write(view)

    def _commit(self) -> None:
        with self._place._refusing(self._name):
            try:
                self._file.close()
            except FileNotFoundError as failure:
                # Completing is repeated if its answer was lost, and then there is no such upload any more.
                if not self._is_there():
                    raise Refusal(
                        f"{self._place}/{self._name}: its upload is gone, run the same command again"
                    ) from failure
        self._open = False

    def _is_there(self) -> bool:
        try:
            there = obstore.get(self._place._store, self._name, options={"head": True}).attributes
        except FileNotFoundError:
            return False
        return self._mark.items() <= dict(there).items()

    def discard(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):
                # What its ``with`` does when an error leaves it: the parts that were sent are dropped.
                self._file.__exit__(Refusal, Refusal(), None)


class _ObjectLog(Log):
    """An object that every append replaces on condition that it is what this writer left or found."""

    def __init__(self, place: ObjectPlace, name: str):
        self._place, self._name = place, within(place, name)
        # One thread may check while another appends: what is there by then is known when its answer has come.
        self._lock = threading.Lock()
        data, self._version = self._look()
        self._data = data[: whole_lines(data)]

    def _look(self) -> tuple[bytes, dict[str, Any] | None]:
        """What is there, and which version; None if nothing is."""
        try:
            with self._place._refusing(self._name):
                got = obstore.get(self._place._store, self._name)
                return bytes(got.bytes()), _version(got.meta)
        except FileNotFoundError:
            return b"", None

    def read(self) -> bytes:
        return self._data

    def append(self, line: bytes) -> None:
        with self._lock:
            self._put(self._data + line)

    def replace(self, lines: Iterable[bytes]) -> None:
        with self._lock:
            self._put(b"".join(lines))

    def _put(self, data: bytes) -> None:
        store, mode = self._place._store, self._version or "create"
        with self._place._refusing(self._name):
            try:
                self._version = _version(obstore.put(store, self._name, data, mode=mode, use_multipart=False))
            except (AlreadyExistsError, PreconditionError):
                # A put whose answer was lost is repeated, and then fails its own condition: what is there decides.
                there, version = self._look()
                if there != data:
                    raise busy(self._place, self._name) from None
                self._version = version
        self._data = data

    def check(self) -> None:
        with self._lock:
            self._check()

    def _check(self) -> None:
        try:
            with self._place._refusing(self._name):
                version = _version(obstore.head(self._place._store, self._name))
        except FileNotFoundError:
            version = None
        if version != self._version:
            raise busy(self._place, self._name)

    def close(self) -> None:
        """Nothing is held."""


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), "")


def _version(of: Any) -> dict[str, str]:
    """What a put can be made conditional on; stores differ in which of the two they have."""
    return {key: of[key] for key in ("e_tag", "version") if of[key] is not None}
