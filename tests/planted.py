"""A small real store in whose middle the box is planted, for tests of probes."""

import numpy as np
import polars as pl

import store
from store.bits import from_float32

LAYERS = ("embed", "0", "1", "2", "final")
PLANTED = "1"
SMALL = dict(
    width=16,
    heads=2,
    depth=2,
    queries=3,
    batch=16,
    steps=4,
    warm_up=2,
    l1_steps=2,
    watch=8,
    threads=1,
    precision="float32",
)
"""A short training."""


def planted_store(folder, n=48, *, aside=(), silent=(), identity=None, grow=False):
    """A store whose instruction tokens spell the box, linearly and under noise, at layer 1 and nowhere else.

    Samples ``aside`` have no states, samples ``silent`` no token of the instruction.
    """
    rng = np.random.default_rng(0)
    size = rng.uniform(0.15, 0.4, (n, 2))
    centre = size / 2 + rng.uniform(0, 1, (n, 2)) * (1 - size)
    unit = np.concatenate([centre - size / 2, centre + size / 2], 1)
    columns = {
        "sample_id": [f"s{i}" for i in range(n)],
        "width": [200] * n,
        "height": [100] * n,
        "n_image": rng.integers(3, 6, n),
        "n_text": np.where(np.isin(range(n), silent), 1, rng.integers(3, 7, n)),
        "split": ["test" if i % 3 == 0 else "train" for i in range(n)],
    }
    for i, name in enumerate(("x1", "y1", "x2", "y2")):
        columns[name] = unit[:, i] * (200 if i % 2 == 0 else 100)
    samples = pl.DataFrame(columns)
    plan = store.Plan(LAYERS, 16, samples, identity or {"planted": PLANTED})
    (store.grow if grow else store.create)(folder, plan)
    spelled = rng.normal(size=(4, 16))
    with store.Writer(folder) as writer:
        for b in writer.blocks():
            with writer.block(b) as block:
                for s in block.samples:
                    if s in aside:
                        block.set_aside(s, "it does not open")
                        continue
                    row = writer.plan.samples.row(s, named=True)
                    counts = [row["n_image"], row["n_text"]]
                    image, text = (rng.normal(size=(len(LAYERS), k, 16)).astype(np.float32) for k in counts)
                    text[LAYERS.index(PLANTED), 1:] += ((unit[s] - 0.5) * 6 @ spelled).astype(np.float32)
                    kinds = ["image"] * counts[0] + ["template"] + ["instruction"] * (counts[1] - 1)
                    tokens = pl.DataFrame({"position": range(sum(counts)), "kind": kinds})
                    block.add(s, image=from_float32(image), text=from_float32(text), tokens=tokens)
    return folder
