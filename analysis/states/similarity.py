"""How alike layers are: linear CKA of every two layers, unbiased in the number of images, by kind of token.

CKA (Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019) is a ratio of HSICs; each HSIC
is the unbiased estimator of Song et al. (*Feature Selection via Dependence Maximization*, 2012), averaged over
minibatches before the ratio is taken (Nguyen et al., *Do Wide and Deep Networks Learn the Same Things?*, 2021).

Shape suffixes: ``n`` image, ``l`` layer, ``w`` width, ``v`` view, ``m`` minibatch, ``x`` pair of images of a minibatch.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from analysis.states.norms import KINDS, of_kinds
from probes import statistics

VIEWS = ("image", "instruction", "last")
"""One row an image: the mean image token, the mean instruction token, the last instruction token."""
NAMES = {"image": "image tokens, mean", "instruction": "instruction tokens, mean", "last": "last instruction token"}

MINIBATCH = 32
"""Images of a minibatch: the estimator needs four, and more minibatches tell more of the error."""
SMALLEST = 4


class Views:
    """The rows of some layers that are compared, filled batch by batch: samples × layers × 3 × width floats."""

    def __init__(self, samples: int, layers: int, width: int):
        self.rows_nlvw = np.full((samples, layers, len(VIEWS), width), np.nan, np.float32)

    def add(self, states_bltw: Tensor, kinds_bt: Tensor, samples: slice) -> None:
        """Add a batch: float32 states, their tokens' kinds (places in ``norms.KINDS``), and which samples they are."""
        places = [KINDS.index(kind) for kind in VIEWS[:2]]
        counts_bv = torch.stack([(kinds_bt == k).sum(1) for k in places], dim=1)
        # A sample without such tokens is 0 / 0, which is NaN: it has no row.
        means_blvw = of_kinds(states_bltw, kinds_bt)[:, :, places] / counts_bv[:, None, :, None]
        self.rows_nlvw[samples, :, :2] = means_blvw.numpy()
        spoken_bt = kinds_bt == KINDS.index("instruction")
        last_b = (spoken_bt * torch.arange(spoken_bt.shape[1])).argmax(1)
        last_blw = states_bltw[torch.arange(len(last_b)), :, last_b]
        found_b = spoken_bt.any(1)[:, None, None]
        self.rows_nlvw[samples, :, VIEWS.index("last")] = torch.where(found_b, last_blw, torch.nan).numpy()

    def of(self, view: str) -> np.ndarray:
        """The rows of a view, (n, l, w); NaN where a sample has no such token."""
        return self.rows_nlvw[:, :, VIEWS.index(view)]


def minibatches(known_n: np.ndarray) -> list[np.ndarray]:
    """The known images in their order, cut into minibatches; a rest of fewer than half joins the last one."""
    places = np.flatnonzero(known_n)
    count = max(1, round(len(places) / MINIBATCH))
    return [part for part in np.array_split(places, count) if len(part) >= SMALLEST]


def centred(rows_nw: np.ndarray) -> np.ndarray:
    """The U-centred Gram matrix (n, n), float64, its diagonal 0 (Székely & Rizzo 2014).

    The unbiased HSIC of two is the sum of their products over n (n − 3) [Song et al. 2012, eq. 5]. NaN throughout if
    all rows are the same: such a layer is like no other.
    """
    n = len(rows_nw)
    rows_nw = rows_nw.astype(np.float64)
    apart_nw = rows_nw - rows_nw.mean(0)
    if np.abs(apart_nw).max() <= 1e-6 * np.abs(rows_nw).max():
        return np.full((n, n), np.nan)
    gram_nn = apart_nw @ apart_nw.T
    np.fill_diagonal(gram_nn, 0)
    sums_n = gram_nn.sum(0) / (n - 2)
    gram_nn += sums_n.sum() / (n - 1) - sums_n[:, None] - sums_n[None]
    np.fill_diagonal(gram_nn, 0)
    return gram_nn


