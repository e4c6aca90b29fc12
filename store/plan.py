"""Everything known before the first pass: samples, layers, extents, and the Zarr arrays that follow from them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from store.bits import BFLOAT16_NAN
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
ATTENTION = ("text_to_image", "text_to_text")


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

    The first two axes are sample and layer. A sample's values at one layer are a *unit* of shape ``shard[2:]``;
    only its first axis is ever cut into inner chunks.
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

    def shard_file(self, shard: int) -> str:
        """Path, within the store, of the shard that starts at sample ``shard * self.shard[0]``."""
        return "/".join([self.name, "c", str(shard)] + ["0"] * (len(self.shape) - 1))


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
    """Image states and attention: zstd (Blosc: byte shuffle + zstd-1, lossless) or none. Text states are raw."""
    samples_per_block: int = 64
    """Samples of a block, the unit of work and of commit."""
    estimated_ratio: float = field(default=1.4, repr=False)
    """Compression of zstd on bfloat16 states that estimates rely on (measured: 1.44)."""

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
        for name in counts:
            least = self.samples[name].min() if not self.samples[name].null_count() else None
            if least is None or least < 1:
                raise Refusal(f"the column {name} holds {least}: every planned sample needs a count of at least 1")
        for name, value, known in (
            ("dtype", self.dtype, ("bfloat16", "float32")),
            ("codec", self.codec, ("zstd", "none")),
        ):
            if value not in known:
                raise Refusal(f"{name} {value!r} is not known: choose one of {', '.join(known)}")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise Refusal(f"kinds {self.kinds} must name at least one of {', '.join(KINDS)}")
        unknown = [name for name in self.attention if name not in ATTENTION]
        if unknown or bool(self.attention) != bool(self.attention_layers):
            raise Refusal(
                f"attention {self.attention} at {self.attention_layers}: name both rows of {ATTENTION} and layers"
            )
        for name in ("layers", "attention_layers"):
            if len(set(getattr(self, name))) != len(getattr(self, name)) or not self.layers:
                raise Refusal(f"{name} {getattr(self, name)} must name at least one layer, each once")

    @property
    def n_samples(self) -> int:
        """Number of planned samples."""
        return self.samples.height

    @property
    def n_blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.n_samples // self.samples_per_block)

    def block(self, b: int) -> range:
        """Sample indices of block ``b``."""
        if not 0 <= b < self.n_blocks:
            raise IndexError(f"block {b} is not one of the {self.n_blocks} planned blocks")
        return range(b * self.samples_per_block, min((b + 1) * self.samples_per_block, self.n_samples))

    def counts(self, name: str) -> dict[str, np.ndarray]:
        """Per ragged dimension of array ``name`` the extent of every sample, int64 ``[s]``."""
        column = "n_image" if name.endswith("image") else "n_text"
        ragged = {"token": self.samples[column].to_numpy().astype(np.int64)}
        if name.startswith("attention/"):
            ragged["query"] = self.samples["n_query"].to_numpy().astype(np.int64)
        return ragged

    def rows(self, name: str) -> np.ndarray:
        """Rows of a unit that are written, int64 ``[s]``: the sample's tokens; attention units are whole."""
        if name.startswith("attention/"):
            return np.full(self.n_samples, self.arrays[name].unit[0], np.int64)
        return self.counts(name)["token"]

    def _array(
        self,
        name: str,
        dims: tuple[str, ...],
        layers: tuple[str, ...],
        unit: tuple[int, ...],
        rows: int,
        dtype: str,
        codec: str,
        tokens: int,
    ) -> ArrayPlan:
        bits = dtype
        dtype = "uint16" if dtype == "bfloat16" else dtype
        sample_bytes = len(layers) * math.prod(unit) * np.dtype(dtype).itemsize
        fitting = max(1, SHARD_BYTES // sample_bytes)
        per_shard = max(
            n for n in range(1, self.samples_per_block + 1) if self.samples_per_block % n == 0 and n <= fitting
        )
        # Arrays of one group share the dimension `token`, and xarray demands one size for it. Both get the larger
        # extent while each keeps its own shard extent: the shards past it are never written and cost nothing.
        return ArrayPlan(
            name=name,
            dims=dims,
            layers=layers,
            shape=(
                self.n_samples,
                len(layers),
                *(tokens if dim == "token" else n for dim, n in zip(dims[2:], unit, strict=True)),
            ),
            inner=(1, 1, rows, *unit[1:]),
            shard=(per_shard, len(layers), *unit),
            dtype=dtype,
            codec=codec,
            bits=bits,
        )

    @cached_property
    def arrays(self) -> dict[str, ArrayPlan]:
        """The Zarr arrays by name."""
        most = {
            name: int(self.samples[name].max())
            for name in self.samples.columns
            if name in ("n_image", "n_text", "n_query")
        }
        extent = {name: -(-count // TEXT_CHUNK) * TEXT_CHUNK for name, count in most.items()}
        tokens = max(extent["n_image"], extent["n_text"])
        arrays = {}
        for kind in self.kinds:
            codec = self.codec if kind == "image" else "none"
            unit = (extent[f"n_{kind}"], self.width)
            # A compressed unit is one chunk (Blosc wants long runs, and padding compresses to nothing).
            rows = TEXT_CHUNK if codec == "none" else unit[0]
            arrays[f"hidden/{kind}"] = self._array(
                f"hidden/{kind}",
                ("sample", "layer", "token", "width"),
                self.layers,
                unit,
                rows,
                self.dtype,
                codec,
                tokens,
            )
        for name in self.attention:
            heads = () if self.attention_heads is None else (self.attention_heads,)
            unit = (*heads, most["n_query"], extent["n_image" if name.endswith("image") else "n_text"])
            dims = ("sample", "layer", *(("head",) if heads else ()), "query", "token")
            arrays[f"attention/{name}"] = self._array(
                f"attention/{name}", dims, self.attention_layers, unit, unit[0], "float16", self.codec, tokens
            )
        return arrays

    def bytes_raw(self, among: np.ndarray | None = None) -> dict[str, int]:
        """Bytes of the real values of every array, no padding, no compression; of samples ``among`` (bool ``[s]``)."""
        among = np.ones(self.n_samples, bool) if among is None else among
        return {
            name: int(math.prod(self.counts(name).values())[among].sum())
            * len(array.layers)
            * (self.width if name.startswith("hidden/") else self.attention_heads or 1)
            * np.dtype(array.dtype).itemsize
            for name, array in self.arrays.items()
        }

    def bytes_estimate(self) -> dict[str, int]:
        """Bytes on disk to expect of every array (padding and compression in), for dry runs and the disk check."""
        estimate = {}
        for name, raw in self.bytes_raw().items():
            array = self.arrays[name]
            padded = int((-(-self.rows(name) // array.inner[2])).sum()) * len(array.layers) * array.chunk_bytes
            index = self.n_samples * len(array.layers) * array.chunks_per_unit * 16
            # Attention is promised no gain: how well it compresses depends on the model.
            ratio = self.estimated_ratio if name.startswith("hidden/") else 1.0
            estimate[name] = index + (padded if array.codec == "none" else int(raw / ratio))
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
        names = (
            "layers",
            "width",
            "dtype",
            "kinds",
            "attention",
            "attention_layers",
            "attention_heads",
            "codec",
            "samples_per_block",
        )
        fields = {name: getattr(self, name) for name in names}
        return json.loads(canonical_json(fields | {"n_samples": self.n_samples, "samples_hash": self.samples_hash}))

    @cached_property
    def plan_hash(self) -> str:
        """The sha256 (hex) of the plan without its identity."""
        return hash_json(self.describe())

    @classmethod
    def restore(cls, described: Mapping[str, Any], samples: pl.DataFrame, identity: Mapping[str, Any]) -> "Plan":
        """The plan of which ``described`` is the description."""
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in described.items()}
        del given["n_samples"], given["samples_hash"]
        return cls(samples=samples, identity=identity, **given)
