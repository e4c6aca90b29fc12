"""The token table: one row a kept token, tied to its place in ``hidden/image`` or ``hidden/text`` by ``slot``."""

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


def conform(tokens: pl.DataFrame, sample: int, n_image: int, n_text: int) -> pl.DataFrame:
    """A sample's tokens with the table's columns and dtypes; ``sample`` and ``slot`` are filled in.

    Slots count the image tokens, and all others, each in the order of ``position``.

    Raises
    ------
    ValueError
        When ``position`` or ``kind`` is missing, or the kinds do not add up to the planned counts.
    """
    lacking = {"position", "kind"} - set(tokens.columns)
    if lacking:
        raise ValueError(f"the token table of sample {sample} lacks the columns {', '.join(sorted(lacking))}")
    image = pl.col("kind") == "image"
    n_found = tokens.select(image.sum()).item()
    if (n_found, tokens.height - n_found) != (n_image, n_text):
        raise ValueError(
            f"the token table of sample {sample} has {n_found} image and {tokens.height - n_found} other tokens, "
            f"and {n_image} and {n_text} were planned"
        )
    slot = pl.int_range(pl.len()).over(image)
    tokens = tokens.sort("position").with_columns(sample=pl.lit(sample), slot=slot)
    absent = [pl.lit(None).alias(name) for name in TOKEN_SCHEMA if name not in tokens.columns]
    tokens = tokens.with_columns(absent)
    extra = [name for name in tokens.columns if name not in TOKEN_SCHEMA]
    return tokens.select(*(pl.col(name).cast(dtype) for name, dtype in TOKEN_SCHEMA.items()), *extra)
