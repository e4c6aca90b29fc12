"""How often the pocket model's generated box is right on fresh scenes, beside the floors that need no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from extract import decoding
from extract.boxes import generate_boxes
from extract.model import load_model, load_processor
from extract.pocket.build import WEIGHTS
from extract.pocket.lesson import describe
from extract.prompts import GROUND_TEMPLATE, editing_template
from extract.scenes.scene import DIFFICULTIES, draw_scene
from extract.scenes.shards import row_of
from extract.scoring import centre_boxes, score_boxes, wilson
from extract.sequence import Conditioner
from store.errors import Refusal

MEAN_BOX_SCENES = 1000
DESCRIBED = 200  # scenes of which descriptions are asked: answers are long


@dataclass(frozen=True)
class EvaluateConfig:
    """Ask the pocket model for boxes on fresh scenes and score them, beside centre box, mean box and random weights."""

    samples: int = 1000
    """Scenes with a box to draw."""
    seed: int = 7
    """Seed of the scenes; training used seed 20001."""
    difficulty: str = "hard"
    """easy, medium, hard or named."""
    model: Path = WEIGHTS
    """Folder of the model; the shipped weights by default."""
    batch_size: int = 50
    """Scenes decoded together."""
    untrained: bool = True
    """Also score the same architecture with random weights."""
    threads: int = 1
    """Torch threads."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Held:
    """A fresh scene as the model gets it (the encoded picture decoded again), the true box and description."""

    image: Image.Image
    instruction: str
    box: tuple[float, ...]
    description: str


def fresh_scenes(samples: int, seed: int, difficulty: str) -> list[Held]:
    """The first ``samples`` scenes of ``seed`` that have a box."""
    held, index = [], 0
    while len(held) < samples:
        scene = draw_scene(seed, index, difficulty)
        row = row_of(scene)
        index += 1
        if row["box"] is not None:
            image = Image.open(BytesIO(row["src_img"]["bytes"])).convert("RGB")
            held.append(Held(image, row["edited_prompt_list"][0], tuple(row["box"]), describe(scene)))
    return held


def score(boxes: Sequence[Sequence[float] | None], held: Sequence[Held]) -> dict[str, float]:
    """`score_boxes` against the scenes' own boxes."""
    return score_boxes(boxes, [h.box for h in held])


def ask(model, processor, held: Sequence[Held], batch_size: int, name: str) -> list:
    """The model's boxes for all scenes; scenes of one grid are decoded together."""
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    order = sorted(range(len(held)), key=lambda i: held[i].image.size)
    boxes: list = [None] * len(held)
    for first in tqdm(range(0, len(order), batch_size), desc=name, unit="batch"):
        chosen = order[first : first + batch_size]
        pairs = [(held[i].image, held[i].instruction) for i in chosen]
        for i, answer in zip(chosen, generate_boxes(model, conditioner, pairs, max_new_tokens=40), strict=True):
            boxes[i] = answer.box
    return boxes


def score_descriptions(model, processor, held: Sequence[Held], batch_size: int) -> dict[str, float]:
    """Under the editing prompt: shares of answers right word for word, whole and by sentence, with their intervals."""
    conditioner = Conditioner(processor, editing_template(), "mrope", model.config)
    said: list[str] = []
    for first in tqdm(range(0, len(held), batch_size), desc="describe", unit="batch"):
        pairs = [(h.image, h.instruction) for h in held[first : first + batch_size]]
        batch = conditioner.batch(pairs, padding_side="left")
        said += [one.text for one in decoding.ask(model, batch, conditioner.tokenizer, max_new_tokens=80)]
    scores: dict[str, float] = {"n": len(held)}
    for name, part in (("whole", slice(None)), ("scene", slice(1)), ("change", slice(1, None))):
        hits = sum(s.split(". ")[part] == h.description.split(". ")[part] for s, h in zip(said, held, strict=True))
        low, high = wilson(hits, len(held))
        scores |= {name: hits / len(held), f"{name}_low": low, f"{name}_high": high}
    return scores


def evaluate(config: EvaluateConfig) -> None:
    """Score the model and the floors and print them; see `EvaluateConfig`."""
    if config.difficulty not in DIFFICULTIES:
        raise Refusal(f"--difficulty {config.difficulty!r} is not one of {', '.join(DIFFICULTIES)}")
    if not any(config.model.glob("*.safetensors")):
        raise Refusal(f"--model {config.model} holds no *.safetensors; `python -m extract.pocket train` makes them")
    torch.set_num_threads(config.threads)
    held = fresh_scenes(config.samples, config.seed, config.difficulty)
    others = fresh_scenes(MEAN_BOX_SCENES, config.seed + 1, config.difficulty)
    sizes = [h.image.size for h in held]
    mean = np.mean([np.array(h.box) / np.array(h.image.size * 2) for h in others], axis=0)
    share = np.mean([(h.box[2] - h.box[0]) * (h.box[3] - h.box[1]) / np.prod(h.image.size) for h in others])
    processor = load_processor(config.model)
    model = load_model(config.model, torch.device("cpu"))
    results = {
        "model": score(ask(model, processor, held, config.batch_size, "model"), held),
        "centre box": score(centre_boxes(sizes, float(share)), held),
        "mean box": score((mean * np.tile(sizes, 2)).tolist(), held),
    }
    if config.untrained:
        torch.manual_seed(0)
        blank = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16).eval()
        results["untrained"] = score(ask(blank, processor, held, config.batch_size, "untrained"), held)
    described = score_descriptions(model, processor, held[:DESCRIBED], config.batch_size)
    if config.json:
        asked = {"samples": len(held), "seed": config.seed, "difficulty": config.difficulty}
        print(json.dumps(asked | {"ground": results, "describe": described}))
        return
    print(f"{len(held)} fresh {config.difficulty} scenes of seed {config.seed}")
    print(f"{'':12} {'IoU ≥ 0.5':>10} {'95 % interval':>18} {'mean IoU':>9} {'no box':>7}")
    for name, r in results.items():
        interval = f"[{r['low']:.3f}, {r['high']:.3f}]"
        print(f"{name:12} {r['iou50']:10.3f} {interval:>18} {r['mean_iou']:9.3f} {r['no_box']:7.3f}")
    names = {"whole": "word for word", "scene": "what is in the picture", "change": "what should change"}
    print(f"descriptions of {described['n']} of them under the editing prompt, right")
    for name, meaning in names.items():
        interval = f"[{described[f'{name}_low']:.3f}, {described[f'{name}_high']:.3f}]"
        print(f"  {meaning:24} {described[name]:.3f} {interval:>18}")
