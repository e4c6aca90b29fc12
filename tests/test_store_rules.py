"""FORMAT.md, rule by rule. What should be there is worked out here anew, from bytes, with none of the store's code.

Stores are made up by `History.draw`: some by a list of seeds, for all rules; others by hypothesis, which shrinks them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import store
from store import runs
from store.layout import metadata
from store.places import locate
from store.repair import repair as store_repair

FORMAT = Path(__file__).parents[1] / "store/FORMAT.md"

# ------------------------------------------------------------------------------------------- the rules, written again

CRC_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ (0x82F63B78 if _byte & 1 else 0)
    CRC_TABLE.append(_byte)


def crc32c(data):
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = (checksum >> 8) ^ CRC_TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def unsealed(data):
    """The document of one sealed line."""
    assert data.endswith(b"\n") and data.count(b"\n") == 1
    document = json.loads(data)
    assert data.decode() == canonical(document) + "\n"
    checksum = document.pop("crc32c")
    assert checksum == f"{crc32c(canonical(document).encode()):08x}"
    return document


def up(n, to=8):
    return -(-n // to) * to


def pass_order(layer):
    if layer == "embed":
        return (0, 0, "")
    if layer == "final":
        return (2, 0, "")
    return (1, int(layer), "") if layer.isdecimal() else (3, 0, layer)


def rows_of(counts, size):
    """Rule 2.3: the row of every sample."""
    rows, blocks = [], 0
    for count in counts:
        rows += [size * blocks + n for n in range(count)]
        blocks += -(-count // size)
    return rows


def blocks_of(counts, size):
    """Rule 6.1: the samples of every block."""
    blocks, first = [], 0
    for count in counts:
        blocks += [list(range(n, min(n + size, first + count))) for n in range(first, first + count, size)]
        first += count
    return blocks


# --------------------------------------------------------------------------------------------------- made-up stores


@dataclass(frozen=True)
class Sample:
    n_image: int
    n_text: int
    n_query: int
    aside: bool


@dataclass(frozen=True)
class Part:
    number: int
    since: int  # generations that were there when it was added
    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    codec: str
    text_codec: str
    attention: tuple[str, ...]
    attention_layers: tuple[str, ...]

    def group(self, kind):
        return f"{kind}_{self.number}" if self.number else kind

    @property
    def variables(self):
        """Group, variable and layers of every array."""
        hidden = [("hidden", kind, self.layers) for kind in self.kinds if self.layers]
        return hidden + [("attention", rows, self.attention_layers) for rows in self.attention]


@dataclass(frozen=True)
class History:
    """How a store came about: what it is of, and what was added when."""

    seed: int
    size: int
    width: int
    dtype: str
    heads: int | None
    generations: tuple[tuple[Sample, ...], ...]
    parts: tuple[Part, ...]
    replaced: bool  # results have a column that the samples table has, too

    @classmethod
    def draw(cls, rnd, seed=0):
        """A history by ``rnd``, of a kind that finds the corners."""
        size, dtype = rnd.choice([1, 2, 3, 4, 6, 8]), rnd.choice(["bfloat16", "bfloat16", "float32"])
        counts = [rnd.choice([1, size, size + 1, rnd.randint(1, 6)]) for _ in range(rnd.choice([1, 1, 2, 3]))]
        counts = rnd.choice([counts, counts, [1] * rnd.randint(2, 6)])
        blocks, fate = blocks_of(counts, size), rnd.choice(["none", "none", "some", "ends", "blocks", "but one"])
        aside = {
            "none": lambda n: False,
            "some": lambda n: rnd.random() < 0.3,
            "ends": lambda n: any(n == block[-1] for block in blocks),
            "blocks": lambda n: any(n in block for block in blocks[::2]),
            "but one": lambda n: n != 0,
        }[fate]
        lengths = rnd.choice([[1, 2, 3], [7, 8, 9], [8, 16], [1, 5, 17, 24]])
        generations, n = [], 0
        for g, count in enumerate(counts):
            longer, members = rnd.choice([0, 0, 1, 8, 25]) if g else 0, []
            for _ in range(count):
                members.append(
                    Sample(rnd.choice(lengths) + longer, rnd.choice(lengths) + longer, rnd.choice([1, 2, 5]), aside(n))
                )
                n += 1
            generations.append(tuple(members))
        codecs = ["none", "none", "zstd", "planes"] if dtype == "bfloat16" else ["none", "zstd"]
        names, rows = ["embed", "0", "1", "final", "other"], ["text_to_image", "text_to_text"]
        parts = []
        for number in range(rnd.choice([1, 1, 2, 3])):
            fresh = {
                kind: [name for name in names if not any(name in getattr(part, kind) for part in parts)]
                for kind in ("layers", "attention_layers")
            }
            layers = tuple(rnd.sample(fresh["layers"], rnd.randint(0 if number else 1, min(3, len(fresh["layers"])))))
            attention = tuple(rnd.choice([[], rows[:1], rows[1:], rows]))
            among = fresh["attention_layers"]
            attention_layers = tuple(rnd.sample(among, rnd.randint(1, len(among)))[:2]) if attention and among else ()
            part = Part(
                number,
                since=rnd.randint(parts[-1].since, len(counts)) if number else 1,
                layers=layers,
                kinds=tuple(rnd.choice([["image", "text"], ["image", "text"], ["image"], ["text"]])),
                codec=rnd.choice(codecs),
                text_codec=rnd.choice(codecs),
                attention=attention if attention_layers else (),
                attention_layers=attention_layers,
            )
            if layers or attention_layers:
                parts.append(part)
            else:
                break
        return cls(
            seed=seed,
            size=size,
            width=rnd.choice([1, 3, 16]),
            dtype=dtype,
            heads=rnd.choice([None, 1, 2]),
            generations=tuple(generations),
            parts=tuple(parts),
            replaced=rnd.random() < 0.3,
        )

    @cached_property
    def samples(self):
        return [sample for generation in self.generations for sample in generation]

    @property
    def counts(self):
        return [len(generation) for generation in self.generations]

    @property
    def identity(self):
        return {"weights": {"größe": self.seed}, "seed": self.seed}

    def ids(self):
        return [f"é-{n}" for n in range(len(self.samples))]

    def table(self, generations=None):
        members = [sample for generation in self.generations[:generations] for sample in generation]
        return pl.DataFrame(
            {
                "sample_id": self.ids()[: len(members)],
                "split": ["train" if n % 3 else "test" for n in range(len(members))],
                "x1": [n + 0.25 for n in range(len(members))],
                **{name: [getattr(one, name) for one in members] for name in ("n_image", "n_text", "n_query")},
            }
        )

    def plan(self, part, generations=None):
        """What is asked for, for ``create`` and ``grow``."""
        names = ("layers", "kinds", "codec", "text_codec", "attention", "attention_layers")
        return store.Plan(
            samples=self.table(generations),
            identity=self.identity,
            width=self.width,
            dtype=self.dtype,
            samples_per_block=self.size,
            attention_heads=self.heads,
            **{name: getattr(part, name) for name in names},
        )

    def extent(self, group, variable, n):
        """Shape of a sample's values at one layer."""
        sample = self.samples[n]
        tokens = sample.n_image if variable.endswith("image") else sample.n_text
        if group == "hidden":
            return (tokens, self.width)
        return (*(() if self.heads is None else (self.heads,)), sample.n_query, tokens)

    def values(self, group, variable, layer, n):
        """A sample's values at one layer, as they are stored."""
        rng = np.random.default_rng([self.seed, n, zlib.crc32(f"{group}/{variable} {layer}".encode())])
        shape = self.extent(group, variable, n)
        if group == "attention":
            return rng.random(shape).astype(np.float16)
        if self.dtype == "float32":
            return rng.standard_normal(shape).astype(np.float32)
        return rng.integers(0x3C00, 0x4180, shape).astype(np.uint16) | (
            rng.integers(0, 2, shape).astype(np.uint16) << 15
        )

    def tokens(self, n):
        """A token table in no order, with kinds that lie anywhere, and one column more."""
        sample, rnd = self.samples[n], random.Random(f"{self.seed} {n}")
        kinds = ["image"] * sample.n_image + rnd.choices(["instruction", "template"], k=sample.n_text)
        rnd.shuffle(kinds)
        rows = [
            {"position": 3 * place + 1, "kind": kind, "text": "ü\n" * (place % 2), "px1": place + 0.5, "mark": place}
            for place, kind in enumerate(kinds)
        ]
        rnd.shuffle(rows)
        return pl.DataFrame(rows, schema_overrides={"px1": pl.Float32})

    def results(self, n):
        found = {"found": None if n % 4 == 2 else n * 1.5, "said": "»no«" if n % 2 else None}
        return found | ({"x1": -1.0 - n} if self.replaced else {})

    def write(self, path, shuffled=0):
        """The store, filled in an order of ``shuffled``."""
        rnd = random.Random(shuffled)
        for generations in range(1, len(self.generations) + 1):
            if generations == 1:
                store.create(path, self.plan(self.parts[0], 1))
            else:
                store.grow(path, self.plan(self.parts[0], generations))
            for part in self.parts[1:]:
                if part.since == generations:
                    store.grow(path, self.plan(part, generations))
            if generations == len(self.generations) or rnd.random() < 0.5:
                for part in self.parts:
                    if part.since <= generations:
                        self.fill(path, part, rnd)
        return path

    def fill(self, path, part, rnd):
        with store.Writer(path, rnd.choice("ab"), part.number) as writer:
            left = store.pending(path, part.number)
            rnd.shuffle(left)
            for b in left:
                with writer.block(b) as block:
                    for n in rnd.sample(list(block.samples), len(block.samples)):
                        if self.samples[n].aside:
                            block.set_aside(n, "»broken«")
                        else:
                            block.add(n, **self.given(part, n))

    def given(self, part, n):
        values = {
            variable: np.stack([self.values(group, variable, layer, n) for layer in layers])
            for group, variable, layers in part.variables
        }
        return values if part.number else values | {"tokens": self.tokens(n), "values": self.results(n)}

    def arrays(self):
        """Rules 2.1 to 2.7: what the metadata of every array should say, by name."""
        return {
            f"{part.group(group)}/{variable}": self.array(part, group, variable, layers)
            for part in self.parts
            for group, variable, layers in part.variables
        }

    def array(self, part, group, variable, layers):
        first = [sample for generation in self.generations[: part.since] for sample in generation]
        unit_tokens = {name: up(max(getattr(one, name) for one in first)) for name in ("n_image", "n_text")}
        own = unit_tokens["n_image" if variable.endswith("image") else "n_text"]
        longest = max(max(one.n_image, one.n_text) for one in self.samples)
        tokens = max(up(longest), *unit_tokens.values())
        if group == "hidden":
            codec = part.codec if variable == "image" else part.text_codec
            unit, whole, dims = (own, self.width), (tokens, self.width), ("token", "width")
            dtype, bits = ("uint16", "bfloat16") if self.dtype == "bfloat16" else ("float32", "float32")
            inner = (8, self.width) if codec == "none" else unit
        else:
            heads, head = ((), ()) if self.heads is None else ((self.heads,), ("head",))
            queries = max(one.n_query for one in first), max(one.n_query for one in self.samples)
            codec, dtype, bits, dims = "none" if part.codec == "none" else "zstd", "float16", "float16", ("query",)
            unit, whole, dims = (*heads, queries[0], own), (*heads, max(queries), tokens), (*head, "query", "token")
            inner = unit
        limit = store.plan.SHARD_BYTES
        bytes_ = len(layers) * math.prod(unit) * np.dtype(dtype).itemsize
        divisors = [n for n in range(1, self.size + 1) if self.size % n == 0]
        together = max([n for n in divisors if n * bytes_ <= limit], default=1)
        return {
            "dims": ("sample", "layer", *dims),
            "shape": (rows_of(self.counts, self.size)[-1] + 1, len(layers), *whole),
            "shard": (together, len(layers), *unit),
            "inner": (1, 1, *inner),
            "dtype": dtype,
            "bits": bits,
            "codec": codec,
        }

    def expected(self, name):
        """Rules 2.2 and 2.3: all that an array holds, NaN where nothing is."""
        array, (group, variable) = self.arrays()[name], name.split("/")
        (part,) = [one for one in self.parts if group in (one.group("hidden"), one.group("attention"))]
        group = group.split("_")[0]
        layers = part.layers if group == "hidden" else part.attention_layers
        out = np.full(array["shape"], 0x7FC0 if array["dtype"] == "uint16" else np.nan, array["dtype"])
        for n, row in enumerate(rows_of(self.counts, self.size)):
            if not self.samples[n].aside:
                for index, layer in enumerate(layers):
                    values = self.values(group, variable, layer, n)
                    out[(row, index, *map(slice, values.shape))] = values
        return out


