"""The page's server: on 127.0.0.1 alone, for those who know its address, one review at a time.

Any web page that the same person has open can send requests to this machine. So the address has a random token in it,
the Host header must name this machine (a stranger's name may point here), and what changes something must come from
the page itself.
"""

import contextlib
import http.server
import json
import re
import secrets
import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import polars as pl

import store
from extract.review.config import ReviewConfig
from extract.review.desk import Desk, Unfit
from extract.review.pictures import Missing, Pictures, check_columns
from extract.review.verdicts import VerdictLog
from store.errors import Refusal

LOOKED_FOR = 8  # samples of which the data must hold one

ADDRESS = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LONGEST_BODY = 64 * 1024


class Server(http.server.ThreadingHTTPServer):
    """Serves ``desk`` at ``url``; raises `Refusal` where the port is taken."""

    desk: Desk

    def __init__(self, port: int):
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise Refusal(f"--port {port} cannot be had: {error.strerror}; leave it out to take a free one") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show what went wrong, unless the page was closed while it was being answered."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of the page."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """The page, a sample, its picture, or how far the review is."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A verdict."""
        self._answer(self._post)

    def do_other(self) -> None:
        """Any other method."""
        self._answer(self._refuse_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_other  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not shown: they would bury the address of the page."""

    def _answer(self, work) -> None:
        try:
            status, kind, body = work(self._path())
        except Unfit as unfit:
            status, kind, body = unfit.status, *as_json({"error": str(unfit)})
        if status >= HTTPStatus.BAD_REQUEST:
            # What was sent may not have been read to its end.
            self.close_connection = True
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _path(self) -> str:
        """What is asked for behind the token."""
        host = self.headers.get("Host", "")
        # The port is free: the page may be seen through a forwarded one.
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):
            raise Unfit(HTTPStatus.MISDIRECTED_REQUEST, f"Host {host!r} is not {ADDRESS} or localhost")
        before, token, path = (*self.path.partition("?")[0].split("/", 2), None, None)[:3]
        known = token is not None and secrets.compare_digest(token.encode(), self.server.token.encode())
        if before or not known or path is None:
            raise Unfit(HTTPStatus.NOT_FOUND, "no such page: open the address that the command printed, whole")
        return path

    def _get(self, path: str) -> tuple[int, str, bytes]:
        desk = self.server.desk
        if path in FILES:
            name, kind = FILES[path]
            return HTTPStatus.OK, kind, (PAGE / name).read_bytes()
        if path == "progress":
            return HTTPStatus.OK, *as_json({"progress": desk.progress(), "next_left": desk.next_left()})
        if asked := re.fullmatch(r"(samples|pictures)/(\d{1,9})", path):
            place = int(asked[2])
            if asked[1] == "samples":
                return HTTPStatus.OK, *as_json(desk.sample(place))
            return HTTPStatus.OK, "image/png", desk.picture(place)
        raise Unfit(HTTPStatus.NOT_FOUND, f"there is no {path!r} here")

    def _post(self, path: str) -> tuple[int, str, bytes]:
        if path != "verdicts":
            raise Unfit(HTTPStatus.NOT_FOUND, f"nothing can be sent to {path!r}; verdicts go to 'verdicts'")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Unfit(HTTPStatus.FORBIDDEN, f"Origin {origin!r} is another page")
        if self.headers.get_content_type() != "application/json":
            raise Unfit(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a verdict is sent as application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length):
            raise Unfit(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if int(length) > LONGEST_BODY:
            raise Unfit(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a verdict has at most {LONGEST_BODY} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Unfit(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {error}") from error
        try:
            return HTTPStatus.OK, *as_json(self.server.desk.judge(given))
        except OSError as error:
            raise Unfit(HTTPStatus.INSUFFICIENT_STORAGE, f"the file of verdicts: {error.strerror}") from error

    def _refuse_method(self, path: str) -> tuple[int, str, bytes]:
        raise Unfit(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not understood; GET and POST are")


def as_json(value: Any) -> tuple[str, bytes]:
    """Content type and bytes of ``value``."""
    return "application/json", json.dumps(value, allow_nan=False).encode()


def verdicts_path(config: ReviewConfig, path: Path | str) -> Path:
    """The file of verdicts: the one asked for, else beside the store at ``path``."""
    if config.out is not None:
        if ":/" in str(config.out):
            raise Refusal(f"--out {config.out} is a URL; give a file on this machine")
        return config.out
    if not isinstance(path, Path):
        raise Refusal(f"{config.store} is an object store, where no file can be added to; give --out FILE")
    return path.parent / f"{path.name}.verdicts.jsonl"


def chosen_samples(samples: pl.DataFrame, split: str | None) -> pl.DataFrame:
    """The rows of a split, all if none is given, without those that were not extracted yet: their boxes may come."""
    chosen = samples if split is None else samples.filter(pl.col("split") == split)
    if chosen.is_empty():
        raise Refusal(f"--split {split!r} has no sample; the store has {', '.join(sorted(set(samples['split'])))}")
    done = chosen.filter(pl.col("valid") | pl.col("set_aside").is_not_null())
    if done.is_empty():
        raise Refusal("no sample of the store is extracted yet; review it when `python -m extract` has filled it")
    if len(done) < len(chosen):
        print(f"{len(chosen) - len(done)} samples are not extracted yet and left out of this review")
    return done


def review(config: ReviewConfig) -> None:
    """Serve the page until Ctrl-C, then say how the review went; see `ReviewConfig`.

    Raises
    ------
    Refusal
        The store, the data or the file of verdicts cannot be used, or the port is taken.
    """
    opened = store.open(config.store)
    samples = chosen_samples(opened.samples, config.split)
    check_columns(samples.columns)
    pictures = Pictures(config.data)
    if not any(there(pictures, row) for row in samples.head(LOOKED_FOR).iter_rows(named=True)):
        raise Refusal(f"--data {config.data} holds none of the store's samples; give the data it was made from")
    with (
        Server(config.port) as server,
        contextlib.closing(VerdictLog(verdicts_path(config, opened.path), opened.plan.identity_hash)) as log,
    ):
        server.desk = desk = Desk(samples, pictures, log, config.reviewer)
        print_start(desk)
        print(f"page      {server.url}  (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
    print(f"\n{desk.summary()}\nkept in {log.path}")


def there(pictures: Pictures, sample: Mapping[str, Any]) -> bool:
    """Whether the data hold a sample's picture."""
    with contextlib.suppress(Missing):
        return bool(pictures.source(sample))
    return False


def print_start(desk: Desk) -> None:
    """What there is to review."""
    samples, log = desk.samples, desk.log
    if log.cut:
        print(f"{log.path}: {log.cut} bytes of a line that was never confirmed are cut off")
    print(f"verdicts  {log.path}: {desk.progress()['left']} of {len(samples)} samples left")
