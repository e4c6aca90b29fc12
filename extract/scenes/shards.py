"""Scenes as parquet shards in OmniEdit-Filtered's columns, with exact boxes and masks beside them."""

import io
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from extract.scenes.scene import DIFFICULTIES, Scene, bounding_box, draw_scene, edited_things, masks_of, paint, restyle
from store.errors import Refusal

if TYPE_CHECKING:
    import datasets

ROWS_PER_SHARD = 512
ROWS_PER_GROUP = 64
JPEG_QUALITY = 95
LABEL = "scenes.json"
SEEDS = 2**32
"""NumPy reads a larger seed as two numbers, and might give it the scenes of another."""


@cache
def features() -> "datasets.Features":
    """The columns of a shard."""
    import datasets  # slow to import, and whoever reads shards does without

    whole = datasets.Value("int64")
    mask = {"size": datasets.List(whole), "counts": datasets.List(whole)}
    thing = {
        "kind": datasets.Value("string"),
        "colour": datasets.Value("string"),
        "box": datasets.List(whole),
        "mask": mask,
    }
    return datasets.Features(
        {
            "omni_edit_id": datasets.Value("string"),
            "task": datasets.Value("string"),
            "src_img": datasets.Image(),
            "edited_img": datasets.Image(),
            "edited_prompt_list": datasets.List(datasets.Value("string")),
            "width": whole,
            "height": whole,
            "sc_score_1": whole,
            "sc_score_2": whole,
            "sc_reasoning": datasets.Value("string"),
            "pq_score": whole,
            "pq_reasoning": datasets.Value("string"),
            "o_score": datasets.Value("float64"),
            "box": datasets.List(whole),
            "objects": datasets.List(thing),
            "layout": datasets.Value("string"),
            "reference": datasets.Value("string"),
            "seed": whole,
        }
    )


@dataclass(frozen=True)
class ScenesConfig:
    """Draw scenes with exact boxes and masks and write them as parquet shards in OmniEdit-Filtered's columns.

    The same seed gives the same scenes, so any number of fresh held-out sets can be drawn. Existing complete
    shards of the same settings are kept.
    """

    out: Path
    """Folder for the shards (made if missing)."""
    samples: int = 4096
    """Number of scenes."""
    seed: int = 0
    """Names the endless set of scenes that these are the first of."""
    difficulty: str = "hard"
    """easy (3–5 plain objects of mixed kinds), medium (3–9, mixed or alike, overlaps, every task), hard (4–9 alike, the
    target told by position alone) or named (3–9 mixed, the target told by what it is alone)."""


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code of a boolean mask (height, width): column by column, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0)) if len(flat) else np.array([], int)
    counts = np.diff(edges, prepend=0, append=len(flat))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def mask_of(code: dict[str, list[int]]) -> np.ndarray:
    """The boolean mask (height, width) that `run_lengths` wrote."""
    height, width = code["size"]
    values = np.arange(len(code["counts"])) % 2 == 1
    return np.repeat(values, code["counts"]).reshape(width, height).T


def _jpeg(picture: np.ndarray | Image.Image) -> dict:
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return {"bytes": stream.getvalue(), "path": None}


def row_of(scene: Scene) -> dict:
    """One scene as a row: both pictures rendered and encoded, the box of what changes (None for the whole picture)."""
    before, owner = paint(scene, scene.things, scene.background)
    masks = masks_of(owner, len(scene.things))
    if scene.wish.task == "style":
        after, box = restyle(Image.fromarray(before), scene.wish.style), None
    else:
        things, background = edited_things(scene)
        after, owner_after = paint(scene, things, background)
        box = bounding_box(masks[scene.wish.target]) if scene.wish.target is not None else None
        if scene.wish.task == "addition":
            box = bounding_box(owner_after == len(things) - 1)
    seed, index = scene.seed
    return {
        "omni_edit_id": f"scene_{scene.difficulty}_{seed}_{index}",
        "task": scene.wish.task,
        "src_img": _jpeg(before),
        "edited_img": _jpeg(after),
        "edited_prompt_list": scene.instructions,
        "width": scene.width,
        "height": scene.height,
        "sc_score_1": 10,
        "sc_score_2": 10,
        "sc_reasoning": "rendered: the change is exact",
        "pq_score": 10,
        "pq_reasoning": "rendered",
        "o_score": 10.0,
        "box": box,
        "objects": [
            {"kind": t.kind, "colour": t.colour, "box": bounding_box(m), "mask": run_lengths(m)}
            for t, m in zip(scene.things, masks, strict=True)
        ],
        "layout": scene.arrangement.layout,
        "reference": scene.reference or None,  # of the whole picture there is none
        "seed": seed,
    }


def shard_paths(config: ScenesConfig) -> list[Path]:
    """Where the shards of a set of scenes lie."""
    shards = -(-config.samples // ROWS_PER_SHARD)
    return [config.out / f"train-{shard:05d}-of-{shards:05d}.parquet" for shard in range(shards)]


def settings_of(config: ScenesConfig) -> dict:
    """What decides the rows: all settings but the folder."""
    return {name: value for name, value in asdict(config).items() if name != "out"}


def is_unfinished(config: ScenesConfig) -> bool:
    """Whether the folder is missing, empty, or holds exactly these scenes in part."""
    label = config.out / LABEL
    if not label.exists():
        return not any(config.out.glob("*.parquet"))
    ours = json.loads(label.read_text()) == settings_of(config)
    return ours and not all(path.exists() for path in shard_paths(config))


def write_scenes(config: ScenesConfig) -> None:
    """Draw scenes and write them as parquet shards; see `ScenesConfig`.

    Raises
    ------
    Refusal
        The settings make no sense, or the folder holds scenes of other settings.
    """
    if config.difficulty not in DIFFICULTIES:
        raise Refusal(f"--difficulty {config.difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
    if config.samples < 1 or not 0 <= config.seed < SEEDS:
        raise Refusal(
            f"--samples {config.samples} and --seed {config.seed}: samples must be 1 or more, the seed 0 to {SEEDS - 1}"
        )
    wanted = settings_of(config)
    label = config.out / LABEL
    if label.exists() and (held := json.loads(label.read_text())) != wanted:
        raise Refusal(f"--out {config.out} holds other scenes ({held}); give another folder or delete it")
    if not label.exists() and config.out.exists() and any(config.out.glob("*.parquet")):
        raise Refusal(f"--out {config.out} holds parquet files that are not scenes; give another folder")
    config.out.mkdir(parents=True, exist_ok=True)
    label.write_text(json.dumps(wanted))
    paths = shard_paths(config)
    with tqdm(total=config.samples, unit="scene", desc="scenes") as bar:
        for shard, path in enumerate(paths):
            indices = range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, config.samples))
            if not path.exists():
                partial = path.with_suffix(".partial")
                with pq.ParquetWriter(partial, features().arrow_schema) as writer:
                    for first in range(indices.start, indices.stop, ROWS_PER_GROUP):
                        group = range(first, min(first + ROWS_PER_GROUP, indices.stop))
                        rows = [row_of(draw_scene(config.seed, index, config.difficulty)) for index in group]
                        writer.write_table(pa.Table.from_pylist(rows, schema=features().arrow_schema))
                        bar.update(len(rows))
                partial.replace(path)
            else:
                bar.update(len(indices))
    size = sum(f.stat().st_size for f in config.out.glob("*.parquet")) / 1e6
    scenes = f"{config.samples} {config.difficulty} scenes of seed {config.seed}"
    print(f"{scenes} in {len(paths)} shards, {size:.0f} MB: {config.out}")
