"""Everything known before the first pass: samples, layers, extents, and the Zarr arrays that follow from them."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from store.bits import BFLOAT16_NAN
from store.codecs import CODECS
from store.errors import Refusal

TEXT_CHUNK = 8
"""Tokens in an inner chunk of uncompressed states: padding costs 1.11x instead of 2.1x on ragged prompts."""

SHARD_BYTES = 512 * 2**20
"""A shard holds at most this much, uncompressed: the memory of a writer and the unit of a rewrite."""

LAYER_SEMANTICS = (
    "embed: the decoder's input (token and image embeddings); a number n: the output of decoder block n, counted "
    "from 0; final: the last block's output after the final norm. Beware of hidden_states[i], whose entry 0 is the "
    "embedding: block n is its entry n + 1, and its last entry is after the final norm."
)

KINDS = ("image", "text")
COUNTS = ("n_image", "n_text", "n_query")
ATTENTION = ("text_to_image", "text_to_text")
ESTIMATED_RATIO = {"zstd": 1.4, "planes": 1.43, "int8": 2.0, "fp8": 2.0}
"""Compression of bfloat16 states that estimates rely on; a little under what was measured."""

DESCRIBED = (
    "part",
    "layers",
    "width",
    "dtype",
    "kinds",
    "attention",
    "attention_layers",
    "attention_heads",
    "codec",
    "text_codec",
    "samples_per_block",
)
"""Fields of a plan that its description holds as they are."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(value: Any) -> str:
    """The sha256 (hex) of ``canonical_json``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def rows_as_bytes(table: pl.DataFrame) -> bytes:
    """The rows of a table as JSON lines: what is hashed, so that parquet's own versions do not matter."""
    return table.write_ndjson().encode() if table.height else b""


@dataclass(frozen=True)
class ArrayPlan:
    """One Zarr array of the store; see FORMAT.md.

    The first two axes are sample and layer (derived arrays may have another second axis). A sample's values at one
    layer are a *unit* of shape ``shard[2:]``; only its first axis is ever cut into inner chunks. A sample that is
    longer than the unit, as growth may bring, goes on in further units: the next cells of the Zarr grid.
    """

    name: str
    dims: tuple[str, ...]
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    inner: tuple[int, ...]
    shard: tuple[int, ...]
    dtype: str
    codec: str
    bits: str

    @property
    def fill(self) -> float | int:
        """What is missing reads as this: NaN, in the array's own bits."""
        return BFLOAT16_NAN if self.dtype == "uint16" else math.nan

    @property
    def unit(self) -> tuple[int, ...]:
        """Shape of one sample at one layer, padded."""
        return self.shard[2:]

    @property
    def chunks_per_unit(self) -> int:
        """Inner chunks of one sample at one layer."""
        return self.shard[2] // self.inner[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a unit (one token of hidden states)."""
        return math.prod(self.unit[1:]) * np.dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before compression."""
        return self.row_bytes * self.inner[2]

    def units(self, extents: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """The units that values of shape ``extents`` (axes 2 …) fill: place in the grid, and slices of the values."""
        counts = [-(-n // size) for n, size in zip(extents, self.unit, strict=True)]
        for cell in itertools.product(*map(range, counts)):
            yield (
                cell,
                tuple(
                    slice(i * size, min((i + 1) * size, n)) for i, size, n in zip(cell, self.unit, extents, strict=True)
                ),
            )

    def shard_file(self, shard: int, cell: Sequence[int] = ()) -> str:
        """Path, within the store, of the shard of rows ``shard * self.shard[0]`` … at a cell of the unit's grid."""
        cell = tuple(cell) or (0,) * len(self.unit)
        return "/".join([self.name, "c", str(shard), "0", *map(str, cell)])