class Grams:
    """Centred Gram matrices of every layer in minibatches of one view; memory is layers × images × MINIBATCH."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.parts: list[np.ndarray] | None = None
        self._grams: list[list[np.ndarray]] = []

    def add(self, layers: Sequence[str], rows_nlw: np.ndarray) -> None:
        """Add layers; all are given the same images."""
        if self.parts is None:
            self.parts = minibatches(np.isfinite(rows_nlw[:, 0, 0]))
        for place, layer in enumerate(layers):
            self.layers.append(layer)
            self._grams.append([centred(rows_nlw[part, place]) for part in self.parts])

    @property
    def images(self) -> int:
        """Images that are compared."""
        return sum(map(len, self.parts or ()))

    def cka(self, shuffle: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CKA of every two layers and the ends of its 95 % interval, each (l, l), NaN where a layer does not vary.

        The interval is Student's t on the jackknife over minibatches; NaN with fewer than two.

        Parameters
        ----------
        shuffle
            A seed: the images of the second layer are in another order in each minibatch. What is left is 0 but for
            chance, the floor.
        """
        generator = np.random.default_rng(shuffle)
        hsic_mll, own_mll = [], []
        for m, part in enumerate(self.parts or ()):
            order = generator.permutation(len(part)) if shuffle is not None else np.arange(len(part))
            one_lx = np.stack([grams[m].ravel() for grams in self._grams])
            other_lx = np.stack([grams[m][np.ix_(order, order)].ravel() for grams in self._grams])
            scale = len(part) * (len(part) - 3)
            hsic_mll.append(one_lx @ other_lx.T / scale)
            own_mll.append(np.square(one_lx).sum(1) / scale)
        if not hsic_mll:
            return (np.full((len(self.layers),) * 2, np.nan),) * 3
        hsic_mll, own_ml = np.stack(hsic_mll), np.stack(own_mll)
        count = len(hsic_mll)
        value_ll = _ratio(hsic_mll.sum(0), own_ml.sum(0))
        if count < 2:
            return value_ll, np.full_like(value_ll, np.nan), np.full_like(value_ll, np.nan)
        without_mll = np.stack(
            [_ratio(hsic_mll.sum(0) - hsic, own_ml.sum(0) - own) for hsic, own in zip(hsic_mll, own_ml, strict=True)]
        )
        error_ll = np.sqrt((count - 1) / count * np.square(without_mll - without_mll.mean(0)).sum(0))
        reach_ll = float(statistics.student(np.array(count - 1))) * error_ll
        return value_ll, np.maximum(value_ll - reach_ll, -1), np.minimum(value_ll + reach_ll, 1)


def _ratio(hsic_ll: np.ndarray, own_l: np.ndarray) -> np.ndarray:
    scale_l = np.sqrt(np.where(own_l > 0, own_l, np.nan))
    return hsic_ll / scale_l[:, None] / scale_l[None]


def table(grams: dict[str, Grams], seed: int, source: str) -> pl.DataFrame:
    """All pairs of all views, tidy: ``source, view, a, b, labels (true or shuffled), value, low, high, images``."""
    parts = []
    for view, one in grams.items():
        for labels, shuffle in (("true", None), ("shuffled", seed)):
            value_ll, low_ll, high_ll = one.cka(shuffle)
            size = len(one.layers)
            pairs = {"a": np.repeat(one.layers, size), "b": np.tile(one.layers, size)}
            ends = {"value": value_ll.ravel(), "low": low_ll.ravel(), "high": high_ll.ravel()}
            parts.append(pl.DataFrame(pairs | ends).with_columns(pl.col("value", "low", "high").fill_nan(None)))
            said = {"source": source, "view": view, "labels": labels}
            parts[-1] = parts[-1].select(*(pl.lit(text).alias(name) for name, text in said.items()), pl.all())
            parts[-1] = parts[-1].with_columns(images=pl.lit(one.images, pl.Int64))
    return pl.concat(parts)


def steps(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs of blocks that follow each other, of one source and view, in the order of the pass."""
    layers = [layer for layer in pairs["a"].unique(maintain_order=True) if layer.isdecimal()]
    following = pl.DataFrame({"a": layers[:-1], "b": layers[1:]}, schema={"a": pl.String, "b": pl.String})
    return following.join(pairs, on=["a", "b"], how="inner", maintain_order="left")


def answer(found: pl.DataFrame) -> str:
    """What the table says in words: how far the first layer is from the last, and where the largest step is."""
    said = []
    for view, name in NAMES.items():
        pairs = found.filter(view=view, labels="true", source="store").drop_nulls("value")
        shuffled = found.filter(view=view, labels="shuffled", source="store").drop_nulls("value")
        if pairs["a"].n_unique() < 2:
            continue
        layers = pairs["a"].unique(maintain_order=True).to_list()
        whole = pairs.filter(a=layers[0], b=layers[-1]).row(0, named=True)
        line = f"{name[0].upper() + name[1:]}: CKA of {layers[0]} and {layers[-1]} is {_ends(whole)}{_step(pairs)}"
        drawn = found.filter(view=view, labels="true", source="random-weights").drop_nulls("value")
        if (low := drawn.sort("value").head(1)).height:
            row = low.row(0, named=True)
            line += f"; random weights, the least alike are {row['a']} and {row['b']}, {_ends(row)}"
        floor = shuffled["value"].abs().max()
        said.append(f"{line}; images shuffled, at most {floor:.2f} either way; n = {whole['images']:,} images.")
    return " ".join(said) or "No two layers vary over enough images to be compared."


def _ends(row: dict) -> str:
    low, high = ("?" if row[end] is None else f"{row[end]:.2f}" for end in ("low", "high"))
    return f"{row['value']:.2f} [{low}, {high}]"


def _step(pairs: pl.DataFrame) -> str:
    found = steps(pairs).sort("value")
    if found.is_empty():
        return ""
    row = found.row(0, named=True)
    return f"; the largest step from block to block is from {row['a']} to {row['b']}, {_ends(row)}"
