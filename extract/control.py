"""Control stores: the ordinary samples with one thing taken away, so that what is left can be told from it."""

import numpy as np
import polars as pl

from store.errors import Refusal

CONTROL_SEED = 0
"""Of the drawn weights and of who is shown whose picture; it stands in the identity of a control's store."""

SHOWN = "shown"
"""Column of the samples table: the sample whose picture a sample was shown."""

OF_PICTURE = ("width", "height", "n_image", "image_crc32c", "file", "row")
"""What the samples table says of the picture; all else is said of the sample."""


def derange(groups: np.ndarray, draw: np.random.Generator) -> np.ndarray | None:
    """For each place another one, so that every place is taken once and none by its own group; null if that cannot be.

    Places are put into random order, those of one group beside each other, and each takes the one that is as far
    ahead as the largest group is long.

    Parameters
    ----------
    groups
        Which group each place belongs to, ``[s]``.
    """
    order = draw.permutation(len(groups))
    _, first, group, sizes = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    if not len(sizes) or 2 * sizes.max() > len(groups):
        return None
    order = order[np.argsort(first[group], kind="stable")]
    taken = np.empty(len(groups), np.int64)
    taken[order] = np.roll(order, -int(sizes.max()))
    return taken


def show_others(samples: pl.DataFrame, seed: int = CONTROL_SEED) -> pl.DataFrame:
    """The planned samples, each shown the picture of another sample of its split.

    ``sample_id``, instruction, split and what the data brought stay. The picture's size, tokens and place become those
    of the picture that is shown, the box keeps its shares of the picture, and ``shown`` names the picture's own
    sample. Equal pictures (of several instructions for one) are never shown for each other. Rows stay in order.

    Raises
    ------
    Refusal
        A split has too few pictures for each of its samples to be shown another one.
    """
    shown = np.empty(samples.height, np.int64)
    splits, draw = samples["split"].to_numpy(), np.random.default_rng(seed)
    for split in sorted(set(splits.tolist())):
        members = np.flatnonzero(splits == split)
        taken = derange(samples["image_crc32c"].to_numpy()[members], draw)
        if taken is None:
            raise Refusal(
                f"--control shuffled-images: the {len(members)} samples of the split {split!r} have too few different "
                "pictures for each to be shown another one; take more data or a larger --limit"
            )
        shown[members] = members[taken]
    pictures = samples[shown]
    scale = {axis: pictures[side] / samples[side] for axis, side in (("x", "width"), ("y", "height"))}
    boxes = [(samples[name] * scale[name[0]]).cast(pl.Float32).alias(name) for name in ("x1", "y1", "x2", "y2")]
    # Data may bring a column of that name themselves.
    samples = samples.rename({SHOWN: f"data_{SHOWN}"}, strict=False)
    return samples.with_columns(*(pictures[name] for name in OF_PICTURE), *boxes, pictures["sample_id"].alias(SHOWN))
