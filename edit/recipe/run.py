"""``recipe``: all stages in order, each with its own model, resumed where a run was interrupted."""

import fcntl
import gc
import hashlib
import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from edit.endpoints.endpoint import Closed
from edit.recipe import dataset
from edit.recipe.boxes import VisionBoxer, compare
from edit.recipe.checkpoints import find, find_language, find_vision
from edit.recipe.config import SCENES, RecipeConfig, endpoint_of
from edit.recipe.dataset import Sample
from edit.recipe.reversal import Reversal
from edit.recipe.scenes import SceneModel, SceneWriter
from edit.recipe.stages import REPLACED, UNFINISHED, Given, Made, Model, Paid, Result, Shelf, Stage, Work, write
from edit.recipe.words import EndpointText, LanguageWriter, LocalText, VisionCaptioner
from extract.model import find_device
from extract.omniedit import BadSample
from extract.pocket.build import WEIGHTS as POCKET_VLM
from store.errors import Busy, Refusal

VERSION = 1
"""Of what the stages make; a change of their code that changes it makes older results void."""
LABEL = "recipe.json"
INDEX = "model_index.json"
STAGES = {"write": "writer", "generate": "generator", "harmonize": "harmonizer", "reverse": None}
STAGES |= {"caption": "captioner", "box": "boxer"}
"""In their order, and the settings that name their models."""


def stages_of(config: RecipeConfig) -> list[Stage]:
    """The stages with the models that the settings name; weights are not loaded (raises `Refusal`)."""
    device = find_device(config.device)

    def model(stage: str, setting: str) -> Model:
        name = getattr(config, setting)
        if name == SCENES:
            return SceneWriter(config.seed) if stage == "write" else SceneModel(stage)
        if stage == "write":
            if behind := endpoint_of(name):
                return LanguageWriter(EndpointText(*behind, config.endpoint))
            return LanguageWriter(LocalText(find_language(setting, name), device))
        # Diffusers takes its time to import, and exact stages do without.
        if stage == "generate":
            from edit.recipe.pictures import DiffusionGenerator

            return DiffusionGenerator(find(setting, name, INDEX), config.side, config.generator_steps, device)
        if stage == "harmonize":
            from edit.pocket.build import WEIGHTS as POCKET_EDITOR
            from edit.recipe.pictures import EditorHarmonizer

            found = find(setting, name, INDEX, POCKET_EDITOR)
            conditioner = find_vision("conditioner", config.conditioner, POCKET_VLM)
            return EditorHarmonizer(found, conditioner, config.conditioning, config.harmonizer_steps, device)
        return {"caption": VisionCaptioner, "box": VisionBoxer}[stage](find_vision(setting, name, POCKET_VLM), device)

    return [Stage(stage, model(stage, setting) if setting else Reversal()) for stage, setting in STAGES.items()]


