"""Made-up tables of a probe run, as training leaves them: how well each probe knows the answer is given."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from probes.tables import gather

LAYERS = ("embed", *map(str, range(6)), "final")
CURVED = {"layer", "prompt", "floor", "control"}


@dataclass
class Made:
    """What a run leaves, and the sample tables of its data."""

    predictions: pl.DataFrame
    curves: pl.DataFrame
    about: pl.DataFrame
    samples: dict[str, pl.DataFrame] = field(default_factory=dict)

    def gather(self):
        return gather(self.predictions, self.curves, self.about, self.samples)

    def without(self, *probes):
        """The run without these probes."""
        keep = ~pl.col("probe").is_in(probes)
        return Made(*(table.filter(keep) for table in (self.predictions, self.curves, self.about)), self.samples)

    def write(self, folder):
        """The tables of a finished run in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        results, comparisons = self.gather()
        tables = {"results": results, "comparisons": comparisons, "about": self.about, "predictions": self.predictions}
        for name, table in tables.items():
            table.write_parquet(folder / f"{name}.parquet")
        (folder / "sweep.json").write_text('{"settings": {}}')
        return folder


def about_row(probe, role, layers, tokens="all", **more):
    label = layers[0] if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
    row = {"probe": probe, "role": role, "kind": "qformer", "layers": list(layers), "layer": label, "tokens": tokens}
    row |= {"target": "box", "labels": "true", "source": "ordinary", "share": 1.0, "keys": None}
    return row | more


def stock(layers=LAYERS, controls=True, extras=True, target="box"):
    """The rows of ``about`` of a stock sweep."""
    rows = [about_row(f"layer-{name}", "layer", (name,)) for name in layers]
    blocks = [name for name in layers if name.isdigit()]
    middle = blocks[len(blocks) // 3 : len(blocks) - len(blocks) // 3] or layers
    rows += [
        about_row("mid-prompt", "prompt", middle, "text"),
        about_row("floor-text-only", "floor", ("embed",), "text"),
        about_row("floor-image-only", "floor", ("embed",), "image"),
        about_row("floor-mean-box", "floor", ("none",), "none", kind="constant"),
        about_row("floor-centre-box", "floor", ("none",), "none", kind="constant"),
    ]
    if controls:
        for name in layers:
            rows += [
                about_row(f"permuted-{name}", "control", (name,), labels="permuted"),
                about_row(f"control-{name}", "control", (name,), labels="control"),
                about_row(f"random-{name}", "control", (name,), source="random-weights"),
                about_row(f"shuffled-{name}", "control", (name,), source="shuffled-images"),
            ]
    if extras:
        rows += [
            about_row(f"matched-{tokens}-{count}", "matched", middle if count == "n" else middle[:1], words, keys=64)
            for tokens, words in (("all", "all"), ("prompt", "text"))
            for count in "1n"
        ]
        rows += [
            about_row(f"layer-{name}-share-1/{part}", "efficiency", (name,), share=1 / part)
            for name in (middle[0], blocks[-1])
            for part in (8, 2)
        ]
    return [row | {"target": target} for row in rows]


def boxes_of(rng, n):
    size = rng.uniform(0.1, 0.5, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * (1 - size)
    return np.concatenate([corner, corner + size], 1)


def made_run(rows=None, skill=None, seeds=(0, 1, 2), n=120, watched=40, shifts=(), default=0.2, steps=(0, 50, 100)):
    """A run without training: a probe of skill 1 knows the answer, one of skill 0 guesses. Boxes or three classes."""
    rows, skill = stock() if rows is None else rows, skill or {}
    rng = np.random.default_rng(0)
    predictions, samples = [], {}
    for data in ("held-out", *shifts):
        true, guess = boxes_of(rng, n), boxes_of(rng, n)
        hard = rng.uniform(-0.15, 0.15, n)  # scenes that are hard for every probe
        samples[data] = pl.DataFrame(
            {
                "sample_id": [f"{data}-{i}" for i in range(n)],
                "task": [("swap", "removal", "rare")[0 if i % 2 else 1 if i > 5 else 2] for i in range(n)],
                "n_objects": rng.integers(4, 7, n),
            }
        )
        for row in rows:
            own = (0,) if row["kind"] == "constant" else seeds
            for seed in own:
                share = np.clip(skill.get(row["probe"], default) + hard + rng.normal(0, 0.03, n), 0, 1)
                if len(own) > 1:
                    share = np.clip(share + rng.normal(0, 0.01), 0, 1)
                named = {"probe": row["probe"], "seed": seed, "data": data, "part": "test", "sample": np.arange(n)}
                named |= {
                    "sample_id": samples[data]["sample_id"],
                    "watched": (np.arange(n) < watched) & (data == "held-out"),
                }
                if row["target"] == "box":
                    values = answers_of_boxes(true, guess, share)
                else:
                    values = answers_of_classes(rng, true, share)
                predictions.append(pl.DataFrame(named | values))
    return Made(
        pl.concat(predictions, how="diagonal"),
        curves_of(rng, rows, skill, default, seeds, steps, watched),
        pl.DataFrame(rows, infer_schema_length=None),
        samples,
    )


def answers_of_boxes(true, guess, share):
    predicted = share[:, None] * true + (1 - share[:, None]) * guess
    columns = {name: predicted[:, i] for i, name in enumerate(("x1", "y1", "x2", "y2"))}
    columns |= {f"true_{name}": true[:, i] for i, name in enumerate(("x1", "y1", "x2", "y2"))}
    return columns | {"width": np.full(len(true), 200), "height": np.full(len(true), 100)}


def answers_of_classes(rng, true, share):
    label = (true[:, 0] * 3).astype(int).astype(str)
    predicted = np.where(rng.uniform(size=len(true)) < share, label, "none")
    return {"predicted": predicted, "true": label, "nll": -np.log(np.clip(share, 0.05, 1))}


def curves_of(rng, rows, skill, default, seeds, steps, watched):
    """Curves that fall from 0.7 by the skill."""
    points = [
        {"probe": row["probe"], "seed": seed, "step": step, "metric": metric, "n": watched}
        | {"value": 0.7 - 0.6 * skill.get(row["probe"], default) * (step / steps[-1]) ** 0.3 + rng.normal(0, 0.01)}
        for row in rows
        if row["role"] in CURVED and row["kind"] != "constant"
        for seed in seeds
        for step in steps
        for metric in (("error", "one_minus_iou") if row["target"] == "box" else ("error",))
    ]
    schema = {"probe": pl.String, "seed": pl.Int64, "step": pl.Int64, "metric": pl.String, "n": pl.Int64}
    return pl.DataFrame(points, schema=schema | {"value": pl.Float64})