# --------------------------------------------------------------------------------------------------- bytes of a store


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def commits(path):
    """Every record of every log, sealed."""
    logs = sorted((Path(path) / "record/commits").glob("*.jsonl"))
    return [unsealed(line + b"\n") for log in logs for line in log.read_bytes().split(b"\n")[:-1]]


def says(path, name):
    """What an array's own metadata say, in the words of `History.array`."""
    return in_our_words(json.loads((Path(path) / name / "zarr.json").read_bytes()))


def in_our_words(document):
    (sharding,) = document["codecs"]
    inside = sharding["configuration"]
    assert sharding["name"] == "sharding_indexed" and inside["index_location"] == "end"
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    assert inside["index_codecs"] == [little, {"name": "crc32c"}] and inside["codecs"][0] == little
    assert document["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    names = [codec["name"] for codec in inside["codecs"][1:]]
    return {
        "dims": tuple(document["dimension_names"]),
        "shape": tuple(document["shape"]),
        "shard": tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
        "inner": tuple(inside["chunk_shape"]),
        "dtype": document["data_type"],
        "bits": document["attributes"]["bits"],
        "codec": {"blosc": "zstd"}.get(names[0], names[0].removeprefix("analysis_by_proxy.")) if names else "none",
    }


def fill_of(document):
    return document["fill_value"]


@dataclass(frozen=True)
class ShardFile:
    """A shard, taken apart by its index."""

    name: str
    cell: tuple[int, ...]
    first_row: int
    data: bytes
    index: np.ndarray  # (samples, layers, chunks of a unit, 2)

    def chunk(self, *place):
        offset, length = self.index[place].tolist()
        return None if offset == 2**64 - 1 else self.data[offset : offset + length]


def shards(path, name):
    """Every shard of an array that is there."""
    array = says(path, name)
    per_dim = [whole // part for whole, part in zip(array["shard"], array["inner"], strict=True)]
    assert set(per_dim[3:]) <= {1}
    for file in sorted((Path(path) / name / "c").rglob("*")):
        if file.is_file():
            data, entries = file.read_bytes(), math.prod(per_dim)
            tail = data[-16 * entries - 4 :]
            assert struct.unpack("<I", tail[-4:])[0] == crc32c(tail[:-4])
            index = np.frombuffer(tail[:-4], "<u8").reshape(*per_dim[:3], 2)
            numbers = [int(n) for n in file.relative_to(Path(path) / name / "c").parts]
            assert numbers[1] == 0
            yield ShardFile(name, tuple(numbers[2:]), numbers[0] * array["shard"][0], data, index)


# Rules 3.1 to 3.5, written again

BLOSC = struct.Struct("<4B3Ii")
SCALED = struct.Struct("<4s3IhHI")


def unblosc(frame, dtype, count):
    """A frame as rule 3.2 has writers make it."""
    item = np.dtype(dtype).itemsize
    *marks, flags, size_of_item, whole, block, size, start = BLOSC.unpack_from(frame)
    assert (marks, size_of_item, whole, block, size, start) == ([2, 1], item, count * item, whole, len(frame), 20)
    assert flags == (0x91 if count < 128 else 0x81)
    streams, place = [], 20
    for length in [whole] if flags & 0x10 else [count] * item:
        (stored,) = struct.unpack_from("<i", frame, place)
        stream = frame[place + 4 : place + 4 + stored]
        streams.append(stream if stored == length else zstandard.ZstdDecompressor().decompress(stream, length))
        assert stored <= length and len(streams[-1]) == length
        place += 4 + stored
    assert place == len(frame)
    planes = np.frombuffer(b"".join(streams), np.uint8).reshape(item, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


def unscaled(chunk, name, rows, width):
    """Base, scales of channels and of tokens in units, and words, of a chunk of rule 3.3."""
    magic, n, d, kept, base, zero, size = SCALED.unpack_from(chunk)
    assert (magic, n, d, zero) == ({"planes": b"ABP1", "int8": b"ABI1", "fp8": b"ABF1"}[name], rows, width, 0)
    if not kept:
        assert (base, size, len(chunk)) == (0, 0, 24)
        return base, None, None, np.zeros((0, width), np.uint16)
    scales = np.frombuffer(zstandard.ZstdDecompressor().decompress(chunk[24 : 24 + size]), np.uint8).astype(np.int64)
    assert len(scales) == width + kept
    words = unblosc(chunk[24 + size :], "<u2" if name == "planes" else "|u1", kept * width).reshape(kept, width)
    return base, scales[:width] + base, scales[width:] + (-128 if name == "planes" else 253), words


def as_float(units):
    return (np.asarray(units, np.int64) << 21).astype(np.uint32).view(np.float32)


def restored(chunk, name, rows, width):
    """The bits of a chunk of `planes`, `int8` or `fp8`."""
    out = np.full((rows, width), 0x7FC0, np.uint16)
    base, channels, tokens, words = unscaled(chunk, name, rows, width)
    if not len(words):
        return out
    assert base in (range(-255, 769) if name == "planes" else range(1, 762))
    if name == "planes":
        bits = (words.astype(np.int64) + 64 * (channels + tokens[:, None])) % 2**16
        out[: len(words)] = bits >> 1 | (bits & 1) << 15
        return out
    if name == "int8":
        ratios, nan = words.view(np.int8).astype(np.float32) / np.float32(127), words == 0x80
    else:
        ratios, nan = words.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(448), words == 0x7F
    with np.errstate(invalid="ignore", over="ignore"):
        values = ratios * as_float(tokens)[:, None] * as_float(channels)
    bits = (values.view(np.uint32).astype(np.uint64) + 0x8000) >> 16
    out[: len(words)] = np.where(nan, 0x7FC0, bits)
    return out


def decoded(chunk, array):
    """The values of one chunk."""
    shape, dtype = array["inner"][2:], np.dtype(array["dtype"]).newbyteorder("<")
    if array["codec"] == "none":
        return np.frombuffer(chunk, dtype).reshape(shape)
    if array["codec"] == "zstd":
        return unblosc(chunk, dtype, math.prod(shape)).reshape(shape)
    return restored(chunk, array["codec"], *shape)


# ------------------------------------------------------------------------------------------------------------ fixtures

SMALL_SHARD = 1500  # bytes, so that a block has several shards


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with mock.patch("store.plan.SHARD_BYTES", SMALL_SHARD):
        yield


@pytest.fixture(scope="module", params=range(16))
def made(request, tmp_path_factory):
    """A store and its history."""
    history = History.draw(random.Random(request.param), request.param)
    return history, history.write(tmp_path_factory.mktemp("rules") / "store.zarr", request.param)


@pytest.fixture
def one(tmp_path):
    """A small store, its own, that a test may change: a history of two generations and two parts."""
    history = History(
        seed=1,
        size=4,
        width=3,
        dtype="bfloat16",
        heads=None,
        generations=tuple(
            tuple(Sample(n + 3, 2 * n + 1, n + 1, n == 2) for n in range(first, last))
            for first, last in ((0, 5), (5, 7))
        ),
        parts=(
            Part(0, 1, ("embed", "0"), ("image", "text"), "zstd", "none", ("text_to_image",), ("0",)),
            Part(1, 2, ("1",), ("text",), "zstd", "none", (), ()),
        ),
        replaced=True,
    )
    return history, history.write(tmp_path / "store.zarr")


def over_histories(examples):
    """The decorators of a test of ``rnd`` by hypothesis."""

    def decorate(test):
        quick = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        return quick(given(rnd=st.randoms(use_true_random=False))(test))

    return decorate


def documents(history):
    """The metadata of the store that ``history`` gives, without writing it."""
    parts = []
    for part in history.parts:
        then = history.plan(part, part.since)
        now = dataclasses.replace(
            then,
            samples=history.table(),
            generations=tuple(history.counts),
            extents=then.unit_extents,
            part=part.number,
        )
        parts.append(now)
    return parts, {name: json.loads(data) for name, data in metadata(parts).items() if name.endswith("zarr.json")}


# -------------------------------------------------------------------------------------------------------- 1. The folder

KNOWN = [
    r"zarr\.json",
    r"(hidden|attention)(_\d+)?/zarr\.json",
    r"(hidden|attention)(_\d+)?/(sample|layer)/(zarr\.json|c/\d+)",
    r"hidden(_\d+)?/(image|text)/(zarr\.json|c/\d+/0/\d+/\d+)",
    r"attention(_\d+)?/text_to_(image|text)/(zarr\.json|c/\d+/0(/\d+){2,3})",
    r"record/(plan|layout)\.json",
    r"record/(twins/)?(samples|set_aside)-[0-9a-f]{16}\.parquet",
    r"record/twins/plan\.json",
    r"record/(tokens|results)/\d{5}\.parquet",
    r"record/commits/[ab]\.jsonl",
]


def test_every_numbered_rule_has_a_test():
    rules = set(re.findall(r"^(\d+\.\d+) ", FORMAT.read_text(), re.MULTILINE))
    tested = set(re.findall(r"^def test_rule_(\d+_\d+)_", Path(__file__).read_text(), re.MULTILINE))
    assert rules == {rule.replace("_", ".") for rule in tested}


def test_the_folder_holds_what_section_1_lists_and_nothing_else(made):
    history, path = made
    names = set(files(path))
    assert not [name for name in names if not any(re.fullmatch(known, name) for known in KNOWN)]
    root = json.loads((path / "zarr.json").read_bytes())
    assert root["node_type"] == "group" and set(root["attributes"]) == {
        "format_version",
        "identity",
        "identity_hash",
        "plan_hash",
        "layer_semantics",
        "bits",
    }
    assert root["attributes"]["format_version"] == 2 and root["attributes"]["bits"] == history.dtype
    inside = {name.removesuffix("/zarr.json") for name in names if name.endswith("/zarr.json")}
    assert set(root["consolidated_metadata"]["metadata"]) == inside
    layout = unsealed((path / "record/layout.json").read_bytes())
    assert layout == {
        "files": {
            name: [len(data), f"{crc32c(data):08x}"]
            for name, data in files(path).items()
            if name.endswith("zarr.json") or re.search(r"/(sample|layer)/c/", name)
        }
    }
    for name in names:
        if name.startswith("record/twins/"):
            assert (path / name).read_bytes() == (path / name.replace("twins/", "")).read_bytes()
    with_states = {
        b for b, block in enumerate(self_blocks(history)) if any(not history.samples[n].aside for n in block)
    }
    for kind in ("tokens", "results"):
        assert {name for name in names if f"/{kind}/" in name} == {
            f"record/{kind}/{b:05d}.parquet" for b in with_states
        }


def self_blocks(history):
    return blocks_of(history.counts, history.size)


def test_rule_1_1_tables_are_named_by_their_hash(made):
    _, path = made
    tables = [p for p in (path / "record").rglob("*.parquet") if "-" in p.name]
    assert len(tables) == 4
    for table in tables:
        assert table.stem.split("-")[1] == hashlib.sha256(table.read_bytes()).hexdigest()[:16]


def test_rule_1_2_sealed_json_is_one_canonical_line_with_the_checksum_of_the_rest(made):
    _, path = made
    assert "größe" in unsealed((path / "record/plan.json").read_bytes())["identity"]["weights"]
    unsealed((path / "record/layout.json").read_bytes())
    assert commits(path)


def test_rule_1_2_a_sealed_document_of_which_a_byte_changed_is_refused(one):
    _, path = one
    whole = (path / "record/plan.json").read_bytes()
    for place in random.Random(0).sample(range(len(whole)), 20):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (path / "record/plan.json").write_bytes(damaged)
        with pytest.raises(store.Refusal, match=r"damaged|version"):
            store.open(path)
    for other in (whole.replace(b'":', b'": ', 1), whole[:-1], whole + b"\n", b" " + whole):
        (path / "record/plan.json").write_bytes(other)
        with pytest.raises(store.Refusal, match="damaged"):
            store.open(path)


def test_rule_1_3_the_plan_has_these_fields_and_the_metadata_follow_from_it(made, tmp_path):
    history, path = made
    plan = unsealed((path / "record/plan.json").read_bytes())
    assert set(plan) == {"format_version", "identity", "samples", "set_aside", "parts"}
    assert plan["format_version"] == 2 and plan["identity"] == history.identity
    assert pl.read_parquet(path / plan["samples"]).equals(history.table())
    assert pl.read_parquet(path / plan["set_aside"]).columns == ["reason"]
    for part, found in zip(history.parts, plan["parts"], strict=True):
        first = [sample for generation in history.generations[: part.since] for sample in generation]
        assert found.pop("samples_hash") == samples_hash(history.table())
        assert found == {
            "part": part.number,
            "layers": list(part.layers),
            "width": history.width,
            "dtype": history.dtype,
            "kinds": list(part.kinds),
            "attention": list(part.attention),
            "attention_layers": list(part.attention_layers),
            "attention_heads": history.heads,
            "codec": part.codec,
            "text_codec": part.text_codec,
            "samples_per_block": history.size,
            "generations": history.counts,
            "extents": {
                "n_image": up(max(one.n_image for one in first)),
                "n_text": up(max(one.n_text for one in first)),
                "n_query": max(one.n_query for one in first),
            },
            "n_samples": len(history.samples),
        }
    # All metadata lost, and made again from the plan.
    copied = Path(shutil.copytree(path, tmp_path / "copied"))
    laid_out = {name for name in files(copied) if re.search(r"zarr\.json$|/(sample|layer)/c/|layout\.json$", name)}
    for name in laid_out:
        (copied / name).unlink()
    store.Writer(copied, "a").close()
    assert files(copied) == {"record/commits/a.jsonl": b""} | files(path)


def samples_hash(table):
    """Rule 8.1."""
    types = {name: str(dtype) for name, dtype in table.schema.items()}
    return sha256(canonical(types) + "".join(json_line(row) + "\n" for row in table.to_dicts()))


def json_line(row):
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------- 2. Arrays


def test_rule_2_1_states_are_bits_or_float32_and_attention_is_float16(made):
    history, path = made
    for name, array in history.arrays().items():
        found = says(path, name)
        assert (found["dtype"], found["bits"]) == (array["dtype"], array["bits"])
        assert found["dtype"] == {"bfloat16": "uint16"}.get(found["bits"], found["bits"])
    assert {name for name in history.arrays()} == {
        name
        for name, node in json.loads((path / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"].items()
        if node["node_type"] == "array" and not name.endswith(("/sample", "/layer"))
    }


def test_rule_2_2_what_is_missing_reads_as_nan(made):
    history, path = made
    for name, array in history.arrays().items():
        fill = json.loads((path / name / "zarr.json").read_bytes())["fill_value"]
        assert fill == (0x7FC0 if array["dtype"] == "uint16" else "NaN")
        found = zarr.open_array(path / name, mode="r")[:]
        np.testing.assert_array_equal(found, history.expected(name))


def test_rule_2_3_rows_of_samples_and_the_coordinates(made):
    history, path = made
    rows = rows_of(history.counts, history.size)
    labels = [""] * (rows[-1] + 1)
    for row, name in zip(rows, history.ids(), strict=True):
        labels[row] = name
    for part in history.parts:
        for kind, layers in (("hidden", part.layers if part.kinds else ()), ("attention", part.attention_layers)):
            if layers:
                group = zarr.open_group(path / part.group(kind), mode="r")
                assert group["sample"][:].tolist() == labels and group["layer"][:].tolist() == list(layers)
                assert group["sample"].chunks == (8192,)


@given(size=st.integers(1, 9), counts=st.lists(st.integers(1, 20), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@example(size=64, counts=[1] * 70)
@example(size=64, counts=[64, 64, 1, 63, 65])
def test_rule_2_3_rows_follow_from_generations_and_block_size_alone(size, counts):
    members = tuple(tuple(Sample(1, 1, 1, False) for _ in range(count)) for count in counts)
    part = Part(0, 1, ("0",), ("text",), "none", "none", (), ())
    history = History(0, size, 1, "float32", None, members, (part,), False)
    ((plan,), found) = documents(history)
    assert plan.rows.tolist() == rows_of(counts, size)
    assert found["hidden/text/zarr.json"]["shape"][0] == rows_of(counts, size)[-1] + 1
    assert [list(block) for block in plan.blocks] == blocks_of(counts, size)
    if size == 64 and len(set(counts)) == 1:
        assert rows_of(counts, size) == list(range(0, 64 * len(counts), 64))


@over_histories(40)
def test_rule_2_4_units_follow_from_the_samples_that_were_there_first(rnd):
    history = History.draw(rnd)
    _, found = documents(history)
    for name, array in history.arrays().items():
        assert in_our_words(found[f"{name}/zarr.json"])["shard"][2:] == array["shard"][2:]


def test_rule_2_4_a_longer_sample_goes_on_in_the_next_cell(made):
    history, path = made
    rows = rows_of(history.counts, history.size)
    for name, array in history.arrays().items():
        group, variable = name.split("/")
        cells = {}
        for shard in shards(path, name):
            for s, row in enumerate(range(shard.first_row, shard.first_row + array["shard"][0])):
                if (shard.index[s, ..., 0] != 2**64 - 1).any():
                    cells.setdefault(row, set()).add(shard.cell)
        expected = {}
        for n, sample in enumerate(history.samples):
            extent = history.extent(group.split("_")[0], variable, n)
            grid = [range(-(-size // unit)) for size, unit in zip(extent, array["shard"][2:], strict=True)]
            expected |= {} if sample.aside else {rows[n]: set(itertools.product(*grid))}
        assert cells == expected


@over_histories(40)
def test_rule_2_5_arrays_of_a_group_have_one_extent_of_tokens(rnd):
    history = History.draw(rnd)
    _, found = documents(history)
    for part in history.parts:
        extents = set()
        for group, variable, layers in part.variables:
            name = f"{part.group(group)}/{variable}"
            words, array = in_our_words(found[f"{name}/zarr.json"]), history.array(part, group, variable, layers)
            assert words["shape"] == array["shape"] and words["dims"] == array["dims"]
            extents.add((group, words["shape"][words["dims"].index("token")]))
        assert len(extents) == len({group for group, _ in extents})


def test_rule_2_5_shards_without_samples_are_not_there(made):
    history, path = made
    rows = rows_of(history.counts, history.size)
    for name, array in history.arrays().items():
        group, variable = name.split("/")
        expected = set()
        for n, sample in enumerate(history.samples):
            extent = history.extent(group.split("_")[0], variable, n)
            grid = [range(-(-size // unit)) for size, unit in zip(extent, array["shard"][2:], strict=True)]
            if not sample.aside:
                expected |= {(rows[n] // array["shard"][0], *cell) for cell in itertools.product(*grid)}
        assert {(s.first_row // array["shard"][0], *s.cell) for s in shards(path, name)} == expected


@given(
    size=st.sampled_from([1, 2, 6, 12, 60, 64, 97]),
    width=st.integers(1, 5000),
    layers=st.integers(1, 40),
    tokens=st.integers(1, 5000),
    queries=st.integers(1, 600),
    heads=st.sampled_from([None, 28]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
@settings(max_examples=40, deadline=None)
@example(size=64, width=3584, layers=30, tokens=4681, queries=1, heads=None, dtype="bfloat16")
@example(size=64, width=1024, layers=32, tokens=8192, queries=1, heads=None, dtype="bfloat16")  # just 512 MiB
@example(size=64, width=1025, layers=32, tokens=8192, queries=1, heads=None, dtype="bfloat16")
@example(size=2, width=512, layers=32, tokens=8192, queries=1, heads=None, dtype="bfloat16")  # two are just 512 MiB
def test_rule_2_6_a_shard_is_the_largest_divisor_of_a_block_that_stays_under_512_mib(
    size, width, layers, tokens, queries, heads, dtype
):
    names = tuple(map(str, range(layers)))
    part = Part(0, 1, names, ("image", "text"), "zstd", "none", ("text_to_image",), names)
    history = History(0, size, width, dtype, heads, ((Sample(tokens, 3, queries, False),),), (part,), False)
    with mock.patch("store.plan.SHARD_BYTES", 512 * 2**20):
        _, found = documents(history)
        for name, array in history.arrays().items():
            words = in_our_words(found[f"{name}/zarr.json"])
            assert words["shard"] == array["shard"] and words["shard"][1] == layers
            bytes_ = [n * math.prod(words["shard"][1:]) * np.dtype(words["dtype"]).itemsize for n in range(size + 1)]
            assert size % words["shard"][0] == 0 and (words["shard"][0] == 1 or bytes_[words["shard"][0]] <= 2**29)
            assert not [n for n in range(words["shard"][0] + 1, size + 1) if size % n == 0 and bytes_[n] <= 2**29]


def test_rule_2_6_the_limit_is_512_mib():
    assert re.search(r"SHARD_BYTES = 512 \* 2\*\*20\n", Path(store.plan.__file__).read_text())


def test_rule_2_7_inner_chunks_and_those_that_are_left_out(made):
    history, path = made
    rows = rows_of(history.counts, history.size)
    for name, array in history.arrays().items():
        assert says(path, name) == array
        group, variable = name.split("/")
        of_row = {row: n for n, row in enumerate(rows) if not history.samples[n].aside}
        for shard in shards(path, name):
            for s, layer, k in np.ndindex(shard.index.shape[:3]):
                n = of_row.get(shard.first_row + s)
                if n is None:
                    assert shard.chunk(s, layer, k) is None
                    continue
                extent = history.extent(group.split("_")[0], variable, n)
                here = all(
                    cell * unit < size for cell, unit, size in zip(shard.cell, array["shard"][2:], extent, strict=True)
                )
                first = shard.cell[0] * array["shard"][2] + k * array["inner"][2]
                assert (shard.chunk(s, layer, k) is not None) == (here and first < extent[0])


def test_rule_2_8_chunks_of_a_sample_lie_in_c_order_without_gaps_then_index_and_checksum(made):
    history, path = made
    for name in history.arrays():
        for shard in shards(path, name):
            runs = []
            for s in range(len(shard.index)):
                chunks = [(o, n) for o, n in shard.index[s].reshape(-1, 2).tolist() if o != 2**64 - 1]
                for (offset, length), (following, _) in itertools.pairwise(chunks):
                    assert offset + length == following
                runs += [(chunks[0][0], sum(n for _, n in chunks))] if chunks else []
            runs.sort()
            assert [offset for offset, _ in runs] == [0, *np.cumsum([n for _, n in runs])[:-1].tolist()]
            assert sum(n for _, n in runs) == len(shard.data) - shard.index.size * 8 - 4
            assert (shard.index[shard.index[..., 0] == 2**64 - 1] == 2**64 - 1).all()


@over_histories(12)
def test_rule_2_9_samples_set_aside_have_no_chunks_and_all_others_their_bits(rnd):
    history = History.draw(rnd)
    rows = rows_of(history.counts, history.size)
    with tempfile.TemporaryDirectory() as folder:
        path = history.write(Path(folder) / "store", rnd.randint(0, 9))
        for name, array in history.arrays().items():
            whole = history.expected(name)
            there = set()
            for shard in shards(path, name):
                for s, layer, k in np.ndindex(shard.index.shape[:3]):
                    if (chunk := shard.chunk(s, layer, k)) is None:
                        continue
                    there.add(shard.first_row + s)
                    at = [cell * unit for cell, unit in zip(shard.cell, array["shard"][2:], strict=True)]
                    at[0] += k * array["inner"][2]
                    values = decoded(chunk, array)
                    place = [slice(a, a + n) for a, n in zip(at, values.shape, strict=True)]
                    expected = whole[(shard.first_row + s, layer, *place)]
                    inside = tuple(slice(n) for n in expected.shape)
                    np.testing.assert_array_equal(values[inside], expected)
                    # Past what the array has, a unit is padding, too.
                    rest = np.ones(values.shape, bool)
                    rest[inside] = False
                    assert (values[rest] == 0x7FC0).all() if values.dtype == np.uint16 else np.isnan(values[rest]).all()
            assert there == {rows[n] for n, sample in enumerate(history.samples) if not sample.aside}


# ---------------------------------------------------------------------------------------------------------- 3. Codecs


def bits_like_states(rng, rows, width):
    """bfloat16 bits as states have them: channels of different size, some NaN, zeros, infinities, huge and tiny."""
    values = rng.standard_normal((rows, width)) * np.exp(3 * rng.standard_normal(width))
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    odd = rng.choice([0, 0x8000, 1, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF00, 0x0080], bits.shape).astype(np.uint16)
    return np.where(rng.random(bits.shape) < rng.choice([0, 0.02]), odd, bits)


def frame_of(name, bits):
    """What the store makes of a chunk of states."""
    from store.codecs import codec

    return codec(name, np.dtype(np.uint16), bits.shape[1], "bfloat16").encode(bits)


def test_rule_3_1_none_is_the_values_little_endian():
    bits = bits_like_states(np.random.default_rng(0), 8, 5)
    assert frame_of("none", bits) == struct.pack(f"<{bits.size}H", *bits.reshape(-1).tolist())


def test_rule_3_2_zstd_is_a_blosc_frame_of_one_block_with_a_stream_for_every_byte():
    from numcodecs import Blosc

    rng = np.random.default_rng(1)
    for rows, width in ((8, 5), (16, 8), (127, 1), (128, 1), (40, 33)):
        bits = bits_like_states(rng, rows, width)
        frame = frame_of("zstd", bits)
        np.testing.assert_array_equal(unblosc(frame, "<u2", bits.size).reshape(bits.shape), bits)
        assert Blosc().decode(frame) == bits.tobytes()


def test_rule_3_3_padding_at_the_end_of_a_chunk_is_not_kept():
    bits = bits_like_states(np.random.default_rng(2), 24, 5)
    bits[9:] = 0x7FC0
    for name in ("planes", "int8", "fp8"):
        assert SCALED.unpack_from(frame_of(name, bits))[3] == 9
        assert (restored(frame_of(name, bits), name, 24, 5)[9:] == 0x7FC0).all()
        assert len(frame_of(name, np.full((24, 5), 0x7FC0, np.uint16))) == 24


def test_rule_3_4_planes_is_lossless():
    rng = np.random.default_rng(3)
    for rows, width in ((8, 5), (1, 1), (200, 3), (16, 700)):
        bits = bits_like_states(rng, rows, width)
        np.testing.assert_array_equal(restored(frame_of("planes", bits), "planes", rows, width), bits)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rule_3_5_lossy_codecs_have_the_scales_and_the_values_of_the_rule(name):
    from store.codecs import codec

    rng = np.random.default_rng(4)
    for rows, width in ((8, 5), (1, 1), (200, 3), (16, 700)):
        bits = bits_like_states(rng, rows, width)
        magnitude = bits & 0x7FFF
        unreal = magnitude >= 0x7F00
        chunk = frame_of(name, bits)
        base, channels, tokens, _ = unscaled(chunk, name, rows, width)
        largest = -(-np.where(unreal, 0, magnitude).astype(np.int64).max(axis=0) >> 5)
        assert base == max(1, largest.max() - 255)
        np.testing.assert_array_equal(channels, np.clip(largest, base, base + 255))
        ratio = np.where(unreal, 0, (magnitude.astype(np.uint32) << 16).view(np.float32)) / as_float(channels)
        largest = -(-ratio.astype(np.float32).max(axis=1).view(np.uint32).astype(np.int64) >> 21)
        np.testing.assert_array_equal(tokens, np.clip(largest, 253, 508))
        out = np.empty_like(bits)
        codec(name, np.dtype(np.uint16), width, "bfloat16").decode_into(chunk, out, rows)
        np.testing.assert_array_equal(out, restored(chunk, name, rows, width))
        assert (out[unreal] == 0x7FC0).all()


def test_rule_3_6_scales_and_words_are_the_same_everywhere():
    # Bits of a linear congruence: no library's random numbers.
    state, bits = 1, np.empty((40, 24), np.uint16)
    for place in np.ndindex(bits.shape):
        state = (state * 1103515245 + 12345) % 2**31
        bits[place] = 0x3C00 + (state >> 8) % 0x500 + 0x8000 * (state >> 30)
    found = {}
    with mock.patch("store.codecs.Planes.tried_values", 0):  # with scales, though the chunk is small
        for name in ("planes", "int8", "fp8"):
            base, channels, tokens, words = unscaled(frame_of(name, bits), name, 40, 24)
            text = canonical([base, channels.tolist(), tokens.tolist(), words.tolist()])
            found[name] = sha256(text)[:16]
    assert found == {"planes": "191cebeef5d40f7f", "int8": "9a9b01c7a188e52f", "fp8": "95357d05f7ceda55"}


# ----------------------------------------------------------------------------------------------------------- 4. Layers


def test_rule_4_1_says_what_the_root_says_of_layers(made):
    _, path = made
    said = json.loads((path / "zarr.json").read_bytes())["attributes"]["layer_semantics"]
    for part in (
        "embed: the decoder's input",
        "a number n: the output of decoder block n",
        "final: the last block's out",
    ):
        assert part in said


def test_rule_4_2_layers_are_in_the_order_of_the_pass(tmp_path):
    names = ["final", "10", "b", "2", "embed", "a"]
    part = Part(0, 1, tuple(names), ("text",), "none", "none", (), ())
    history = History(0, 1, 2, "float32", None, ((Sample(1, 1, 1, False),),), (part,), False)
    opened = store.open(history.write(tmp_path / "store"))
    assert list(opened.layers) == sorted(names, key=pass_order) == ["embed", "2", "10", "final", "a", "b"]
    for name in names:
        found = opened.hidden.text.sel(layer=name).values[0, :1]
        np.testing.assert_array_equal(found, history.values("hidden", "text", name, 0))


# ----------------------------------------------------------------------------------------------------------- 5. Tables

COLUMNS = "sample position slot token_id text kind word row col px1 py1 px2 py2 pos_t pos_h pos_w".split()


def table(path, kind, b):
    return pq.read_table(Path(path) / f"record/{kind}/{b:05d}.parquet").to_pylist()


def token_rows(history, n):
    """The rows of a sample's tokens, by rule 5.1."""
    slots = {True: itertools.count(), False: itertools.count()}
    rows = []
    for row in sorted(history.tokens(n).to_dicts(), key=lambda row: row["position"]):
        known = dict.fromkeys(COLUMNS) | {"sample": n, "slot": next(slots[row["kind"] == "image"])}
        rows.append(known | row)
    return rows


def test_rule_5_1_tokens_are_in_order_with_their_slots(made):
    history, path = made
    for b, block in enumerate(self_blocks(history)):
        expected = [row for n in block if not history.samples[n].aside for row in token_rows(history, n)]
        if expected:
            found = table(path, "tokens", b)
            assert found == expected and list(found[0]) == [*COLUMNS, "mark"]


def test_rule_5_1_a_slot_leads_to_the_state_of_its_token(tmp_path):
    # States that say whose they are.
    part = Part(0, 1, ("0",), ("image", "text"), "zstd", "none", (), ())
    history = History(5, 2, 1, "float32", None, ((Sample(9, 5, 1, False), Sample(3, 11, 1, False)),), (part,), False)
    path = store.create(tmp_path / "store", history.plan(part))
    with store.Writer(path) as writer, writer.block(0) as block:
        for n in (1, 0):
            tokens = history.tokens(n).sort("position")
            of = {
                kind: tokens.filter((pl.col("kind") == "image") == (kind == "image"))["position"].to_numpy()
                for kind in ("image", "text")
            }
            states = {kind: positions[None, :, None].astype(np.float32) for kind, positions in of.items()}
            block.add(n, tokens=history.tokens(n), **states)
    stock = {kind: zarr.open_array(path / "hidden" / kind, mode="r")[:] for kind in ("image", "text")}
    for row in table(path, "tokens", 0):
        kind = "image" if row["kind"] == "image" else "text"
        assert stock[kind][row["sample"], 0, row["slot"], 0] == row["position"]


def test_rule_5_1_token_tables_with_other_columns_than_those_before_are_refused(tmp_path):
    part = Part(0, 1, ("0",), ("text",), "none", "none", (), ())
    history = History(5, 2, 1, "float32", None, ((Sample(9, 5, 1, False), Sample(3, 11, 1, False)),), (part,), False)
    path = store.create(tmp_path / "store", history.plan(part))
    with store.Writer(path) as writer, pytest.raises(ValueError, match="further columns"), writer.block(0) as block:
        block.add(0, **history.given(part, 0))
        block.add(1, **history.given(part, 1) | {"tokens": history.tokens(1).drop("mark")})


def test_rule_5_2_results_take_the_place_of_planned_columns(made):
    history, path = made
    for b, block in enumerate(self_blocks(history)):
        expected = [{"sample": n, **history.results(n)} for n in block if not history.samples[n].aside]
        assert not expected or table(path, "results", b) == expected
    samples = store.open(path).samples
    if history.replaced and samples["valid"].any():
        expected = [None if sample.aside else -1.0 - n for n, sample in enumerate(history.samples)]
    else:
        expected = history.table()["x1"].to_list()
    assert samples["x1"].to_list() == expected


def test_rule_5_3_samples_count_rows_of_the_samples_table_over_all_generations(made):
    history, path = made
    found = []
    for b, block in enumerate(self_blocks(history)):
        if any(not history.samples[n].aside for n in block):
            numbers = [row["sample"] for row in table(path, "results", b)]
            assert numbers == sorted({row["sample"] for row in table(path, "tokens", b)})
            found += numbers
    assert found == [n for n, sample in enumerate(history.samples) if not sample.aside]
    assert store.open(path).samples["sample_id"].to_list() == history.ids()


# ---------------------------------------------------------------------------------------------- 6. Blocks and commits


def test_rule_6_1_blocks_are_those_of_generations_and_shards_do_not_cross_them(made):
    history, path = made
    blocks = self_blocks(history)
    found = sorted((record.get("part", 0), record["block"]) for record in commits(path))
    assert found == [(part.number, b) for part in history.parts for b in range(len(blocks))]
    for record in commits(path):
        assert set(map(int, record["set_aside"])) == {n for n in blocks[record["block"]] if history.samples[n].aside}
    for array in history.arrays().values():
        assert history.size % array["shard"][0] == 0


class Recorder:
    """What a process asks of the file system: ``sync`` and ``name`` (rename or link) and ``gone``, in order."""

    def __init__(self, path, monkeypatch):
        self.path, self.events, self.logs = Path(path), [], []
        fsync, rename, link, unlink = os.fsync, Path.rename, os.link, Path.unlink

        def traced_fsync(descriptor):
            fsync(descriptor)
            name = self.name(Path(f"/proc/self/fd/{descriptor}").readlink())
            if name.startswith("record/commits/"):
                self.logs.append((len(self.events), name, (self.path / name).read_bytes()))
            self.events.append(("sync", name))

        def traced_rename(source, target):
            named = rename(source, target)
            away = self.name(target).startswith("record/partial/")
            self.events.append(("gone", self.name(source)) if away else ("name", self.name(source), self.name(target)))
            return named

        def traced_link(source, target):
            link(source, target)
            self.events.append(("name", self.name(source), self.name(target)))

        def traced_unlink(file, **more):
            unlink(file, **more)
            self.events.append(("gone", self.name(file)))

        monkeypatch.setattr(os, "fsync", traced_fsync)
        monkeypatch.setattr(pathlib.Path, "rename", traced_rename)
        monkeypatch.setattr(os, "link", traced_link)
        monkeypatch.setattr(pathlib.Path, "unlink", traced_unlink)

    def name(self, file):
        return os.path.relpath(file, self.path)

    def gone(self, name):
        """Where in the order a file or folder was taken away, or the folder that it is in."""
        return next(
            i for i, (kind, *what) in enumerate(self.events) if kind == "gone" and f"{name}/".startswith(f"{what[0]}/")
        )

    def named(self, name):
        """Where in the order a file got its name, the last time."""
        return max(i for i, event in enumerate(self.events) if event[0] == "name" and event[2] == name)


def test_rule_6_2_every_file_is_written_aside_synced_named_and_its_folder_synced(tmp_path, monkeypatch, one):
    history, _ = one
    path = tmp_path / "traced"
    seen = Recorder(path, monkeypatch)
    history.write(path)
    with store.derive(path, "mass", ("sample", "x"), (7, 2)) as out:
        out.write(np.ones((7, 2)))
    for name in files(path):
        if name.startswith("record/commits/"):
            assert ("sync", name) in seen.events and ("sync", "record/commits") in seen.events
            continue
        (event,) = [seen.events[seen.named(name)]]
        at = seen.events.index(event)
        assert event[1].startswith("record/partial/") and ("sync", event[1]) in seen.events[:at]
        assert ("sync", str(Path(name).parent)) in seen.events[at:]
    # Folders, too, are there for good: each was made durable in its parent.
    for folder in (p for p in path.rglob("*") if p.is_dir() and "partial" not in p.parts):
        assert ("sync", seen.name(folder.parent)) in seen.events
    assert not [p for p in (path / "record/partial").rglob("*") if p.is_file()]


def test_rule_6_3_the_commit_record_is_last_and_names_every_file_with_size_and_checksum(made):
    history, path = made
    blocks, rows = self_blocks(history), rows_of(history.counts, history.size)
    for record in commits(path):
        number = record.get("part", 0)
        part, block = history.parts[number], blocks[record["block"]]
        assert set(record) == {"block", "files", "set_aside"} | ({"part"} if number else set())
        assert record["set_aside"] == {str(n): "»broken«" for n in block if history.samples[n].aside}
        for name, (size, checksum) in record["files"].items():
            data = (path / name).read_bytes()
            assert (len(data), f"{crc32c(data):08x}") == (size, checksum)
        expected = set()
        if not number and any(not history.samples[n].aside for n in block):
            expected = {f"record/{kind}/{record['block']:05d}.parquet" for kind in ("tokens", "results")}
        here = {rows[n] for n in block}
        for group, variable, _ in part.variables:
            name = f"{part.group(group)}/{variable}"
            for shard in shards(path, name):
                number_of = shard.first_row // history.arrays()[name]["shard"][0]
                covered = range(shard.first_row, shard.first_row + history.arrays()[name]["shard"][0])
                if here & set(covered):
                    expected.add("/".join([name, "c", str(number_of), "0", *map(str, shard.cell)]))
        assert set(record["files"]) == expected


def test_rule_6_3_files_are_durable_before_the_record_is_written(tmp_path, monkeypatch, one):
    history, _ = one
    path = tmp_path / "traced"
    seen = Recorder(path, monkeypatch)
    history.write(path)
    records = {}
    for at, name, data in seen.logs:
        for line in data.split(b"\n")[:-1]:
            records.setdefault((name, line), at)
    assert len(records) == len(commits(path)) == 6
    for (_, line), at in records.items():
        for file in json.loads(line)["files"]:
            named = seen.named(file)
            assert ("sync", str(Path(file).parent)) in seen.events[named:at]


def test_rule_6_4_a_torn_or_damaged_line_is_no_record(one):
    history, path = one
    log = next((path / "record/commits").glob("*.jsonl"))
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    last = json.loads(lines[-1])
    others = [p.read_bytes() for p in (path / "record/commits").glob("*.jsonl") if p != log]
    assert not any(canonical(last).encode() in other for other in others)
    for damaged in (lines[-1][:-1], lines[-1][:-9], lines[-1].replace(b'"block":', b'"blocK":'), b"\n", b"{}\n"):
        log.write_bytes(b"".join(lines[:-1]) + damaged)
        part = last.get("part", 0)
        assert last["block"] in store.pending(path, part)
        opened = store.open(path)
        valid = opened.valid_in(part)
        block = self_blocks(history)[last["block"]]
        assert not valid[block].any()
        assert bool(opened.log_problems) == damaged.endswith(b"\n")  # a line that is torn is what a kill leaves
        layer = history.parts[part].layers[0]
        assert np.isnan(opened.hidden.text.sel(layer=layer).values[block]).all()
        assert part or opened.tokens.filter(pl.col("sample").is_in(block)).collect().is_empty()
        assert not store.verify(path).ok
    log.write_bytes(whole)
    assert store.verify(path).ok


def test_rule_6_5_a_worker_holds_its_log_and_its_block_while_it_works(one, tmp_path):
    history, _ = one
    path = store.create(tmp_path / "held", history.plan(history.parts[0]))

    def locked(name):
        with (path / name).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    with store.Writer(path, "w") as writer:
        assert locked("record/commits/w.jsonl")
        with pytest.raises(store.Refusal, match="'w'"):
            store.Writer(path, "w")
        with contextlib.suppress(KeyboardInterrupt), writer.block(1):
            assert locked("record/partial/claims/0-1")
            with store.Writer(path, "v") as other:
                assert not other.claim(1) and other.claim(0)
            raise KeyboardInterrupt
        assert not (path / "record/partial/claims/0-1").exists()
    assert not locked("record/commits/w.jsonl")


def test_rule_6_5_who_changes_the_plan_is_alone(one):
    _, path = one
    claim = path / "record/partial/claims/plan"
    claim.parent.mkdir(parents=True, exist_ok=True)
    held = claim.open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as pool:
        dropping = pool.submit(store.drop, path, "hidden/text")
        with pytest.raises(TimeoutError):
            dropping.result(0.3)
        assert (path / "hidden/text").exists()
        held.close()
        dropping.result(60)
    assert not (path / "hidden/text").exists()


def test_rule_6_6_the_plan_comes_after_its_tables_and_before_the_metadata(tmp_path, monkeypatch, one):
    history, _ = one
    path = tmp_path / "traced"
    seen = Recorder(path, monkeypatch)
    part = history.parts[0]
    for change in (
        lambda: store.create(path, history.plan(part, 1)),
        lambda: store.grow(path, history.plan(part)),
        lambda: store.grow(path, history.plan(history.parts[1])),
        lambda: store.drop(path, "attention/text_to_image"),
    ):
        before = files(path) if path.exists() else {}
        seen.events.clear()
        change()
        plan = unsealed((path / "record/plan.json").read_bytes())
        at = seen.named("record/plan.json")
        written = [name for name, data in files(path).items() if before.get(name) != data]
        for name in written:
            if name.endswith(".parquet"):
                assert seen.named(name) < at and plan["samples"] in files(path)
            elif name.endswith("zarr.json") or "/c/" in name or name == "record/layout.json":
                assert at < seen.named(name) <= seen.named("zarr.json")


def test_rule_6_6_metadata_that_are_not_of_the_plan_are_completed_by_whoever_writes(one, tmp_path):
    history, _ = one
    part = history.parts[0]
    # Two states of a store, and every mixture that a kill can leave: a prefix of what is written after the plan.
    before = tmp_path / "before"
    store.create(before, history.plan(part, 1))
    after = Path(shutil.copytree(before, tmp_path / "after"))
    store.grow(after, history.plan(part))
    old, new = files(before), files(after)
    first = [name for name in new if name.endswith(".parquet") or name == "record/plan.json"]
    rest = sorted(name for name in new if name not in first and old.get(name) != new[name] and name != "zarr.json")
    for done in range(len(rest) + 1):
        torn = Path(shutil.copytree(before, tmp_path / f"torn-{done}"))
        for name in (*first, *rest[:done]):
            (torn / name).parent.mkdir(parents=True, exist_ok=True)
            (torn / name).write_bytes(new[name])
        assert store.open(torn).plan.n_samples == 7
        store.Writer(torn, "w").close()
        for name, data in new.items():
            assert (torn / name).read_bytes() == data, name


def test_rule_6_7_notes_of_runs_are_sealed_and_in_no_hash(tmp_path, one):
    history, _ = one
    path = history.write(tmp_path / "noted")
    before = store.verify(path)
    runs.note(locate(path), "0-first", {"samples": 3})
    runs.note(locate(path), "0-first", {"samples": 4})
    assert unsealed((path / "record/runs/0-first.json").read_bytes()) == {"samples": 4}
    assert store.open(path).runs == [{"samples": 4}]
    assert store.verify(path) == before
    (path / "record/runs/0-first.json").write_bytes(b"{}")
    assert store.open(path).runs == []
    assert store.verify(path).problems == ["record/runs/0-first.json is damaged: a note of a run, `repair` removes it"]
    assert store_repair(path) == before


# ----------------------------------------------------------------------------------------------------------- 7. Growth


def test_rule_7_1_growing_replaces_the_plan_and_its_metadata_and_nothing_else(one):
    history, path = one
    before = files(path)
    longer = (*history.generations, (Sample(30, 30, 9, False), Sample(1, 1, 1, False)))
    grown = dataclasses.replace(
        history,
        generations=longer,
        parts=(*history.parts, Part(2, 3, ("final",), ("image",), "none", "none", ("text_to_text",), ("1",))),
    )
    store.grow(path, grown.plan(grown.parts[0]))
    store.grow(path, grown.plan(grown.parts[2]))
    for part in grown.parts:
        grown.fill(path, part, random.Random(0))
    after = files(path)
    for name, data in before.items():
        if name.startswith("record/commits/"):
            assert after[name].startswith(data)
        elif re.search(r"zarr\.json$|/(sample|layer)/c/|(plan|layout)\.json$", name):
            assert name in after
        elif re.search(r"/samples-", name):
            assert name not in after
        else:
            assert after[name] == data, name
    plan = unsealed(after["record/plan.json"])
    assert [part["generations"] for part in plan["parts"]] == [[5, 2, 2]] * 3
    assert [part["part"] for part in plan["parts"]] == [0, 1, 2]
    for name, array in grown.arrays().items():
        assert says(path, name) == array
        np.testing.assert_array_equal(zarr.open_array(path / name, mode="r")[:], grown.expected(name))
    assert store.verify(path).ok


def test_rule_7_1_growing_by_one_sample_many_times_is_the_store_made_at_once(tmp_path):
    part = Part(0, 1, ("embed", "0"), ("image", "text"), "zstd", "none", ("text_to_text",), ("0",))
    rnd = random.Random(0)
    singles = tuple((Sample(rnd.randint(1, 9 + 3 * n), rnd.randint(1, 20), 1 + n % 3, n == 4),) for n in range(12))
    grown = History(2, 3, 3, "bfloat16", None, singles, (part,), False)
    path = grown.write(tmp_path / "grown")
    at_once = dataclasses.replace(grown, generations=(tuple(grown.samples),))
    assert store.verify(path).content_hash == store.verify(at_once.write(tmp_path / "at once")).content_hash
    for name in grown.arrays():
        np.testing.assert_array_equal(zarr.open_array(path / name, mode="r")[:], grown.expected(name))


def test_rule_7_1_a_layer_that_has_rows_gets_no_others_and_all_parts_have_the_same_heads(one):
    history, path = one
    before = files(path)
    part = dataclasses.replace(history.parts[0], attention=("text_to_image", "text_to_text"))
    with pytest.raises(store.Refusal, match="no rows text_to_text of layer 0"):
        store.grow(path, history.plan(part))
    part = dataclasses.replace(history.parts[0], attention_layers=("1",))
    with pytest.raises(store.Refusal, match=r"the mean of heads.* not 2 heads"):
        store.grow(path, dataclasses.replace(history, heads=2).plan(part))
    assert files(path) == before


def test_rule_7_2_a_derived_array_is_its_record_and_its_rows_are_those_of_samples(one):
    history, path = one
    values = np.arange(7 * 4, dtype=np.float64).reshape(7, 4)
    labels = {"head": ["a", "b", "ç", "d"]}
    with store.derive(
        path, "mass", ("sample", "head"), (7, 4), "float64", coordinates=labels, attributes={"probe": "ab"}
    ) as out:
        out.write(values[:3])
        out.write(values[3:])
        assert not list((path / "record").glob("derived/*"))
    name = "derived/mass/mass/c/0/0"
    record = unsealed((path / "record/derived/mass.json").read_bytes())
    data = (path / name).read_bytes()
    rows = rows_of(history.counts, history.size)
    assert record == {
        "name": "mass",
        "dims": ["sample", "head"],
        "shape": [rows[-1] + 1, 4],
        "chunks": [rows[-1] + 1, 4],
        "shards": [rows[-1] + 1, 4],
        "dtype": "float64",
        "attributes": {"probe": "ab"},
        "coordinates": labels,
        "samples": 7,
        "files": {name: [len(data), f"{crc32c(data):08x}"]},
        "group": "derived/mass",
    }
    document = json.loads((path / "derived/mass/mass/zarr.json").read_bytes())
    assert document["attributes"] == {"probe": "ab"} and document["fill_value"] == "NaN"
    (blosc,) = document["codecs"][0]["configuration"]["codecs"][1:]
    assert blosc["name"] == "blosc"
    assert {key: blosc["configuration"][key] for key in ("cname", "clevel", "shuffle", "typesize")} == {
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "typesize": 8,
    }
    grown = dataclasses.replace(history, generations=(*history.generations, (Sample(1, 1, 1, False),)))
    store.grow(path, grown.plan(grown.parts[0]))
    rows = rows_of(grown.counts, grown.size)
    tree = xr.open_datatree(path, engine="zarr", consolidated=False)
    expected = np.full((rows[-1] + 1, 4), np.nan)
    expected[rows[:7]] = values
    np.testing.assert_array_equal(tree["derived/mass/mass"].values, expected)
    assert tree["derived/mass"].sample.values[rows].tolist() == grown.ids()
    assert tree["derived/mass"]["head"].values.tolist() == labels["head"]
    mine = store.open(path).derived["mass"]
    np.testing.assert_array_equal(mine.values, [*values, [np.nan] * 4])
    (path / "record/derived/mass.json").unlink()
    assert not store.open(path).derived


def test_rule_7_2_a_derived_array_with_its_record_is_read_before_its_metadata_are_complete(one, tmp_path):
    _, path = one
    before = files(path)
    with store.derive(path, "mass", ("sample",), (7,)) as out:
        out.write(np.arange(7))
    whole = files(path)
    # As a kill leaves it: the record was written, and nothing after it.
    for name in whole.keys() - {"record/derived/mass.json", "derived/mass/mass/zarr.json", "derived/mass/mass/c/0"}:
        if name in before:
            (path / name).write_bytes(before[name])
        else:
            (path / name).unlink()
    assert store.open(path).derived["mass"].values.tolist() == list(range(7))
    store.Writer(path, "a").close()
    assert files(path) == {"record/commits/a.jsonl": b""} | whole


@pytest.mark.parametrize(
    ("name", "dims", "labels"),
    [
        ("sample", ("sample", "x"), {}),
        ("x", ("sample", "x"), {}),
        ("zarr.json", ("sample", "x"), {}),
        ("y", ("sample", "zarr.json"), {}),
        ("y", ("sample", "a/b"), {}),
        ("y", ("sample", "x"), {"x": ["p"]}),
        ("y", ("sample", "x"), {"sample": list("abcdefg")}),
    ],
)
def test_rule_7_2_names_and_labels_of_derived_arrays_do_not_clash(one, name, dims, labels):
    _, path = one
    with store.derive(path, "there", ("sample", "x"), (7, 2), coordinates={"x": ["p", "q"]}) as out:
        out.write(np.zeros((7, 2)))
    before = files(path)
    with pytest.raises(store.Refusal):
        store.derive(path, name, dims, (7, 2), coordinates=labels)
    assert files(path) == before and store.verify(path).ok


def test_rule_7_3_dropping_takes_an_array_out_of_the_plan_then_the_metadata_then_removes_it(one, monkeypatch):
    history, path = one
    before = {name for name in files(path) if not name.startswith("record/partial")}
    with store.derive(path, "mass", ("sample", "x"), (7, 2), coordinates={"x": ["p", "q"]}) as out:
        out.write(np.ones((7, 2)))
    seen = Recorder(path, monkeypatch)
    store.drop(path, "derived/mass")
    places = [seen.gone("record/derived/mass.json"), seen.named("zarr.json"), seen.gone("derived/mass")]
    assert places == sorted(places)
    assert set(files(path)) == before and not (path / "derived").exists()
    for name in ("hidden/text", "attention/text_to_image"):
        seen.events.clear()
        store.drop(path, name)
        places = [seen.named("record/plan.json"), seen.named("zarr.json"), seen.gone(name)]
        assert places == sorted(places)
        kind, variable = name.split("/")
        gone = {f"{part.group(kind)}/{variable}" for part in history.parts}
        assert not [file for file in files(path) if any(file.startswith(f"{one}/") for one in gone)]
        plan = unsealed((path / "record/plan.json").read_bytes())
        assert not any(variable in part["kinds" if kind == "hidden" else "attention"] for part in plan["parts"][:1])
        report = store.verify(path)
        assert report.ok, report.problems
    # Part 1 had nothing else: it keeps its number, and has no groups.
    assert [part["layers"] for part in plan["parts"]] == [["embed", "0"], []]
    assert not (path / "hidden_1").exists() and not (path / "attention").exists()
    for name in ("hidden/image",):
        np.testing.assert_array_equal(zarr.open_array(path / name, mode="r")[:], history.expected(name))
    added = Part(2, 2, ("1",), ("text",), "none", "none", (), ())
    store.grow(path, history.plan(added))
    history.fill(path, added, random.Random(0))
    np.testing.assert_array_equal(
        zarr.open_array(path / "hidden_2/text", mode="r")[:, :, :16], history.expected("hidden_1/text")[:, :, :16]
    )
    assert store.verify(path).ok and store.pending(path, 1) == []


# ----------------------------------------------------------------------------------------------------------- 8. Hashes


def test_rule_8_1_identity_and_plan_are_hashed_as_canonical_json(made):
    history, path = made
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
    plan = unsealed((path / "record/plan.json").read_bytes())
    assert attributes["identity"] == history.identity
    assert attributes["identity_hash"] == sha256(canonical(history.identity)) == store.verify(path).identity_hash
    assert attributes["plan_hash"] == sha256(canonical(plan["parts"]))


def content_hash(history):
    """Rule 8.2, from what was given."""
    content = hashlib.sha256(canonical([history.width, history.dtype]).encode())
    variables = sorted(
        (
            (group, variable, layer)
            for part in history.parts
            for group, variable, layers in part.variables
            for layer in layers
        ),
        key=lambda one: (f"{one[0]}/{one[1]}", pass_order(one[2])),
    )
    for n, sample in enumerate(history.samples):
        content.update(b"-" if sample.aside else b"+")
        for group, variable, layer in variables if not sample.aside else ():
            values = history.values(group, variable, layer, n)
            little = values.astype(values.dtype.newbyteorder("<")).tobytes()
            content.update(f"{group}/{variable} {layer}".encode() + hashlib.blake2b(little).digest())
    none = all(sample.aside for sample in history.samples)  # then there are no results, and no columns of theirs
    for n, row in enumerate(history.table().to_dicts()):
        aside = history.samples[n].aside
        found = dict.fromkeys(history.results(n)) if aside else history.results(n)
        row = row | {"valid": not aside} | ({} if none else found)
        content.update((json_line(dict(sorted(row.items()))) + "\n").encode())
    for n, sample in enumerate(history.samples):
        for row in token_rows(history, n) if not sample.aside else ():
            content.update((json_line(dict(sorted(row.items()))) + "\n").encode())
    return content.hexdigest()


def test_rule_8_2_the_content_hash_is_that_of_values_and_tables(made):
    history, path = made
    report = store.verify(path)
    assert report.ok, report.problems
    assert report.content_hash == content_hash(history)
    assert report.samples == sum(not sample.aside for sample in history.samples)


@over_histories(12)
def test_rule_8_2_the_content_hash_does_not_know_how_a_store_came_about(rnd):
    history = History.draw(rnd)
    # At once, in one part, with other blocks and codecs; where kinds of tokens or rows differ by part it cannot be.
    uniform = dataclasses.replace(
        history,
        parts=tuple(
            dataclasses.replace(
                part,
                kinds=history.parts[0].kinds,
                attention=history.parts[0].attention if part.attention_layers else (),
                attention_layers=part.attention_layers if history.parts[0].attention else (),
            )
            for part in history.parts
            if part.layers
        ),
    )
    uniform = dataclasses.replace(
        uniform, parts=tuple(dataclasses.replace(part, number=n) for n, part in enumerate(uniform.parts))
    )
    codecs = ["none", "zstd", "planes"] if history.dtype == "bfloat16" else ["none", "zstd"]
    one_part = dataclasses.replace(
        uniform.parts[0],
        layers=tuple(layer for part in uniform.parts for layer in part.layers),
        attention_layers=tuple(layer for part in uniform.parts for layer in part.attention_layers),
        codec=rnd.choice(codecs),
        text_codec=rnd.choice(codecs),
    )
    at_once = dataclasses.replace(
        uniform, generations=(tuple(uniform.samples),), parts=(one_part,), size=rnd.choice([1, 3, 5, 8])
    )
    with tempfile.TemporaryDirectory() as folder:
        reports = [
            store.verify(made.write(Path(folder) / name, rnd.randint(0, 9)))
            for name, made in (("grown", uniform), ("at once", at_once))
        ]
    assert all(report.ok for report in reports), [report.problems for report in reports]
    assert reports[0].content_hash == reports[1].content_hash == content_hash(uniform)


@over_histories(8)
def test_rule_8_2_a_copy_of_all_has_the_content_of_the_original(rnd):
    history = History.draw(rnd)
    first = history.parts[0]
    history = dataclasses.replace(
        history,
        generations=tuple(
            tuple(dataclasses.replace(sample, aside=False) for sample in generation)
            for generation in history.generations
        ),
        parts=tuple(
            dataclasses.replace(part, kinds=first.kinds, attention=part.attention and ("text_to_image",))
            for part in history.parts
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = history.write(Path(folder) / "store")
        target = store.copy(path, Path(folder) / "copy", codec="none", text_codec="zstd")
        assert store.verify(target).ok
        assert store.verify(target).content_hash == store.verify(path).content_hash == content_hash(history)


# ------------------------------------------------------------------------------------------------------- Stock readers


@pytest.fixture(scope="module", params=["none", "zstd"])
def grown(request, tmp_path_factory):
    """A store for stock readers: grown in samples, tokens and layers, with gaps and samples set aside."""
    rnd, codec = random.Random(7), request.param
    generations = tuple(
        tuple(
            Sample(rnd.randint(1, most), rnd.randint(1, most), rnd.randint(1, 5), rnd.random() < 0.2) for _ in range(n)
        )
        for n, most in ((7, 20), (3, 40))
    )
    rows = ("text_to_image", "text_to_text")
    history = History(
        seed=7,
        size=4,
        width=16,
        dtype="bfloat16",
        heads=2,
        generations=generations,
        parts=(
            Part(0, 1, ("embed", "0", "final"), ("image", "text"), codec, codec, rows, ("0", "final")),
            Part(1, 2, ("1",), ("image", "text"), codec, codec, rows, ("1",)),
        ),
        replaced=False,
    )
    return history, history.write(tmp_path_factory.mktemp("stock") / "store.zarr")


@pytest.mark.parametrize("reader", ["zarr-python", "zarrs", "tensorstore"])
def test_stock_readers_read_every_bit_and_nan_where_nothing_is(grown, reader):
    history, path = grown
    for name in history.arrays():
        if reader == "tensorstore":
            import tensorstore

            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
            array = tensorstore.open(spec, read=True).result()
            assert array.domain.labels == history.arrays()[name]["dims"]
            found, some = array.read().result(), array[2:7, ::2].read().result()
        else:
            pipeline = {
                "zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
                "zarrs": "zarrs.ZarrsCodecPipeline",
            }
            with zarr.config.set({"codec_pipeline.path": pipeline[reader]}), warnings.catch_warnings():
                # zarrs warns where it hands an array back to zarr-python.
                warnings.simplefilter("error")
                array = zarr.open_array(path / name, mode="r")
                found, some = array[:], array[2:7, ::2]
        expected = history.expected(name)
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
        assert some.tobytes() == np.ascontiguousarray(expected[2:7, ::2]).tobytes()


def test_stock_readers_and_ours_read_the_same(grown):
    import torch

    history, path = grown
    opened, rows = store.open(path), rows_of(history.counts, history.size)
    valid = [n for n, sample in enumerate(history.samples) if not sample.aside]
    for part in history.parts:
        for kind, layer in itertools.product(part.kinds, part.layers):
            states, mask = opened.read(valid, layer, kind)
            stock = zarr.open_array(path / part.group("hidden") / kind, mode="r")[:, part.layers.index(layer)]
            for i, n in enumerate(valid):
                ours = states[i, 0][mask[i]].view(torch.uint16).numpy()
                assert len(ours) == history.extent("hidden", kind, n)[0]
                np.testing.assert_array_equal(ours, stock[rows[n], : len(ours)])
    for rows_of_, layer in itertools.product(("text_to_image", "text_to_text"), ("0", "1", "final")):
        (part,) = [part for part in history.parts if layer in part.attention_layers]
        stock = zarr.open_array(path / part.group("attention") / rows_of_, mode="r")
        lazy = opened.attention[rows_of_].sel(layer=layer).values
        np.testing.assert_array_equal(lazy, stock[:][rows, part.attention_layers.index(layer)].astype(np.float32))


def test_stock_xarray_is_lazy_named_labelled_and_in_step_with_the_chunks(grown):
    import dask.array

    history, path = grown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ResourceWarning)
        tree = xr.open_datatree(path, chunks={})
        groups = {
            group: xr.open_zarr(path, group=group) for group in ("hidden", "attention", "hidden_1", "attention_1")
        }
        # By whole shards there are few tasks; nothing complains about chunks that are cut.
        shards_ = {name: says(path, name)["shard"] for name in history.arrays()}
        whole = xr.open_zarr(path, group="hidden", chunks=dict(zip(("sample", "layer"), (4, 3), strict=True)))
    assert set(tree.children) == set(groups)
    rows = rows_of(history.counts, history.size)
    for name, array in history.arrays().items():
        group, variable = name.split("/")
        for found in (groups[group][variable], tree[name]):
            assert isinstance(found.data, dask.array.Array)
            assert found.dims == array["dims"] and found.shape == array["shape"]
            assert found.encoding["chunks"] == array["inner"] and found.encoding["shards"] == array["shard"]
            assert set(found.coords) == {"sample", "layer"}
            assert found.sample.values[rows].tolist() == history.ids()
            for sizes, inner in zip(found.chunks, array["inner"], strict=True):
                assert all(start % inner == 0 for start in np.cumsum([0, *sizes[:-1]]))
            assert found.dtype == array["dtype"] and found.attrs == {"bits": array["bits"]}
        np.testing.assert_array_equal(groups[group][variable].values, history.expected(name))
    one = groups["hidden_1"].text.sel(sample="é-8", layer="1")
    values = history.values("hidden", "text", "1", 8)
    assert history.samples[8].aside or (one.values[: len(values)] == values).all()
    assert whole.text.chunks[0] == (4, 4, 3) and shards_["hidden/text"][1] == 3


def test_a_store_of_version_1_is_as_the_end_of_the_format_says(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data/format-1.zarr.zip") as packed:
        packed.extractall(tmp_path)
    path = tmp_path / "format-1.zarr"
    plan = json.loads((path / "record/plan.json").read_bytes())
    assert plan["format_version"] == 1 and "crc32c" not in plan and "plan" in plan and "parts" not in plan
    names = set(files(path))
    assert {"record/samples.parquet", "record/set_aside.parquet"} <= names
    assert not [name for name in names if "twins" in name or name == "record/layout.json"]
    for record in commits(path):
        for name, (size, checksum) in record["files"].items():
            assert (len(data := (path / name).read_bytes()), f"{crc32c(data):08x}") == (size, checksum)
    for name in ("hidden/image", "hidden/text"):
        assert list(shards(path, name))
    with mock.patch("store.plan.SHARD_BYTES", 2**29):
        assert store.verify(path).ok
