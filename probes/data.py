"""What a run reads from the store: the scenes with a true box, and batches of their states.

Shape suffixes: ``s`` sample, ``b`` batch, ``l`` VLM layer, ``t`` token, ``w`` VLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from store.errors import Refusal
from store.plan import hash_json

PIECE = 256
"""Samples read from the store at once while states are taken into memory."""

KINDS = ("image", "text")


@dataclass(frozen=True, eq=False)
class Scenes:
    """The usable samples of a store, and their true boxes. ``train``, ``watch`` and ``rest`` index ``samples``."""

    samples: np.ndarray
    """Position in the store, int64 (s,)."""
    boxes_s4: np.ndarray
    """True box as corners in [0, 1] of the image, float32."""
    sizes_s2: np.ndarray
    """Width and height of the image in pixels, float32."""
    train: np.ndarray
    """Rows of the train split."""
    watch: np.ndarray
    """Rows of the test split on which the error is followed and a layer may be chosen."""
    rest: np.ndarray
    """All other rows of the test split; nothing is chosen by them."""

    @property
    def test(self) -> np.ndarray:
        """Rows of the whole test split."""
        return np.concatenate([self.watch, self.rest])

    def describe(self) -> dict[str, Any]:
        """JSON-able: how many samples, and a hash of which and with what boxes."""
        parts = {name: self.samples[getattr(self, name)].tolist() for name in ("train", "watch", "rest")}
        counts = {name: len(rows) for name, rows in parts.items()}
        return counts | {"hash": hash_json(parts | {"boxes": self.boxes_s4.tolist()})}


def scenes(store: Any, watch: int) -> Scenes:
    """The samples of ``store`` that are valid and have a true box.

    At most half of the test split is watched, so that there is always a rest that chose nothing.

    Raises
    ------
    Refusal
        When the store has no boxes, or none in one of its splits.
    """
    table = store.samples.with_row_index("position")
    lacking = [name for name in ("x1", "y1", "x2", "y2") if name not in table.columns]
    if not lacking:
        known = pl.all_horizontal(pl.col("x1", "y1", "x2", "y2").is_not_null())
        valid = pl.col("valid").fill_null(False) if "valid" in table.columns else pl.lit(True)
        table = table.filter(known & valid)
    if lacking or table.is_empty():
        raise Refusal("the store holds no sample with a true box (x1, y1, x2, y2): there is nothing to learn")
    rows = {name: np.flatnonzero((table["split"] == name).to_numpy()) for name in ("train", "test")}
    for name, found in rows.items():
        if len(found) < 2:
            raise Refusal(f"{len(found)} samples with a true box are in split {name!r}: both train and test need some")
    # The store may be sorted by task, so the watched images are drawn, always the same.
    test = np.random.default_rng(0).permutation(rows["test"])
    watched = min(watch, len(test) // 2)
    sizes_s2 = table.select("width", "height").to_numpy().astype(np.float32)
    boxes_s4 = table.select("x1", "y1", "x2", "y2").to_numpy().astype(np.float32) / np.tile(sizes_s2, 2)
    positions = table["position"].to_numpy().astype(np.int64)
    return Scenes(positions, boxes_s4, sizes_s2, rows["train"], np.sort(test[:watched]), np.sort(test[watched:]))


class States:
    """Hidden states of the scenes at some layers: held in memory if they fit, else read batch by batch.

    Parameters
    ----------
    store : Store
        What is read.
    samples : ndarray of int, (s,)
        Positions in the store; ``batch`` takes rows of this.
    layers : sequence of str
        Layers by name.
    kinds : sequence of str
        ``image``, ``text`` or both; image tokens come first.
    memory : float
        Bytes that may be held.
    """

    def __init__(self, store: Any, samples: np.ndarray, layers: Sequence[str], kinds: Sequence[str], memory: float):
        self.store, self.samples, self.layers, self.kinds = store, samples, list(layers), list(kinds)
        self.held: Tensor | None = None
        if bytes_of(store, len(samples), kinds) * len(layers) > memory:
            return
        pieces = np.array_split(np.arange(len(samples)), -(-len(samples) // PIECE))
        for rows in pieces:
            states_bltw, masks = self._read(rows)
            if self.held is None:
                self.held = states_bltw.new_empty(len(samples), *states_bltw.shape[1:])
                self.held_masks = {kind: mask.new_empty(len(samples), mask.shape[1]) for kind, mask in masks.items()}
            self.held[rows[0] : rows[-1] + 1] = states_bltw
            for kind, mask in masks.items():
                self.held_masks[kind][rows[0] : rows[-1] + 1] = mask

    def _read(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """States (b, l, t, w) and a mask (b, t) per kind; all batches are padded to the same t."""
        parts, masks = [], []
        for kind in self.kinds:
            states, mask = self.store.read(self.samples[rows], self.layers, kind)
            missing = longest(self.store, kind) - mask.shape[1]
            parts.append(torch.nn.functional.pad(states, (0, 0, 0, missing)))
            masks.append(torch.nn.functional.pad(mask, (0, missing)))
        tokens = [mask.shape[1] for mask in masks]
        by_kind = {}
        for i, kind in enumerate(self.kinds):
            by_kind[kind] = torch.nn.functional.pad(masks[i], (sum(tokens[:i]), sum(tokens[i + 1 :])))
        return torch.cat(parts, dim=2), by_kind | {"all": torch.cat(masks, dim=1)}

    def batch(self, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """States of ``rows`` in the store's dtype (b, l, t, w), and bool masks (b, t) by ``Spec.tokens``."""
        if self.held is None:
            return self._read(rows)
        index = torch.from_numpy(rows)
        return self.held[index], {kind: mask[index] for kind, mask in self.held_masks.items()}


def longest(store: Any, kind: str) -> int:
    """Tokens of this kind in the sample that has the most."""
    return int(store.samples[f"n_{kind}"].max())


def bytes_of(store: Any, n: int, kinds: Sequence[str]) -> int:
    """Bytes that one layer of ``n`` samples takes in memory, padding included."""
    tokens = sum(longest(store, kind) for kind in kinds)
    return n * tokens * store.plan.width * (2 if store.plan.dtype == "bfloat16" else 4)
