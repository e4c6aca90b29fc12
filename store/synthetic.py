"""Made-up stores of any size, a function of a seed: for tests, benches and trying the API without a model."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from store import bits
from store.layout import create
from store.plan import Plan
from store.writer import Block, Writer


def synthetic_plan(
    n_samples: int = 20,
    seed: int = 0,
    *,
    image: tuple[int, int] = (6, 12),
    text: tuple[int, int] = (5, 20),
    identity: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Plan:
    """A plan of ragged samples; ``image`` and ``text`` are the least and largest token counts, ``changes`` fields."""
    rng = np.random.default_rng([seed, 1])
    n_text = rng.integers(text[0], text[1] + 1, n_samples)
    samples = pl.DataFrame(
        {
            "sample_id": [f"made-{seed}-{n:05d}" for n in range(n_samples)],
            "task": rng.choice(["swap", "removal"], n_samples),
            "instruction": [f"Remove object {n}." for n in range(n_samples)],
            "n_image": rng.integers(image[0], image[1] + 1, n_samples),
            "n_text": n_text,
            "n_query": n_text - 3,
            "split": ["train" if n % 5 else "test" for n in range(n_samples)],
            "x1": rng.uniform(0, 100, n_samples),
        }
    )
    given = {"layers": ("embed", "0", "final"), "width": 16, "samples_per_block": 8} | changes
    return Plan(samples=samples, identity=identity or {"weights": {"sha256": "made up"}, "seed": seed}, **given)


def synthetic_sample(plan: Plan, sample: int) -> dict[str, Any]:
    """Arguments of ``Block.add`` for one sample; a function of the identity's seed and the sample."""
    rng = np.random.default_rng([plan.identity["seed"], 2, sample])
    n_image, n_text = (int(plan.samples[name][sample]) for name in ("n_image", "n_text"))

    def hidden(n: int) -> np.ndarray:
        values = rng.standard_normal((len(plan.layers), n, plan.width), np.float32)
        return values if plan.dtype == "float32" else bits.from_float32(values)

    given: dict[str, Any] = {"image": hidden(n_image), "text": hidden(n_text)}
    heads = () if plan.attention_heads is None else (plan.attention_heads,)
    for name in plan.attention:
        n_tokens = n_image if name.endswith("image") else n_text
        given[name] = rng.random((len(plan.attention_layers), *heads, int(plan.samples["n_query"][sample]), n_tokens))
    before = 1  # a template token, the image, two more template tokens, the instruction
    kinds = ["template"] * before + ["image"] * n_image + ["template"] * 2 + ["instruction"] * (n_text - 3)
    given["tokens"] = pl.DataFrame(
        {"position": range(len(kinds)), "kind": kinds, "token_id": rng.integers(0, 99, len(kinds))}
    )
    given["values"] = {"vlm_x1": float(rng.uniform(0, 100))}
    return given


def fill_block(block: Block, plan: Plan) -> None:
    """Add all samples of a block."""
    for sample in block.samples:
        block.add(sample, **synthetic_sample(plan, sample))


def synthetic_store(
    path: str | os.PathLike, plan: Plan, blocks: Iterable[int] | None = None, worker: str = "0"
) -> Path:
    """Create the store of ``plan`` and fill ``blocks``, all if not given."""
    folder = create(path, plan)
    with Writer(folder, worker) as writer:
        for b in range(plan.n_blocks) if blocks is None else blocks:
            with writer.block(b) as block:
                fill_block(block, plan)
    return folder
