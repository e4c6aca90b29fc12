"""Small real stores in one of whose layers the box, a word and a number are planted, and nowhere else."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

import store
from probes.config import SweepConfig, TrainConfig
from store.bits import from_float32

LAYERS = ("embed", "0", "1", "2", "final")
PLANTED = "1"
WIDTH = 16
WORDS = ("cube", "ball", "cone", "ring")
CORNERS = ("x1", "y1", "x2", "y2")

QUICK = dict(width=16, heads=2, depth=1, queries=2, lr=5e-3, batch=16, steps=12, warm_up=2, l1_steps=4)
QUICK |= dict(watch=16, watch_every=6, seeds=(0, 1), threads=1, precision="float32")
"""Settings of a run in which nothing is learned, but everything happens."""


@dataclass
class Planted:
    """What a planted store is made of; ``write`` makes it."""

    n: int = 96
    planted: str | None = PLANTED
    """Layer whose instruction tokens spell the answers, linearly and under noise."""
    spelled: tuple[str, ...] = ("box", "word", "weight")
    """Which answers they spell."""
    boxes: bool = True
    seed: int = 0
    """Of the states; the samples of all stores are alike."""
    samples: range | list[int] = field(default_factory=list)
    """Which of the n samples it holds, in their order; all if not given."""
    layers: tuple[str, ...] = LAYERS
    width: int = WIDTH
    ids: str = "s"
    test: int = 3
    """Every how manieth sample is held out."""
    spoiled: dict[tuple[int, str], float] = field(default_factory=dict)
    """Value of one number of (sample, layer)."""
    more: dict[str, list] = field(default_factory=dict)
    """Columns to add to the sample table."""

    def table(self) -> pl.DataFrame:
        """All n samples."""
        n, rng = self.n, np.random.default_rng(0)
        size = rng.uniform(0.15, 0.4, (n, 2))
        centre = size / 2 + rng.uniform(0, 1, (n, 2)) * (1 - size)
        unit = np.concatenate([centre - size / 2, centre + size / 2], 1)
        words = [WORDS[k] for k in rng.integers(0, len(WORDS), n)]
        columns = {
            "sample_id": [f"{self.ids}{i}" for i in range(n)],
            "instruction": [f"remove the {word}." for word in words],
            "width": [200] * n,
            "height": [100] * n,
            "n_image": rng.integers(3, 6, n),
            "n_text": rng.integers(3, 7, n),
            "split": ["test" if i % self.test == 0 else "train" for i in range(n)],
            "object_kind": words,
            "n_objects": rng.integers(4, 7, n),
            "weight": rng.normal(10, 3, n),
        }
        for i, name in enumerate(CORNERS):
            columns[name] = unit[:, i] * (200 if i % 2 == 0 else 100) if self.boxes else [None] * n
        return pl.DataFrame(columns | self.more, schema_overrides=dict.fromkeys(CORNERS, pl.Float64))

    def write(self, folder) -> str:
        """The store in ``folder``."""
        whole, rng = self.table(), np.random.default_rng([self.seed, 1])
        kept = whole[list(self.samples)] if self.samples else whole
        told = np.stack([kept[name].fill_null(0).to_numpy() / (200, 100)[i % 2] for i, name in enumerate(CORNERS)], 1)
        words = np.eye(len(WORDS))[[WORDS.index(word) for word in kept["object_kind"]]]
        answers = {"box": (told - 0.5) * 6, "word": words * 3, "weight": (kept["weight"].to_numpy()[:, None] - 10) / 3}
        facts = np.concatenate([values * (name in self.spelled) for name, values in answers.items()], 1)
        letters = np.random.default_rng(7).normal(size=(facts.shape[1], self.width))
        plan = store.Plan(self.layers, self.width, kept, {"planted": self.planted, "seed": self.seed})
        store.create(folder, plan)
        with store.Writer(folder) as writer:
            for b in range(plan.n_blocks):
                with writer.block(b) as block:
                    for s in plan.block(b):
                        counts = [int(kept[name][s]) for name in ("n_image", "n_text")]
                        shapes = [(len(self.layers), count, self.width) for count in counts]
                        image, text = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
                        if self.planted:
                            text[self.layers.index(self.planted), 1:] += (facts[s] @ letters).astype(np.float32)
                        for (sample, layer), value in self.spoiled.items():
                            if sample == s:
                                text[self.layers.index(layer), 1, 3] = value
                        kinds = ["image"] * counts[0] + ["template"] + ["instruction"] * (counts[1] - 1)
                        tokens = pl.DataFrame({"position": range(sum(counts)), "kind": kinds})
                        block.add(s, image=from_float32(image), text=from_float32(text), tokens=tokens)
        return str(folder)


def quick(store_path, out, **changes) -> SweepConfig:
    """A sweep that takes a second."""
    return SweepConfig(str(store_path), out, **QUICK | changes)


def alone(store_path, out, *layers, **changes) -> TrainConfig:
    """One probe with the settings of ``quick``."""
    return TrainConfig(str(store_path), out, layers=layers, **QUICK | changes)


def weights_of(out) -> dict[str, bytes]:
    """The weights of every finished probe of a folder, by its name."""
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("proxies/*/probe.safetensors"))}
