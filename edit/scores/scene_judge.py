"""The exact judge of edited scenes: which objects changed, by pixels, knowing every mask and what was asked.

Whether an object is as it was is a distance over its mask: of the edited picture to the source or, where the wish
changes what is near it, to the true target. An editor's autoencoder blurs and may shift by a pixel or two, and neither
is a change, so a distance is the smallest over several blurs of the known picture and shifts of up to ``REACH``.

The object that the wish is about is looked at where source and target differ, its shadow and new outline included:
``left`` as it was, ``asked`` for, or changed ``otherwise``. All distances are root mean squares of 8-bit RGB values.
The thresholds are measured, see ``LEFT`` and ``NEAR``.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from edit.scores.outside import pixels_of
from extract.scenes import OBJECT_TASKS
from extract.scenes.shards import mask_of
from store.errors import Refusal

TASKS = (*OBJECT_TASKS, "addition")
REACH = 2
"""Pixels by which an object may be shifted and is still the same."""
BLURS = (0.0, 1.0, 1.6, 2.4, 3.4)
"""Standard deviations in pixels of what the known pictures are blurred by."""
SMOOTH = 1.0
"""Standard deviation of a blur of all pictures, against noise."""
LEFT = 20.0
"""A thing further than this from what it should be is something else, unless the next two say otherwise.

Measured on 200 hard scenes, objects that were left are at most 1.7 away after a blur of 1.5 pixels, 2.1 with noise of
6, 6.7 at 128 × 128 and back, 12.4 after JPEG of quality 40. Those that the wish was carried out on are 10 to 190 away,
and all but one of 1,400 at more than SHARE of the distance of their source and target."""
SHARE = 0.36
"""The bound is never above this share of how far source and target are apart: a change of texture is faint. Where that
is far, it is LIKE times the distance of a middling object if that is more: an autoencoder wears all alike."""
LIKE = 2.0
FAINT = 6.0
"""The bound is never below."""
DIFFERS = 12
"""Values by which a pixel of source and target differ where something was to change (JPEG differs by less)."""
STRAY = 0.3
"""A blot on the background is a change if it has this share of a middling object's area."""
BLOT = 28.0
"""Distance of a pixel within a blot."""

Subject = Literal["left", "asked", "otherwise"]
Outcome = Literal["success", "leaked", "mislocalized", "otherwise", "unchanged"]


@dataclass(frozen=True)
class Verdict:
    """What became of one scene."""

    subject: Subject
    """The object that the wish is about (for an addition, the place of the new one)."""
    changed: tuple[int, ...]
    """Other objects that changed, as indices of ``objects``."""
    stray: bool
    """Whether something of an object's size changed on the background."""
    outcome: Outcome
    """``success``: as asked, nothing else. ``leaked``: as asked, and something else. ``mislocalized``: something else,
    while the right object was left. ``otherwise``: the right one became something else. ``unchanged``: nothing."""
    instruction: int
    """0–4, how fully what was asked is at its place: 4 asked, 0 left; else 3, 2 or 1 by ``progress`` over ½, over ¼ and
    below."""
    accuracy: int
    """0–4, whether the right subject changed: 0 if it was left; else 4 over the number of things that changed, it
    included, rounded up."""
    leakage: int
    """0–4, whether nothing else changed: 4 less four times the share of the other things (objects and background) that
    did, rounded up."""
    progress: float
    """1 − the distance to the target over that of source and target, at the place of the edit, within 0 … 1."""
    distances: tuple[float, ...]
    """Of every object to what it should look like (for the subject: to the source, where the two differ)."""

    @property
    def success(self) -> bool:
        """Exactly the right object became what was asked, and nothing else changed."""
        return self.outcome == "success"

    @property
    def mislocalized(self) -> bool:
        """Something else changed, and the right object did not."""
        return self.outcome == "mislocalized"


