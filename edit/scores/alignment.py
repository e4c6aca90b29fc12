"""Shift and zoom of an edited picture against its source, found outside the box and undone before measuring.

Qwen-Image-Edit moves its whole output by some pixels and scales it a little; every edge then counts as a change. The
model is a shift and a zoom of its own along each axis: editors resize to sides that are multiples of 16 or 32, each
rounded by itself, and nothing in them turns or shears a picture. OpenCV's ECC knows no such motion, so an affine one
is estimated and its turn and shear dropped. Where they are not small, it is no such artefact and nothing is undone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from edit.scores.outside import Outside, Perception, Place

LEVELS = (4, 2, 1)
"""The picture is reduced by these, in turn, so that the estimate starts coarse."""
COARSE = 64
"""Pixels of the shorter side that a reduced picture must keep."""
CRITERIA = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-7)
BLUR = 5
"""Side of ECC's own Gaussian."""
MARGIN = 0.04
"""Share of the longer side that the box is grown by, so that what moved out of it is not looked at either."""
FARTHEST = 0.1
"""Share of the longer side: beyond it a shift is no artefact."""
MOST_ZOOM = 0.1
MOST_TURN = 0.02
STILL = 0.1
"""Pixels: a picture whose corners all move by less stands still."""
GAIN = 0.95
"""The error must fall below this share of what it was: resampling alone blurs noise away."""


@dataclass(frozen=True)
class Aligned:
    """One edited picture outside the box, as it is and with its shift and zoom undone."""

    raw: Outside
    corrected: Outside
    """Of the pixels whose content is within the frame after undoing; the same as ``raw`` where that was kept."""
    shift: tuple[float, float] | None
    """How far the middle of the picture moved right and down, in pixels; None where no estimate could be had."""
    zoom: tuple[float, float] | None
    """Its scale across and down; over 1 is larger than the source."""
    kept_raw: str | None
    """Why nothing was undone; None where it was."""


def aligned(source: Image.Image, edited: Image.Image, box: Sequence[float], perception: Perception) -> Aligned:
    """Measure an edited picture outside a box (xyxy in pixels), raw and corrected.

    Raises
    ------
    Refusal
        As ``outside.outside``.
    """
    place = Place(source, box)
    pixels = place.edited(edited)
    raw = place.measure(pixels, place.outside, perception)
    try:
        warp = estimate(place, pixels)
    except NotFound as failure:
        return Aligned(raw, raw, None, None, str(failure))
    shift, zoom = shift_of(warp, place.size), (float(warp[0, 0]), float(warp[1, 1]))
    moved = np.abs(_corners(place.size) @ (warp[:, :2] - np.eye(2)).T + warp[:, 2]).max()
    if moved < STILL:
        return Aligned(raw, raw, shift, zoom, f"it stands still: its corners move by {moved:.2f} pixels")
    undone, within = undo(warp, pixels)
    counted = within & place.outside
    if not counted.any():
        return Aligned(raw, raw, shift, zoom, "no pixel outside the box is within the frame after undoing")
    before, after = place.l2(pixels, counted), place.l2(undone, counted)
    if after > GAIN * before:
        return Aligned(raw, raw, shift, zoom, f"undoing does not help: L2 outside {before:.5f} would be {after:.5f}")
    return Aligned(raw, place.measure(undone, counted, perception), shift, zoom, None)


class NotFound(Exception):  # noqa: N818 - it is an answer, not a fault
    """No shift and zoom could be estimated, and why."""


