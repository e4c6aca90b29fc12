"""A small real study by the pocket model: scenes, store, probes and attention, as the README's commands make it."""

from pathlib import Path

from extract.config import ExtractConfig
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes
from probes.attend import attend
from probes.config import AttendConfig, SweepConfig
from probes.sweep import sweep

SAMPLES = 96


def pocket_run(folder: Path) -> Path:
    """``data/scenes``, ``data/store.zarr`` and ``runs/probes`` in ``folder``, small and trained for a moment."""
    scenes, place, runs = folder / "data/scenes", folder / "data/store.zarr", folder / "runs/probes"
    write_scenes(ScenesConfig(scenes, samples=SAMPLES, seed=1, difficulty="hard"))
    extract(ExtractConfig(preset="pocket", data=str(scenes), store=str(place), limit=SAMPLES, vlm_boxes=False))
    parts = ("layers", "prompt", "joint", "floors")
    quick = {"steps": 40, "watch": 8, "watch_every": 20, "warm_up": 10, "l1_steps": 10, "depth": 2}
    sweep(SweepConfig(str(place), runs, parts=parts, layers=("6", "11", "final"), seeds=(0, 1), **quick))
    joint = sorted(runs.glob("proxies/joint-*-seed0"))
    others = sorted([*runs.glob("proxies/joint-*-seed1"), *runs.glob("proxies/permuted-0+1*")])
    attend(AttendConfig(tuple(joint), str(place)))
    attend(AttendConfig(tuple(others), str(place), keep="mass"))
    return folder
