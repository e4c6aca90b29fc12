"""How well the model's own box agrees with the one a person left: mean IoU with a bootstrap interval over images."""

from collections.abc import Sequence

import numpy as np

from extract.review.verdicts import Box

DRAWS = 2000


def iou(a_sx: np.ndarray, b_sx: np.ndarray) -> np.ndarray:
    """Intersection over union ``[s]`` of boxes ``[s, 4]``, pair by pair; a box without area has none."""
    low, high = np.maximum(a_sx[:, :2], b_sx[:, :2]), np.minimum(a_sx[:, 2:], b_sx[:, 2:])
    shared = (high - low).clip(0).prod(1)
    union = sum((box[:, 2:] - box[:, :2]).prod(1) for box in (a_sx, b_sx)) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def mean_iou(pairs: Sequence[tuple[Box, Box]]) -> tuple[float, float, float]:
    """Mean IoU of pairs of boxes with the ends of its 95 % percentile interval: (mean, low, high)."""
    given_spx = np.asarray(pairs, np.float64)
    iou_s = iou(given_spx[:, 0], given_spx[:, 1])
    draws = np.random.default_rng(0).integers(len(iou_s), size=(DRAWS, len(iou_s)))
    low, high = np.quantile(iou_s[draws].mean(1), [0.025, 0.975])
    return float(iou_s.mean()), float(low), float(high)
