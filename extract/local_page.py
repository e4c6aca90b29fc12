"""A page for one person at this machine: a server on 127.0.0.1 alone, for those who know its address.

Any web page that the same person has open can send requests to this machine. So the address has a random token in it,
the Host header must name this machine (a stranger's name may point here), and what changes something must come from
the page itself.
"""

import http.server
import json
import re
import secrets
import sys
from abc import ABC, abstractmethod
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

from store.errors import Refusal

ADDRESS = "127.0.0.1"
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "local.js": (Path(__file__).with_suffix(".js"), "text/javascript; charset=utf-8"),
}
"""Where each file of a page is asked for, its name in the page's folder (the script that all share: its path), its
content type."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LONGEST_BODY = 64 * 1024


class Unfit(ValueError):  # noqa: N818 - an answer to what the page sent
    """What was asked cannot be answered, or kept; the message says why, ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class PageServer(http.server.ThreadingHTTPServer):
    """Serves a page at ``url`` by handlers of its own; raises `Refusal` where the port is taken."""

    def __init__(self, port: int, handler: type["PageHandler"]):
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((ADDRESS, port), handler)
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


class PageHandler(ABC, http.server.BaseHTTPRequestHandler):
    """One connection of a page; a subclass says what is there and what is done with what the page sends."""

    folder: ClassVar[Path]
    """Where ``FILES`` lie."""
    takes: ClassVar[tuple[str, ...]]
    """Paths that something can be sent to."""
    protocol_version = "HTTP/1.1"
    timeout = 60

    @abstractmethod
    def get(self, path: str) -> tuple[str, bytes]:
        """Content type and bytes of what is at ``path``, behind the token; raises `Unfit`."""

    @abstractmethod
    def post(self, path: str, given: Any) -> Any:
        """Keep the JSON that was sent to ``path``, one of ``takes``, and answer with JSON.

        Raises
        ------
        Unfit
            It was not kept: it is no such thing, or could not be written.
        """

    def do_GET(self) -> None:
        """A file of the page, or what it asks for."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """What the page sends."""
        self._answer(self._post)

    def do_other(self) -> None:
        """Any other method."""
        self._answer(self._refuse_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_other  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not shown: they would bury the address of the page."""

    def _answer(self, work) -> None:
        try:
            status, (kind, body) = HTTPStatus.OK, work(self._path())
        except Unfit as unfit:
            status, (kind, body) = unfit.status, as_json({"error": str(unfit)})
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

    def _get(self, path: str) -> tuple[str, bytes]:
        if path in FILES:
            name, kind = FILES[path]
            return kind, (self.folder / name).read_bytes()
        return self.get(path)

    def _post(self, path: str) -> tuple[str, bytes]:
        if path not in self.takes:
            raise Unfit(HTTPStatus.NOT_FOUND, f"nothing can be sent to {path!r}, only to {', '.join(self.takes)}")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Unfit(HTTPStatus.FORBIDDEN, f"Origin {origin!r} is another page")
        if self.headers.get_content_type() != "application/json":
            raise Unfit(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"what is sent to {path!r} is application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length):
            raise Unfit(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if int(length) > LONGEST_BODY:
            raise Unfit(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"what is sent has at most {LONGEST_BODY} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Unfit(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {error}") from error
        return as_json(self.post(path, given))

    def _refuse_method(self, path: str) -> tuple[str, bytes]:
        raise Unfit(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not understood; GET and POST are")


def as_json(value: Any) -> tuple[str, bytes]:
    """Content type and bytes of ``value``."""
    return "application/json", json.dumps(value, allow_nan=False).encode()
