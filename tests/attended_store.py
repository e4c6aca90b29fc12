"""Small real stores with the attention of made-up proxies: what they read, and where, is known."""

import numpy as np
import polars as pl

import store

LAYERS = ("embed", "0", "1", "2", "3", "final")
READ = ("0", "1", "2", "3")
HEADS = ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1")
QUERIES = 3
SAID = (
    "Remove the leftmost ball.",
    "Paint the second cube from the left red, please.",
    "Turn the green ball into a cube!",
    "The leftmost one of the leftmost row should go.",
)
ASIDE = (2, 11)
"""Samples that were set aside: they have no states, no tokens and no attention."""


def attended_store(path, n=40, seeds=(0, 1), permuted=(0,), by_token=True, seed=0, favourite="2", tokens="text") -> str:
    """A store of ``n`` samples with attention arrays; most heads of true proxies give ``favourite`` most mass."""
    rng = np.random.default_rng(seed)
    spoken = [SAID[i % len(SAID)] for i in range(n)]
    words = [text.split() for text in spoken]
    left, top = rng.uniform(0, 100, n), rng.uniform(0, 50, n)
    samples = pl.DataFrame(
        {
            "sample_id": [f"scene-{i}" for i in range(n)],
            "task": [("swap", "removal")[i % 2] for i in range(n)],
            "instruction": spoken,
            "width": 200,
            "height": 100,
            "n_image": 6,
            "n_text": [len(one) + 3 for one in words],
            "n_query": [len(one) for one in words],
            "split": ["test" if i % 3 == 0 else "train" for i in range(n)],
            "n_objects": rng.integers(4, 7, n),
            "x1": left,
            "y1": top,
            "x2": left + 60,
            "y2": top + 40,
        }
    )
    rows = ("text_to_image", "text_to_text")
    plan = store.Plan(
        LAYERS, 8, samples, {"made": seed, "queries": "instruction"}, attention=rows, attention_layers=READ,
        samples_per_block=16,
    )  # fmt: skip
    store.create(path, plan)
    with store.Writer(path) as writer:
        for b in range(plan.n_blocks):
            with writer.block(b) as block:
                for s in plan.block(b):
                    if s in ASIDE:
                        block.set_aside(s, "made to be")
                        continue
                    block.add(s, **_sample(rng, plan, words[s]))
    counts = samples[{"text": "n_text", "image": "n_image"}[tokens]].to_numpy()
    longest = int(counts.max())
    for labels, many in (("true", seeds), ("permuted", permuted)):
        for one in many:
            values = made_attention(rng, counts, longest, favourite if labels == "true" else None)
            spec = {"name": f"joint-{labels}", "layers": list(READ), "tokens": tokens, "labels": labels}
            kept = values if by_token and (labels, one) == ("true", seeds[0]) else np.nansum(values, -1)
            kept[[s for s in ASIDE if s < n]] = np.nan
            about = {
                "proxy": f"{labels}{one}",
                "seed": one,
                "spec": spec,
                "run": "runs/made",
                "samples": n - sum(s < n for s in ASIDE),
            }
            dims = ("sample", "head", "query", "layer", "token")[: kept.ndim]
            coordinates = {"head": HEADS, "layer": READ}
            name = f"attention-{labels}-{one}"
            with store.derive(
                path, name, dims, kept.shape, "float16", coordinates=coordinates, attributes=about
            ) as out:
                out.write(kept)
    return str(path)


def _sample(rng, plan, words):
    n_text = len(words) + 3
    kinds = ["template"] + ["image"] * 6 + ["instruction"] * len(words) + ["template"] * 2
    place = [None] * 7 + list(range(len(words))) + [None] * 2
    grid = [None] + [divmod(i, 3) for i in range(6)] + [None] * (len(words) + 2)
    tokens = pl.DataFrame(
        {
            "position": range(len(kinds)),
            "token_id": rng.integers(0, 50, len(kinds)),
            "text": ["<s>"] + ["<i>"] * 6 + [f" {word}" for word in words] + ["\n", "</s>"],
            "kind": kinds,
            "word": pl.Series(place, dtype=pl.Int32),
            "row": pl.Series([cell and cell[0] for cell in grid], dtype=pl.Int32),
            "col": pl.Series([cell and cell[1] for cell in grid], dtype=pl.Int32),
        }
        | {
            name: pl.Series([cell and float(size * (cell[axis] + far)) for cell in grid], dtype=pl.Float32)
            for name, axis, size, far in (
                ("px1", 1, 200 / 3, 0), ("py1", 0, 50, 0), ("px2", 1, 200 / 3, 1), ("py2", 0, 50, 1)
            )
        }
    )  # fmt: skip
    given = {
        "image": rng.normal(size=(len(LAYERS), 6, 8)).astype(np.float32),
        "text": rng.normal(size=(len(LAYERS), n_text, 8)).astype(np.float32),
        "text_to_image": rng.random((len(READ), len(words), 6)),
        "text_to_text": rng.random((len(READ), len(words), n_text)),
    }
    given = {name: store.bits.from_float32(v) if name in ("image", "text") else v for name, v in given.items()}
    return given | {"tokens": tokens}


def made_attention(rng, n_text, longest, favourite):
    """a[sample, head, query, layer, token], float32: sums to 1 over layer and token, NaN past a sample's tokens."""
    scores = rng.normal(size=(len(n_text), len(HEADS), QUERIES, len(READ), longest)) * 1.5
    if favourite is not None:
        # The first three heads are decisive; the others are not.
        scores[:, :3, :, READ.index(favourite)] += 3
        scores[..., 3] += 1.5
    scores[np.broadcast_to(np.arange(longest) >= n_text[:, None, None, None, None], scores.shape)] = -np.inf
    flat = np.exp(scores).reshape(*scores.shape[:3], -1)
    values = (flat / flat.sum(-1, keepdims=True)).reshape(scores.shape).astype(np.float32)
    values[np.isneginf(scores)] = np.nan
    return values
