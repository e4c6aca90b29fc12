"""The VLM's own attention rows with the tokens that they are of, in batches whose memory is bounded.

A row is what one text token (a query) gives to the picture's tokens, or to the text's, at one block. Shape suffixes:
``s`` sample of a batch, ``l`` block, ``q`` query, ``t`` token of the picture, ``x`` token of the text, ``n`` row of
the token table.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from store.errors import Refusal
from store.plan import Plan, depth
from store.reader import Store

BATCH_BYTES = 96 * 2**20
"""Attention rows, as float32, that are held at once."""
PIXELS = ("px1", "py1", "px2", "py2")
DIMS = ("query", "token")
TO_IMAGE, TO_TEXT = "text_to_image", "text_to_text"


@dataclass(frozen=True)
class Rows:
    """Attention rows of some samples, and what their tokens are.

    Attributes
    ----------
    samples_s
        Rows of the samples table, int64.
    layers
        Names of the blocks, in the order of the pass.
    image_slqt
        float32, mean over heads, 0 past a sample's queries and tokens, NaN where the store has no value.
    text_slqx
        The same at the text's tokens, or null where not asked for.
    slot_sq
        Slot on the text's token axis of each query's token, -1 past a sample's queries.
    instruction_sq
        Which queries are tokens of the instruction (the others are of the template), bool.
    pixels_st4
        Box of each image token in pixels of the source picture, xyxy; NaN past a sample's tokens, and for tokens that
        stand for no part of the picture.
    """

    samples_s: np.ndarray
    layers: tuple[str, ...]
    image_slqt: np.ndarray
    text_slqx: np.ndarray | None
    slot_sq: np.ndarray
    instruction_sq: np.ndarray
    pixels_st4: np.ndarray


def blocks_with_rows(opened: Store) -> tuple[str, ...]:
    """Names of the blocks whose rows at the picture are kept, in the order of the pass.

    Raises
    ------
    Refusal
        When none is.
    """
    layers = {name for part in opened.parts for name in _array_layers(part, TO_IMAGE)}
    if not layers:
        raise Refusal(
            f"{opened.place} keeps no attention rows at the picture: extract it with --attention mean --keys all"
        )
    return tuple(sorted(layers, key=depth))


def keeps_text_rows(opened: Store) -> bool:
    """Whether rows at the text's tokens are kept for all blocks that have rows at the picture's."""
    layers = {name for part in opened.parts for name in _array_layers(part, TO_TEXT)}
    return layers >= set(blocks_with_rows(opened))


def read_rows(opened: Store, samples: np.ndarray, text: bool = False) -> Iterator[Rows]:
    """Rows of named valid samples at all blocks that have some, batch by batch in the order given.

    Parameters
    ----------
    opened
        A store with attention rows, averaged over heads or per head.
    samples
        Rows of the samples table, ascending.
    text
        Read the rows at the text's tokens, too.

    Raises
    ------
    Refusal
        When there are no such rows, or the token table has another number of tokens than rows were kept of.
    """
    layers = blocks_with_rows(opened)
    counts = {name: opened.samples[name].to_numpy() for name in ("n_query", "n_image", "n_text")}
    tokens = _token_table(opened, samples)
    held = counts["n_query"] * (counts["n_image"] + counts["n_text"] * text) * len(layers) * 4
    # Read as float16 and masked: about three copies for a moment.
    together = max(1, BATCH_BYTES // (3 * max(1, int(held[samples].max(initial=1)))))
    for start in range(0, len(samples), together):
        samples_s = samples[start : start + together]
        queries, images, texts = (int(counts[name][samples_s].max()) for name in ("n_query", "n_image", "n_text"))
        image_slqt = _read(opened, TO_IMAGE, layers, samples_s, (queries, images))
        text_slqx = _read(opened, TO_TEXT, layers, samples_s, (queries, texts)) if text else None
        slot_sq, instruction_sq, pixels_st4 = _places(opened, tokens, samples_s, queries, images)
        yield Rows(samples_s, layers, image_slqt, text_slqx, slot_sq, instruction_sq, pixels_st4)


def _array_layers(part: Plan, rows_of: str) -> tuple[str, ...]:
    """Blocks of a part whose rows of a kind are kept."""
    array = part.arrays.get(f"{part.group('attention')}/{rows_of}")
    return array.layers if array is not None else ()


def _read(
    opened: Store, rows_of: str, layers: tuple[str, ...], samples_s: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Rows of a kind, float32 (s, l, *shape), by the direct reader: the lazy arrays read one layer a task."""
    out_slqt = np.full((len(samples_s), len(layers), *shape), np.nan, np.float32)
    for part in opened.parts:
        held = _array_layers(part, rows_of)
        there_s = np.flatnonzero(opened.valid_in(part.part)[samples_s])
        if not held or not there_s.size:
            continue
        name = f"{part.group('attention')}/{rows_of}"
        array = part.arrays[name]
        bits = np.zeros((there_s.size, len(held), *array.unit), array.dtype)
        opened.reader(name).read_into(bits, samples_s[there_s], range(len(held)))
        if "head" in array.dims:
            bits = bits.mean(axis=2, dtype=np.float32)
        # What lies past a unit is past every sample's tokens.
        size = tuple(min(wanted, kept) for wanted, kept in zip(shape, bits.shape[2:], strict=True))
        for j, layer in enumerate(held):
            out_slqt[there_s, layers.index(layer), : size[0], : size[1]] = bits[:, j, : size[0], : size[1]]
    count = opened.plan.counts(f"attention/{rows_of}")
    past_sq, past_st = (np.arange(n) >= count[dim][samples_s][:, None] for n, dim in zip(shape, DIMS, strict=True))
    np.copyto(out_slqt, 0, where=past_sq[:, None, :, None] | past_st[:, None, None, :])
    return out_slqt


