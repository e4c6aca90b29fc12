"""An evaluation as `python -m edit evaluate` leaves it, of scenes edited truly or wrongly by drawing."""

import io
import json
from dataclasses import replace

import numpy as np
import polars as pl
from PIL import Image

from edit.methods import METHODS, STANDALONE
from extract.scenes import OBJECT_TASKS, draw_scene
from extract.scenes.scene import edited_things, paint
from extract.scenes.shards import row_of

SUCCEEDS = {
    "plain": 0.3,
    "norm-average": 0.26,
    "description": 0.33,
    "middle": 0.36,
    "our-box": 0.62,
    "true-box": 0.72,
    "wrong-box": 0.02,
    "unedited": 0.0,
}
WRONG = 4
"""Every which of our boxes is on another object."""


def made_evaluation(folder, count=12, methods=tuple(METHODS), trunk="AlexNet", seed=7):
    """The evaluation in ``folder``; the same arguments give the same files."""
    rng, items, scores, index = np.random.default_rng(seed), [], [], 0
    done = 0
    while done < count:
        scene = draw_scene(seed, index, "hard")
        index += 1
        if scene.wish.task not in OBJECT_TASKS:
            continue
        done += 1
        row = row_of(scene)
        name, boxes = row["omni_edit_id"], [one["box"] for one in row["objects"]]
        other = (scene.wish.target + 1) % len(boxes)
        source = np.array(Image.open(io.BytesIO(row["src_img"]["bytes"])).convert("RGB"))
        kept = save(folder, "source", name, source, {"scene": name})
        is_right, luck = done % WRONG != 0, rng.random()
        scores.append((name, STANDALONE, "right object", float(luck < 0.9)))
        for method in methods:
            p = SUCCEEDS[method] if method != "our-box" else SUCCEEDS["true-box"] if is_right else 0.05
            kinds = ["mislocalized", "unchanged", "leaked", "otherwise"]
            outcome = "success" if 0.6 * luck + 0.4 * rng.random() < p else rng.choice(kinds, p=[0.6, 0.2, 0.1, 0.1])
            outcome = "unchanged" if method == "unedited" else str(outcome)
            box = {"true": boxes[scene.wish.target], "wrong": boxes[other]}.get(METHODS[method].box)
            if METHODS[method].box == "proxy":
                box = [v + rng.normal(0, 2) for v in boxes[scene.wish.target if is_right else other]]
            edited = draw(scene, outcome, other)
            edited = np.clip(edited + rng.normal(0, 5, edited.shape), 0, 255).astype(np.uint8)
            label = {"editor": "pocket", "steps": 20, "noise_seed": 0, "lora": "runs/lora" if box else None}
            label |= {"conditioning": {"way": METHODS[method].way}, "method": method, "scene": name}
            label |= {"instruction": row["edited_prompt_list"][0], "box": box, "seconds": 2 + rng.random()}
            place = save(folder, method, name, edited, label)
            item = {"sample": name, "method": method, "instruction": row["edited_prompt_list"][0], "task": row["task"]}
            item |= {"objects": len(boxes), "source": kept, "edited": place}
            items.append(item | dict(zip(("x1", "y1", "x2", "y2"), map(float, row["box"]), strict=True)))
            scores += [(name, method, *one) for one in scored(outcome, source, edited, row["box"], trunk, rng)]
            scores.append((name, method, "seconds", label["seconds"]))
            if box is not None:
                right = {"true": True, "wrong": False}.get(METHODS[method].box, is_right)
                scores.append((name, method, "box on the right object", float(right)))
    pl.DataFrame(items).write_parquet(folder / "items.parquet")
    schema = {"sample": pl.String, "method": pl.String, "metric": pl.String, "value": pl.Float64}
    pl.DataFrame(scores, schema, orient="row").write_parquet(folder / "scores.parquet")
    settings = {"difficulty": "hard", "seed": seed, "samples": count, "editor": "pocket"}
    about = {"methods": methods, "settings": settings, "device": "CPU", "threads": 2, "peak_memory_bytes": 3 << 30}
    (folder / "evaluation.json").write_text(json.dumps(about))
    return folder


def save(folder, kind, name, picture, label):
    """A picture with its label; its path from the folder on."""
    place = folder / "pictures" / kind / f"{name}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(place)
    place.with_suffix(".json").write_text(json.dumps(label))
    return str(place.relative_to(folder))


def draw(scene, outcome, other):
    """The scene as an edit of that outcome leaves it, float RGB."""
    things, background = scene.things, scene.background
    if outcome in ("success", "leaked", "otherwise"):
        things, background = edited_things(scene)
    elif outcome == "mislocalized":
        things, background = edited_things(replace(scene, wish=replace(scene.wish, target=other)))
    return paint(scene, things, background)[0].astype(float)


def scored(outcome, source, edited, box, trunk, rng):
    """Scores that fit an outcome."""
    x1, y1, x2, y2 = map(int, box)
    differences = np.square((edited.astype(float) - source) / 255).mean(2)
    outside = np.ones(differences.shape, bool)
    outside[y1:y2, x1:x2] = False
    l2 = float(differences[outside].mean())
    grade = {"success": 4.0, "leaked": 4.0, "otherwise": 2.0}.get(outcome, 0.0)
    yield "success", float(outcome == "success")
    yield "right object", float(outcome in ("success", "otherwise"))
    yield "mislocalized", float(outcome == "mislocalized")
    yield "unchanged", float(outcome == "unchanged")
    yield "instruction (0–4)", grade
    yield "accuracy (0–4)", 2.0 if outcome == "leaked" else float(4 * (grade > 0))
    yield "leakage (0–4)", 3.0 if outcome in ("leaked", "mislocalized") else 4.0
    yield "L2", l2
    yield f"LPIPS ({trunk}), filled", 6 * l2 + 0.01 * rng.random()
    yield f"LPIPS ({trunk}), map", 7 * l2 + 0.01 * rng.random()
    yield "L2, aligned", 0.98 * l2
