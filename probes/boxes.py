"""Box arithmetic in the unit square: overlap, distance, containment, and the proxy's loss.

All boxes are corners ``(x1, y1, x2, y2)`` with ``x1 <= x2``, ``y1 <= y2``: float tensors (..., 4) in [0, 1].
"""

import math

import torch
from torch import Tensor

GIOU_SHARE = 0.4
"""Weight of 1 − GIoU in the loss once it has joined; L1 has the rest [ABP §4.4]."""

TINY = 1e-9
"""Keeps empty boxes from dividing by zero; far below the smallest true box (area 1e-3)."""


def centre_to_corners(box: Tensor) -> Tensor:
    """(cx, cy, w, h) → (x1, y1, x2, y2), both (..., 4); corners may leave the unit square."""
    centre, size = box.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def area(box: Tensor) -> Tensor:
    """Area (...) of boxes (..., 4)."""
    return (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Shared area (...) of boxes (..., 4)."""
    return area(torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (...) in [0, 1]."""
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared).clamp(min=TINY)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (...) in [-1, 1]: IoU less the share of the hull that neither box covers."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1))
    return shared / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference (...) of the four corner coordinates."""
    return (a - b).abs().mean(-1)


def centre_distance(a: Tensor, b: Tensor, size: Tensor | None = None) -> Tensor:
    """Distance (...) between centres over the image diagonal, in [0, 1].

    ``size`` (..., 2) is the image's width and height in pixels; without it the image is taken as square.
    """
    gap = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    if size is None:
        return gap.norm(dim=-1) / math.sqrt(2)
    return (gap * size).norm(dim=-1) / size.norm(dim=-1)


def containment(inner: Tensor, outer: Tensor) -> Tensor:
    """Share (...) of ``inner``'s area that lies within ``outer``, in [0, 1]."""
    return intersection(inner, outer) / area(inner).clamp(min=TINY)


def loss(predicted: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
    """Loss (...) of each box at a training step: L1 alone at first, then 0.6·L1 + 0.4·(1 − GIoU) [ABP §4.4].

    GIoU is flat for boxes that are far apart and tiny, so L1 brings them near first.
    """
    distance = l1(predicted, true)
    if step < l1_steps:
        return distance
    return (1 - GIOU_SHARE) * distance + GIOU_SHARE * (1 - giou(predicted, true))