class Workshop:
    """The folder of a run; one process at a time works in it.

    Raises
    ------
    Refusal
        The folder holds something else, or another process works in it (`Busy`).
    """

    def __init__(self, out: Path):
        self.out = out.expanduser().absolute()

    def __enter__(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise Refusal(f"--out {self.out} is a file: give a folder")
        there = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if there - {f"{LABEL}{UNFINISHED}"} and LABEL not in there:
            raise Refusal(f"--out {self.out} holds files that are no recipe's: give another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            os.close(self._folder)
            raise Busy(f"--out {self.out} is at work in another process: wait, or give another folder") from held
        self._clean()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def _clean(self) -> None:
        """Remove what a kill left."""
        self.shelf.clean()
        for left in [*self.out.glob(f"*{UNFINISHED}"), *self.out.glob(f"*{REPLACED}")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    @property
    def shelf(self) -> Shelf:
        """Where the stages' results lie."""
        return Shelf(self.out / "stages")

    def label(self, described: Mapping[str, Any]) -> None:
        """Say what the folder is, and by which settings it was made last."""
        unfinished = self.out / f"{LABEL}{UNFINISHED}"
        write(unfinished, (json.dumps(described, indent=1, sort_keys=True) + "\n").encode())
        unfinished.replace(self.out / LABEL)


@dataclass(frozen=True)
class Passed:
    """How a stage went: samples that came out of it, how many of them were made now, and what that took."""

    stage: str
    samples: int
    new: int
    seconds: float
    spent: float
    """Money."""


def run_stage(place: int, stage: Stage, samples: Sequence[Sample], shelf: Shelf, config: RecipeConfig) -> Passed:
    """Bring all samples that are not set aside through a stage; what lies on the shelf is taken from there."""
    began = time.perf_counter()
    described = json.dumps([stage.name, stage.model.describe()], sort_keys=True)
    going = [sample for sample in samples if sample.aside is None]
    left, spent = [], 0.0
    for sample in going:
        sample.fingerprint = hashlib.sha256(f"{sample.fingerprint} {described}".encode()).hexdigest()
        found = shelf.find(stage.name, sample.number, sample.fingerprint)
        if found is None or (found.aside and config.retry):
            left.append(sample)
        else:
            advance(sample, stage.name, found)
    if left:
        work = stage.model.load()
        bar = tqdm(left, desc=stage.name, unit="sample", initial=len(going) - len(left), total=len(going))
        with closing(work) if isinstance(work, Paid) else nullcontext():
            for sample in bar:
                drawn = np.random.SeedSequence([config.seed, sample.number, place]).generate_state(1)[0]
                made, aside = attempt(work, Given(sample.number, int(drawn), sample.told, sample.files))
                advance(sample, stage.name, shelf.keep(stage.name, sample.number, sample.fingerprint, made, aside))
                if isinstance(work, Paid) and work.spent:
                    spent = work.spent
                    bar.set_postfix_str(f"{spent:.4f} spent", refresh=False)
        # The next stage's model may need all the memory that this one had.
        del work
        gc.collect()
    passed = sum(sample.aside is None for sample in going)
    return Passed(stage.name, passed, len(left), time.perf_counter() - began, spent)


def attempt(work: Work, given: Given) -> tuple[Made, tuple[str, str] | None]:
    """What the stage made, or made nothing and why: one bad sample never ends a run, whatever a model raises.

    That an endpoint answers nobody any more (`Closed`) is no sample's fault and ends it.
    """
    try:
        return work(given), None
    except BadSample as bad:
        return Made(), (bad.reason, bad.detail)
    except Closed:
        raise
    except Exception as error:
        return Made(), (type(error).__name__, (str(error).strip() or "without a word").splitlines()[0][:500])


def advance(sample: Sample, stage: str, found: Result) -> None:
    """A sample with a stage's result; the next stage's fingerprint follows from it."""
    sample.fingerprint = f"{sample.fingerprint} {found.digest}"
    if found.aside:
        sample.aside = (stage, *found.aside)
        return
    sample.done = stage
    sample.told = sample.told | dict(found.told)
    sample.files = sample.files | dict(found.files)


def recipe(config: RecipeConfig) -> int:
    """Make the data set, or go on with it; see `RecipeConfig`.

    Raises
    ------
    Refusal
        A model cannot be had, the folder is another's or at work, or no sample came through.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    return make(config, stages_of(config))


def make(config: RecipeConfig, stages: Sequence[Stage]) -> int:
    """`recipe` with these stages."""
    began = time.perf_counter()
    described = {"version": VERSION, "seed": config.seed}
    described |= {"stages": {stage.name: dict(stage.model.describe()) for stage in stages}}
    with Workshop(config.out) as workshop:
        workshop.label(described)
        samples = [Sample(number, f"{VERSION} {config.seed} {number}") for number in range(config.samples)]
        passed = [run_stage(place, stage, samples, workshop.shelf, config) for place, stage in enumerate(stages)]
        summary = finish(config, workshop.out, samples, described)
    summary["stages"] = {
        one.stage: {"samples": one.samples, "new": one.new, "seconds": one.seconds, "spent": one.spent}
        for one in passed
    }
    summary["seconds"] = time.perf_counter() - began
    print(json.dumps(summary) if config.json else told(summary))
    return 0


def finish(config: RecipeConfig, out: Path, samples: Sequence[Sample], described: Mapping[str, Any]) -> dict[str, Any]:
    """Write the data set, the store to review, what was verified and the manifest; how many there are of each."""
    whole = [sample for sample in samples if sample.aside is None]
    names = [sample.sample_id for sample in whole]
    data, verified, review = out / "dataset", out / "verified", out / "review"
    compared = [sample for sample in samples if "true_box" in sample.told and asked(sample)]
    found = compare([sample.told.get("box") for sample in compared], [one.told["true_box"] for one in compared])
    boxed = dict(zip((sample.number for sample in whole), names, strict=True))
    if not whole:
        dataset.write_manifest(out / "manifest.parquet", samples, boxed)
        reasons = "; ".join(f"{count} × {reason}" for reason, count in set_aside(samples).items())
        raise Refusal(f"no sample came through, see {out / 'manifest.parquet'}: {reasons}")
    dataset.write_shards(data, whole, names, config.seed, described)
    path = dataset.lay_out_review(data, review, names)
    dataset.apply_verdicts(whole, names, config.verdicts, review)
    kept = [sample for sample in whole if sample.final is not None]
    if kept:
        dataset.write_shards(verified, kept, [boxed[one.number] for one in kept], config.seed, described)
    else:
        dataset.remove(verified)
    dataset.write_manifest(out / "manifest.parquet", samples, boxed)
    return {
        "asked": len(samples),
        "dataset": {"samples": len(whole), "path": str(data)},
        "verdicts": dict(Counter(sample.verdict for sample in whole if sample.verdict)),
        "verified": {"samples": len(kept), "path": str(verified) if kept else None},
        "set_aside": set_aside(samples),
        "boxes": found,
        "boxes_of_person": compare([one.told["box"] for one in kept], [one.final for one in kept]),
        "review": shlex.join(["python", "-m", "extract.review", "--store", str(path), "--data", str(data)]),
    }


def asked(sample: Sample) -> bool:
    """Whether a sample came to the boxer."""
    return sample.aside is None or sample.aside[0] == "box"


def set_aside(samples: Sequence[Sample]) -> dict[str, int]:
    """How many were set aside, by stage and reason, the most frequent first."""
    return dict(Counter(f"{one.aside[0]}: {one.aside[1]}" for one in samples if one.aside).most_common())


def told(summary: Mapping[str, Any]) -> str:
    """The summary in words."""
    lines = [f"\n{summary['dataset']['samples']} of {summary['asked']} samples: {summary['dataset']['path']}"]
    for name, stage in summary["stages"].items():
        cost = f", {stage['spent']:.4f} spent" if stage["spent"] else ""
        made = f"{stage['new']} of them now, {stage['seconds']:.1f} s{cost}"
        lines += [f"  {name:<10} {stage['samples']:>6} samples, {made}"]
    judged = ", ".join(f"{count} {verdict}" for verdict, count in summary["verdicts"].items())
    lines += [f"  {'verify':<10} {summary['verified']['samples']:>6} samples{f' ({judged})' if judged else ''}"]
    lines += [f"  set aside  {sum(summary['set_aside'].values()):>6}"]
    lines += [f"    {count} × {reason}" for reason, count in summary["set_aside"].items()]
    for name, whose in (("boxes", "the true ones"), ("boxes_of_person", "the person's")):
        if found := summary[name]:
            mean, iou50 = (
                f"{found[key]:.3f} [{found[f'{key}_interval'][0]:.3f}, {found[f'{key}_interval'][1]:.3f}]"
                for key in ("mean_iou", "iou50")
            )
            lines += [f"  boxes against {whose}: mean IoU {mean}, IoU ≥ 0.5 {iou50}, n = {found['n']}"]
    lines += [f"  time       {summary['seconds']:.0f} s"]
    left = summary["dataset"]["samples"] - sum(summary["verdicts"].values())
    if left:
        lines += [f"  verify {left} by hand: {summary['review']}", "  and then give this command again"]
    elif summary["verified"]["path"]:
        lines += [f"  verified   {summary['verified']['path']}"]
    return "\n".join(lines)
