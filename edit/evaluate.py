"""``python -m edit evaluate``: the same scenes by every conditioning and box; an exact judge, and pixels."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from PIL import Image
from torchvision.ops import box_iou
from tqdm import tqdm

from edit import run
from edit.conditions import Conditioning
from edit.config import EvaluateConfig
from edit.editor import Editor
from edit.scores import table
from edit.scores.alignment import aligned
from edit.scores.outside import Perception
from edit.scores.scene_judge import SceneJudge
from edit.stages import TwoStage
from extract.boxes import generate_boxes
from extract.prompts import GROUND_TEMPLATE
from extract.scenes import OBJECT_TASKS, draw_scene
from extract.scenes.shards import row_of
from extract.sequence import Conditioner
from store.errors import Refusal

STANDALONE = "standalone VLM"
REFERENCE = "our-box"
SHARES = ("success", "right object", "mislocalized", "unchanged", "box on the right object")


@dataclass(frozen=True)
class Method:
    """A way to edit: what conditions, and whose box is drawn."""

    way: Literal["last", "norm-average", "description", "middle"] = "last"
    box: Literal["none", "proxy", "true", "wrong"] = "none"
    about: str = ""


METHODS = {
    "plain": Method(about="last layer, no box: the editor as it is"),
    "norm-average": Method("norm-average", about="normalised states averaged over layers, no box"),
    "description": Method("description", about="the VLM writes the scene out first, no box"),
    "middle": Method("middle", about="the voted layer, no box"),
    "our-box": Method(box="proxy", about="last layer, the proxy's box from the same pass"),
    "true-box": Method(box="true", about="last layer, the true box: what a perfect proxy would reach"),
    "wrong-box": Method(box="wrong", about="last layer, the box of another object: the floor, and how far boxes steer"),
    "unedited": Method(about="the picture through the autoencoder alone: the floor of what pixels can say"),
}


@dataclass(frozen=True)
class Held:
    """A scene: its row as `python -m extract.scenes` writes it, and its picture."""

    name: str
    row: Mapping[str, Any]

    @property
    def picture(self) -> Image.Image:
        """Before the edit."""
        return Image.open(io.BytesIO(self.row["src_img"]["bytes"])).convert("RGB")

    @property
    def instruction(self) -> str:
        """What is asked."""
        return self.row["edited_prompt_list"][0]

    @property
    def other_box(self) -> list[int]:
        """The box of another object: the next one, around."""
        boxes = [list(one["box"]) for one in self.row["objects"]]
        return boxes[(boxes.index(list(self.row["box"])) + 1) % len(boxes)]


def held_out(samples: int, seed: int, difficulty: str) -> list[Held]:
    """The first scenes of a seed whose wish is about one of their objects."""
    found, index = [], 0
    while len(found) < samples:
        scene = draw_scene(seed, index, difficulty)
        index += 1
        if scene.wish.task in OBJECT_TASKS:
            row = row_of(scene)
            found.append(Held(row["omni_edit_id"], row))
    return found


def evaluate(config: EvaluateConfig) -> int:
    """Edit, score, and write the table."""
    if config.threads:
        torch.set_num_threads(config.threads)
    methods = config.methods or tuple(name for name in METHODS if name != "middle" or config.middle)
    if unknown := [name for name in methods if name not in METHODS]:
        raise Refusal(f"--methods {unknown[0]} is not known: {', '.join(METHODS)}")
    perception = Perception(config.lpips_trunk)
    held = held_out(config.samples, config.seed, config.difficulty)
    config.out.mkdir(parents=True, exist_ok=True)
    stages = run.load_stages(config)
    write_items(config, methods, held)
    scores = standalone(stages, held)
    for name in methods:
        scores += by_method(config, stages, name, held, perception)
    frame = pl.DataFrame(
        scores,
        orient="row",
        schema={"sample": pl.String, "method": pl.String, "metric": pl.String, "value": pl.Float64},
    )
    frame.write_parquet(config.out / "scores.parquet")
    summary, compared = table.summary(frame, SHARES), table.comparisons(frame, REFERENCE, SHARES)
    told = "\n".join(f"* {name}: {METHODS[name].about}" for name in methods)
    head = f"{len(held)} {config.difficulty} scenes of seed {config.seed}."
    text = "\n\n".join((head, table.markdown(summary, compared), told)) + "\n"
    (config.out / "table.md").write_text(text)
    if config.json:
        print(json.dumps({"n": len(held), "summary": summary.to_dicts(), "comparisons": compared.to_dicts()}))
    else:
        print(text)
        print(gap(frame))
    return 0


def write_items(config: EvaluateConfig, methods: Sequence[str], held: Sequence[Held]) -> None:
    """``items.parquet``, which `python -m edit judge` asks about, and the sources that it shows."""
    sources = config.out / "pictures" / "source"
    sources.mkdir(parents=True, exist_ok=True)
    rows = []
    for one in held:
        source = run.paths_of(sources, one.name)[0]
        if not source.is_file():
            run.write(sources, one.name, one.picture, {"scene": one.name})
        for name in methods:
            made = run.paths_of(config.out / "pictures" / name, one.name)[0]
            files = {"source": source, "edited": made}
            box = dict(zip(("x1", "y1", "x2", "y2"), map(float, one.row["box"]), strict=True))
            about = {"sample": one.name, "method": name, "instruction": one.instruction}
            rows.append(about | {kind: str(path.relative_to(config.out)) for kind, path in files.items()} | box)
    pl.DataFrame(rows).write_parquet(config.out / "items.parquet")


def standalone(stages: TwoStage, held: Sequence[Held]) -> list[tuple]:
    """Whether the VLM, asked for the box, names the right object: scores of `STANDALONE`."""
    encoder = stages.encoder
    conditioner = Conditioner(encoder.conditioner.processor, GROUND_TEMPLATE, "mrope", encoder.model.config)
    found = []
    for one in tqdm(held, unit="scene", desc=STANDALONE):
        (answer,) = generate_boxes(encoder.model, conditioner, [(one.picture, one.instruction)], max_new_tokens=40)
        found.append((one.name, STANDALONE, "right object", float(is_right(answer.box, one.row))))
    return found


def is_right(box: Sequence[float] | None, row: Mapping[str, Any]) -> bool:
    """Whether a box is closer, by IoU, to the true one than to that of any other object, and touches it."""
    if box is None:
        return False
    boxes = torch.tensor([one["box"] for one in row["objects"]], dtype=torch.float32)
    ious = box_iou(torch.tensor([list(map(float, box))]), boxes)[0]
    true = [list(one["box"]) for one in row["objects"]].index(list(row["box"]))
    return bool(ious[true] > 0 and ious.argmax() == true)


def by_method(
    config: EvaluateConfig, stages: TwoStage, name: str, held: Sequence[Held], perception: Perception
) -> list[tuple]:
    """Scores of one method, a row a scene and metric; pictures go to ``pictures/<method>``."""
    method = METHODS[name]
    way = Conditioning(method.way, config.middle if method.way == "middle" else None)
    ours = replace(stages, conditioning=way, overlay=None if method.box == "none" else stages.overlay)
    out = config.out / "pictures" / name
    out.mkdir(parents=True, exist_ok=True)
    settings = run.settings_of(config, ours) | {"method": name}
    rows, began, made = [], time.perf_counter(), 0
    with stages.without_lora(method.box == "none"):
        for one in tqdm(held, unit="picture", desc=name):
            wanted = settings | {"scene": one.name, "instruction": one.instruction}
            if not run.is_there(out, one.name, wanted):
                picture, box = edited(ours, name, one, config)
                run.write(out, one.name, picture, wanted | {"box": box})
                made += 1
            place, label = run.paths_of(out, one.name)
            picture, box = Image.open(place).convert("RGB"), json.loads(label.read_text())["box"]
            rows += [
                (one.name, name, metric, value)
                for metric, value in scored(one, picture, box, perception, stages.editor)
            ]
    if made:
        rows.append((held[0].name, name, "seconds", (time.perf_counter() - began) / made))
    return rows


def edited(stages: TwoStage, name: str, one: Held, config: EvaluateConfig) -> tuple[Image.Image, Any]:
    """The edited picture, and the box that was drawn."""
    if name == "unedited":
        return through(stages.editor, one.picture), None
    box = {"true": one.row["box"], "wrong": one.other_box}.get(METHODS[name].box)
    found = stages(one.picture, one.instruction, config.noise_seed, box, config.steps)
    return found.picture, found.box


def through(editor: Editor, picture: Image.Image) -> Image.Image:
    """The picture as an editor that changes nothing would give it: at its working size, through its autoencoder."""
    return editor.decode(editor.latents([editor.resized(picture)]))[0].resize(picture.size, Image.Resampling.LANCZOS)


def scored(
    one: Held, picture: Image.Image, box: Sequence[float] | None, perception: Perception, editor: Editor
) -> Iterator[tuple[str, float]]:
    """Every metric of one edited picture."""
    verdict = SceneJudge.of_row(one.row, lambda known: through(editor, known))(picture)
    yield "success", float(verdict.success)
    yield "right object", float(verdict.subject != "left" and not verdict.changed and not verdict.stray)
    yield "mislocalized", float(verdict.mislocalized)
    yield "unchanged", float(verdict.outcome == "unchanged")
    yield "instruction (0–4)", float(verdict.instruction)
    yield "accuracy (0–4)", float(verdict.accuracy)
    yield "leakage (0–4)", float(verdict.leakage)
    measured = aligned(one.picture, picture, one.row["box"], perception)
    yield "L2", measured.raw.l2
    yield f"{measured.raw.lpips}, filled", measured.raw.lpips_filled
    yield f"{measured.raw.lpips}, map", measured.raw.lpips_map
    yield "L2, aligned", measured.corrected.l2
    if box is not None:
        yield "box on the right object", float(is_right(box, one.row))


def gap(frame: pl.DataFrame) -> str:
    """One sentence: how much of the gap between the plain editor and the true box the proxy's box closes."""
    means = {
        name: float(np.mean(frame.filter(method=name, metric="success")["value"].to_numpy()))
        for name in ("plain", "our-box", "true-box")
        if not frame.filter(method=name).is_empty()
    }
    if len(means) < 3 or means["true-box"] <= means["plain"]:
        return "The true box does not beat the plain editor here: there is no gap to close."
    closed = (means["our-box"] - means["plain"]) / (means["true-box"] - means["plain"])
    return (
        f"Success: plain {means['plain']:.3f}, our box {means['our-box']:.3f}, true box {means['true-box']:.3f}; "
        f"our box closes {closed:.0%} of the gap."
    )
