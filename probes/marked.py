"""Prompt tokens that a probe is trained without: derived arrays mark them, so that who chooses them needs no probe.

Shape suffixes: ``s`` sample, ``t`` token.
"""

import hashlib
from typing import Any

import numpy as np

from store.errors import Refusal

DIMS = ("sample", "token")


def marks(opened: Any, name: str) -> np.ndarray:
    """A derived array over the prompt's slots (s, t): not zero at tokens that are left out, NaN where nothing is known.

    Raises
    ------
    Refusal
        When the store has none of this name, or it is of other dimensions.
    """
    if name not in opened.derived:
        there = [other for other, array in opened.derived.items() if array.dims == DIMS]
        raise Refusal(
            f"--without {name}: {opened.place} has no derived array of that name; over (sample, token) it has "
            f"{', '.join(there) or 'none'}"
        )
    array, longest = opened.derived[name], int(opened.plan.samples["n_text"].max())
    if array.dims != DIMS or array.sizes["token"] < longest:
        sizes = ", ".join(f"{dim} {size}" for dim, size in array.sizes.items())
        raise Refusal(
            f"--without {name}: derived/{name} in {opened.place} is over ({sizes}), and what marks prompt tokens is "
            f"over (sample, token) with {longest} tokens or more"
        )
    return array.values.astype(np.float32)


def describe(opened: Any, name: str) -> dict[str, Any]:
    """What such an array says of itself, and a hash of which tokens it leaves out; JSON-able."""
    digest = hashlib.sha256((marks(opened, name) != 0).tobytes()).hexdigest()
    return {"name": name, "hash": digest, "attributes": dict(opened.derived[name].attrs)}


def unmarked(
    places_st: np.ndarray, counts_s: np.ndarray, marks_st: np.ndarray, n_image_s: np.ndarray, n_text_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places (s, t) and counts (s,) of the tokens that are not marked; none of a sample of which nothing is known.

    Parameters
    ----------
    places_st, counts_s
        Tokens among a sample's states (image, then text), as ``data.Source.slots`` gives them.
    marks_st
        As ``marks`` gives them.
    """
    slots = np.arange(marks_st.shape[1])
    known_s = ~(np.isnan(marks_st) & (slots < n_text_s[:, None])).any(1)
    inside_st = np.arange(places_st.shape[1]) < counts_s[:, None]
    slot_st = places_st - n_image_s[:, None]
    text_st = inside_st & (slot_st >= 0)
    marked_st = text_st & (np.take_along_axis(marks_st, np.where(text_st, slot_st, 0), 1) != 0)
    kept_st = inside_st & ~marked_st & known_s[:, None]
    counts_s = kept_st.sum(1)
    order_st = np.argsort(~kept_st, axis=1, kind="stable")[:, : counts_s.max(initial=0)]
    return np.take_along_axis(places_st, order_st, 1), counts_s
