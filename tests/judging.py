"""A real local server that plays the endpoint of a judge, well or badly: for the judges' tests."""

import http.server
import json
import threading
import time

import numpy as np
from PIL import Image

GRADES = {"edit": 4, "subject": 3, "leakage": 2, "reason": "the cube is blue"}
KEY = "sk-very-secret-0123456789"


def said(grades=GRADES, tokens=(1000, 50), kind="openai", text=None, finish=None, **more):
    """The body of a good answer of either kind."""
    text = json.dumps(grades) if text is None else text
    if kind == "openai":
        choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish or "stop"}
        usage = {"usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}} if tokens else {}
        return {"choices": [choice], **usage}
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish or "STOP"}
    usage = {"usageMetadata": {"promptTokenCount": tokens[0], "candidatesTokenCount": tokens[1]}} if tokens else {}
    return {"candidates": [candidate], **usage, **more}


def reply(body, status=200, **headers):
    """A step of the server: answer with JSON, or with text or bytes as they are."""

    def act(handler):
        raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    return act


def hang(handler):
    """Say nothing until the test is over."""
    handler.server.over.wait(20)


def cut(handler):
    """Promise more than is sent, and close."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def slam(handler):
    """Close without a word."""
    handler.close_connection = True


def trickle(handler):
    """A byte now and then, for ever: no single read times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def flood(handler):
    """A hundred megabytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 * 2**20))
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * 2**20)


class Endpoint(http.server.ThreadingHTTPServer):
    """Takes its ``steps`` one a request, then ``usual`` for ever; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, *steps, usual=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.steps, self.usual = list(steps), usual or reply(said())
        self.asked, self.times, self.most, self._now = [], [], 0, 0
        self.lock, self.over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_):
        """A client that hung up is what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append({"path": self.path, "headers": dict(self.headers), "body": body})
            server.times.append(time.monotonic())
            step = server.steps.pop(0) if server.steps else server.usual
            server._now += 1
            server.most = max(server.most, server._now)
        try:
            step(self)
        finally:
            with server.lock:
                server._now -= 1

    def log_message(self, *_):
        pass


def picture(seed=0, size=(56, 56)):
    """Noise, another for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)
