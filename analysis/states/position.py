"""Where states say that they are: a linear classifier from a state to a cell of the picture, layer by layer [MOL].

Asked twice: of an image token, in which cell its patch lies; of an instruction's mean state, in which cell the edited
object lies. The classifier is ridge regression on one-hot cells, solved from sums that are streamed.

Shape suffixes: ``n`` state (a token, or a sample), ``m`` image token of all samples, ``s`` sample, ``l`` layer, ``w``
width, ``c`` class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from analysis.states.norms import measured

CELLS = 3
"""Rows and columns of the grid of cells."""
CLASSES = CELLS * CELLS

RIDGE = 0.01
"""Penalty over the number of states, of dimensions scaled to variance 1; a tenth of it gives accuracies within 0.01."""

TOKENS = 64
"""Image tokens of a picture that are read at most, drawn: neighbours tell the same, and wide states cost w² each."""

QUESTIONS = {"token": "the cell of an image token's own patch", "object": "the cell of the edited object"}


def cells(boxes_m4: np.ndarray, sizes_m2: np.ndarray) -> np.ndarray:
    """Cell (0 … 8, row by row) of each box's centre in its picture, int64 (m,); -1 where a box is not known.

    Boxes are corners in pixels, sizes are width and height; a centre outside of the picture counts as at its edge.
    """
    unit_m2 = (boxes_m4[:, :2] + boxes_m4[:, 2:]) / 2 / sizes_m2
    known_m = np.isfinite(unit_m2).all(1)
    place_m2 = np.clip(np.where(known_m[:, None], unit_m2, 0) * CELLS, 0, CELLS - 1).astype(np.int64)
    return np.where(known_m, place_m2[:, 1] * CELLS + place_m2[:, 0], -1)


def one_hot(cells_n: np.ndarray) -> np.ndarray:
    """Float64 (n, 9)."""
    return np.eye(CLASSES)[cells_n]


def shuffled_within(cells_m: np.ndarray, samples_m: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The cells, each sample's given to its own tokens in another order."""
    order = np.lexsort((generator.random(len(cells_m)), samples_m))
    out = np.empty_like(cells_m)
    out[np.argsort(samples_m, kind="stable")] = cells_m[order]
    return out


