"""Training the pocket editor's autoencoder from scratch on crops of scenes, before and after their edit."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import nn
from tqdm import tqdm

from edit.checkpoints import load_checkpoint, save_checkpoint
from edit.frames import for_single_frames
from edit.overlay import Overlay
from edit.pocket.build import AREA, LATENT_CHANNELS, VAE_LOG, build_vae
from extract.scenes.scene import DIFFICULTIES, Scene, bounding_box, draw_scene, edited_things, paint, restyle

CROPS = 4
"""Crops of one scene: drawing a scene costs as much as several steps on a crop."""
OVERLAID = 0.3
"""Share of the crops on which boxes are drawn, so that the autoencoder can say what a LoRA is to see."""
WEIGHTS = {"l1": 1.0, "l2": 4.0, "edges": 0.2, "size": 1e-4}
"""Squares weigh most: they are what tells one colour from another early on."""
VALIDATION = 32


@dataclass(frozen=True)
class VaeConfig:
    """Train the pocket editor's autoencoder from scratch (half an hour on one core); goes on from its checkpoint."""

    out: Path = Path("runs/editor")
    """Folder for checkpoints, vae.jsonl and the finished autoencoder."""
    steps: int = 6_000
    """Optimizer steps."""
    batch_size: int = 8
    """Crops a step."""
    crop: int = 64
    """Side of a crop in pixels."""
    learning_rate: float = 2e-3
    """Peak rate of Muon for the convolutions, and twice that of Adam for all else; linear warm-up, then by a cosine to
    a hundredth. By Adam alone colours and textures come many times later, and at 1e-3 not at all."""
    warmup: int = 200
    """Steps of linear warm-up."""
    threads: int = 1
    """Torch threads."""
    checkpoint_every: int = 250
    """Steps between checkpoints and validations."""
    seed: int = 30_001
    """Seed of weights and scenes; scenes of other seeds are never seen."""


class Crops(torch.utils.data.IterableDataset):
    """Crops by step, drawn ahead of training by a worker process: float32 ``[batch, 3, crop, crop]`` in -1 … 1."""

    def __init__(self, config: VaeConfig, start: int):
        self.config, self.start = config, start

    def __iter__(self) -> Iterator[torch.Tensor]:
        config = self.config
        for step in range(self.start, config.steps):
            rng = np.random.default_rng([config.seed, step])
            made = []
            while len(made) < config.batch_size:
                scene = draw_scene(config.seed, step * config.batch_size + len(made), DIFFICULTIES[rng.integers(3)])
                made += self._crops(rng, scene)
            yield to_tensor(np.stack(made[: config.batch_size]))

    def _crops(self, rng: np.random.Generator, scene: Scene) -> list[np.ndarray]:
        picture, owner = pictures_of(scene)[int(rng.integers(2))], paint(scene, scene.things, scene.background)[1]
        boxes = [bounding_box(owner == index) for index in np.unique(owner[owner >= 0])]
        picture = resized(picture, AREA * rng.uniform(0.8, 2.2))
        scale = np.array(picture.size * 2) / np.array([scene.width, scene.height] * 2)
        crops = []
        for _ in range(CROPS):
            shown = picture
            if boxes and rng.random() < OVERLAID:
                shown = Overlay().draw(picture, boxes[rng.integers(len(boxes))] * scale)
            x, y = (int(rng.integers(extent - self.config.crop + 1)) for extent in picture.size)
            crops.append(np.asarray(shown)[y : y + self.config.crop, x : x + self.config.crop])
        return crops


