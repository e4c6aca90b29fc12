"""Made-up stores of any size, a function of a seed: for tests, benches and trying the API without a model."""

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl

from store import bits
from store.layout import create
from store.places import Place
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
    # A generator for every column: a longer plan begins like a shorter one, so that stores can be grown.
    columns = iter(range(9))

    def draw() -> np.random.Generator:
        return np.random.default_rng([seed, 1, next(columns)])

    n_text = draw().integers(text[0], text[1] + 1, n_samples)
    samples = pl.DataFrame(
        {
            "sample_id": [f"made-{seed}-{n:05d}" for n in range(n_samples)],
            "task": draw().choice(["swap", "removal"], n_samples),
            "instruction": [f"Remove object {n}." for n in range(n_samples)],
            "n_image": draw().integers(image[0], image[1] + 1, n_samples),
            "n_text": n_text,
            "n_query": n_text - 3,
            "split": ["train" if n % 5 else "test" for n in range(n_samples)],
            "x1": draw().uniform(0, 100, n_samples),
        }
    )
    given = {"layers": ("embed", "0", "final"), "width": 16, "samples_per_block": 8} | changes
    return Plan(samples=samples, identity=identity or {"weights": {"sha256": "made up"}, "seed": seed}, **given)


def synthetic_sample(plan: Plan, sample: int) -> dict[str, Any]:
    """Arguments of ``Block.add`` for one sample; a function of the identity's seed, the sample and the layers."""
    n_image, n_text = (int(plan.samples[name][sample]) for name in ("n_image", "n_text"))

    def draw(*about: str) -> np.random.Generator:
        return np.random.default_rng([plan.identity["seed"], 2, sample, zlib.crc32(" ".join(about).encode())])

    def hidden(kind: str, n: int) -> np.ndarray:
        values = np.stack([draw(kind, name).standard_normal((n, plan.width), np.float32) for name in plan.layers])
        return values if plan.dtype == "float32" else bits.from_float32(values)

    counts = {"image": n_image, "text": n_text}
    given: dict[str, Any] = {kind: hidden(kind, counts[kind]) for kind in plan.kinds if plan.layers}
    heads = () if plan.attention_heads is None else (plan.attention_heads,)
    for name in plan.attention:
        shape = (*heads, int(plan.samples["n_query"][sample]), n_image if name.endswith("image") else n_text)
        given[name] = np.stack([draw(name, layer).random(shape) for layer in plan.attention_layers])
    if plan.part:
        return given
    before = 1  # a template token, the image, two more template tokens, the instruction
    kinds = ["template"] * before + ["image"] * n_image + ["template"] * 2 + ["instruction"] * (n_text - 3)
    given["tokens"] = pl.DataFrame(
        {
            "position": range(len(kinds)),
            "kind": kinds,
            "token_id": draw("tokens").integers(0, 99, len(kinds)),
            "word": [*[None] * (len(kinds) - n_text + 3), *(n // 2 for n in range(n_text - 3))],
        }
    )
    given["values"] = {"vlm_x1": float(draw("vlm").uniform(0, 100))}
    return given


def fill_block(block: Block, plan: Plan) -> None:
    """Add all samples of a block."""
    for sample in block.samples:
        block.add(sample, **synthetic_sample(plan, sample))


def synthetic_store(
    path: str | os.PathLike | Place, plan: Plan, blocks: Iterable[int] | None = None, worker: str = "0"
) -> str | os.PathLike | Place:
    """Create the store of ``plan`` and fill ``blocks``, all if not given; ``path`` as it came."""
    create(path, plan)
    fill_store(path, blocks, worker)
    return path


def fill_store(
    path: str | os.PathLike | Place, blocks: Iterable[int] | None = None, worker: str = "0", part: int = 0
) -> None:
    """Fill ``blocks`` of a part of a store, all that are left if not given."""
    with Writer(path, worker, part) as writer:
        for b in writer.blocks() if blocks is None else blocks:
            with writer.block(b) as block:
                fill_block(block, writer.plan)
