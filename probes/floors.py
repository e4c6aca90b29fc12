"""Floors that need no training: the same answer for every image.

The trained floors (words alone, the picture alone) and controls are probes like any other; see ``probes.specs``.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from probes.targets import BOX, Target

CENTRE_BOX = np.array([0.25, 0.25, 0.75, 0.75], np.float32)
"""Half as wide and half as high as the image, in its middle."""


def constant(target: Target, train: np.ndarray, test: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and answers, in the columns of ``Target.answers``, of each untrained floor for samples ``test``.

    Boxes: the mean box of the train samples, and a box in the centre. Classes: the most frequent one, with the train
    samples' frequencies (one added to each) as its probabilities. Numbers: the mean.
    """
    true = target.labels[test]
    if target.form == "box":
        for name, box in (("mean-box", target.labels[train].mean(0)), ("centre-box", CENTRE_BOX)):
            said = {column: np.full(len(test), box[i]) for i, column in enumerate(BOX)}
            yield f"floor-{name}", said | {f"true_{column}": true[:, i] for i, column in enumerate(BOX)}
    elif target.form == "class":
        names = target.describe()["classes"]
        counts = np.bincount(target.labels[train], minlength=len(names)) + 1
        answers = {"predicted": [names[counts.argmax()]] * len(test), "true": [names[place] for place in true]}
        yield "floor-majority", answers | {"nll": -np.log(counts[true] / counts.sum())}
    else:
        told = target.describe()
        values = [array.astype(np.float64) * told["spread"] + told["mean"] for array in (target.labels[train], true)]
        yield "floor-mean", {"predicted": np.full(len(test), values[0].mean()), "true": values[1]}
