"""What a probe may be asked for: the edited object's box, its grid cell, or any column of the sample table.

Shape suffixes: ``s`` sample, ``p`` probe, ``b`` batch, ``o`` output.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from probes import boxes
from store.errors import Refusal

BOX = ("x1", "y1", "x2", "y2")
MOST_CLASSES = 64
"""A column of words with more values than this is no class target: most would have no example."""
MOST_COUNTS = 20
"""Whole numbers with at most this many values are classes; with more they are a quantity."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is asked, and every sample's answer. ``known`` samples have one."""

    name: str
    known: np.ndarray
    """Which samples of the store have an answer, bool (s,)."""
    labels: np.ndarray
    """Their answers as they are learned: float32 (s, 4) or (s,), or int64 (s,); anything where not known."""

    form: ClassVar[Literal["box", "class", "number"]]

    @property
    def outputs(self) -> int:
        """Numbers that a probe says of it."""
        raise NotImplementedError

    def loss(self, raw_pbo: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
        """Loss (p, b) of a probe's raw output; ``true`` (p, b) or (p, b, 4)."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """JSON-able: what it takes to read an output without the store."""
        return {"name": self.name, "form": self.form, "outputs": self.outputs}

    def answers(self, raw_bo: Tensor, true: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the table of predictions: what was said, and what is so."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class BoxTarget(Target):
    """The edited object's box, corners in [0, 1] of the picture [ABP §4.4]."""

    form: ClassVar = "box"

    @property
    def outputs(self) -> int:
        """Centre and size."""
        return 4

    def loss(self, raw_pbo: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
        """L1 first, then with 1 − GIoU; see ``boxes.loss``."""
        return boxes.loss(decode_box(raw_pbo), true, step, l1_steps)

    def answers(self, raw_bo: Tensor, true: np.ndarray) -> dict[str, np.ndarray]:
        """Predicted corners, clamped to the picture, and true ones."""
        said_b4 = read(self.describe(), raw_bo).numpy()
        return {name: said_b4[:, i] for i, name in enumerate(BOX)} | {
            f"true_{name}": true[:, i] for i, name in enumerate(BOX)
        }


@dataclass(frozen=True, eq=False)
class ClassTarget(Target):
    """One of several classes; loss is the cross-entropy in nats."""

    classes: Sequence[str] = ()
    form: ClassVar = "class"

    @property
    def outputs(self) -> int:
        """One number a class."""
        return len(self.classes)

    def loss(self, raw_pbo: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(raw_pbo.flatten(0, 1), true.flatten(), reduction="none").view(true.shape)

    def describe(self) -> dict[str, Any]:
        """With the classes in the order of the outputs."""
        return super().describe() | {"classes": list(self.classes)}

    def answers(self, raw_bo: Tensor, true: np.ndarray) -> dict[str, np.ndarray]:
        """The likeliest class, the true one, and the true one's negative log-likelihood in nats."""
        logs_bo = raw_bo.log_softmax(-1)
        nll_b = -logs_bo.gather(1, torch.from_numpy(true)[:, None])[:, 0]
        return {
            "predicted": read(self.describe(), raw_bo),
            "true": [self.classes[place] for place in true],
            "nll": nll_b.double().numpy(),
        }


@dataclass(frozen=True, eq=False)
class NumberTarget(Target):
    """A quantity; learned in units of its spread over the known samples, by squared error."""

    mean: float = 0.0
    spread: float = 1.0
    form: ClassVar = "number"

    @property
    def outputs(self) -> int:
        """The number."""
        return 1

    def loss(self, raw_pbo: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
        """Squared error in units of the variance."""
        return (raw_pbo[..., 0] - true).square()

    def describe(self) -> dict[str, Any]:
        """With the mean and spread that undo the scaling."""
        return super().describe() | {"mean": self.mean, "spread": self.spread}

    def answers(self, raw_bo: Tensor, true: np.ndarray) -> dict[str, np.ndarray]:
        """In the column's own unit."""
        return {
            "predicted": read(self.describe(), raw_bo).numpy(),
            "true": true.astype(np.float64) * self.spread + self.mean,
        }


def decode_box(raw: Tensor) -> Tensor:
    """Raw outputs (…, 4) → corners (…, 4) by way of (cx, cy, w, h) in [0, 1]; corners may leave the picture."""
    return boxes.centre_to_corners(raw.sigmoid())


def read(described: Mapping[str, Any], raw_bo: Tensor) -> Any:
    """What a probe says, from its raw output and what ``Target.describe`` said: boxes (b, 4), classes, or numbers."""
    if described["form"] == "box":
        return decode_box(raw_bo).clamp(0, 1)
    if described["form"] == "class":
        return [described["classes"][place] for place in raw_bo.argmax(-1).tolist()]
    return raw_bo[:, 0].double() * described["spread"] + described["mean"]


def unit_boxes(table: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """True boxes as shares of the picture, float32 (s, 4), NaN where there is none; and which there are, bool (s,)."""
    if any(name not in table.columns for name in BOX):
        return np.full((table.height, 4), np.nan, np.float32), np.zeros(table.height, bool)
    sides_s4 = np.tile(table.select("width", "height").to_numpy().astype(np.float32), 2)
    boxes_s4 = table.select(pl.col(BOX).cast(pl.Float32)).to_numpy() / sides_s4
    return boxes_s4, np.isfinite(boxes_s4).all(1)


def make(name: str, table: pl.DataFrame, described: Mapping[str, Any] | None = None) -> Target:
    """The target of this name over a store's samples.

    Parameters
    ----------
    name
        ``box``, ``cell-3x3`` (any ROWSxCOLUMNS), or a column of ``table``.
    table
        ``store.samples``.
    described
        What ``describe`` said when a probe was trained, to read another store's answers in the same classes and units;
        a class that was not known then is no answer.

    Raises
    ------
    Refusal
        When there is no such column, or it is nothing that can be learned.
    """
    if name == "box":
        boxes_s4, known = unit_boxes(table)
        return BoxTarget(name, known, boxes_s4)
    if grid := re.fullmatch(r"cell-(\d+)x(\d+)", name):
        rows, columns = int(grid[1]), int(grid[2])
        if not 1 < rows * columns <= MOST_CLASSES:
            raise Refusal(f"--target {name}: a grid has 2 to {MOST_CLASSES} cells, e.g. cell-3x3")
        boxes_s4, known = unit_boxes(table)
        centres_s2 = np.where(known[:, None], (boxes_s4[:, :2] + boxes_s4[:, 2:]) / 2, 0)
        place_s2 = np.clip((centres_s2 * [columns, rows]).astype(np.int64), 0, [columns - 1, rows - 1])
        names = [f"row {r + 1}, column {c + 1}" for r in range(rows) for c in range(columns)]
        return ClassTarget(name, known, place_s2[:, 1] * columns + place_s2[:, 0], names)
    if name not in table.columns:
        raise Refusal(f"--target {name!r} is no column: give box, cell-3x3 or one of {', '.join(table.columns)}")
    return _column(name, table[name], described)


def _column(name: str, column: pl.Series, described: Mapping[str, Any] | None) -> Target:
    form = described["form"] if described else None
    if form is None:
        few = column.dtype.is_integer() and column.n_unique() <= MOST_COUNTS
        words = column.dtype in (pl.String, pl.Boolean, pl.Categorical, pl.Enum)
        if not (words or column.dtype.is_numeric()):
            raise Refusal(f"--target {name}: a column of {column.dtype} is neither classes nor numbers")
        form = "class" if few or words else "number"
    if form == "class":
        words = column.cast(pl.String)
        classes = described["classes"] if described else sorted(words.drop_nulls().unique().to_list(), key=_natural)
        if not 2 <= len(classes) <= MOST_CLASSES:
            raise Refusal(f"--target {name}: {len(classes)} different values; classes are 2 to {MOST_CLASSES}")
        place = {value: i for i, value in enumerate(classes)}
        labels = np.array([place.get(value, -1) for value in words], np.int64)
        return ClassTarget(name, labels >= 0, labels, classes)
    values = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
    known = np.isfinite(values)
    if not described and (known.sum() < 2 or np.std(values[known]) == 0):
        raise Refusal(f"--target {name}: its values do not differ, so there is nothing to learn")
    mean = described["mean"] if described else float(values[known].mean())
    spread = described["spread"] if described else float(values[known].std())
    return NumberTarget(name, known, ((values - mean) / spread).astype(np.float32), mean, spread)


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers by size, before words by letter."""
    number = re.fullmatch(r"-?\d+(\.\d+)?", value)
    return (0, float(value), "") if number else (1, 0.0, value)


def taught(
    target: Target, labels: str, train: np.ndarray, types: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The answers that a probe is taught and scored by, like ``target.labels``, and which samples count, bool (s,).

    Parameters
    ----------
    labels
        ``true``; ``permuted``: train samples have each other's answers, so that only the answers' distribution can be
        learned, scored by the true ones; ``control``: one answer for every type of input, drawn from the train
        samples' own, scored by that answer where the type was there in training [Hewitt & Liang 2019].
    train
        Samples of the train split, positions in the store.
    types
        The type of every sample (s,), any integers.
    seed
        Of the drawing; a control task is the same for all layers and probes of a seed.
    """
    known = target.known
    if labels == "true":
        return target.labels, known
    answers = target.labels.copy()
    if labels == "permuted":
        answers[train] = target.labels[np.random.default_rng([seed, 2]).permutation(train)]
        return answers, known
    found, group_s = np.unique(types, return_inverse=True)
    drawn = np.random.default_rng([seed, 3]).choice(train, len(found))
    seen = np.zeros(len(found), bool)
    seen[group_s[train]] = True
    return target.labels[drawn][group_s], seen[group_s]