class Ridge:
    """Sums XᵀX and XᵀY (float64) of states that come in pieces, and the classifier that they give."""

    def __init__(self, width: int, outputs: int):
        self.count = 0
        self.sum_w, self.sum_o = np.zeros(width), np.zeros(outputs)
        self.xx_ww, self.xy_wo = np.zeros((width, width)), np.zeros((width, outputs))

    def add(self, states_nw: np.ndarray, targets_no: np.ndarray) -> None:
        """Add states and what they should give."""
        states_nw = states_nw.astype(np.float64)
        self.count += len(states_nw)
        self.sum_w += states_nw.sum(0)
        self.sum_o += targets_no.sum(0)
        self.xx_ww += states_nw.T @ states_nw
        self.xy_wo += states_nw.T @ targets_no

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (w, o) and offset (o,) of ``states @ weights + offset``, float64; dimensions are scaled alike."""
        mean_w, mean_o = self.sum_w / self.count, self.sum_o / self.count
        covariance_ww = self.xx_ww / self.count - np.outer(mean_w, mean_w)
        variance_w = np.diag(covariance_ww)
        # What does not vary (but for rounding) says nothing.
        varies_w = variance_w > 1e-12 * np.maximum(np.diag(self.xx_ww) / self.count, 1e-300)
        scale_w = np.divide(1, np.sqrt(variance_w), out=np.zeros_like(variance_w), where=varies_w)
        correlation_ww = covariance_ww * scale_w[:, None] * scale_w
        np.fill_diagonal(correlation_ww, correlation_ww.diagonal() + RIDGE)
        cross_wo = (self.xy_wo / self.count - np.outer(mean_w, mean_o)) * scale_w[:, None]
        weights_wo = np.linalg.solve(correlation_ww, cross_wo) * scale_w[:, None]
        return weights_wo, mean_o - mean_w @ weights_wo


class Decoder:
    """One question asked of some layers: classifiers by the true cells and by shuffled ones, then their predictions."""

    def __init__(self, layers: int, width: int):
        self._sums = [Ridge(width, 2 * CLASSES) for _ in range(layers)]
        self._solved: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.told: list[np.ndarray] = []
        """Predicted cells of each piece, int8 (2, l, n): by the true cells, and by the shuffled ones."""

    @property
    def taught(self) -> bool:
        """Whether there is anything that predictions can be made from."""
        return self._solved is not None or any(sums.count for sums in self._sums)

    def fit(self, states_lnw: np.ndarray, cells_n: np.ndarray, shuffled_n: np.ndarray) -> None:
        """Teach; the cells are 0 … 8, all known."""
        targets_no = np.concatenate([one_hot(cells_n), one_hot(shuffled_n)], 1)
        for sums, states_nw in zip(self._sums, states_lnw, strict=True):
            sums.add(states_nw, targets_no)

    def predict(self, states_lnw: np.ndarray) -> None:
        """Ask, after all was taught."""
        if self._solved is None:
            self._solved = [sums.solve() for sums in self._sums]
            self._sums.clear()
        scores_lno = np.stack(
            [
                states_nw @ weights + offset
                for states_nw, (weights, offset) in zip(states_lnw, self._solved, strict=True)
            ]
        )
        told_2ln = np.stack([scores_lno[..., :CLASSES].argmax(-1), scores_lno[..., CLASSES:].argmax(-1)])
        self.told.append(told_2ln.astype(np.int8))


@dataclass
class Asked:
    """A question, its true answers, and what the layers told."""

    question: str
    """Of ``QUESTIONS``."""
    true_n: np.ndarray
    """True cells of the states that are asked."""
    images_n: np.ndarray
    """Their images (int ≥ 0), which are drawn whole."""
    taught_n: np.ndarray
    """Cells that were taught."""
    teachers: int
    """Of how many images."""
    told: list[np.ndarray] = field(default_factory=list)
    """As ``Decoder.told`` has them, (2, l, n), of the layers in their order."""

    def table(self, layers: Sequence[str]) -> pl.DataFrame:
        """Accuracies, tidy: ``question, layer, labels, metric, value, low, high, n, images, taught``.

        ``labels`` are true, shuffled, or most-frequent (the commonest cell of what was taught, the same at any layer);
        minus-first and minus-last are the differences, on the same images, to the first and the last layer's true
        ones. ``metric`` is ``cell``, or its ``row`` or ``column`` alone.
        """
        parts = {"cell": lambda cell: cell, "row": lambda cell: cell // CELLS, "column": lambda cell: cell % CELLS}
        told_2ln = np.concatenate(self.told, axis=1)
        commonest = int(np.bincount(self.taught_n, minlength=CLASSES).argmax())
        told_kn = np.concatenate([told_2ln.reshape(-1, len(self.true_n)), np.full((1, len(self.true_n)), commonest)])
        names = [(layer, labels) for labels in ("true", "shuffled") for layer in layers] + [(None, "most-frequent")]
        names += [(layer, labels) for labels in ("minus-first", "minus-last") for layer in layers]
        right = []
        for part in parts.values():
            own_kn = (part(told_kn) == part(self.true_n)).astype(np.float32)
            own_ln = own_kn[: len(layers)]
            right.append(np.concatenate([own_kn, own_ln - own_ln[:1], own_ln - own_ln[-1:]]))
        ends = zip(("value", "low", "high"), measured(np.concatenate(right), self.images_n), strict=True)
        said = {
            "layer": [layer for layer, _ in names] * len(parts),
            "labels": [labels for _, labels in names] * len(parts),
        }
        said["metric"] = np.repeat(list(parts), len(names))
        both = pl.DataFrame(said | dict(ends), schema_overrides={"layer": pl.String})
        n = {"n": len(self.true_n), "images": len(np.unique(self.images_n)), "taught": self.teachers}
        both = both.with_columns(pl.lit(value, pl.Int64).alias(name) for name, value in n.items())
        return both.select(pl.lit(self.question).alias("question"), pl.all())


def best(found: pl.DataFrame, question: str, source: str = "store", metric: str = "cell") -> dict | None:
    """The layer whose states are read best by the true cells; null if the question was not asked."""
    rows = found.filter(question=question, source=source, labels="true", metric=metric).sort("value")
    return rows.row(-1, named=True) if rows.height else None


def answer(found: pl.DataFrame, absent: Mapping[str, str]) -> str:
    """What the table says in words; ``absent`` are the questions that could not be asked, and why."""
    said = []
    for question, name in QUESTIONS.items():
        if question in absent:
            said.append(f"Not asked, {name}: {absent[question]}.")
            continue
        top = best(found, question)
        rows = found.filter(question=question, source="store", metric="cell")
        first, last = (rows.filter(labels="true").row(place, named=True) for place in (0, -1))
        line = (
            f"{name[0].upper() + name[1:]} is read best at {top['layer']}: accuracy {_ends(top)}; "
            f"{first['layer']} {_ends(first)}, {last['layer']} {_ends(last)}"
        )
        gains = [rows.filter(labels=labels, layer=top["layer"]) for labels in ("minus-first", "minus-last")]
        line += " (differences on the same images " + " and ".join(_ends(one.row(0, named=True)) for one in gains) + ")"
        common = rows.filter(labels="most-frequent").row(0, named=True)
        mixed = rows.filter(labels="shuffled", layer=top["layer"]).row(0, named=True)
        line += f". Floors: commonest cell {_ends(common)}, shuffled cells {_ends(mixed)}"
        if (drawn := best(found, question, "random-weights")) is not None:
            line += f", random weights at most {_ends(drawn)} ({drawn['layer']})"
        asked = f"{top['n']:,} tokens of {top['images']:,}" if question == "token" else f"{top['images']:,}"
        said.append(f"{line}. Taught on {top['taught']:,} images, n = {asked} others.")
    return " ".join(said)


def _ends(row: Mapping) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
