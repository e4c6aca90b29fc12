"""Tiny random models of the real classes that the recipe runs, in folders."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_families import WIDTH, model_of, processor_of, texts
from transformers import Qwen2Config, Qwen2ForCausalLM

from edit.editor import Settings
from edit.pocket.build import build_pipeline, build_scheduler, build_vae
from extract.pocket.build import CHAT_TEMPLATE, train_tokenizer

VLM_WIDTH = 128  # of the pocket model's states


def save_editor(folder, width=VLM_WIDTH):
    """A Qwen-Image-Edit of the pocket's shape with random weights, working at 64×64; its folder."""
    torch.manual_seed(0)
    build_pipeline(build_vae(), width, seed=0).to(torch.bfloat16).save_pretrained(folder)
    Settings(area=64 * 64, multiple=16, steps=1).save(folder)
    return str(folder)


def save_generator(folder):
    """A Qwen-Image with random weights; its folder."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = QwenImagePipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=model_of("qwen2_5_vl"),
        tokenizer=processor_of("qwen2_5_vl").tokenizer,
        transformer=transformer,
    )
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    pipeline.save_pretrained(folder)
    return str(folder)


def save_vision(folder, name):
    """A vision-language model of a family with random weights; its folder."""
    model_of(name).save_pretrained(folder)
    processor_of(name).save_pretrained(folder)
    return str(folder)


def save_language(folder, chat=True):
    """A language model with random weights; its folder."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts("qwen2_5_vl"), 500)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
