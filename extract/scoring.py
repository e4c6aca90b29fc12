"""How good boxes are: IoU against true ones, and shares with their intervals."""

import math
from collections.abc import Sequence

import torch
from torchvision.ops import box_iou

from extract.boxes import Box

HIT = 0.5  # IoU from which a box counts as right [ABP §4.1]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    share = hits / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def score_boxes(given: Sequence[Box | None], truth: Sequence[Box]) -> dict[str, float]:
    """Share of boxes with IoU of at least one half, its interval, mean IoU, share of answers without a box."""
    boxes = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in given], dtype=torch.float32)
    ious = box_iou(boxes, torch.tensor(truth, dtype=torch.float32)).diagonal().nan_to_num()
    hits = int((ious >= HIT).sum())
    low, high = wilson(hits, len(truth))
    missing = sum(box is None for box in given) / len(truth)
    return {"iou50": hits / len(truth), "low": low, "high": high, "mean_iou": float(ious.mean()), "no_box": missing}


def centre_boxes(sizes: Sequence[tuple[int, int]], share: float) -> list[Box]:
    """The box in the middle of each picture (``(width, height)``) that covers ``share`` of its area."""
    near, far = 0.5 - math.sqrt(share) / 2, 0.5 + math.sqrt(share) / 2
    return [(near * width, near * height, far * width, far * height) for width, height in sizes]
