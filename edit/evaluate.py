"""``python -m edit evaluate``: the same scenes by every conditioning and box; an exact judge, and pixels."""

import io
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import polars as pl
import torch
from PIL import Image
from torchvision.ops import box_iou
from tqdm import tqdm

from edit import run
from edit.conditions import Conditioning
from edit.config import EvaluateConfig, ReportConfig
from edit.editor import Editor
from edit.methods import INSTRUCTION, METHODS, MISLOCALIZED, RIGHT, RIGHT_BOX, SECONDS, STANDALONE, SUCCESS
from edit.report.command import report
from edit.report.evaluation import ABOUT
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
from store.places import write_file

LIBRARIES = ("torch", "diffusers", "transformers")


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
    """Edit, score, and write the report."""
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
    write_about(config, methods, stages.editor.pipeline.transformer.device)
    report(ReportConfig(config.out, json=config.json))
    return 0


def write_about(config: EvaluateConfig, methods: Sequence[str], device: torch.device) -> None:
    """``evaluation.json``: the settings, and what the report has to know besides scores and pictures."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    about = {
        "methods": methods,
        "settings": asdict(config),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }
    write_file(config.out / ABOUT, (json.dumps(about, default=str, indent=1) + "\n").encode())


def peak_resident() -> int:
    """Bytes of memory that this process had at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


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
            about |= {"task": one.row["task"], "objects": len(one.row["objects"])}
            rows.append(about | {kind: str(path.relative_to(config.out)) for kind, path in files.items()} | box)
    pl.DataFrame(rows).write_parquet(config.out / "items.parquet")


def standalone(stages: TwoStage, held: Sequence[Held]) -> list[tuple]:
    """Whether the VLM, asked for the box, names the right object: scores of `STANDALONE`."""
    encoder = stages.encoder
    conditioner = Conditioner(encoder.conditioner.processor, GROUND_TEMPLATE, "mrope", encoder.model.config)
    found = []
    for one in tqdm(held, unit="scene", desc=STANDALONE):
        (answer,) = generate_boxes(encoder.model, conditioner, [(one.picture, one.instruction)], max_new_tokens=40)
        found.append((one.name, STANDALONE, RIGHT, float(is_right(answer.box, one.row))))
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
    rows = []
    with stages.without_lora(method.box == "none"):
        for one in tqdm(held, unit="picture", desc=name):
            wanted = settings | {"scene": one.name, "instruction": one.instruction}
            if not run.is_there(out, one.name, wanted):
                began = time.perf_counter()
                picture, box = edited(ours, name, one, config)
                run.write(out, one.name, picture, wanted | {"box": box, "seconds": time.perf_counter() - began})
            place, label = run.paths_of(out, one.name)
            picture, about = Image.open(place).convert("RGB"), json.loads(label.read_text())
            rows += [
                (one.name, name, metric, value)
                for metric, value in scored(one, picture, about["box"], perception, stages.editor)
            ]
            rows.append((one.name, name, SECONDS, about.get("seconds")))
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
    yield SUCCESS, float(verdict.success)
    yield RIGHT, float(verdict.subject != "left" and not verdict.changed and not verdict.stray)
    yield MISLOCALIZED, float(verdict.mislocalized)
    yield "unchanged", float(verdict.outcome == "unchanged")
    yield INSTRUCTION, float(verdict.instruction)
    yield "accuracy (0–4)", float(verdict.accuracy)
    yield "leakage (0–4)", float(verdict.leakage)
    measured = aligned(one.picture, picture, one.row["box"], perception)
    yield "L2", measured.raw.l2
    yield f"{measured.raw.lpips}, filled", measured.raw.lpips_filled
    yield f"{measured.raw.lpips}, map", measured.raw.lpips_map
    yield "L2, aligned", measured.corrected.l2
    if box is not None:
        yield RIGHT_BOX, float(is_right(box, one.row))
