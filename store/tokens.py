"""The token table: one row a kept token, tied to its place in ``hidden/image`` or ``hidden/text`` by ``slot``."""

from collections.abc import Sequence

import numpy as np
import polars as pl

TOKEN_SCHEMA = {
    "sample": pl.Int64,  # row of the samples table
    "position": pl.Int32,  # place in the model's input sequence
    "slot": pl.Int32,  # index on the token axis of hidden/image (kind image) or hidden/text (all other kinds)
    "token_id": pl.Int32,
    "text": pl.String,
    "kind": pl.String,  # image, instruction, template …
    "word": pl.Int32,  # index of the instruction's word
    "row": pl.Int32,  # grid cell of an image token
    "col": pl.Int32,
    "px1": pl.Float32,  # its box in pixels of the source image
    "py1": pl.Float32,
    "px2": pl.Float32,
    "py2": pl.Float32,
    "pos_t": pl.Int32,  # the three position ids
    "pos_h": pl.Int32,
    "pos_w": pl.Int32,
}


def check(tokens: pl.DataFrame, sample: int, n_image: int, n_text: int) -> None:
    """Refuse a sample's tokens that cannot be those of its states.

    Raises
    ------
    ValueError
        When ``position`` or ``kind`` is missing, or the kinds do not add up to the planned counts.
    """
    lacking = {"position", "kind"} - set(tokens.columns)
    if lacking:
        raise ValueError(f"the token table of sample {sample} lacks the columns {', '.join(sorted(lacking))}")
    n_found = int((tokens["kind"] == "image").sum())
    if (n_found, tokens.height - n_found) != (n_image, n_text):
        raise ValueError(
            f"the token table of sample {sample} has {n_found} image and {tokens.height - n_found} other tokens, "
            f"and {n_image} and {n_text} were planned"
        )


def conform(tables: dict[int, pl.DataFrame]) -> pl.DataFrame:
    """The token tables of a block's samples as one, in the order of samples and positions.

    ``sample`` and ``slot`` are filled in; slots count the image tokens, and all others, each in the order of
    ``position``. Columns that are missing are null, others are kept.
    """
    samples = np.repeat(list(tables), [table.height for table in tables.values()])
    both = pl.concat(tables.values(), how="diagonal_relaxed").with_columns(sample=pl.Series(samples, dtype=pl.Int64))
    both = both.sort("sample", "position", maintain_order=True)
    image = pl.col("kind") == "image"
    both = both.with_columns(slot=pl.int_range(pl.len()).over("sample", image))
    both = both.with_columns(pl.lit(None).alias(name) for name in TOKEN_SCHEMA if name not in both.columns)
    extra = [name for name in both.columns if name not in TOKEN_SCHEMA]
    return both.select(*(pl.col(name).cast(dtype) for name, dtype in TOKEN_SCHEMA.items()), *extra)


def words_of(tokens: pl.LazyFrame, samples: pl.DataFrame, words: Sequence[str]) -> pl.LazyFrame:
    """The tokens of some words of the instructions, compared without case and punctuation at their ends.

    ``word`` of the token table counts the words of the column ``instruction`` of the samples table, as white space
    parts them.
    """
    wanted = pl.Series([plain_word(word) for word in words], dtype=pl.String)
    spoken = pl.col("instruction").str.extract_all(r"\S+")
    found = samples.lazy().select(sample=pl.int_range(pl.len(), dtype=pl.Int64), spoken=spoken)
    found = found.with_columns(word=pl.int_ranges(pl.col("spoken").list.len(), dtype=pl.Int32)).explode(
        "spoken", "word"
    )
    found = found.filter(pl.col("spoken").str.strip_chars(PUNCTUATION).str.to_lowercase().is_in(wanted.implode()))
    return tokens.join(found.select("sample", "word"), on=["sample", "word"], how="semi")


def plain_word(word: str) -> str:
    """A word without case, and without punctuation at its ends."""
    return word.strip(PUNCTUATION).lower()


PUNCTUATION = ".,;:!?\"'()[]"
