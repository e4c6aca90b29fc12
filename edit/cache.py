"""Latents of pictures before and after their edit, encoded once: blocks of safetensors, whole or not there.

A cache's folder is named by all that determines its values (autoencoder, working size, overlay, data, samples), so
that none is ever read that belongs to something else.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from edit.ahead import read_ahead
from edit.editor import Editor
from edit.overlay import Overlay, rescaled
from edit.pairs import Pair, Pairs
from store.errors import Refusal
from store.reader import Store

BLOCK = 256
"""Samples in a file."""
AHEAD = 2
"""Blocks that are read while a GPU is at work."""
BOX = ("x1", "y1", "x2", "y2")
PICTURE = ("sample_id", "image_crc32c", *BOX)


@dataclass(frozen=True)
class Drawn:
    """What is drawn on pictures before their edit."""

    overlay: Overlay
    bystanders: float = 0.0
    """0: every picture's own box. Over 0: on this share of pictures the box of another one, which means nothing."""

    def boxes(self, opened: Store, samples: Sequence[int]) -> dict[int, tuple[float, ...]]:
        """The box to draw on each sample that gets one, in pixels of its picture; the same on every call."""
        rows = opened.samples[list(samples)].with_columns(pl.Series("number", list(samples))).drop_nulls(BOX)
        own = dict(zip(rows["number"], rows.select(BOX).iter_rows(), strict=True))
        if not self.bystanders:
            return own
        rng = np.random.default_rng(len(samples))
        others = rng.permutation(len(own))
        sizes = rows.select("width", "height").rows()
        numbers = list(own)
        return {
            number: rescaled(own[numbers[other]], sizes[other], size)
            for number, other, size, chance in zip(numbers, others, sizes, rng.random(len(own)), strict=True)
            if chance < self.bystanders
        }


@dataclass(frozen=True)
class Cache:
    """Latents by row of ``Store.samples``."""

    folder: Path
    sizes: dict[int, tuple[int, int]]
    """Height and width in latent cells of each sample that has them."""
    missing: dict[int, str]
    """Samples that could not be encoded, and why."""
    block_of: dict[int, int]

    def read(self, samples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents before (with its overlay) and after, each bfloat16 ``[b, c, h, w]``, of samples of one size."""
        with ExitStack() as stack:
            files = {
                block: stack.enter_context(safe_open(self.folder / _file(block), "pt"))
                for block in {self.block_of[sample] for sample in samples}
            }
            pairs = [
                [files[self.block_of[sample]].get_tensor(f"{kind}.{sample}") for sample in samples]
                for kind in ("source", "target")
            ]
        return torch.stack(pairs[0]), torch.stack(pairs[1])

    def buckets(self, samples: Iterable[int]) -> dict[tuple[int, int], list[int]]:
        """Samples by size: only those of one size can be in a batch."""
        found: dict[tuple[int, int], list[int]] = {}
        for sample in samples:
            if sample in self.sizes:
                found.setdefault(self.sizes[sample], []).append(sample)
        return found


def build(
    root: Path,
    opened: Store,
    pairs: Pairs,
    editor: Editor,
    samples: Sequence[int],
    drawn: Drawn | None,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Encode what of ``samples`` the cache under ``root`` lacks; of several processes each does its share of blocks."""
    folder = folder_of(root, opened, editor, samples, drawn)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {number: samples[number * BLOCK : (number + 1) * BLOCK] for number in range(-(-len(samples) // BLOCK))}
    left = [n for n in blocks if n % ranks == rank and not (folder / _file(n)).exists()]
    boxes = drawn.boxes(opened, samples) if drawn else {}
    found = read_ahead(lambda n: list(pairs.read(blocks[n])), left, AHEAD, editor.pipeline.device)
    with tqdm(
        total=sum(len(blocks[number]) for number in left), unit="pair", desc="latents", disable=not left or rank > 0
    ) as bar:
        for number, block in zip(left, found, strict=True):
            _write(folder / _file(number), block, editor, drawn, boxes)
            bar.update(len(block))


def load(root: Path, opened: Store, editor: Editor, samples: Sequence[int], drawn: Drawn | None) -> Cache:
    """The cache that ``build`` filled."""
    folder = folder_of(root, opened, editor, samples, drawn)
    sizes, missing, block_of = {}, {}, {}
    for number in range(-(-len(samples) // BLOCK)):
        with safe_open(folder / _file(number), "pt") as file:
            about = json.loads(file.metadata()["about"])
        sizes |= {int(sample): tuple(size) for sample, size in about["sizes"].items()}
        missing |= {int(sample): reason for sample, reason in about["missing"].items()}
        block_of |= dict.fromkeys(map(int, about["sizes"]), number)
    if not sizes:
        reason = next(iter(missing.values()), "there are none")
        raise Refusal(f"no sample of {opened.path} could be encoded ({reason}): see --data")
    return Cache(folder, sizes, missing, block_of)


def folder_of(root: Path, opened: Store, editor: Editor, samples: Sequence[int], drawn: Drawn | None) -> Path:
    """Where the latents of these samples lie: named by everything that they follow from."""
    weights = hashlib.sha256()
    for name, value in sorted(editor.pipeline.vae.state_dict().items()):
        weights.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    made_of: dict[str, Any] = {
        "vae": weights.hexdigest(),
        "config": {k: v for k, v in editor.pipeline.vae.config.items() if not k.startswith("_")},
        "area": [editor.settings.area, editor.settings.multiple],
        "dtype": str(editor.pipeline.vae.dtype),
        "overlay": drawn.overlay.as_dict() if drawn else None,
        "store": opened.plan.identity_hash,
        "samples": hashlib.sha256(np.asarray(samples, np.int64)).hexdigest(),
        "pictures": hashlib.sha256(opened.samples[list(samples)].select(PICTURE).write_csv().encode()).hexdigest(),
    }
    if drawn and drawn.bystanders:
        made_of["bystanders"] = drawn.bystanders
    return root / hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file(block: int) -> str:
    return f"{block:05d}.safetensors"


def _write(
    path: Path,
    found: Sequence[Pair | tuple[int, str]],
    editor: Editor,
    drawn: Drawn | None,
    boxes: Mapping[int, tuple[float, ...]],
) -> None:
    tensors, sizes, missing = {}, {}, {}
    for pair in found:
        if not isinstance(pair, Pair):
            missing[pair[0]] = pair[1]
            continue
        source = editor.resized(pair.source)
        if drawn and pair.sample in boxes:
            source = drawn.overlay.draw(source, rescaled(boxes[pair.sample], pair.source.size, source.size))
        elif drawn and not drawn.bystanders:
            missing[pair.sample] = "it has no box to draw"
            continue
        made = editor.latents([source, editor.resized(pair.target)]).to(torch.bfloat16).contiguous()
        tensors[f"source.{pair.sample}"], tensors[f"target.{pair.sample}"] = made[0].clone(), made[1].clone()
        sizes[pair.sample] = tuple(made.shape[2:])
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, {"about": json.dumps({"sizes": sizes, "missing": missing})})
    unfinished.replace(path)