def estimate(place: Place, edited: np.ndarray) -> np.ndarray:
    """The map, float64 (2, 3), of a pixel of the source to where its content lies in the edited picture.

    Raises
    ------
    NotFound
        There is too little to see outside the box, ECC does not converge, or what it finds is no shift and zoom.
    """
    width, height = place.size
    seen = _unboxed(place)
    if seen.mean() < 0.02:
        raise NotFound("too little of the picture lies outside the box to find a shift by")
    source, other = _grey(place.source, edited, seen)
    if source[seen].std() < 2:
        raise NotFound("nothing outside the box stands out to find a shift by")
    warp = _start(source, other, seen)
    for level in LEVELS:
        if level > 1 and min(width, height) < level * COARSE:
            continue
        size = (round(width / level), round(height / level))
        reduced = [cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in (source, other)]
        mask = cv2.resize(seen.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        scaled = _rescaled(warp, 1 / level)
        try:
            _, scaled = cv2.findTransformECC(
                *reduced, scaled.astype(np.float32), cv2.MOTION_AFFINE, CRITERIA, mask, BLUR
            )
        except cv2.error as failure:
            raise NotFound("the estimate of a shift does not converge") from failure
        warp = _rescaled(scaled.astype(float), level)
        if not np.isfinite(warp).all():
            raise NotFound("the estimate of a shift does not converge")
    if max(abs(warp[0, 1]), abs(warp[1, 0])) > MOST_TURN:
        raise NotFound(f"the picture seems turned or sheared, by {max(abs(warp[0, 1]), abs(warp[1, 0])):.3f}")
    shift = shift_of(warp, place.size)
    zoom = np.diag(warp[:, :2])
    if np.abs(zoom - 1).max() > MOST_ZOOM or np.abs(shift).max() > FARTHEST * max(width, height):
        raise NotFound(
            f"a shift of {shift[0]:.1f}, {shift[1]:.1f} pixels and a zoom of {zoom.max():.2f} is no artefact"
        )
    # Turn and shear are dropped about the middle, where that moves the least.
    middle = _middle(place.size)
    return np.column_stack([np.diag(zoom), np.asarray(shift) + middle - zoom * middle])


def shift_of(warp: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """How far a map (2, 3) moves the middle of a picture of ``size`` right and down, in pixels."""
    middle = _middle(size)
    across, down = warp[:, :2] @ middle + warp[:, 2] - middle
    return float(across), float(down)


def undo(warp: np.ndarray, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edited picture with its content back in place, and which of its pixels are known, boolean (height, width)."""
    height, width = edited.shape[:2]
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    back = cv2.warpAffine(edited, warp, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    # A pixel is known if all that its interpolation looks at lay within the frame.
    known = np.full((height, width), 255, np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    known = cv2.warpAffine(known, warp, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    inner = cv2.erode(known, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=255)
    return back, inner == 255


def _middle(size: tuple[int, int]) -> np.ndarray:
    return (np.array(size, float) - 1) / 2


def _corners(size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]], float)


def _unboxed(place: Place) -> np.ndarray:
    """Pixels that lie outside the box grown by its margin, boolean (height, width)."""
    reach = 2 * round(MARGIN * max(place.size)) + 1
    within = (~place.outside).astype(np.uint8)
    return cv2.dilate(within, np.ones((reach, reach), np.uint8)) == 0


def _grey(source: np.ndarray, edited: np.ndarray, seen: np.ndarray) -> list[np.ndarray]:
    """Both pictures along the direction of colour that the source varies most in, float32 (height, width).

    Their luminance would not do: a teal ball on grey has the same.
    """
    colours = source[seen].astype(np.float64)
    _, axes = np.linalg.eigh(np.cov(colours.T))
    return [np.ascontiguousarray(one.astype(np.float32) @ axes[:, -1].astype(np.float32)) for one in (source, edited)]


def _rescaled(warp: np.ndarray, factor: float) -> np.ndarray:
    """The same map for pictures enlarged by ``factor``; pixel centres lie at half numbers of it."""
    offset = (factor - 1) / 2
    shift = factor * warp[:, 2] + offset - warp[:, :2] @ np.full(2, offset)
    return np.column_stack([warp[:, :2], shift])


def _start(source: np.ndarray, edited: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A shift to begin with: none, or the one of phase correlation if the pictures fit better so."""
    mean = source[seen].mean()
    blank = [np.where(seen, one, mean).astype(np.float32) for one in (source, edited)]
    window = cv2.createHanningWindow(source.shape[::-1], cv2.CV_32F)
    (across, down), _ = cv2.phaseCorrelate(*blank, window)
    still = np.eye(2, 3)
    moved = np.array([[1, 0, across], [0, 1, down]], float)
    if not max(abs(across), abs(down)) <= FARTHEST * max(source.shape):
        return still
    return min((still, moved), key=lambda warp: _misfit(source, edited, seen, warp))


def _misfit(source: np.ndarray, edited: np.ndarray, seen: np.ndarray, warp: np.ndarray) -> float:
    size = source.shape[::-1]
    back = cv2.warpAffine(
        edited, warp, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return float(np.square(back - source)[seen].mean())