@dataclass(frozen=True, eq=False)
class Plan:
    """What a store will hold, complete before the first pass.

    Raises
    ------
    Refusal
        When a column is missing, a ``sample_id`` repeats, or a count is not positive.
    """

    layers: tuple[str, ...]
    """Layers of hidden states by name, e.g. ``("embed", "0", …, "27", "final")``."""
    width: int
    """Width of a hidden state."""
    samples: pl.DataFrame
    """One row a sample, in store order: sample_id, n_image, n_text, split (and n_query if attention is kept) …"""
    identity: Mapping[str, Any]
    """JSON-able: everything that determines the bytes (weights, processor, template, kernel, versions …)."""
    dtype: str = "bfloat16"
    """Hidden states as computed: bfloat16 (kept as its bits, uint16) or float32."""
    kinds: tuple[str, ...] = KINDS
    """Whose hidden states are kept: image tokens, all others (text), or both."""
    attention: tuple[str, ...] = ()
    """Attention rows to keep: any of text_to_image, text_to_text."""
    attention_layers: tuple[str, ...] = ()
    """Decoder blocks whose attention rows are kept."""
    attention_heads: int | None = None
    """Heads kept apart; None averages over them."""
    codec: str = "zstd"
    """Image states: none, zstd (lossless, any Zarr reader), planes (lossless, smaller, needs this package), int8 or
    fp8 (lossy, need this package). Attention is zstd unless this is none."""
    text_codec: str = "none"
    """Text states: as ``codec``. They are small and read most, so they are raw by default."""
    samples_per_block: int = 64
    """Samples of a block, the unit of work and of commit."""
    generations: tuple[int, ...] = ()
    """Samples that were planned together, in order: one count, and one more each time the store grew."""
    extents: Mapping[str, int] = field(default_factory=dict)
    """Rows of a unit by count column, fixed when the part is planned; the longest sample's if not given."""
    part: int = 0
    """0 as created; layers that were added later are parts 1, 2 …, in Zarr groups of their own."""

    def __post_init__(self) -> None:
        counts = ["n_image", "n_text"] + (["n_query"] if self.attention else [])
        lacking = [name for name in ["sample_id", "split", *counts] if name not in self.samples.columns]
        if lacking:
            raise Refusal(f"the samples table lacks the columns {', '.join(lacking)}: it has {self.samples.columns}")
        if self.samples.is_empty():
            raise Refusal("the samples table is empty: a store needs at least one sample")
        if self.samples["sample_id"].is_duplicated().any():
            twice = self.samples["sample_id"].filter(self.samples["sample_id"].is_duplicated())[0]
            raise Refusal(f"sample_id {twice!r} comes twice: ids name samples, make them unique")
        if self.samples["sample_id"].dtype != pl.String or (self.samples["sample_id"].fill_null("") == "").any():
            # The empty string is the label of rows that no sample has.
            raise Refusal("sample_id holds something that is no string, or an empty one: give every sample a name")
        for name in counts:
            least = self.samples[name].min() if not self.samples[name].null_count() else None
            if least is None or least < 1:
                raise Refusal(f"the column {name} holds {least}: every planned sample needs a count of at least 1")
        for name, value, known in (
            ("dtype", self.dtype, ("bfloat16", "float32")),
            ("codec", self.codec, CODECS),
            ("text_codec", self.text_codec, CODECS),
        ):
            if value not in known:
                raise Refusal(f"{name} {value!r} is not known: choose one of {', '.join(known)}")
        if self.dtype != "bfloat16" and (needy := {self.codec, self.text_codec} - {"none", "zstd"}):
            raise Refusal(
                f"codec {needy.pop()!r} is for bfloat16 states and these are {self.dtype}: choose zstd or none"
            )
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise Refusal(f"kinds {self.kinds} must name at least one of {', '.join(KINDS)}")
        unknown = [name for name in self.attention if name not in ATTENTION]
        if unknown or bool(self.attention) != bool(self.attention_layers):
            raise Refusal(
                f"attention {self.attention} at {self.attention_layers}: name both rows of {ATTENTION} and layers"
            )
        for name in ("layers", "attention_layers"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise Refusal(f"{name} {getattr(self, name)} must name each layer once")
        # A part that was added keeps its number when all of its arrays are dropped.
        if not (self.layers or self.attention_layers or self.part):
            raise Refusal("neither layers nor attention_layers name a layer: a store needs at least one")
        if self.samples_per_block < 1:
            raise Refusal(f"samples_per_block {self.samples_per_block} must be at least 1")
        if sum(self.generations or (self.n_samples,)) != self.n_samples:
            raise Refusal(f"generations {self.generations} do not add up to the {self.n_samples} planned samples")

    @property
    def n_samples(self) -> int:
        """Number of planned samples."""
        return self.samples.height

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """Sample indices of every block. The last block of a generation may be short."""
        found, start, size = [], 0, self.samples_per_block
        for count in self.generations or (self.n_samples,):
            found += [range(first, min(first + size, start + count)) for first in range(start, start + count, size)]
            start += count
        return tuple(found)

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block(self, b: int) -> range:
        """Sample indices of block ``b``."""
        if not 0 <= b < self.n_blocks:
            raise IndexError(f"block {b} is not one of the {self.n_blocks} planned blocks")
        return self.blocks[b]

    @cached_property
    def rows(self) -> np.ndarray:
        """Index on the arrays' first axis of every sample, int64 ``[s]``.

        Block ``b`` begins at row ``b * samples_per_block``. A block that growth found short leaves rows unused, so
        that nothing that is there has to be written again.
        """
        size = self.samples_per_block
        return np.concatenate([np.arange(len(block)) + b * size for b, block in enumerate(self.blocks)])

    @property
    def n_rows(self) -> int:
        """Extent of the arrays' first axis."""
        return int(self.rows[-1]) + 1

    def counts(self, name: str) -> dict[str, np.ndarray]:
        """Per ragged dimension of array ``name`` the extent of every sample, int64 ``[s]``."""
        column = "n_image" if name.endswith("image") else "n_text"
        ragged = {"token": self._count(column)}
        if name.startswith("attention"):
            ragged = {"query": self._count("n_query")} | ragged
        return ragged

    def _count(self, column: str) -> np.ndarray:
        return self.samples[column].to_numpy().astype(np.int64)

    def extent(self, name: str, sample: int) -> tuple[int, ...]:
        """Shape of a sample's real values at one layer of array ``name``."""
        array, counts = self.arrays[name], self.counts(name)
        return tuple(
            int(counts[dim][sample]) if dim in counts else size
            for dim, size in zip(array.dims[2:], array.unit, strict=True)
        )

    def group(self, kind: str) -> str:
        """Zarr group of ``hidden`` or ``attention`` of this part."""
        return kind if self.part == 0 else f"{kind}_{self.part}"

    @cached_property
    def unit_extents(self) -> dict[str, int]:
        """Rows of a unit by count column: the longest sample's, rounded up to whole text chunks (queries are not)."""
        if self.extents:
            return dict(self.extents)
        most = {name: int(self.samples[name].max()) for name in COUNTS if name in self.samples.columns}
        return {name: n if name == "n_query" else round_up(n) for name, n in most.items()}

    def _array(
        self, name: str, dims: tuple[str, ...], unit: tuple[int, ...], rows: int, dtype: str, codec: str, tokens: int
    ) -> ArrayPlan:
        layers = self.layers if name.startswith("hidden") else self.attention_layers
        stored = "uint16" if dtype == "bfloat16" else dtype
        sample_bytes = len(layers) * math.prod(unit) * np.dtype(stored).itemsize
        # Arrays of one group share the dimension `token`, and xarray demands one size for it. Both get the larger
        # extent while each keeps its own shard extent: the shards past it are never written and cost nothing.
        longest = {"token": tokens} | {dim: int(n.max()) for dim, n in self.counts(name).items() if dim == "query"}
        extents = (max(longest.get(dim, n), n) for dim, n in zip(dims[2:], unit, strict=True))
        return ArrayPlan(
            name=name,
            dims=dims,
            layers=layers,
            shape=(self.n_rows, len(layers), *extents),
            inner=(1, 1, rows, *unit[1:]),
            shard=(samples_per_shard(sample_bytes, self.samples_per_block), len(layers), *unit),
            dtype=stored,
            codec=codec,
            bits=dtype,
        )

    @cached_property
    def arrays(self) -> dict[str, ArrayPlan]:
        """The Zarr arrays by name."""
        extent = self.unit_extents
        tokens = max(round_up(int(self.samples[name].max())) for name in ("n_image", "n_text"))
        tokens = max(tokens, extent["n_image"], extent["n_text"])
        arrays = {}
        for kind in self.kinds if self.layers else ():
            codec = self.codec if kind == "image" else self.text_codec
            unit = (extent[f"n_{kind}"], self.width)
            # A compressed unit is one chunk: entropy coding wants long runs, and padding compresses to nothing.
            rows = TEXT_CHUNK if codec == "none" else unit[0]
            name = f"{self.group('hidden')}/{kind}"
            arrays[name] = self._array(
                name, ("sample", "layer", "token", "width"), unit, rows, self.dtype, codec, tokens
            )
        for rows_of in self.attention:
            heads = () if self.attention_heads is None else (self.attention_heads,)
            unit = (*heads, extent["n_query"], extent["n_image" if rows_of.endswith("image") else "n_text"])
            dims = ("sample", "layer", *(("head",) if heads else ()), "query", "token")
            name = f"{self.group('attention')}/{rows_of}"
            codec = "none" if self.codec == "none" else "zstd"
            arrays[name] = self._array(name, dims, unit, unit[0], "float16", codec, tokens)
        return arrays

    def bytes_raw(self, among: np.ndarray | None = None) -> dict[str, int]:
        """Bytes of the real values of every array, no padding, no compression; of samples ``among`` (bool ``[s]``)."""
        among = np.ones(self.n_samples, bool) if among is None else among
        return {
            name: int(math.prod(self.counts(name).values())[among].sum())
            * len(array.layers)
            * (self.width if name.startswith("hidden") else self.attention_heads or 1)
            * np.dtype(array.dtype).itemsize
            for name, array in self.arrays.items()
        }

    def bytes_estimate(self) -> dict[str, int]:
        """Bytes on disk to expect of every array (padding and compression in), for dry runs and the disk check."""
        estimate = {}
        for name, raw in self.bytes_raw().items():
            array = self.arrays[name]
            index = self.n_samples * len(array.layers) * array.chunks_per_unit * 16
            if array.codec == "none":
                tokens = self.counts(name)["token"] if name.startswith("hidden") else array.unit[0]
                padded = np.broadcast_to(-(-tokens // array.inner[2]), self.n_samples).sum()
                estimate[name] = index + int(padded) * len(array.layers) * array.chunk_bytes
            else:
                # Attention is promised no gain: how well it compresses depends on the model.
                ratio = ESTIMATED_RATIO[array.codec] if name.startswith("hidden") else 1.0
                estimate[name] = index + int(raw / ratio)
        return estimate

    @cached_property
    def identity_hash(self) -> str:
        """The sha256 (hex) of the identity."""
        return hash_json(dict(self.identity))

    @cached_property
    def samples_hash(self) -> str:
        """The sha256 (hex) of the samples table: column names, dtypes and rows."""
        schema = {name: str(dtype) for name, dtype in self.samples.schema.items()}
        return hashlib.sha256(canonical_json(schema).encode() + rows_as_bytes(self.samples)).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The plan as JSON-able data; the samples table by its size and hash."""
        fields = {name: getattr(self, name) for name in DESCRIBED} | {
            "generations": self.generations or (self.n_samples,),
            "extents": self.unit_extents,
            "n_samples": self.n_samples,
            "samples_hash": self.samples_hash,
        }
        return json.loads(canonical_json(fields))

    @classmethod
    def restore(cls, described: Mapping[str, Any], samples: pl.DataFrame, identity: Mapping[str, Any]) -> "Plan":
        """The plan of which ``described`` is the description; format 1 described less."""
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
        del given["n_samples"], given["samples_hash"]
        return cls(samples=samples, identity=identity, **given)


def hash_parts(parts: Sequence[Plan]) -> str:
    """The sha256 (hex) of what the parts of a store describe, without its identity."""
    return hash_json([part.describe() for part in parts])


def samples_per_shard(sample_bytes: int, samples_per_block: int) -> int:
    """The largest divisor of a block's samples whose shard stays under ``SHARD_BYTES``; 1 if none does."""
    fitting = max(1, SHARD_BYTES // max(1, sample_bytes))
    return max(n for n in range(1, samples_per_block + 1) if samples_per_block % n == 0 and n <= fitting)


def round_up(n: int) -> int:
    """``n`` rounded up to whole text chunks."""
    return -(-n // TEXT_CHUNK) * TEXT_CHUNK


def depth(layer: str) -> tuple[int, int, str]:
    """A sort key that puts layer names in the order of the pass: embed, 0, 1, …, final, then all others."""
    return (
        {"embed": 0, "final": 2}.get(layer, 1 if layer.isdecimal() else 3),
        int(layer) if layer.isdecimal() else 0,
        layer,
    )
