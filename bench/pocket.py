"""The pocket model over drawn scenes, set up once for all rows that are about it."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import store
from bench.config import BenchConfig
from extract.config import ExtractConfig
from extract.omniedit import Sample
from extract.pocket.build import WEIGHTS, build_config, build_processor
from extract.run import Clock, Extractor, extract, extract_blocks, make_extractor, planned_samples
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.sequence import Batch

SEED = 3


@dataclass(frozen=True)
class Pocket:
    """A planned extraction of the pocket model, boxes off, and the loaded model."""

    config: ExtractConfig
    plan: store.Plan
    extractor: Extractor
    weights: str
    """``shipped``, or ``random`` where none are there: as fast, but the states are not a trained model's."""

    def first_batch(self) -> Batch:
        """The first scenes in the data's order, whatever their lengths: a padded batch."""
        members = islice(planned_samples(self.config, self.plan), self.config.batch_size)
        pairs = [(sample.image, sample.instruction) for _, sample in members if isinstance(sample, Sample)]
        return self.extractor.conditioner.batch(pairs)

    def new_store(self) -> None:
        """Lay out the store again, empty."""
        shutil.rmtree(self.config.store, ignore_errors=True)
        store.create(self.config.store, self.plan)

    def fill_store(self) -> None:
        """The block loop of ``python -m extract``."""
        with quiet():
            extract_blocks(self.extractor)


def set_up(config: BenchConfig, scratch: Path) -> Pocket:
    """Draw the scenes, find or make the weights, and extract once: that gives the plan, and warms what gets warm."""
    sizes = config.sizes
    shipped = any(WEIGHTS.glob("*.safetensors"))
    # Wishes about the whole picture have no box and are set aside.
    scenes = ScenesConfig(scratch / "scenes", samples=2 * sizes.samples, seed=SEED)
    with quiet():
        write_scenes(scenes)
        folder = WEIGHTS if shipped else make_random(scratch / "random")
        asked = ExtractConfig(
            model=str(folder),
            data=str(scenes.out),
            store=scratch / "pocket.zarr",
            limit=sizes.samples,
            held_out=0.5,
            vlm_boxes=False,
            batch_size=sizes.batch,
            device="cpu",
            threads=config.threads,
        )
        if extract(asked):
            raise RuntimeError(f"the extraction that is to be measured failed: python -m store verify {asked.store}")
        plan = store.load_plan(asked.store)
        extractor = make_extractor(asked, folder, torch.device("cpu"), plan, Clock())
    return Pocket(asked, plan, extractor, "shipped" if shipped else "random")


def make_random(folder: Path) -> Path:
    """A checkpoint of the pocket model's shape with random weights."""
    processor = build_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(build_config(processor.tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and summaries of what is measured out of the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
