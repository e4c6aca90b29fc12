"""The pass at the shapes of the 7B model on a GPU: how near it comes to what the GPU can do, and what keeping costs.

Weights are random, made where they are used: speed does not depend on them, and nothing is downloaded.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import store
from bench.measure import Row, figure_row, missing_row
from extract.capture import layer_names, single_pass
from extract.moving import Mover

PART = "GPU, 7B shapes"
SIDES = {384: 16, 1024: 4}
"""Side of the picture in pixels -> samples of a pass."""
PROMPT = 96
"""Tokens of the prompt, system part and instruction together."""
ASKED = 24
"""Tokens of the instruction."""
MATRIX = 8192
"""Side of the matrices whose product is the ceiling."""


def config_7b() -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's configuration."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def measure(repeats: int) -> list[Row]:
    """The rows, or that they were not measured."""
    if not torch.cuda.is_available():
        names = [f"{side}² pictures, {what}" for side in SIDES for what in ("pass", "capture", "capture and writing")]
        return [missing_row(PART, name, "–", "not measured: no GPU") for name in (*names, "device to host")]
    device = torch.device("cuda")
    with device:
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config_7b(), dtype=torch.bfloat16).eval()
    rows = []
    for side, batch in SIDES.items():
        rows += of_pictures(model, side, batch, MATRIX, repeats)
    return [*rows, moving(device, 2**30, repeats)]


@torch.no_grad()
def of_pictures(model: torch.nn.Module, side: int, batch: int, matrix: int, repeats: int) -> list[Row]:
    """Rows of one size of pictures."""
    device, dtype = model.device, model.dtype
    inputs, asked, keep, counts = made_up(model.config, side, batch, device)
    core, layers = model.model, layer_names(model)
    kept = {"rows": "mean", "query_mask": asked, "keep": keep}
    square = torch.randn(matrix, matrix, device=device, dtype=dtype)
    mover = Mover(device)

    def write(done) -> None:
        block = writer.block(next(blocks)).__enter__()
        moved = mover.move({"hidden": done.hidden, "rows": done.rows.half()}, lambda free: free.get())
        arrays = moved.arrays()
        left = [batch]

        def release() -> None:
            left[0] -= 1
            if not left[0]:
                moved.release()

        n_image, n_text = counts
        tokens = pl.DataFrame({"position": range(n_image + n_text), "kind": ["image"] * n_image + ["text"] * n_text})
        for number, sample in enumerate(block.samples):
            own = arrays["hidden"][:, number * (n_image + n_text) : (number + 1) * (n_image + n_text)]
            rows = arrays["rows"][number]
            block.add(
                sample, image=own[:, :n_image], text=own[:, n_image:], tokens=tokens, done=release,
                text_to_image=rows[..., :n_image], text_to_text=rows[..., n_image : n_image + n_text],
            )  # fmt: skip
        block.__exit__(None, None, None)

    with TemporaryDirectory() as folder:
        plan = plan_of(layers, model.config.text_config.hidden_size, batch, counts, 2 * repeats + 2)
        store.create(Path(folder) / "gpu.zarr", plan)
        with store.Writer(Path(folder) / "gpu.zarr") as writer:
            blocks = iter(writer.blocks())
            bare = timed(lambda: core(**inputs, use_cache=False), repeats, device)
            captured = timed(lambda: single_pass(model, inputs, layers, **kept), repeats, device)
            written = timed(lambda: write(single_pass(model, inputs, layers, **kept)), repeats, device)
        product = timed(lambda: square @ square, repeats, device)
    ceiling = 2 * matrix**3 / product
    work = 2 * sum(p.numel() for p in core.language_model.layers.parameters()) * inputs["input_ids"].numel()
    work += 2 * sum(p.numel() for p in core.visual.blocks.parameters()) * len(inputs["pixel_values"])
    named = f"{side}² pictures"
    product_of = f"product of {matrix}² bf16"

    def kept_row(what: str, seconds: float) -> Row:
        return figure_row(PART, f"{named}, {what}", seconds * 1e3, "ms", "bare forward", bare * 1e3, "less", goal=1.05)

    return [
        figure_row(PART, f"{named}, pass, samples/s", batch / bare, "", "one sample", 1.0, "more"),
        figure_row(PART, f"{named}, its products", work / bare / 1e12, "TFLOP/s", product_of, ceiling / 1e12, "more"),
        kept_row("states and rows kept", captured),
        kept_row("kept and written", written),
    ]


def moving(device: torch.device, size: int, repeats: int) -> Row:
    """Device to host through page-locked memory."""
    tensor, mover = torch.empty(size, dtype=torch.uint8, device=device), Mover(device)

    def move() -> None:
        moved = mover.move({"bytes": tensor}, lambda free: free.get())
        moved.arrays()
        moved.release()

    move()
    pageable = timed(lambda: tensor.cpu(), repeats, device)
    return figure_row(
        PART, "device to host, page-locked", size / timed(move, repeats, device) / 1e9, "GB/s", "pageable",
        size / pageable / 1e9, "more",
    )  # fmt: skip


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of a call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def made_up(
    config: Qwen2_5_VLConfig, side: int, batch: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Inputs of square noise and random words: inputs, the instruction's mask, what is kept, and counts a sample."""
    vision = config.vision_config
    grid = round(side / vision.patch_size / vision.spatial_merge_size) * vision.spatial_merge_size
    n_image = (grid // vision.spatial_merge_size) ** 2
    ids = torch.randint(0, 1000, (batch, n_image + PROMPT))
    ids[:, :n_image] = config.image_token_id
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, -ASKED:] = True
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand(3, batch, -1),
        "pixel_values": torch.randn(batch * grid * grid, patch),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * batch),
    }
    keep = torch.arange(ids.numel())
    return {n: t.to(device) for n, t in inputs.items()}, asked.to(device), keep.to(device), (n_image, PROMPT)


def plan_of(layers: list[str], width: int, batch: int, counts: tuple[int, int], blocks: int) -> store.Plan:
    """A store of so many blocks, each a batch."""
    n = batch * blocks
    samples = pl.DataFrame(
        {"sample_id": [str(i) for i in range(n)], "split": ["train"] * n, "n_image": [counts[0]] * n}
        | {"n_text": [counts[1]] * n, "n_query": [ASKED] * n}
    )
    return store.Plan(
        layers=tuple(layers), width=width, samples=samples, identity={}, attention=("text_to_image", "text_to_text"),
        attention_layers=tuple(layers[1:-1]), samples_per_block=batch,
    )  # fmt: skip
