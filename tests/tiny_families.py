"""Tiny random models of every family's real classes, with real processors around tokenizers trained here."""

import json
from collections.abc import Iterable
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from extract.families import FAMILIES
from extract.pocket.build import train_tokenizer
from extract.prompts import ground_template, native_template

WIDTH, HEADS, KEY_HEADS = 64, 4, 2
INSTRUCTIONS = ("make the second red cube from the left blue", "remove the ball")


def texts(name: str) -> list[str]:
    """What a family's tokenizer is trained on."""
    return [template(FAMILIES[name]) for template in (native_template, ground_template)] * 5 + [*INSTRUCTIONS] * 5


def train_sentencepiece(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """As Llama's: BPE over text whose blanks are marks, one put before it, with bytes for what is not known."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(models.BPE())
    learner.normalizer = marks
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.add_bos_token = True
    return made


@cache
def processor_of(name: str):
    """The family's stock processor; pictures are small."""
    if name == "llava":
        image = LlavaImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
        return LlavaProcessor(
            image,
            train_sentencepiece(texts(name), 600),
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template="",
        )
    tokenizer = train_tokenizer(texts(name), 500)
    if name == "internvl":
        roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        tokenizer = with_roles(tokenizer, roles | {"video_token": "<video>"})
        image = GotOcr2ImageProcessor(size={"height": 112, "width": 112}, max_patches=6)
        return InternVLProcessor(image, tokenizer, InternVLVideoProcessor(), image_seq_length=16, chat_template="")
    if name == "qwen3_vl":
        image = Qwen2VLImageProcessor(size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 40}, patch_size=16)
        return Qwen3VLProcessor(image, tokenizer, Qwen3VLVideoProcessor(), chat_template="")
    image = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40})
    return Qwen2_5_VLProcessor(image, tokenizer, Qwen2VLVideoProcessor(), chat_template="")


def with_roles(tokenizer: Qwen2Tokenizer, roles: dict[str, str]) -> Qwen2Tokenizer:
    """The same tokenizer with further special tokens that have names."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=[*tokenizer.extra_special_tokens, *roles.values()],
        **roles,
    )


def decoder_settings(tokenizer, **more) -> dict:
    """A small decoder's part of a configuration."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more


def config_of(name: str):
    """A small configuration of the family."""
    tokenizer = processor_of(name).tokenizer
    image_id = tokenizer.convert_tokens_to_ids(FAMILIES[name].placeholder)
    tower = {"hidden_size": 32, "intermediate_size": 48}
    if name == "llava":
        return LlavaConfig(
            text_config=decoder_settings(tokenizer, model_type="llama"),
            vision_config=tower
            | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "num_attention_heads": 2}
            | {"image_size": 84, "patch_size": 14, "projection_dim": 32},
            image_token_index=image_id,
            image_seq_length=36,
        )
    if name == "internvl":
        return InternVLConfig(
            text_config=decoder_settings(tokenizer, model_type="qwen3", tie_word_embeddings=False),
            vision_config=tower
            | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "patch_size": 14},
            image_token_id=image_id,
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    ids = {
        f"{which}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for which, token in {"image": "image_pad", "video": "video_pad"}.items()
    } | {
        f"{which}_token_id": tokenizer.convert_tokens_to_ids(f"<|{which}|>") for which in ("vision_start", "vision_end")
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    tower |= {"depth": 4, "num_heads": 2, "out_hidden_size": WIDTH}
    if name == "qwen3_vl":
        text = decoder_settings(tokenizer, rope_parameters=rope | {"mrope_interleaved": True})
        tower |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
        return Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
    text = decoder_settings(tokenizer, rope_parameters=rope)
    return Qwen2_5_VLConfig(
        text_config={key: value for key, value in text.items() if key != "head_dim"},
        vision_config=tower | {"window_size": 112, "fullatt_block_indexes": [1, 3]},
        **ids,
    )


def model_of(name: str, attention: str = "sdpa"):
    """A small random model in float32 (weights large enough that attention is not flat)."""
    torch.manual_seed(0)
    config = config_of(name)
    config._attn_implementation = attention
    model = FAMILIES[name].model_class(config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.ndim == 2 and "lm_head" not in weight_name:
                weight.mul_(4)
    return model
