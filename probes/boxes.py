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


def centre_distance_over_box(predicted: Tensor, true: Tensor, size: Tensor) -> Tensor:
    """Distance (...) between centres in pixels over the true box's size, the square root of its area in pixels.

    ``size`` (..., 2) is the image's width and height in pixels.
    """
    gap = (predicted[..., :2] + predicted[..., 2:] - true[..., :2] - true[..., 2:]) / 2
    return (gap * size).norm(dim=-1) / (area(true) * size.prod(-1)).clamp(min=TINY).sqrt()


def pointing(predicted: Tensor, true: Tensor) -> Tensor:
    """Whether (...) the predicted box's centre lies within the true box, bool.

    A centre placed uniformly at random hits with the true box's area for probability.
    """
    centre = (predicted[..., :2] + predicted[..., 2:]) / 2
    return ((centre >= true[..., :2]) & (centre <= true[..., 2:])).all(-1)


def containment(inner: Tensor, outer: Tensor) -> Tensor:
    """Share (...) of ``inner``'s area that lies within ``outer``, in [0, 1]."""
    return intersection(inner, outer) / area(inner).clamp(min=TINY)


def chance_overlap(size: Tensor, box: Tensor) -> Tensor:
    """Expected area (...) that ``box`` shares with a box of ``size`` placed uniformly at random inside the image.

    The axes are independent. Along one, the placed box [x, x + w] has x uniform on [0, 1 − w], and a point t of the
    image is covered for the x in [max(t − w, 0), min(t, 1 − w)]. The expected overlap with [a, b] is the integral of
    that length over t from a to b, over 1 − w; its antiderivative is (t² − (t − 1 + w)₊² − (t − w)₊²) / 2.

    Parameters
    ----------
    size : Tensor
        Width and height (..., 2) in [0, 1] of the image.
    box : Tensor
        Corners (..., 4) of the box that stays.
    """
    room = 1 - size

    def covered(t: Tensor) -> Tensor:
        return (t**2 - (t - room).clamp(min=0) ** 2 - (t - size).clamp(min=0) ** 2) / 2

    start, end = box[..., :2], box[..., 2:]
    free = room > 1e-6  # as wide as the image it has one place only
    along = torch.where(free, (covered(end) - covered(start)) / room.clamp(min=1e-6), end - start)
    return along.clamp(min=0).prod(-1)


METRICS = (
    "iou",
    "iou_at_0.5",
    "giou",
    "centre_distance",
    "centre_distance_over_box",
    "pointing",
    "pointing_chance",
    "truth_inside",
    "truth_inside_chance",
    "inside_truth",
    "inside_truth_chance",
)
"""What ``metrics`` gives, in order."""


def metrics(predicted_n4: Tensor, true_n4: Tensor, size_n2: Tensor) -> dict[str, Tensor]:
    """How well each predicted box fits its true one: name → float64 (n,), the keys of ``METRICS``.

    ``truth_inside`` is the share of the true box that the predicted one covers, ``inside_truth`` the share of the
    predicted box that lies within the true one. Beside pointing and containment stands what a box of the predicted
    size reaches when it is placed uniformly at random.

    Parameters
    ----------
    predicted_n4, true_n4 : Tensor
        Corners in [0, 1].
    size_n2 : Tensor
        Width and height of the image in pixels.
    """
    predicted, true, size = predicted_n4.double(), true_n4.double(), size_n2.double()
    overlap = iou(predicted, true)
    by_chance = chance_overlap((predicted[:, 2:] - predicted[:, :2]).clamp(0, 1), true)
    values = (
        overlap,
        overlap >= 0.5,
        giou(predicted, true),
        centre_distance(predicted, true, size),
        centre_distance_over_box(predicted, true, size),
        pointing(predicted, true),
        area(true),
        containment(true, predicted),
        by_chance / area(true).clamp(min=TINY),
        containment(predicted, true),
        by_chance / area(predicted).clamp(min=TINY),
    )
    return {name: value.double() for name, value in zip(METRICS, values, strict=True)}


def loss(predicted: Tensor, true: Tensor, step: int, l1_steps: int) -> Tensor:
    """Loss (...) of each box at a training step: L1 alone at first, then 0.6·L1 + 0.4·(1 − GIoU) [ABP §4.4].

    GIoU is flat for boxes that are far apart and tiny, so L1 brings them near first.
    """
    distance = l1(predicted, true)
    if step < l1_steps:
        return distance
    return (1 - GIOU_SHARE) * distance + GIOU_SHARE * (1 - giou(predicted, true))