def pictures_of(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """A scene before and after its wish came true."""
    before = Image.fromarray(paint(scene, scene.things, scene.background)[0])
    if scene.wish.task == "style":
        return before, restyle(before, scene.wish.style)
    return before, Image.fromarray(paint(scene, *edited_things(scene))[0])


def resized(picture: Image.Image, area: float) -> Image.Image:
    """The picture at about ``area`` pixels, its sides multiples of 32, as the pipeline resizes it."""
    width, height, _ = calculate_dimensions(area, picture.width / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 ``[b, h, w, 3]`` to float32 ``[b, 3, h, w]`` in -1 … 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(vae: AutoencoderKLQwenImage, frames: torch.Tensor) -> torch.Tensor:
    """Means and log-variances ``[b, 2z, 1, h/8, w/8]`` of frames ``[b, 3, h, w]``, without the video's caches."""
    return vae.quant_conv(vae.encoder(frames.unsqueeze(2)))


def decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Frames ``[b, 3, h, w]`` of raw latents ``[b, z, 1, h/8, w/8]``, not clamped."""
    return vae.decoder(vae.post_quant_conv(latents))[:, :, 0]


def losses_of(vae: AutoencoderKLQwenImage, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reconstruction from the latents' means (L1, squares, edges), and the size of the latents.

    Nothing is drawn: the pipeline takes the means as well, and noise in the latents costs this small one its colours.
    """
    mean = encode(vae, frames)[:, :LATENT_CHANNELS]
    error = decode(vae, mean).float() - frames
    edges = sum(torch.diff(error, dim=dim).abs().mean() for dim in (2, 3))
    return {"l1": error.abs().mean(), "l2": error.square().mean(), "edges": edges, "size": mean.float().square().mean()}


class Optimizer:
    """Muon for the kernels that a single frame goes through, each as a matrix; Adam for all other parameters."""

    def __init__(self, vae: AutoencoderKLQwenImage, learning_rate: float):
        kernels = [p for name, p in vae.named_parameters() if p.ndim >= 4 and len(p) > 3 and "time_conv" not in name]
        taken = set(map(id, kernels))
        self._others = [p for p in vae.parameters() if id(p) not in taken]
        self._matrices = [(kernel, nn.Parameter(_frame(kernel).flatten(1).clone())) for kernel in kernels]
        muon = torch.optim.Muon(
            [matrix for _, matrix in self._matrices], lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.Adam(self._others, lr=learning_rate / 2, betas=(0.9, 0.99))
        self.parts = (muon, adam)
        self._peaks = (learning_rate, learning_rate / 2)

    def rate(self, share: float) -> None:
        """Set the learning rates to a share of their peaks."""
        for part, peak in zip(self.parts, self._peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * share

    @torch.no_grad()
    def step(self) -> None:
        """One step by the gradients that there are, which are then forgotten."""
        for kernel, matrix in self._matrices:
            matrix.copy_(_frame(kernel).flatten(1))
            matrix.grad = _frame(kernel.grad).flatten(1)
        for part in self.parts:
            part.step()
        for kernel, matrix in self._matrices:
            _frame(kernel).copy_(matrix.view(_frame(kernel).shape))
            kernel.grad = None
        for parameter in self._others:
            parameter.grad = None


def _frame(kernel: torch.Tensor) -> torch.Tensor:
    """What a single frame meets of a kernel: the last slice in time of a 3-D one."""
    return kernel[:, :, -1] if kernel.ndim == 5 else kernel


def validation(config: VaeConfig) -> list[torch.Tensor]:
    """Whole pictures of unseen hard scenes, each ``[1, 3, h, w]``."""
    scenes = (draw_scene(config.seed + 1, index, "hard") for index in range(VALIDATION))
    pictures = (pictures_of(scene)[index % 2] for index, scene in enumerate(scenes))
    return [to_tensor(np.array(resized(picture, AREA))[None]) for picture in pictures]


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, pictures: list[torch.Tensor]) -> float:
    """Mean peak signal to noise of pictures through their latents' means, in dB."""
    found = []
    for frames in pictures:
        again = decode(vae, encode(vae, frames)[:, :LATENT_CHANNELS]).clamp(-1, 1)
        found.append(10 * math.log10(4 / float((again - frames).square().mean())))
    return float(np.mean(found))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLQwenImage, pictures: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel: the pipeline normalises by them."""
    rows = torch.cat([encode(vae, frames)[:, :LATENT_CHANNELS].flatten(2)[0] for frames in pictures], 1)
    return rows.mean(1).tolist(), rows.std(1).tolist()


def train_vae(config: VaeConfig) -> None:
    """Train the autoencoder and save it; go on from the last checkpoint."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    vae = for_single_frames(build_vae()).train()
    optimizer = Optimizer(vae, config.learning_rate)
    checkpoint = config.out / "vae-checkpoint.safetensors"
    start = load_checkpoint(checkpoint, list(vae.parameters()), optimizer.parts)
    batches = torch.utils.data.DataLoader(Crops(config, start), batch_size=None, num_workers=1, prefetch_factor=16)
    pictures = validation(config)
    averages: dict[str, float] = {}
    began = time.time()
    with (config.out / VAE_LOG).open("a") as log:
        log.write(json.dumps({"from_step": start} | asdict(config), default=str) + "\n")
        bar = tqdm(batches, initial=start, total=config.steps, unit="step", mininterval=5)
        for step, frames in enumerate(bar, start):
            falling = 0.5 * (1 + math.cos(math.pi * step / config.steps))
            optimizer.rate(min((step + 1) / config.warmup, 0.01 + 0.99 * falling))
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(vae, frames)
            sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            for name, loss in losses.items():
                averages[name] = 0.98 * averages.get(name, float(loss.detach())) + 0.02 * float(loss.detach())
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                seen = {"step": step + 1, "seconds": round(time.time() - began), "psnr": round(psnr(vae, pictures), 2)}
                log.write(json.dumps(seen | {name: round(value, 5) for name, value in averages.items()}) + "\n")
                log.flush()
                save_checkpoint(checkpoint, step + 1, list(vae.parameters()), optimizer.parts)
                bar.set_postfix(psnr=f"{seen['psnr']:.1f}")
    mean, std = latent_statistics(vae, pictures)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.to(torch.bfloat16).save_pretrained(config.out / "vae")
    print(f"saved {config.out / 'vae'}")
