"""Floors that need no training: the same box for every image.

The trained floors (text only, image only, permuted labels) are proxies like any other; see ``probes.specs``.
"""

import numpy as np

CENTRE_BOX = np.array([0.25, 0.25, 0.75, 0.75], np.float32)
"""Half as wide and half as high as the image, in its middle."""


def constant_boxes(train_boxes_s4: np.ndarray) -> dict[str, np.ndarray]:
    """Name → box (4,) of each untrained floor; ``train_boxes_s4`` are the true boxes of the train split."""
    return {"floor-mean-box": train_boxes_s4.mean(0), "floor-centre-box": CENTRE_BOX}
