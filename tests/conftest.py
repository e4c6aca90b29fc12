"""A tokenizer, a processor and tiny random models of the real classes, made in memory: no test needs the hub."""

import pytest
import torch
from s3 import make_bucket, s3_server
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from extract.pocket.build import train_tokenizer
from extract.prompts import editing_template, ground_text


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests share their machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> Qwen2_5_VLProcessor:
    """The stock processor around a byte-level BPE tokenizer trained on the prompts."""
    texts = [editing_template(), ground_text("make the second red cube from the left blue, remove the ball")]
    tokenizer = train_tokenizer(texts * 5, 500)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template="",
    )


@pytest.fixture(scope="session")
def tiny_config(processor):
    """A function of (dtype-free) settings that makes a small Qwen2.5-VL configuration; vision has window attention."""

    def make(layers: int = 4, heads: int = 4, kv_heads: int = 2) -> Qwen2_5_VLConfig:
        tokenizer = processor.tokenizer
        return Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16 * heads,
                "intermediate_size": 96,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "bos_token_id": None,
                "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 16 * heads,
                "window_size": 112,
                "fullatt_block_indexes": [1, 3],
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A function that makes a small random model in float32 (weights large enough that attention is not flat)."""

    def make(attention: str = "sdpa", **settings) -> Qwen2_5_VLForConditionalGeneration:
        torch.manual_seed(0)
        config = tiny_config(**settings)
        config._attn_implementation = attention
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "lm_head" not in name:
                    weight.mul_(4)
        return model

    return make


@pytest.fixture
def scripted():
    """A function that makes a model say fixed token ids, one a step, and gives the list of rows of every step.

    Scripts are sorted, longest first: samples that have ended may leave the batch, and those left move up.
    """
    hooks = []

    def speak(model, scripts) -> list[int]:
        rows = []

        def say(module, args, logits):
            logits = torch.full_like(logits, -10.0)
            for row, script in zip(range(len(logits)), scripts, strict=False):
                logits[row, -1, script[min(len(rows), len(script) - 1)]] = 10.0
            rows.append(len(logits))
            return logits

        hooks.append(model.lm_head.register_forward_hook(say))
        return rows

    yield speak
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="session")
def s3_endpoint():
    """A real S3 server on loopback."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, monkeypatch) -> str:
    """URL of a place in a new bucket of it; the environment says how to get there."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return f"s3://{make_bucket(s3_endpoint)}/a/store"
