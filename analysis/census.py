"""One pass over the attention mass of every sample: ranks, layers, and what each head is for; then the vote on l*.

The mass of a layer is what a proxy's query gives to all its tokens, ``A[h, q, l] = Σ_i a[h, q, l, i]`` [ABP §5]. The
array may be larger than memory: it is read once, block by block, and what is kept of a sample is what the vote needs.

Shape suffixes: ``p`` part (0 the choosing split, 1 the reporting split), ``s`` sample, ``h`` head, ``q`` query,
``k`` rank, ``l`` layer.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr

from analysis.blocks import over_blocks
from store.errors import Refusal

DIMS = ("sample", "head", "query", "layer")
PARTS = (0, 1)
"""Choosing and reporting."""

NONE = 255
"""Favourite layer of a head of a sample without attention."""

MEMORY_BYTES = 512 * 2**20
"""Masses summed over queries that are larger lie in an unnamed file, not in memory."""

PIECE_BYTES = 512 * 1024
"""Samples are taken together up to this much of float32, so that all steps of a piece find it in the cache."""

VOTE_BYTES = 64 * 2**20
"""Masses that are read at a time for the vote."""

_HALF_INFINITY = np.uint16(0x7C00)
_INFINITY = np.uint32(0x7F800000)


@dataclass(frozen=True, eq=False)
class Census:
    """What one pass over the masses found; a sample without attention, or with some of it missing, counts nowhere."""

    heads: tuple[str, ...]
    layers: tuple[str, ...]
    ranked_phqk: np.ndarray
    """float64: mean over the samples of a part of the masses sorted from largest to smallest, so that rank replaces
    layer identity [ABP §5]. NaN in a part without samples."""
    layered_phql: np.ndarray
    """float64: mean mass by layer."""
    count_p: np.ndarray
    """int64: samples with attention."""
    favourite_sh: np.ndarray
    """uint8: the layer with most mass over all queries, the lowest if several have it; ``NONE`` where none."""
    drop_sh: np.ndarray
    """float32: mean over queries of the largest mass less the second; NaN where none. Its mean over the samples of a
    part and a head's queries is that of rank 1 less rank 2."""
    summed_shl: np.ndarray
    """float32: mass summed over queries; NaN where none. In a file if large."""


@dataclass(frozen=True, eq=False)
class Votes:
    """The vote of decisive heads on where a sample's signal is, ``l* = mode{l*_h}`` [ABP §5]."""

    l_star_s: np.ndarray
    """int16: the layer most heads are for; among several the one with most mass over those heads, then the lowest.
    -1 without attention, or without decisive heads."""
    tied_s: np.ndarray
    """bool: whether several layers had as many votes."""
    votes_s: np.ndarray
    """int16: heads that are for it; 0 where none."""
    entropy_s: np.ndarray
    """float64: bits of the distribution of votes, 0 where all agree; NaN where none."""
    counts_sl: np.ndarray
    """int16: votes by layer."""


@dataclass(frozen=True, eq=False)
class _Tally:
    """What one block of samples adds."""

    ranked_phqk: np.ndarray
    layered_phql: np.ndarray
    count_p: np.ndarray
    favourite_sh: np.ndarray
    drop_sh: np.ndarray
    summed_shl: np.ndarray


