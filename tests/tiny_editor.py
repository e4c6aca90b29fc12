"""A tiny editor of the real classes with random weights, and a small store that conditions it."""

from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from edit.pocket.build import SETTINGS, build_pipeline, build_vae
from extract.config import ExtractConfig
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes

SAMPLES = 24


def tiny_editor(folder: Path, layers: int = 2, settings=SETTINGS) -> Path:
    """A pipeline's folder, as the pocket editor's is, with a transformer of ``layers`` blocks of width 32."""
    torch.manual_seed(0)
    pipeline = build_pipeline(build_vae(), 128, 0)
    pipeline.transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    settings.save(folder)
    return folder


def tiny_study(folder: Path) -> Path:
    """``scenes`` and ``store.zarr`` in ``folder``: hard scenes as the pocket VLM reads them."""
    write_scenes(ScenesConfig(folder / "scenes", samples=SAMPLES, seed=5, difficulty="hard"))
    config = ExtractConfig(
        preset="pocket",
        data=str(folder / "scenes"),
        store=str(folder / "store.zarr"),
        limit=SAMPLES,
        vlm_boxes=False,
        threads=1,
        loaders=0,
        batch_size=1,
    )
    assert extract(config) == 0
    return folder
