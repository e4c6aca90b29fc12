"""A small real store with its data, and the review command as a process of its own: for its tests."""

import http.client
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import google_crc32c
import polars as pl

import store
from extract.omniedit import read
from extract.planning import SAMPLE_SCHEMA
from extract.review import verdicts
from store.synthetic import synthetic_sample

BOX = ("x1", "y1", "x2", "y2")


def make_store(path, data, instructions=(), vlm=(), boxes=(), seed=0, blocks=None, **columns):
    """A store of the samples of ``data``; lists replace what their first samples bring (None: nothing)."""
    rows = []
    for number, sample in enumerate(read(data)):
        told = dict(enumerate(instructions)).get(number) or sample.instruction
        box = dict(enumerate(boxes)).get(number) or sample.box or (None,) * 4
        size = (sample.width, sample.height, 4, 6, 3)
        crc = google_crc32c.value(sample.source)
        rows.append(
            (sample.sample_id, sample.task, told, *size, *box, "test" if number % 3 else "train", crc, *sample.place)
        )
    samples = pl.DataFrame(rows, schema=SAMPLE_SCHEMA, orient="row").with_columns(**columns)
    plan = store.Plan(
        layers=("final",), width=8, samples=samples, identity={"seed": seed}, kinds=("text",), samples_per_block=8
    )
    store.create(path, plan)
    with store.Writer(path) as writer:
        for b in writer.blocks() if blocks is None else blocks:
            with writer.block(b) as block:
                for number in block.samples:
                    said = dict(enumerate(vlm)).get(number) or (None,) * 4
                    values = {f"vlm_{name}": value for name, value in zip(BOX, said, strict=True)}
                    block.add(number, **synthetic_sample(plan, number) | {"values": values})
    return path


class Review:
    """The command, running until it is stopped or killed."""

    def __init__(self, *options):
        self.command = [sys.executable, "-m", "extract.review", *map(str, options)]
        self.out = dict(itertools.pairwise(options)).get("--out")
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
        said, trouble = self.process.communicate(timeout=30)
        assert (self.process.returncode, trouble) == (0, ""), trouble
        return said

    def kill(self):
        """As by ``kill -9``; nothing if it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def ask(self, path, body=None, method=None, headers=(), token=None):
        """Status and answer of one request; a body that is no bytes is sent as JSON."""
        own = self.url.split("/")[3]
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {"Content-Type": "application/json"} | dict(headers)
        body = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
        whole = f"/{own if token is None else token}/{path}"
        link.request(method or ("GET" if body is None else "POST"), whole, body, sent)
        answer = link.getresponse()
        data = answer.read()
        link.close()
        self.headers = answer.headers
        return answer.status, json.loads(data) if answer.headers.get_content_type() == "application/json" else data

    def withdraw_all(self):
        """Take every verdict back."""
        for name in verdicts.boxes_by_id(self.out):
            sent = {"sample_id": name, "verdict": "withdrawn", "box": None, "reason": None}
            assert self.ask("verdicts", sent)[0] == 200


def lines(path):
    """The lines of a file of verdicts."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
