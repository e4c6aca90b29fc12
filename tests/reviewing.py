"""A small real store with its data, and the review command as a process of its own: for its tests."""

import itertools
import json
from pathlib import Path

import google_crc32c
import polars as pl
from serving import Serving

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


class Review(Serving):
    """The command, running until it is stopped or killed."""

    def __init__(self, *options):
        self.out = dict(itertools.pairwise(options)).get("--out")
        super().__init__("extract.review", *options)

    def stop(self):
        """Ctrl-C; what it says then, which is all that is said."""
        said = super().stop()
        assert self.trouble == ""
        return said

    def withdraw_all(self):
        """Take every verdict back."""
        for name in verdicts.boxes_by_id(self.out):
            sent = {"sample_id": name, "verdict": "withdrawn", "box": None, "reason": None}
            assert self.ask("verdicts", sent)[0] == 200


def lines(path):
    """The lines of a file of verdicts."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
