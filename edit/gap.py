"""``python -m edit gap``: standalone boxes against edited regions on the same pictures [ABP §4.1]."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import polars as pl
import torch
from PIL import Image
from torchvision.ops import box_iou
from tqdm import tqdm

from edit import run
from edit.config import GapConfig
from edit.evaluate import held_out
from edit.scores.alignment import NotFound, Place, estimate, undo
from edit.scores.outside import pixels_of
from edit.scores.table import mcnemar
from extract.boxes import generate_boxes
from extract.omniedit import BadSample, SetAside, read
from extract.prompts import GROUND_TEMPLATE
from extract.sequence import Conditioner
from probes import statistics
from store.errors import Refusal

Box = tuple[float, float, float, float]
CHANGED = 24.0
"""A pixel has changed if its colour moved by this (root mean square of 8-bit RGB), after a blur against noise."""
BLUR = 1.5
SMALLEST = 5e-4
"""Regions under this share of the picture are specks."""


@dataclass(frozen=True)
class Asked:
    """A picture, what is to be edited in it, and where that is."""

    name: str
    picture: Image.Image
    instruction: str
    box: Box


def gap(config: GapConfig) -> int:
    """Ask, edit, compare; 0 if every picture was, 1 if some were set aside."""
    if config.threads:
        torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    stages = run.load_stages(config)
    encoder = stages.encoder
    conditioner = Conditioner(encoder.conditioner.processor, GROUND_TEMPLATE, "mrope", encoder.model.config)
    rows, aside = [], {}
    settings = run.settings_of(config, stages)
    for one in tqdm(pictures(config), total=config.samples, unit="picture", desc="gap"):
        if isinstance(one, SetAside):
            aside[one.sample_id or str(one.place)] = one.reason
            continue
        wanted = settings | {"name": one.name, "instruction": one.instruction}
        try:
            if not run.is_there(config.out, one.name, wanted):
                made = stages(one.picture, one.instruction, config.noise_seed, steps=config.steps)
                run.write(config.out, one.name, made.picture, wanted)
            pair = [(one.picture, one.instruction)]
            (answer,) = generate_boxes(encoder.model, conditioner, pair, config.max_new_tokens)
        except (Refusal, BadSample) as error:
            aside[one.name] = str(error)
            continue
        edited = Image.open(run.paths_of(config.out, one.name)[0]).convert("RGB")
        region = edited_region(one.picture, edited, one.box)
        rows.append(
            {"name": one.name, "box": list(one.box)} | found("said", answer.box, one) | found("edited", region, one)
        )
    if not rows:
        raise Refusal(f"no picture could be compared ({next(iter(aside.values()), 'there are none')}): see --data")
    table = pl.DataFrame(rows)
    table.write_parquet(config.out / "gap.parquet")
    told = summary(table) | {"set_aside": aside}
    (config.out / "gap.json").write_text(json.dumps(told | {"config": asdict(config)}, default=str, indent=1) + "\n")
    print(json.dumps(told) if config.json else sentence(told))
    return int(bool(aside))


def pictures(config: GapConfig) -> Iterator[Asked | SetAside]:
    """Scenes drawn, or samples of the data that have a box; what cannot be read with its reason."""
    if config.data is None:
        for one in held_out(config.samples, config.seed, config.difficulty):
            yield Asked(one.name, one.picture, one.instruction, tuple(map(float, one.row["box"])))
        return
    count = 0
    for sample in read(config.data):
        if isinstance(sample, SetAside):
            yield sample
        elif sample.box is not None:
            count += 1
            yield Asked(sample.sample_id, sample.image, sample.instruction, sample.box)
        if count == config.samples:
            return


def edited_region(source: Image.Image, edited: Image.Image, box: Box) -> Box | None:
    """The box around the largest region that changed, in pixels of the source; null if nothing of size did.

    The editor's own shift and zoom are undone first, where they can be told; pixels that left the frame do not count.
    """
    before, after = pixels_of(source), pixels_of(edited)
    within = np.ones(before.shape[:2], bool)
    with contextlib.suppress(NotFound, Refusal):  # a region is told from the picture as it is, then
        after, within = undo(estimate(Place(source, box), after), after)
    smooth = [cv2.GaussianBlur(one.astype(np.float32), (0, 0), BLUR) for one in (before, after)]
    changed = (np.sqrt(np.square(smooth[0] - smooth[1]).mean(2)) > CHANGED) & within
    count, _, stats, _ = cv2.connectedComponentsWithStats(changed.astype(np.uint8))
    if count < 2:
        return None
    x, y, width, height, area = stats[1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())].tolist()
    return None if area < SMALLEST * changed.size else (float(x), float(y), float(x + width), float(y + height))


def found(kind: str, box: Sequence[float] | None, one: Asked) -> dict[str, object]:
    """How a box lies to the true one: its IoU, and whether its centre is within."""
    if box is None:
        return {f"{kind}_box": None, f"{kind}_iou": 0.0, f"{kind}_within": False}
    iou = box_iou(torch.tensor([list(map(float, box))]), torch.tensor([list(one.box)]))[0, 0]
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    within = one.box[0] <= x <= one.box[2] and one.box[1] <= y <= one.box[3]
    return {f"{kind}_box": list(map(float, box)), f"{kind}_iou": float(iou), f"{kind}_within": bool(within)}


def summary(table: pl.DataFrame) -> dict[str, object]:
    """Shares whose centre is in the true box, of both, with 95 % intervals; their difference; mean IoUs."""
    n = len(table)
    told: dict[str, object] = {"n": n}
    for kind in ("said", "edited"):
        share = float(table[f"{kind}_within"].mean())
        told[kind] = {"share": share, "interval": list(statistics.wilson(share, n))}
        told[kind]["mean_iou"] = float(table[f"{kind}_iou"].mean())
        told[kind]["nothing"] = int(table[f"{kind}_box"].null_count())
    differences = (table["said_within"].cast(pl.Int8) - table["edited_within"].cast(pl.Int8)).to_numpy().astype(float)
    mean, low, high = statistics.interval(differences)
    told["gap"] = {"difference": mean, "interval": [low, high], "p": mcnemar(differences), "test": "McNemar, exact"}
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in table["box"].to_list()]
    told["mean_true_area"] = float(np.mean(areas))
    return told


def sentence(told: dict) -> str:
    """The summary in words."""
    lines = []
    for kind, name in (("said", "the VLM, asked for the box"), ("edited", "the region that the editor changed")):
        one = told[kind]
        low, high = one["interval"]
        lines.append(
            f"{name}: centre in the true box in {one['share']:.1%} [{low:.1%}, {high:.1%}], mean IoU "
            f"{one['mean_iou']:.3f}, none in {one['nothing']}"
        )
    low, high = told["gap"]["interval"]
    lines.append(
        f"the gap: {told['gap']['difference']:+.1%} [{low:+.1%}, {high:+.1%}], p = {told['gap']['p']:.2g} "
        f"({told['gap']['test']}), n = {told['n']}"
    )
    return "\n".join(lines)
