"""The pocket editor's parts: the classes of Qwen-Image-Edit with small configs."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
)
from transformers import AutoConfig

from edit.editor import Settings
from edit.stages import lora_settings
from edit.train import LOG, LORA_SETTINGS, LORA_WEIGHTS
from extract.pocket.build import WEIGHTS as VLM_WEIGHTS
from probes.trained import MAKING as PROXY_MAKING
from probes.trained import WEIGHTS as PROXY_WEIGHTS
from probes.trained import load as load_proxy
from store.errors import Refusal

AREA = 128 * 128
"""Pixels that a picture is resized to before the autoencoder: where Qwen-Image-Edit has a million."""
LATENT_CHANNELS = 16
VAE_LOG = "vae.jsonl"
WEIGHTS = Path(__file__).parent / "weights"
SETTINGS = Settings(area=AREA, multiple=16, steps=12)


def build_vae() -> AutoencoderKLQwenImage:
    """8× down, 16 latent channels, base width 16: 2.6 million parameters, of which single frames use a third."""
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer(width: int) -> QwenImageTransformer2DModel:
    """Eight double-stream blocks of width 160, with four heads of 40, for conditions of ``width``: 7.6 million."""
    return QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=width,
        axes_dims_rope=(8, 16, 16),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's, without the shift towards noise that pictures of a million pixels need."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=1.0)


def build_pipeline(vae: AutoencoderKLQwenImage, width: int, seed: int) -> QwenImageEditPipeline:
    """A trained autoencoder and a transformer with weights drawn from ``seed``; the pocket VLM stays where it is."""
    torch.manual_seed(seed)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    return QwenImageEditPipeline(scheduler=build_scheduler(), vae=vae, transformer=build_transformer(width), **parts)


@dataclass(frozen=True)
class BuildConfig:
    """Put the editor together: a trained autoencoder, and a transformer with drawn weights or a trained one.

    With drawn weights it is what `python -m edit train --train all` begins with; with the transformer of that
    training it is the pocket editor, and its LoRA and its proxy can lie beside it. Logs of training come along.
    """

    vae: Path = Path("runs/editor/vae")
    """Folder of the autoencoder, of `python -m edit.pocket vae`."""
    transformer: Path | None = None
    """Folder of the trained transformer; drawn weights where not given."""
    lora: Path | None = None
    """Folder of the LoRA that sees boxes, of `python -m edit train`."""
    proxy: Path | None = None
    """Folder of the proxy that finds the box, of `python -m probes train`."""
    out: Path = Path("runs/editor/start")
    """Folder of the editor."""
    seed: int = 30_002
    """Of drawn weights."""


def build(config: BuildConfig) -> None:
    """Write the folder of a pipeline, in bfloat16."""
    try:
        vae = AutoencoderKLQwenImage.from_pretrained(config.vae, dtype=torch.bfloat16)
        width = AutoConfig.from_pretrained(VLM_WEIGHTS).text_config.hidden_size
        pipeline = build_pipeline(vae, width, config.seed)
        if config.transformer:
            pipeline.transformer = QwenImageTransformer2DModel.from_pretrained(config.transformer)
    except OSError as error:
        raise Refusal(f"the editor's parts are not there ({str(error).splitlines()[0]}): train them first") from error
    if config.lora:
        lora_settings(config.lora)
    if config.proxy:
        load_proxy(config.proxy)
    pipeline.to(torch.bfloat16).save_pretrained(config.out)
    SETTINGS.save(config.out)
    copied = {Path("vae") / LOG: config.vae.parent / VAE_LOG}
    if config.transformer and (log := config.transformer.parent / LOG).exists():
        (config.out / "transformer" / LOG).write_text(history(log))
    if config.lora:
        copied |= {Path("lora") / name: config.lora / name for name in (LORA_WEIGHTS, LORA_SETTINGS, LOG)}
    if config.proxy:
        copied[Path("proxy") / PROXY_WEIGHTS] = config.proxy / PROXY_WEIGHTS
    for name, source in copied.items():
        if source.exists():
            (config.out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, config.out / name)
    if config.proxy:
        making = json.loads((config.proxy / PROXY_MAKING).read_text())
        making["store"]["path"] = Path(making["store"]["path"]).name  # where it lay is nobody's business
        (config.out / "proxy" / PROXY_MAKING).write_text(json.dumps(making, indent=1) + "\n")
    print(f"saved {config.out}")


def history(log: Path) -> str:
    """A training's log behind that of the editor that it began with, if that has one."""
    own = log.read_text()
    before = Path(json.loads(own.splitlines()[0])["editor"]) / "transformer" / LOG
    return (before.read_text() if before.exists() else "") + own