def census(
    mass: xr.DataArray,
    parts_s: np.ndarray,
    *,
    dask: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Census:
    """Read the masses of all samples once.

    Blocks are the array's chunks along ``sample``; partial sums are float64 and added in the order of blocks, so the
    result is the same to the bit for any number of threads, and on a cluster.

    Parameters
    ----------
    mass
        Lazy ``A[sample, head, query, layer]``, any float dtype; NaN where a sample has no attention. A sum over tokens
        is NaN there with ``sum("token", min_count=1)`` only.
    parts_s
        int8: 0 for samples of the choosing split, 1 of the reporting split, -1 of neither.
    dask, threads, progress
        As of ``over_blocks``.

    Raises
    ------
    Refusal
        When the masses are of one layer only, or of more than 255, or one is negative.
    """
    if mass.dims != DIMS or parts_s.shape != mass.shape[:1]:
        raise ValueError(f"masses are {mass.dims} {mass.shape} and parts {parts_s.shape}: give {DIMS} and parts [s]")
    n, *shape_hql = mass.shape
    n_heads, _, n_layers = shape_hql
    if not 2 <= n_layers <= NONE:
        raise Refusal(
            f"the masses of {mass.name} are of {n_layers} layers: ranks need 2 to {NONE}; ask a proxy that reads "
            "several layers together"
        )
    totals = {name: np.zeros((len(PARTS), *shape_hql)) for name in ("ranked_phqk", "layered_phql")}
    count_p = np.zeros(len(PARTS), np.int64)
    favourite_sh, drop_sh = np.empty((n, n_heads), np.uint8), np.empty((n, n_heads), np.float32)
    summed = _Rows((n, n_heads, n_layers))
    work = partial(_tally, np.asarray(parts_s, np.int8))
    for block_s, tally in over_blocks(work, mass, dask=dask, threads=threads, progress=progress, label="masses"):
        for name, total_phql in totals.items():
            total_phql += getattr(tally, name)
        count_p += tally.count_p
        favourite_sh[block_s], drop_sh[block_s] = tally.favourite_sh, tally.drop_sh
        summed.append(tally.summed_shl)
    with np.errstate(invalid="ignore"):
        means = {name: total_phql / count_p[:, None, None, None] for name, total_phql in totals.items()}
    labels = (
        tuple(map(str, mass[dim].values if dim in mass.coords else range(mass.sizes[dim]))) for dim in ("head", "layer")
    )
    return Census(*labels, **means, count_p=count_p, favourite_sh=favourite_sh, drop_sh=drop_sh, summed_shl=summed())


class _Rows:
    """An array float32 that is written from its first sample to its last: in memory, or in a file if it is large.

    The file has no name, so that it is gone with the array however the program ends.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self._written = shape, 0
        small = 4 * np.prod(shape, dtype=np.int64) <= MEMORY_BYTES
        self._memory = np.empty(shape, np.float32) if small else None
        self._file = None if small else tempfile.TemporaryFile()  # noqa: SIM115 - the array keeps it

    def append(self, rows: np.ndarray) -> None:
        """The next samples."""
        if self._file:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
        else:
            self._memory[self._written : self._written + len(rows)] = rows
        self._written += len(rows)

    def __call__(self) -> np.ndarray:
        """The array, read-only if it is in a file."""
        if not self._file:
            return self._memory
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=self.shape)


def _tally(parts_s: np.ndarray, mass_shql: np.ndarray, block_s: slice) -> _Tally:
    n, *shape_hql = mass_shql.shape
    n_heads, _, n_layers = shape_hql
    parts_s = parts_s[block_s]
    found = _Tally(
        np.zeros((len(PARTS), *shape_hql))[..., ::-1],  # sums come from the smallest rank to the largest
        np.zeros((len(PARTS), *shape_hql)),
        np.zeros(len(PARTS), np.int64),
        np.full((n, n_heads), NONE, np.uint8),
        np.full((n, n_heads), np.nan, np.float32),
        np.full((n, n_heads, n_layers), np.nan, np.float32),
    )
    for part, members_s in _pieces(parts_s, 4 * int(np.prod(shape_hql))):
        floats_shql = _as_float32(mass_shql[members_s])
        summed_shl = np.einsum("shql->shl", floats_shql)  # in the order of queries, as `sum` does, in half the time
        # Masses are not negative, so that what is missing cannot cancel.
        there_s = np.isfinite(summed_shl).all((1, 2))
        if not there_s.all():
            members_s, floats_shql, summed_shl = members_s[there_s], floats_shql[there_s], summed_shl[there_s]
            if not len(members_s):
                continue
        found.summed_shl[members_s] = summed_shl
        found.favourite_sh[members_s] = summed_shl.argmax(-1)
        if part in PARTS:
            found.count_p[part] += len(members_s)
            found.layered_phql[part] += floats_shql.sum(0)
        _sort(floats_shql)
        found.drop_sh[members_s] = (floats_shql[..., -1] - floats_shql[..., -2]).mean(-1)
        if part in PARTS:
            rising_hqk = found.ranked_phqk[part, ..., ::-1]
            rising_hqk += floats_shql.sum(0)
    return found


def _pieces(parts_s: np.ndarray, sample_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Samples that fit into the cache together, all of one part."""
    together = max(1, PIECE_BYTES // sample_bytes)
    for part in (*PARTS, -1):
        members_s = np.flatnonzero(parts_s == part)
        for start in range(0, len(members_s), together):
            yield part, members_s[start : start + together]


def _as_float32(values: np.ndarray) -> np.ndarray:
    """A copy as float32; NumPy itself takes several times as long for float16 as these steps, which are exact."""
    if values.dtype == np.float16:
        words = np.ascontiguousarray(values).view(np.uint16)
        if words.max() < _HALF_INFINITY:  # finite, and no sign
            # Exponent and mantissa go where float32 has them; the exponents count from 15 there and from 127 here.
            widened = words.astype(np.uint32)
            widened <<= np.uint32(13)
            floats = widened.view(np.float32)
            floats *= np.float32(2.0**112)
            return floats
    return values.astype(np.float32)


def _sort(mass_shql: np.ndarray) -> None:
    """Sort finite masses along the last axis in place, from smallest to largest.

    Raises
    ------
    Refusal
        When one is negative.
    """
    # Bits of floats without a sign rise as they do, and sort faster.
    words = mass_shql.view(np.uint32)
    words.sort(-1)
    if words[..., -1].max() > _INFINITY:
        if (least := mass_shql.min()) < 0:
            raise Refusal(f"a mass is {least:.3g}: attention cannot be negative, so these are no masses")
        np.abs(mass_shql, out=mass_shql)  # negative zeros
        words.sort(-1)


def votes(census: Census, decisive_h: np.ndarray) -> Votes:
    """The vote of decisive heads in every sample; samples are read in blocks.

    Parameters
    ----------
    census
        Of all samples.
    decisive_h
        bool: which heads vote.
    """
    n, n_heads, n_layers = census.summed_shl.shape
    if decisive_h.shape != (n_heads,) or decisive_h.dtype != bool:
        raise ValueError(f"decisive heads are {decisive_h.dtype} {decisive_h.shape}: give bool [{n_heads}]")
    found = Votes(
        np.full(n, -1, np.int16),
        np.zeros(n, bool),
        np.zeros(n, np.int16),
        np.full(n, np.nan),
        np.zeros((n, n_layers), np.int16),
    )
    heads = np.flatnonzero(decisive_h)
    if not len(heads):
        return found
    together = max(1, VOTE_BYTES // (4 * n_heads * n_layers))
    for start in range(0, n, together):
        block_s = slice(start, start + together)
        favourite_sh = census.favourite_sh[block_s][:, heads]
        there_s = np.flatnonzero(favourite_sh[:, 0] != NONE)
        if not len(there_s):
            continue
        place_sh = favourite_sh[there_s] + np.arange(len(there_s))[:, None] * n_layers
        counts_sl = np.bincount(place_sh.ravel(), minlength=len(there_s) * n_layers).reshape(-1, n_layers)
        mass_sl = census.summed_shl[block_s][:, heads].sum(1, dtype=np.float64)[there_s]
        most_s = counts_sl.max(1)
        leading_sl = counts_sl == most_s[:, None]
        share_sl = counts_sl / len(heads)
        bits_sl = share_sl * np.log2(share_sl, out=np.zeros_like(share_sl), where=share_sl > 0)
        rows_s = start + there_s
        found.l_star_s[rows_s] = np.where(leading_sl, mass_sl, -np.inf).argmax(1)
        found.tied_s[rows_s] = leading_sl.sum(1) > 1
        found.votes_s[rows_s] = most_s
        found.entropy_s[rows_s] = 0.0 - bits_sl.sum(1)
        found.counts_sl[rows_s] = counts_sl
    return found
