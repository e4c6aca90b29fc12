"""Tiny random editors of the real pipeline and model classes, with real tokenizers, saved as folders."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LATENTS = 4
NORM = {"latents_mean": [0.1] * LATENTS, "latents_std": [1.3] * LATENTS}
SHIFTS = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def scheduler(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SHIFTS, **settings)


def byte_tokenizer(*special: str, **settings) -> PreTrainedTokenizerFast:
    """One token a byte."""
    pieces = [*special, *BYTES]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def qwen(kind: str, processor, text_encoder) -> diffusers.DiffusionPipeline:
    vae = AutoencoderKLQwenImage(4, LATENTS, [1] * 4, 1, temperal_downsample=[False] * 3, **NORM)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENTS,
        out_channels=LATENTS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_encoder.config.text_config.hidden_size,
        axes_dims_rope=(4, 6, 6),
    )
    return getattr(diffusers, kind)(
        scheduler=scheduler(shift_terminal=0.02),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer,
    )


def flux_kontext() -> diffusers.DiffusionPipeline:
    width, ends = 16, "<|endoftext|>"
    letters = ["<|startoftext|>", ends, *BYTES, *(f"{letter}</w>" for letter in BYTES)]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(letters)}, merges=[], model_max_length=77)
    t5 = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))],
        extra_ids=0,
    )
    pooled = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    read = T5Config(vocab_size=len(t5), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2)
    return diffusers.FluxKontextPipeline(
        scheduler=scheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4,) * 4,
            latent_channels=LATENTS,
            norm_num_groups=2,
            scaling_factor=0.4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(pooled),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(read),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=4 * LATENTS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}"
)


def flux2() -> diffusers.DiffusionPipeline:
    """Thirty-one layers, for it reads the tenth, twentieth and thirtieth."""
    width = 16
    special = ("<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = byte_tokenizer(*special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[4:])})
    heads = {"num_attention_heads": 2, "intermediate_size": width, "hidden_size": width}
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 31,
            "num_key_value_heads": 2,
            "head_dim": 8,
            **heads,
        },
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 56, "patch_size": 14, **heads},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return diffusers.Flux2Pipeline(
        scheduler=scheduler(),
        vae=AutoencoderKLFlux2(
            block_out_channels=(4,) * 4, latent_channels=LATENTS, norm_num_groups=2, layers_per_block=1
        ),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=PixtralProcessor(PixtralImageProcessor(patch_size=14), tokenizer, patch_size=14, chat_template=CHAT),
        transformer=Flux2Transformer2DModel(
            in_channels=4 * LATENTS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * width,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    )


def fibo_edit() -> diffusers.DiffusionPipeline:
    """Its vocabulary reaches past the token 128,000, which stands for an empty text."""
    width, begin = 16, 128_000
    tokenizer = byte_tokenizer("<|end|>", eos_token="<|end|>", pad_token="<|end|>")
    config = SmolLM3Config(
        vocab_size=begin + 8,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return diffusers.BriaFiboEditPipeline(
        scheduler=scheduler(),
        vae=AutoencoderKLWan(4, None, LATENTS, [1] * 5, 1, temperal_downsample=[False] * 4, **NORM),
        text_encoder=SmolLM3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=BriaFiboTransformer2DModel(
            in_channels=LATENTS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * width,
            axes_dims_rope=[4, 6, 6],
            text_encoder_dim=width,
        ),
    )


def save_tiny(name: str, folder: Path, processor, tiny_model: Callable) -> Path:
    """The editor of a baseline's name, in a folder; the same weights every time."""
    torch.manual_seed(0)
    if name.startswith("qwen"):
        kind = "QwenImageEditPipeline" if name == "qwen-image-edit" else "QwenImageEditPlusPipeline"
        made = qwen(kind, processor, tiny_model())
    else:
        made = {"flux-kontext": flux_kontext, "flux2": flux2, "fibo-edit": fibo_edit}[name]()
    with torch.no_grad():
        for weight in (*made.vae.parameters(), *made.transformer.parameters()):
            if weight.ndim > 1:
                # As they are drawn, pictures hardly depend on anything.
                weight.mul_(2)
    made.save_pretrained(folder)
    return folder