class SceneJudge:
    """Judges edited pictures of one scene.

    Parameters
    ----------
    source, target
        RGB of one size: before, and with the wish come true.
    objects
        The column ``objects`` of the scene's row: ``box`` (x1, y1, x2, y2) and ``mask`` (run lengths) of each.
    box
        Of what is to change: that of one of the objects, or of the new one.
    task
        ``removal``, ``swap``, ``attribute_modification`` or ``addition``.
    through
        What an editor does to a picture even if it changes nothing: its working size and its autoencoder. Pictures are
        then held against the known ones as they come out of it too; a weak autoencoder needs it.

    Raises
    ------
    Refusal
        The task is about the whole picture, no object has that box, pictures or masks have other sizes, or source and
        target do not differ.
    """

    def __init__(
        self,
        source: Image.Image,
        target: Image.Image,
        objects: Sequence[Mapping[str, Any]],
        box: Sequence[int] | None,
        task: str,
        through: Callable[[Image.Image], Image.Image] | None = None,
    ):
        if task not in TASKS:
            raise Refusal(f"a scene of task {task!r} has no object to judge: those of {', '.join(TASKS)} have")
        if target.size != source.size:
            raise Refusal(
                f"the target has {target.size} pixels and the source {source.size}: give pictures of one size"
            )
        self.size = source.size
        try:
            masks = [mask_of(one["mask"]) for one in objects]
        except ValueError as failure:
            raise Refusal(f"the mask of an object is damaged ({failure}): draw the scenes again") from failure
        if wrong := [mask.shape[::-1] for mask in masks if mask.shape[::-1] != self.size]:
            raise Refusal(f"a mask has {wrong[0]} pixels and the picture {self.size}: the objects are of another scene")
        self.subject = self._subject(objects, box, task)
        before, after = pixels_of(source), pixels_of(target)
        differing = np.abs(before.astype(int) - after).max(2) > DIFFERS
        # Single pixels are JPEG's; what was to change is larger.
        place = cv2.morphologyEx(differing.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)) > 0
        if not place.any():
            raise Refusal("source and target show the same: there is nothing to judge the edit by")
        known = [
            _blurred(pixels_of(one)) + (_blurred(pixels_of(through(one).resize(self.size))) if through else [])
            for one in (source, target)
        ]
        self._place = _Region(place, known)
        self._objects = [_Region(mask, known) for mask in masks]
        self._contrast = self._place.apart()
        self._sources = known[0][:: len(BLURS)]
        self._background = self._around(masks, place)
        self._blot = STRAY * float(np.median([mask.sum() for mask in masks])) if masks else np.inf

    @classmethod
    def of_row(
        cls, row: Mapping[str, Any], through: Callable[[Image.Image], Image.Image] | None = None
    ) -> "SceneJudge":
        """The judge of a row of ``python -m extract.scenes``; refused as the class, or where a picture is damaged."""
        try:
            source, target = (
                Image.open(io.BytesIO(row[name]["bytes"])).convert("RGB") for name in ("src_img", "edited_img")
            )
        except OSError as failure:
            raise Refusal(f"a picture of the scene is damaged ({failure}): draw the scenes again") from failure
        return cls(source, target, row["objects"], row["box"], row["task"], through)

    def __call__(self, edited: Image.Image) -> Verdict:
        """Judge one edited picture, RGB; one of another size is resized to the source's."""
        if edited.size != self.size:
            edited = edited.resize(self.size, Image.Resampling.LANCZOS)
        seen = _smooth(pixels_of(edited), SMOOTH)
        padded = cv2.copyMakeBorder(seen, REACH, REACH, REACH, REACH, cv2.BORDER_REPLICATE)
        at_place = self._place.distances(padded)
        each = [region.distances(padded) for region in self._objects]
        # Over its own mask as well: a change of texture is little where an outline was to change.
        to_source, to_target = np.max([at_place, *([each[self.subject]] if self.subject is not None else [])], axis=0)
        distances = [to_source if index == self.subject else min(one) for index, one in enumerate(each)]
        others = [index for index in range(len(distances)) if index != self.subject]
        worn = float(np.median([distances[index] for index in others])) if others else 0.0
        bound = max(FAINT, min(SHARE * self._contrast, max(LEFT, LIKE * worn)))
        subject: Subject = "otherwise"
        if min(to_source, to_target) < bound:
            subject = "left" if to_source < to_target else "asked"
        changed = tuple(index for index in others if distances[index] > bound)
        stray = self._stray(seen)
        elsewhere = len(changed) + stray
        progress = float(np.clip(1 - at_place[1] / self._contrast, 0, 1))
        instruction = {"asked": 4, "left": 0}.get(subject, 1 + (progress > 0.25) + (progress > 0.5))
        return Verdict(
            subject=subject,
            changed=changed,
            stray=stray,
            outcome=_outcome(subject, elsewhere),
            instruction=instruction,
            accuracy=0 if subject == "left" else -(-4 // (1 + elsewhere)),
            leakage=4 - -(-4 * elsewhere // (len(others) + 1)),
            progress=progress,
            distances=tuple(map(float, distances)),
        )

    @staticmethod
    def _subject(objects: Sequence[Mapping[str, Any]], box: Sequence[int] | None, task: str) -> int | None:
        if task == "addition":
            return None
        boxes = [list(one["box"]) for one in objects]
        if box is None or list(box) not in boxes:
            raise Refusal(f"no object has the box {box} of what is to change: the objects have {boxes}")
        return boxes.index(list(box))

    @staticmethod
    def _around(masks: Sequence[np.ndarray], place: np.ndarray) -> np.ndarray:
        """The background clear of every object, its shadow and blur, and of the place of the edit."""
        taken = np.any([place, *masks], axis=0).astype(np.uint8)
        size = float(np.sqrt(np.median([mask.sum() for mask in masks]))) if masks else 0.0
        reach = 2 * round(0.15 * size + REACH) + 1
        return cv2.dilate(taken, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))) == 0

    def _stray(self, seen: np.ndarray) -> bool:
        """Whether a blot of an object's size is on the background."""
        differences = [np.square(_smooth(seen - source, 2)).mean(2) for source in self._sources]
        apart = np.min(differences, axis=0) > BLOT**2
        _, _, stats, _ = cv2.connectedComponentsWithStats((apart & self._background).astype(np.uint8))
        return bool(stats[1:, cv2.CC_STAT_AREA].max(initial=0) > self._blot)


