"""``python -m probes train``: every proxy of a store, in stacks, each finished one on disk at once."""

import io
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import tqdm

import store
from probes import boxes, trained
from probes.config import EvaluateConfig, ProbeConfig
from probes.data import KINDS, Scenes, States, bytes_of, scenes
from probes.evaluate import evaluate
from probes.floors import constant_boxes
from probes.intervals import interval, resamples
from probes.learn import predict, train_stack
from probes.qformer import take
from probes.specs import Spec, specs
from store.errors import Refusal
from store.places import readable, write_file

PROVENANCE = "probes.json"
GB = 1e9


def train(config: ProbeConfig) -> None:
    """Train every proxy that is not on disk yet, each finished one written at once; then print the table.

    Raises
    ------
    Refusal
        When the store has no boxes, or ``config.out`` holds proxies of another store or other settings.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    opened = store.open(config.store)
    found = scenes(opened, config.watch)
    wanted = specs(config, opened.layers)
    making = {
        "settings": config.settings,
        "sizes": config.sizes,
        "store": {"identity_hash": opened.plan.identity_hash, "samples": found.describe()},
    }
    begin(config, making, wanted, opened)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    groups = list(stacks(wanted, config, opened, found))
    open_work = {
        (g, seed): [spec for spec in group if not finished(config.out, spec, seed)]
        for g, group in enumerate(groups)
        for seed in config.seeds
    }
    total = sum(len(spec.layers) for todo in open_work.values() for spec in todo) * config.steps
    # Counted in layers × steps, so that the rate means the same for a stack of many and for one proxy.
    with tqdm(total=total, unit="layer step", smoothing=0.05, disable=not total) as bar:
        for g, group in enumerate(groups):
            if not any(open_work[g, seed] for seed in config.seeds):
                continue
            bar.set_description(f"reading {len({name for spec in group for name in spec.layers})} layers")
            layers = [name for name in opened.layers if any(name in spec.layers for spec in group)]
            states = States(opened, found.samples, layers, kinds_of(group), config.memory * GB)
            for seed in config.seeds:
                if open_work[g, seed]:
                    train_and_save(open_work[g, seed], states, found, config, seed, device, making, bar)
    gather(config, wanted, found)
    evaluate(EvaluateConfig(config.out))


def kinds_of(group: Sequence[Spec]) -> list[str]:
    """The kinds of tokens that a group of proxies needs from the store."""
    return [kind for kind in KINDS if any(spec.tokens in (kind, "all") for spec in group)]


def stacks(wanted: Sequence[Spec], config: ProbeConfig, opened: Any, found: Scenes) -> Iterator[list[Spec]]:
    """The proxies that are trained side by side: single layers, as many as fit in memory; each joint one alone."""
    single = [spec for spec in wanted if len(spec.layers) == 1]
    per_layer = bytes_of(opened, len(found.samples), KINDS)
    room = int(config.memory * GB // per_layer)
    layers = list(dict.fromkeys(spec.layers[0] for spec in single))
    if not room:  # not even one layer fits: batches are read from the store as they come, for all layers at once
        room = len(layers)
    for start in range(0, len(layers), room):
        yield [spec for spec in single if spec.layers[0] in layers[start : start + room]]
    yield from ([spec] for spec in wanted if len(spec.layers) > 1)


def begin(config: ProbeConfig, making: dict, wanted: Sequence[Spec], opened: Any) -> None:
    """Write the provenance; refuse a folder whose proxies were made otherwise."""
    path = config.out / PROVENANCE
    if path.exists():
        before = json.loads(path.read_text())
        for part in ("settings", "store"):
            for name, value in json.loads(json.dumps(making[part])).items():
                then = before[part].get(name)
                if then != value:
                    raise Refusal(
                        f"{config.out} holds proxies of {part} {name} = {brief(then)}, and {brief(value)} is asked: "
                        "give another --out"
                    )
    provenance = making | {
        "command": ["python", "-m", "probes", *sys.argv[1:]],
        "preset": config.preset,
        "seeds": list(config.seeds),
        "store": making["store"] | {"path": str(config.store), "identity": dict(opened.identity)},
        "probes": [asdict(spec) for spec in wanted],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    write_file(config.out / PROVENANCE, json.dumps(provenance, indent=1).encode())


def brief(value: Any) -> str:
    """A value for one line of text."""
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}…"


def finished(out: Path, spec: Spec, seed: int) -> bool:
    """Whether this proxy is on disk, as it is wanted now."""
    path = trained.folder_of(out, spec, seed) / trained.MAKING
    if not path.exists():
        return False
    if json.loads(path.read_text())["spec"] != json.loads(json.dumps(asdict(spec))):
        raise Refusal(f"{path.parent} reads other layers or tokens than {spec.name} does now: give another --out")
    return True


def train_and_save(
    todo: Sequence[Spec],
    states: States,
    found: Scenes,
    config: ProbeConfig,
    seed: int,
    device: str,
    making: dict,
    bar: tqdm,
) -> None:
    """Train one stack, score it on the test split, and write each of its proxies whole."""
    curves: list[list[dict]] = [[] for _ in todo]
    true_n4 = torch.from_numpy(found.boxes_s4[found.watch])
    weights_rn = resamples(len(found.watch))
    best = (0.0, "")
    bar.set_description(todo[0].name if len(todo) == 1 else f"{len(todo)} proxies, seed {seed}")

    def watch(step: int, predicted_pn4: Tensor) -> None:
        nonlocal best
        for spec, curve, predicted_n4 in zip(todo, curves, predicted_pn4, strict=True):
            curve += curve_point(spec, seed, step, predicted_n4, true_n4, weights_rn)
            best = max(best, (1 - curve[-1]["value"], spec.name))
        bar.set_postfix_str(f"best IoU {best[0]:.3f} {best[1]}")

    layers = sum(len(spec.layers) for spec in todo)
    model, read = train_stack(
        todo, states, found, config, seed, device=device, watch=watch, tick=lambda _: bar.update(layers)
    )
    predicted_pn4 = predict(model, read, found.test, config.batch)
    model = model.cpu()
    for p, spec in enumerate(todo):
        predictions = scored(predicted_pn4[p], found, spec.name, seed)
        results = pl.DataFrame(curves[p] + summary(predictions, spec, config.steps), schema=RESULTS)
        trained.save(config.out, spec, seed, take(model, p), making, {"results": results, "predictions": predictions})


RESULTS = {
    "probe": pl.String,
    "role": pl.String,  # layer, prompt or floor
    "layer": pl.String,
    "tokens": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,  # 95 % bootstrap interval over images
    "high": pl.Float64,
    "n": pl.Int64,
}


def curve_point(
    spec: Spec, seed: int, step: int, predicted_n4: Tensor, true_n4: Tensor, weights_rn: np.ndarray
) -> list[dict]:
    """The rows of one point of the error curve: the full loss, whatever the step, and 1 − IoU."""
    error_n = boxes.loss(predicted_n4, true_n4, step=1, l1_steps=0).numpy()
    miss_n = 1 - boxes.iou(predicted_n4, true_n4).numpy()
    pairs = (("error", error_n), ("one_minus_iou", miss_n))
    return [row(spec, seed, step, metric, values_n, weights_rn) for metric, values_n in pairs]


def row(spec: Spec, seed: int, step: int, metric: str, values_n: np.ndarray, weights_rn: np.ndarray) -> dict:
    """One row of the results: a mean over images with its interval."""
    value, low, high = interval(values_n, weights_rn)
    numbers = {"step": step, "metric": metric, "value": value, "low": low, "high": high, "n": len(values_n)}
    return {"probe": spec.name, "role": spec.role, "layer": spec.layer, "tokens": spec.tokens, "seed": seed} | numbers


def scored(predicted_n4: Tensor, found: Scenes, probe: str, seed: int) -> pl.DataFrame:
    """One row per test image: the predicted box in [0, 1] and how well it fits the true one."""
    true_n4 = torch.from_numpy(found.boxes_s4[found.test])
    size_n2 = torch.from_numpy(found.sizes_s2[found.test])
    columns = {
        "sample": found.samples[found.test],
        "watched": np.arange(len(found.test)) < len(found.watch),
        **{name: predicted_n4[:, i].numpy() for i, name in enumerate(("x1", "y1", "x2", "y2"))},
        "iou": boxes.iou(predicted_n4, true_n4).numpy(),
        "giou": boxes.giou(predicted_n4, true_n4).numpy(),
        "centre_distance": boxes.centre_distance(predicted_n4, true_n4, size_n2).numpy(),
        "truth_inside": boxes.containment(true_n4, predicted_n4).numpy(),
        "inside_truth": boxes.containment(predicted_n4, true_n4).numpy(),
    }
    names = {"probe": [probe] * len(predicted_n4), "seed": [seed] * len(predicted_n4)}
    return pl.DataFrame(names | columns)


def summary(predictions: pl.DataFrame, spec: Spec, step: int) -> list[dict]:
    """The final metrics of one proxy over the whole test split."""
    values = {name: predictions[name].to_numpy() for name in predictions.columns[-5:]}
    values["iou_at_0.5"] = (values["iou"] >= 0.5).astype(np.float32)
    weights_rn = resamples(predictions.height)
    seed = predictions["seed"][0]
    return [row(spec, seed, step, metric, values_n, weights_rn) for metric, values_n in values.items()]


def gather(config: ProbeConfig, wanted: Sequence[Spec], found: Scenes) -> None:
    """Join the tables of all proxies, and of the floors that need no training, into one of each kind."""
    folders = [trained.folder_of(config.out, spec, seed) for seed in config.seeds for spec in wanted]
    results = [pl.read_parquet(folder / "results.parquet") for folder in folders]
    predictions = [pl.read_parquet(folder / "predictions.parquet") for folder in folders]
    watched = len(found.watch)
    true_n4, weights_rn = torch.from_numpy(found.boxes_s4[found.watch]), resamples(watched)
    for name, box in constant_boxes(found.boxes_s4[found.train]).items():
        floor = Spec(name, "floor", ("none",), "none")
        guess_n4 = torch.from_numpy(box).expand(len(found.test), 4)
        guesses = scored(guess_n4, found, name, seed=0)
        rows = curve_point(floor, 0, config.steps, guess_n4[:watched], true_n4, weights_rn)
        results.append(pl.DataFrame(rows + summary(guesses, floor, config.steps), schema=RESULTS))
        predictions.append(guesses)
    for name, tables in (("results", results), ("predictions", predictions)):
        buffer = io.BytesIO()
        pl.concat(tables).write_parquet(buffer)
        size = write_file(config.out / f"{name}.parquet", buffer.getvalue())
        print(f"{config.out / name}.parquet  {readable(size)}")
