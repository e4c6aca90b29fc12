"""``python -m edit run``: pictures edited in two stages, each with its box, its seed and its settings."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import probes
import store
from edit.conditions import Conditioning
from edit.config import POCKET, POCKET_LORA, POCKET_PROXY, RunConfig, StagesConfig
from edit.editor import Editor
from edit.stages import TwoStage
from extract.encoder import Encoder
from extract.model import find_device
from extract.omniedit import BadSample, SetAside, decode, read
from store.errors import Refusal

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Job:
    """One picture to edit."""

    name: str
    picture: bytes
    instruction: str


def run(config: RunConfig) -> int:
    """Edit what is asked for; 0 if all of it was edited, 1 if some was set aside."""
    if config.threads:
        torch.set_num_threads(config.threads)
    jobs = list(jobs_of(config))
    stages = load_stages(config, config.conditioning, finds=config.box is None)
    config.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(config, stages) | {"given_box": config.box}
    done, aside, kept = 0, {}, 0
    began = time.perf_counter()
    for job in tqdm(jobs, unit="picture", desc="edit", disable=len(jobs) < 2):
        if isinstance(job, SetAside):
            aside[job.sample_id or str(job.place)] = f"{job.reason} ({job.detail})" if job.detail else job.reason
            continue
        asked = settings | {
            "instruction": job.instruction,
            "picture": hashlib.sha256(job.picture).hexdigest(),
        }
        if is_there(config.out, job.name, asked):
            kept += 1
            continue
        try:
            edited = stages(decode(job.picture), job.instruction, config.noise_seed, config.box, config.steps)
        except (BadSample, Refusal) as error:
            aside[job.name] = str(error)
            continue
        write(config.out, job.name, edited.picture, asked | {"box": edited.box, "read": edited.read})
        done += 1
    seconds = time.perf_counter() - began
    found = {"edited": done, "kept": kept, "set_aside": aside, "seconds": round(seconds, 2), "out": str(config.out)}
    if config.json:
        print(json.dumps(found))
    else:
        rate = f", {seconds / done:.1f} s each" if done else ""
        print(f"{done} edited{rate}, {kept} were there, {len(aside)} set aside: {config.out}")
        for name, reason in aside.items():
            print(f"  {name}: {reason}")
    return int(bool(aside))


def jobs_of(config: RunConfig) -> Iterator[Job | SetAside]:
    """What is to be edited, in order; what cannot be, with its reason."""
    if config.picture is not None:
        try:
            yield Job(config.picture.stem, config.picture.read_bytes(), config.instruction)
        except OSError as error:
            raise Refusal(f"--picture {config.picture} cannot be read: {error.strerror}") from None
    elif config.folder is not None:
        pictures = sorted(path for path in config.folder.glob("*") if path.suffix.lower() in PICTURES)
        if not pictures:
            raise Refusal(f"--folder {config.folder} has no pictures ({', '.join(PICTURES)})")
        for path in pictures:
            text = path.with_suffix(".txt")
            if not text.is_file():
                yield SetAside(path.name, (str(config.folder), None), f"no instruction: there is no {text.name}")
                continue
            yield Job(path.stem, path.read_bytes(), text.read_text(errors="replace").strip())
    else:
        for sample in read(config.data, config.limit, check_pixels=False):
            yield sample if isinstance(sample, SetAside) else Job(sample.sample_id, sample.source, sample.instruction)


def load_stages(config: StagesConfig, conditioning: Conditioning | None = None, finds: bool = True) -> TwoStage:
    """The VLM, the editor with its LoRA, and the proxy if boxes are to be found."""
    device = find_device(config.device)
    proxy = None
    if finds and config.proxy is not None and config.lora is not None:
        proxy = probes.load(POCKET_PROXY if config.proxy == POCKET else config.proxy)
    if proxy is not None:
        encoder = proxy.encoder(config.vlm)
    elif config.store is not None:
        encoder = Encoder.of(store.open(config.store).identity, config.vlm, device=config.device)
    else:
        encoder = probes.load(POCKET_PROXY).encoder(config.vlm)
    editor = Editor.load(config.editor, getattr(torch, config.dtype), device)
    stages = TwoStage(encoder, editor, conditioning or Conditioning(), proxy)
    if config.lora is None:
        return stages
    return stages.with_lora(POCKET_LORA if config.lora == POCKET else Path(config.lora))


def settings_of(config: StagesConfig, stages: TwoStage) -> dict[str, Any]:
    """All that determines an edited picture but the picture, its instruction and a given box."""
    return {
        "editor": config.editor,
        "weights": stages.editor.weights,
        "working": asdict(stages.editor.settings),
        "lora": config.lora if stages.overlay else None,
        "lora_weights": stages.lora if stages.overlay else None,
        "overlay": stages.overlay.as_dict() if stages.overlay else None,
        "proxy": stages.proxy.hash if stages.proxy else None,
        "conditioning": asdict(stages.conditioning),
        "steps": config.steps or stages.editor.settings.steps,
        "noise_seed": config.noise_seed,
        "dtype": config.dtype,
    }


def is_there(out: Path, name: str, asked: dict[str, Any]) -> bool:
    """Whether the picture is there and was made by these settings."""
    picture, label = paths_of(out, name)
    if not (picture.is_file() and label.is_file()):
        return False
    try:
        found = json.loads(label.read_text())
    except ValueError:
        return False
    return all(found.get(key) == value for key, value in json.loads(json.dumps(asked)).items())


def write(out: Path, name: str, picture: Image.Image, about: dict[str, Any]) -> None:
    """The picture, then what it came about by; a picture without the second is not there."""
    place, label = paths_of(out, name)
    stream = BytesIO()
    picture.save(stream, "PNG")
    for path, data in ((place, stream.getvalue()), (label, (json.dumps(about, indent=1) + "\n").encode())):
        unfinished = path.with_name(path.name + ".partial")
        unfinished.write_bytes(data)
        unfinished.replace(path)


def paths_of(out: Path, name: str) -> tuple[Path, Path]:
    """Of the picture and of its label; names of samples may be anything."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".")[:100]
    if safe != name:
        safe = f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return out / f"{safe}.png", out / f"{safe}.json"
