"""A command that serves a local page, as a process of its own: for the tests of pages."""

import http.client
import json
import re
import signal
import subprocess
import sys
from urllib.parse import urlsplit


class Client:
    """Whoever has the address of a page."""

    def __init__(self, url):
        self.url = url

    def ask(self, path, body=None, method=None, headers=(), token=None):
        """Status and answer of one request; a body that is no bytes is sent as JSON."""
        own = self.url.split("/")[3]
        link = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        sent = {"Content-Type": "application/json"} | dict(headers)
        body = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
        whole = f"/{own if token is None else token}/{path}"
        link.request(method or ("GET" if body is None else "POST"), whole, body, sent)
        answer = link.getresponse()
        data = answer.read()
        link.close()
        self.headers = answer.headers
        return answer.status, json.loads(data) if answer.headers.get_content_type() == "application/json" else data


class Serving(Client):
    """``python -m`` with these arguments, running until it is stopped or killed."""

    def __init__(self, *command):
        self.command = [sys.executable, "-m", *map(str, command)]
        self.start()

    def start(self):
        """Start it, for the first time or again, and wait for the address of its page."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/\S+/", line):
                self.url, self.port = found[0], int(found[1])
                return
        raise AssertionError(self.process.communicate()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def stop(self):
        """Ctrl-C; what it says then."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self):
        """What it says from now to its end."""
        said, trouble = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, trouble
        self.trouble = trouble
        return said

    def kill(self):
        """As by ``kill -9``; nothing if it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
