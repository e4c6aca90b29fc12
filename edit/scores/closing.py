"""How much of the gap between the plain editor and the true box our box closes, and where the rest of it is lost.

All of it is of success on the same scenes, and every interval is a bootstrap over scenes that is paired: a draw takes
the same scenes for each method (or Wilson's, for a share).
"""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from edit.methods import MISLOCALIZED, REFERENCE, RIGHT_BOX, SUCCESS
from probes import statistics

PLAIN, TRUE = "plain", "true-box"
ASKED = (PLAIN, REFERENCE, TRUE)
ENOUGH = 0.5
"""Share of the gap that our box should close."""
OBEYED = 0.5
"""An editor obeys the true box if it changes another object in less than this share of the scenes in which the plain
one does."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (null where it has none) and the scenes that it is of."""

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self):
        return self.told("{:.3f}")

    def told(self, form: str) -> str:
        """The number, written by a format, with its interval."""
        written = form.format(self.value)
        if self.low is not None:
            written += f" [{form.format(self.low)}, {form.format(self.high)}]"
        return written.replace("-", "−")


@dataclass(frozen=True)
class Closing:
    """What became of the gap."""

    n: int
    """Scenes that all three methods have."""
    unpaired: int
    """Scenes that some of the three lack."""
    success: dict[str, Estimate] = field(default_factory=dict)
    """By method: plain, our-box, true-box; empty if one of them has no scene in common with the others."""
    elsewhere: dict[str, Estimate] = field(default_factory=dict)
    """Share of scenes where another object was changed instead, of the same methods; of one that lacks it, nothing."""
    gap: Estimate | None = None
    """Success with the true box less that of the plain editor."""
    share: Estimate | None = None
    """Of the gap, what our box closes; null where there is no gap, without interval where there may be none."""
    right: Estimate | None = None
    """Share of our boxes on the right object; null where nothing is known of boxes."""
    success_if_right: Estimate | None = None
    """Success with our box in scenes where it is on the right object; null where there are none."""
    success_if_wrong: Estimate | None = None
    """And where it is on another, or on none."""
    short_if_wrong: Estimate | None = None
    """What our box falls short of the true one, of all scenes: the part where it is not on the right object."""
    short_if_right: Estimate | None = None
    """And the part in scenes where it is on the right one."""

    @property
    def is_enough(self) -> bool:
        """Whether our box closes half of the gap or more."""
        return self.share is not None and self.share.value >= ENOUGH

    def table(self) -> pl.DataFrame:
        """Every number: quantity, value, low, high, n."""
        named = {f"success, {name}": one for name, one in self.success.items()}
        named |= {f"{MISLOCALIZED}, {name}": one for name, one in self.elsewhere.items()}
        named |= {
            "gap: true-box less plain": self.gap,
            "share of the gap closed": self.share,
            RIGHT_BOX: self.right,
            "success, our-box on the right object": self.success_if_right,
            "success, our-box on another or none": self.success_if_wrong,
            "true-box less our-box, in scenes with a wrong box": self.short_if_wrong,
            "true-box less our-box, in scenes with a right box": self.short_if_right,
        }
        rows = [(name, one.value, one.low, one.high, one.n) for name, one in named.items() if one is not None]
        schema = {"quantity": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def words(self) -> str:
        """The answer, beginning with a sentence that says it all."""
        if not self.success:
            return f"Nothing is known of the gap: no scene was scored by all of {', '.join(ASKED)}."
        plain, ours, true = (self.success[name] for name in ASKED)
        each = f"Success: plain {plain}, our box {ours}, true box {true}."
        if self.share is None:
            told = [
                f"The true box does not beat the plain editor on {self.n} scenes: there is no gap to close. {each}",
                f"Why: {self._without_gap()}. With the true box it fails in {1 - true.value:.0%} of scenes.",
            ]
            return "\n\n".join([*told, *self._place(), *self._boxes()])
        closed = self.share.told("{:.0%}")
        told = f"Our box closes {closed} of the gap between the plain editor and the true box on {self.n} scenes: "
        told += f"{self._verdict()}. {each} The gap itself is {self.gap}."
        if self.share.low is None:
            told += " It cannot be told from none, so the share has no interval."
        return "\n\n".join([told, *self._reason(), *self._place(), *self._boxes()])

    def _without_gap(self) -> str:
        plain, true = (self.elsewhere.get(name) for name in (PLAIN, TRUE))
        if plain and true and true.value < OBEYED * plain.value:
            return "the editor obeys a drawn box, but does there no better what is asked"
        return "the editor does not obey a drawn box, or needs none"

    def _place(self) -> list[str]:
        """Where edits land, whatever becomes of them there."""
        if len(self.elsewhere) < len(ASKED):
            return []
        plain, ours, true = (self.elsewhere[name].told("{:.1%}") for name in ASKED)
        return [
            f"Another object is changed instead in {plain} of scenes, {ours} with our box, {true} with the true one."
        ]

    def _verdict(self) -> str:
        low, high = self.share.low, self.share.high
        if self.is_enough:
            return "at least half" if low is not None and low >= ENOUGH else "half or more, but it may be less"
        return "less than half" if high is not None and high < ENOUGH else "less than half, but it may be more"

    def _boxes(self) -> list[str]:
        """Whether our boxes are right, and what follows from it."""
        if self.right is None:
            return []
        told = f"Our box is on the right object in {self.right.told('{:.1%}')} of {self.right.n} scenes"
        parts = [
            f"{one} where it is {where} (n = {one.n})"
            for one, where in ((self.success_if_right, "right"), (self.success_if_wrong, "on another or on none"))
            if one is not None
        ]
        return [f"{told}; success is {' and '.join(parts)}."]

    def _reason(self) -> list[str]:
        """Why the gap is not closed by half."""
        if self.is_enough or self.right is None:
            return []
        wrong, right = self.short_if_wrong, self.short_if_right
        short = f"Of what it falls short of the true box, {wrong} lies in scenes where our box is on the wrong object"
        if wrong.value > right.value:
            return [f"Why not half: the box is wrong too often. {short} and {right} in the others."]
        return [
            f"Why not half: the editor does less with our box than with the true one though it is on the right object. "
            f"{short} and {right} in the others."
        ]


def closing(frame: pl.DataFrame) -> Closing:
    """What became of the gap, by the long frame of scores (``edit.scores.table``)."""
    wide = (
        frame.filter(metric=SUCCESS)
        .filter(pl.col("method").is_in(ASKED), pl.col("value").is_not_null(), pl.col("value").is_not_nan())
        .pivot("method", index="sample", values="value", maintain_order=True)
    )
    if lacking := [name for name in ASKED if name not in wide.columns]:
        wide = wide.with_columns(pl.lit(None, pl.Float64).alias(name) for name in lacking)
    whole = wide.drop_nulls()
    n, unpaired = len(whole), len(wide) - len(whole)
    if not n:
        return Closing(n, unpaired)
    plain_n, ours_n, true_n = whole.select(ASKED).to_numpy().T
    success = {name: _share(values_n) for name, values_n in zip(ASKED, (plain_n, ours_n, true_n), strict=True)}
    gap = Estimate(*statistics.interval(true_n - plain_n), n)
    boxes = frame.filter(method=REFERENCE, metric=RIGHT_BOX).select("sample", pl.col("value").alias("right"))
    right_n = whole.join(boxes, on="sample", how="left", maintain_order="left")["right"].to_numpy()
    landed = frame.filter(pl.col("sample").is_in(whole["sample"].implode()), metric=MISLOCALIZED).drop_nulls("value")
    elsewhere = {name: landed.filter(method=name)["value"].to_numpy() for name in ASKED}
    return Closing(
        n,
        unpaired,
        success,
        {name: _share(values_n) for name, values_n in elsewhere.items() if len(values_n)},
        gap,
        _closed(plain_n, ours_n, true_n, gap),
        **_by_box(right_n, ours_n, true_n),
    )


def _closed(plain_n: np.ndarray, ours_n: np.ndarray, true_n: np.ndarray, gap: Estimate) -> Estimate | None:
    """The ratio of means, and its percentiles over draws of scenes.

    Draws without a gap say nothing of the share and are left out; where there may be none at all (its interval reaches
    0, so that over 2.5 % of draws have none) there is no interval.
    """
    if gap.value <= 0:
        return None
    share = float((ours_n.mean() - plain_n.mean()) / (true_n.mean() - plain_n.mean()))
    if gap.low <= 0:
        return Estimate(share, None, None, len(plain_n))
    closed_r, gap_r = statistics.mean_draws(np.stack([ours_n - plain_n, true_n - plain_n])).T
    low, high = statistics.ends(np.where(gap_r > 0, closed_r / np.where(gap_r > 0, gap_r, 1), np.nan)[:, None])
    return Estimate(share, float(low[0]), float(high[0]), len(plain_n))


def _by_box(right_n: np.ndarray, ours_n: np.ndarray, true_n: np.ndarray) -> dict[str, Estimate | None]:
    """What depends on whether our box is on the right object: 1, 0 or NaN where that is not known."""
    known_n = ~np.isnan(right_n)
    right_n, ours_n, true_n = (values_n[known_n] for values_n in (right_n, ours_n, true_n))
    if not len(right_n):
        return {}
    short_kn = (true_n - ours_n) * np.stack([right_n == 0, right_n == 1])
    wrong, right = (Estimate(*statistics.interval(short_n), len(short_n)) for short_n in short_kn)
    return {
        "right": _share(right_n),
        "success_if_right": _share(ours_n[right_n == 1]),
        "success_if_wrong": _share(ours_n[right_n == 0]),
        "short_if_wrong": wrong,
        "short_if_right": right,
    }


def _share(values_n: np.ndarray) -> Estimate | None:
    """A share with Wilson's interval; null of nothing."""
    n = len(values_n)
    return Estimate(float(values_n.mean()), *statistics.wilson(float(values_n.mean()), n), n) if n else None