def _token_table(opened: Store, samples: np.ndarray) -> pl.DataFrame:
    """What is needed of the tokens of some samples: instruction tokens with their number, image tokens' boxes."""
    wanted = opened.tokens.filter(pl.col("sample").is_in(samples.tolist()), pl.col("kind") != "template")
    return wanted.select("sample", "kind", "slot", *PIXELS).collect().sort("sample", "slot", maintain_order=True)


def _places(
    opened: Store, tokens: pl.DataFrame, samples_s: np.ndarray, queries: int, images: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``slot_sq``, ``instruction_sq`` and ``pixels_st4`` of a batch, see `Rows`."""
    first, last = np.searchsorted(tokens["sample"].to_numpy(), [samples_s[0], samples_s[-1] + 1]).tolist()
    mine = tokens[first:last].filter(pl.col("sample").is_in(samples_s.tolist()))
    told, seen = (mine.filter(pl.col("kind") == kind) for kind in ("instruction", "image"))
    n_query_s = opened.samples["n_query"].to_numpy()[samples_s]
    slot_sq = np.full((len(samples_s), queries), -1)
    instruction_sq = np.zeros((len(samples_s), queries), bool)
    at_n, slot_n = np.searchsorted(samples_s, told["sample"].to_numpy()), told["slot"].to_numpy()
    if opened.identity.get("queries", "instruction") == "prompt":
        # All text tokens have rows: a query's number is its slot.
        every_q = np.arange(queries)
        slot_sq[:] = np.where(every_q < n_query_s[:, None], every_q, -1)
        kept_n = slot_n < queries
        instruction_sq[at_n[kept_n], slot_n[kept_n]] = True
    else:
        told_s = np.bincount(at_n, minlength=len(samples_s))
        if (wrong := np.flatnonzero(told_s != n_query_s)).size:
            at = int(wrong[0])
            raise Refusal(
                f"sample {opened.samples['sample_id'][int(samples_s[at])]!r} of {opened.place} has rows of "
                f"{n_query_s[at]} tokens and {told_s[at]} instruction tokens: see `python -m store verify`"
            )
        number_n = np.arange(len(at_n)) - np.repeat(np.cumsum(told_s) - told_s, told_s)
        slot_sq[at_n, number_n] = slot_n
        instruction_sq[at_n, number_n] = True
    pixels_st4 = np.full((len(samples_s), images, 4), np.nan, np.float32)
    at_n = np.searchsorted(samples_s, seen["sample"].to_numpy())
    pixels_st4[at_n, seen["slot"].to_numpy()] = seen.select(PIXELS).to_numpy().astype(np.float32)
    return slot_sq, instruction_sq, pixels_st4