class _Region:
    """Some pixels of a picture, and how far a picture is from what source and target show there.

    Parameters
    ----------
    mask
        Boolean (height, width).
    known
        The source, then the target, each at every blur: float32 (height, width, 3).
    """

    def __init__(self, mask: np.ndarray, known: Sequence[Sequence[np.ndarray]]):
        rows, columns = np.nonzero(mask)
        if not len(rows):
            raise Refusal("an object has no visible pixel: its mask is empty")
        shifts = np.arange(2 * REACH + 1)
        across = mask.shape[1] + 2 * REACH
        self._places = (rows * across + columns) + (shifts[:, None, None] * across + shifts[:, None])
        # Less what is between black and white, so that the squares below stay small.
        self._known = [np.stack([one[mask].ravel() - 128 for one in pictures]) for pictures in known]

    def apart(self) -> float:
        """How far source and target are from each other, as an editor can show it."""
        source, target = (known[:: len(BLURS)] for known in self._known)
        return float(np.sqrt(np.square(source - target).mean(1)).min())

    def distances(self, padded: np.ndarray) -> tuple[float, float]:
        """To source and target, the least over their blurs and shifts, of a picture with REACH pixels more around."""
        pixels = padded.reshape(-1, 3).take(self._places, axis=0)
        seen = pixels.reshape(self._places.shape[0] ** 2, -1) - 128
        squares = np.einsum("sv,sv->s", seen, seen)[:, None]
        # einsum, not @: for so small a product BLAS wakes its threads for nothing.
        to_source, to_target = (
            (squares - 2 * np.einsum("sv,bv->sb", seen, known) + np.square(known).sum(1)).min() / seen.shape[1]
            for known in self._known
        )
        return float(np.sqrt(max(to_source, 0))), float(np.sqrt(max(to_target, 0)))


def _smooth(picture: np.ndarray, deviation: float) -> np.ndarray:
    return cv2.GaussianBlur(picture.astype(np.float32), (0, 0), deviation, borderType=cv2.BORDER_REPLICATE)


def _blurred(picture: np.ndarray) -> list[np.ndarray]:
    """A known picture at every blur, smoothed as the edited one is."""
    return [_smooth(picture, float(np.hypot(SMOOTH, blur))) for blur in BLURS]


def _outcome(subject: Subject, elsewhere: int) -> Outcome:
    if subject == "left":
        return "mislocalized" if elsewhere else "unchanged"
    if subject == "otherwise":
        return "otherwise"
    return "leaked" if elsewhere else "success"
