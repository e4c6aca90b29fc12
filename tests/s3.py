"""A real S3 server on loopback, and a proxy before it that loses requests and answers on demand."""

import http.client
import http.server
import itertools
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

BUCKETS = itertools.count()


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a server that runs as long as this is entered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the S3 server did not start: is moto[server] installed?") from None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(endpoint: str, method: str, path: str) -> tuple[int, bytes]:
    """Status and body of one request."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(endpoint).netloc, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def make_bucket(endpoint: str) -> str:
    """The name of a new bucket."""
    name = f"bucket-{next(BUCKETS)}"
    assert ask(endpoint, "PUT", f"/{name}")[0] == 200
    return name


def uploads(endpoint: str, bucket: str) -> int:
    """Uploads in parts that were begun and neither completed nor dropped."""
    return ask(endpoint, "GET", f"/{bucket}?uploads")[1].count(b"<Upload>")


@contextmanager
def proxy(endpoint: str, fault: Callable[[str, str, dict], int | str | None]) -> Iterator[str]:
    """The endpoint of a proxy before ``endpoint``.

    ``fault(method, path, headers)`` says what befalls a request: None nothing, a number that status as the answer,
    ``"lost"`` the connection breaks before it arrives, ``"unanswered"`` after it was done, ``"unconditional"`` its
    conditions are not passed on.
    """
    target = urllib.parse.urlsplit(endpoint).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = dict(self.headers)
            found = fault(self.command, self.path, headers)
            if found == "lost":
                self.close_connection = True
                return
            if isinstance(found, int):
                self.send_response(found)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if found == "unconditional":
                headers = {k: v for k, v in headers.items() if k.lower() not in ("if-match", "if-none-match")}
            connection = http.client.HTTPConnection(target, timeout=30)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if found == "unanswered":
                self.close_connection = True
                return
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(key, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Not to the terminal."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
