"""The pocket model over drawn scenes, set up once for all rows that are about it."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import store
from bench.config import BenchConfig
from bench.measure import quiet
from extract.config import ExtractConfig
from extract.loading import Loaders, planned_of, prepare, rows_at
from extract.pipeline import Clock, Extractor, batches_of
from extract.pocket.build import WEIGHTS, build_config, build_processor
from extract.rows import Place, Shards
from extract.run import begin, extract, fill, make_extractor
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.sequence import Batch
from extract.workers import Rank

SEED = 3
LOADERS = 1


@dataclass(frozen=True)
class Pocket:
    """A planned extraction of the pocket model, boxes off, the loaded model, and loaders that have begun."""

    config: ExtractConfig
    extractor: Extractor
    loaders: Loaders
    weights: str
    """``shipped``, or ``random`` where none are there: as fast, but the states are not a trained model's."""

    @property
    def plan(self) -> store.Plan:
        """The plan of the store that is filled."""
        return self.extractor.plan

    def batches(self) -> list[Batch]:
        """The batches of the extraction."""
        plan, shards = self.plan, Shards(self.config.data)
        planned, places = planned_of(plan.samples), [Place(*row) for row in plan.samples.select("file", "row").rows()]
        made = []
        for samples in (batch for b in range(plan.n_blocks) for batch in batches_of(plan, b, self.config.batch_size)):
            rows = rows_at(shards, [places[n] for n in samples])
            work = self.loaders.submit(prepare, [planned[n] for n in samples], rows, self.extractor.purposes)
            found, _ = self.loaders.result(work)
            made.append(self.extractor.conditioner.collate([one["edit"] for one in found]))
        return made

    def new_store(self) -> None:
        """Lay out the store again, empty."""
        shutil.rmtree(self.config.store, ignore_errors=True)
        store.create(self.config.store, self.plan)

    def fill_store(self) -> None:
        """The part of ``python -m extract`` between laying out and verifying."""
        self.extractor.clock.seconds.clear()
        with quiet():
            fill(self.extractor, self.loaders, "0", lambda samples: None)


@contextlib.contextmanager
def set_up(config: BenchConfig, scratch: Path, samples: int) -> Iterator[Pocket]:
    """Draw the scenes, find or make the weights, and extract once: that gives the plan, and warms what gets warm."""
    shipped = any(WEIGHTS.glob("*.safetensors"))
    # Wishes about the whole picture have no box and are set aside.
    scenes = ScenesConfig(scratch / f"scenes-{samples}", samples=2 * samples, seed=SEED)
    with quiet():
        write_scenes(scenes)
        folder = WEIGHTS if shipped else make_random(scratch / "random")
        asked = ExtractConfig(
            model=str(folder),
            data=str(scenes.out),
            store=scratch / f"pocket-{samples}.zarr",
            limit=samples,
            held_out=0.5,
            vlm_boxes=False,
            batch_size=config.sizes.batch,
            device="cpu",
            threads=config.threads,
            loaders=LOADERS,
        )
        if extract(asked):
            raise RuntimeError(f"the extraction that is to be measured failed: python -m store verify {asked.store}")
        planner, loaders = begin(asked, Rank())
        extractor = make_extractor(planner, store.load_plan(asked.store), Clock())
    with loaders:
        yield Pocket(asked, extractor, loaders, "shipped" if shipped else "random")


def make_random(folder: Path) -> Path:
    """A checkpoint of the pocket model's shape with random weights."""
    processor = build_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration(build_config(processor.tokenizer))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
