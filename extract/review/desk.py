"""What lies before the person: the samples and their boxes, how far the review is, and what makes a verdict."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import polars as pl

from extract.local_page import Unfit
from extract.review.agreement import mean_iou
from extract.review.pictures import Missing, Pictures
from extract.review.verdicts import (
    ACCEPTED,
    BOX_COLUMNS,
    REJECTED,
    VERDICTS,
    WITHDRAWN,
    Box,
    Verdict,
    VerdictLog,
    box_of,
    now,
)
from store.errors import Refusal

NEEDED = ("sample_id", "instruction", "width", "height")
FIELDS = ("sample_id", "verdict", "box", "reason")
LONGEST_REASON = 2000


class Desk:
    """The samples of one review, by place ``0 … n-1``.

    Parameters
    ----------
    samples
        Rows of ``store.open(path).samples``.
    pictures, log
        Where the pictures come from and the verdicts go.
    reviewer
        Written into every verdict.

    Raises
    ------
    Refusal
        A column that a review needs is not there.
    """

    def __init__(self, samples: pl.DataFrame, pictures: Pictures, log: VerdictLog, reviewer: str | None):
        if lacking := [name for name in NEEDED if name not in samples.columns]:
            raise Refusal(f"the store's samples have no column {', '.join(lacking)}; a review needs them")
        self.samples, self.pictures, self.log, self.reviewer = samples, pictures, log, reviewer
        self.places = {name: place for place, name in enumerate(samples["sample_id"])}

    def row(self, place: int) -> dict[str, Any]:
        """The row of a sample; raises `Unfit` where there is none."""
        if not 0 <= place < len(self.samples):
            raise Unfit(404, f"there is no sample {place}; there are {len(self.samples)}")
        return self.samples.row(place, named=True)

    def sample(self, place: int) -> dict[str, Any]:
        """One sample as the page shows it; raises `Unfit`."""
        row = self.row(place)
        verdict = self.log.last.get(row["sample_id"])
        return {
            "place": place,
            **{name: row[name] for name in NEEDED},
            "task": row.get("task"),
            "set_aside": row.get("set_aside"),
            "box": box_before(row),
            "verdict": verdict and {"verdict": verdict.verdict, "box": verdict.box, "reason": verdict.reason},
            "next_left": self.next_left(place),
        }

    def picture(self, place: int) -> bytes:
        """The picture of a sample as PNG; raises `Unfit` where it cannot be shown."""
        row = self.row(place)
        try:
            return self.pictures.png(row)
        except Missing as missing:
            raise Unfit(404, str(missing)) from missing

    def progress(self) -> dict[str, int]:
        """How many samples there are, have each verdict, and are left."""
        told = Counter(verdict.verdict for name in self.places if (verdict := self.log.last.get(name)))
        left = len(self.places) - told.total()
        return {"total": len(self.places), **{name: told[name] for name in VERDICTS}, "left": left}

    def next_left(self, place: int = -1) -> int | None:
        """The first sample without a verdict after ``place``, else the first of all; null if every one has one."""
        left = [at for name, at in self.places.items() if name not in self.log.last]
        return next((at for at in left if at > place), left[0] if left else None)

    def judge(self, given: Any) -> dict[str, Any]:
        """Keep a verdict that the page sent, and say how far the review is.

        Raises
        ------
        Unfit
            It is no verdict; nothing was kept.
        OSError
            It could not be written; nothing was kept.
        """
        if not isinstance(given, Mapping) or set(given) != set(FIELDS):
            raise Unfit(400, f"a verdict is a JSON object with the fields {', '.join(FIELDS)}")
        name, kind, reason = given["sample_id"], given["verdict"], given["reason"]
        if not isinstance(name, str) or name not in self.places:
            raise Unfit(404, f"there is no sample {name!r} in this review")
        row = self.row(self.places[name])
        if kind not in (*VERDICTS, WITHDRAWN):
            raise Unfit(422, f"verdict {kind!r} is not one of {', '.join((*VERDICTS, WITHDRAWN))}")
        if kind == WITHDRAWN and name not in self.log.last:
            raise Unfit(409, f"sample {name} has no verdict to take back")
        if reason is not None and not (kind == REJECTED and is_text(reason)):
            raise Unfit(422, f"a reason belongs to a rejection and is a text of at most {LONGEST_REASON} characters")
        before = box_before(row)
        verdict_box = self._final(given["box"], kind, row, before)
        self.log.append(
            Verdict(name, kind, verdict_box, reason or None, before, self.reviewer, now(), self.log.identity_hash)
        )
        return {"progress": self.progress(), "next_left": self.next_left(self.places[name])}

    @staticmethod
    def _final(given: Any, kind: str, row: Mapping[str, Any], before: Box | None) -> Box | None:
        try:
            box = box_of(given)
        except ValueError as error:
            raise Unfit(422, str(error)) from error
        if kind in (REJECTED, WITHDRAWN):
            if box is not None:
                raise Unfit(422, f"{kind} has no box")
            return None
        if box is None:
            raise Unfit(422, f"{kind} needs a box")
        if box[0] < 0 or box[1] < 0 or box[2] > row["width"] or box[3] > row["height"]:
            raise Unfit(422, f"box {list(box)} leaves the picture of {row['width']}×{row['height']}")
        if (kind == ACCEPTED) != (box == before):
            raise Unfit(422, "accepted is the box that was shown first, fixed is another one")
        return box

    def summary(self) -> str:
        """How far the review is, and how well the model's box agrees with the final one."""
        progress = self.progress()
        counts = ", ".join(f"{progress[name]} {name}" for name in (*VERDICTS, "left"))
        return f"{counts}, of {progress['total']} samples\n{self._agreement()}"

    def _agreement(self) -> str:
        if "vlm_x1" not in self.samples.columns:
            return "agreement: the store has no boxes of the model"
        rows = (self.row(place) for name, place in self.places.items() if name in self.log.last)
        final = [(tuple(row[f"vlm_{n}"] for n in BOX_COLUMNS), self.log.last[row["sample_id"]].box) for row in rows]
        pairs = [(said, box) for said, box in final if box is not None and None not in said]
        silent = sum(box is not None for _, box in final) - len(pairs)
        without = f"; the model gave no box for {silent} more" if silent else ""
        if not pairs:
            return f"agreement: no accepted or fixed sample has a box of the model{without}"
        mean, low, high = mean_iou(pairs)
        return f"agreement: mean IoU of the model's box with the final one {mean:.3f} [{low:.3f}, {high:.3f}], " + (
            f"n = {len(pairs)}{without}"
        )


def is_text(reason: Any) -> bool:
    """Whether a reason can be kept: not too long, and no half of a character that JSON allows and files do not."""
    return isinstance(reason, str) and len(reason) <= LONGEST_REASON and not re.search("[\ud800-\udfff]", reason)


def box_before(row: Mapping[str, Any]) -> Box | None:
    """The box that is shown first: the true one, else the model's; null where neither has an area."""
    for prefix in ("", "vlm_"):
        found = [row.get(f"{prefix}{name}") for name in BOX_COLUMNS]
        try:
            return box_of(found)
        except ValueError:
            continue
    return None
