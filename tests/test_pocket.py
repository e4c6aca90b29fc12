"""The pocket model: the real class with a real tokenizer, small, shipped, and right about where things are."""

import json
from dataclasses import replace

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import box_iou
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import extract.pocket.train as training
import store
from extract.boxes import parse_box
from extract.config import POCKET, PRESETS
from extract.families import Frame
from extract.model import load_model, load_processor
from extract.pocket.build import SPECIAL_TOKENS, WEIGHTS, build_config
from extract.pocket.evaluate import ask, fresh_scenes, score, score_descriptions, wilson
from extract.pocket.lesson import Teacher, box_answer
from extract.pocket.train import TrainConfig, grouped_windows
from extract.prompts import editing_template, ground_text
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def processor():
    return load_processor(WEIGHTS)


@pytest.fixture(scope="module")
def model():
    return load_model(WEIGHTS, torch.device("cpu"))


@pytest.fixture(scope="module")
def lesson(processor):
    return Teacher(processor, 5, 2, 3, 2, 1.0, 0.1).lesson(0)


def test_it_is_the_real_class_with_twelve_blocks_windows_and_mrope(model):
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert len(model.model.language_model.layers) >= 12
    vision = model.config.vision_config
    assert set(range(vision.depth)) - set(vision.fullatt_block_indexes), "no window attention"
    assert sum(model.config.text_config.rope_parameters["mrope_section"]) == 16
    assert vision.patch_size * vision.spatial_merge_size == 28


def test_the_weights_are_small_and_safetensors():
    (weights,) = WEIGHTS.glob("*.safetensors")
    assert weights.stat().st_size <= 12 * MEGABYTE
    assert not [p for p in WEIGHTS.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_the_tokenizer_is_byte_level_bpe_with_qwens_special_tokens_and_single_digits(processor):
    tokenizer = processor.tokenizer
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert isinstance(AutoProcessor.from_pretrained(WEIGHTS), type(processor))
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1, token
    assert tokenizer.tokenize("1280") == ["1", "2", "8", "0"]
    for text in ("naïve Zürich 東京 🙂\n\t x", ground_text("Remove it."), box_answer([1, 20, 188, 200])):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_gives_the_editing_prompt(processor):
    system, _ = editing_template().split("<|im_end|>", 1)
    messages = [
        {"role": "system", "content": system.removeprefix("<|im_start|>system\n")},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Remove it."}]},
    ]
    made = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert made == editing_template().format("Remove it.")


def test_a_packed_branch_is_what_the_model_would_see_alone(model, processor, lesson):
    """Prefix and one branch cut out of a packed row give the same states as the row with all its branches."""
    model = model.float()
    core, batch, row = model.model, lesson.ground, 0
    with torch.no_grad():
        features = core.visual(lesson.pixels, grid_thw=lesson.grid).pooler_output.unflatten(0, (len(lesson.grid), -1))
        embeds = core.language_model.embed_tokens(batch.tokens)
        for i, own in enumerate(features[: len(embeds)]):
            embeds[i, batch.tokens[i] == model.config.image_token_id] = own

        def states(which, visible):
            given = {
                "inputs_embeds": embeds[row : row + 1, which],
                "position_ids": batch.positions[:, row : row + 1, which],
            }
            return core.language_model(**given, attention_mask=visible, use_cache=False).last_hidden_state[0]

        whole = states(torch.arange(embeds.shape[1]), batch.visible[row : row + 1])
        ends = batch.prompt_ends[batch.prompt_ends[:, 0] == row, 1]
        sees = batch.visible[row, 0, int(ends[1])]
        alone = states(sees.nonzero()[:, 0], None)
    assert not sees[int(ends[0])], "the second branch sees the first"
    assert torch.allclose(whole[sees], alone, atol=1e-4)
    model.bfloat16()


def test_positions_of_a_lesson_are_the_models_own(model, processor, lesson):
    tokens = lesson.ground.tokens[:1]
    ids = lesson.ground.prompt_ends[0, 1] + 1
    types = (tokens == model.config.image_token_id).long()
    own, _ = model.model.get_rope_index(tokens[:, :ids], types[:, :ids], lesson.grid[:1])
    assert torch.equal(own, lesson.ground.positions[:, :1, :ids])


def test_grouped_windows_are_the_stock_vision_tower(model, lesson):
    with torch.no_grad():
        stock = model.float().model.visual(lesson.pixels, grid_thw=lesson.grid).pooler_output
        with grouped_windows():
            grouped = model.model.visual(lesson.pixels, grid_thw=lesson.grid).pooler_output
    model.bfloat16()
    assert torch.allclose(stock, grouped, atol=1e-4)


def test_answers_are_boxes_of_the_resized_picture(processor, lesson):
    batch, tokenizer = lesson.ground, processor.tokenizer
    height, width = (int(v) * 14 for v in lesson.grid[0, 1:])
    for (row, column), truth in zip(batch.prompt_ends.tolist(), batch.branch_boxes, strict=True):
        said = tokenizer.decode(batch.tokens[row, column + 1 : column + 40]).split("<|im_end|>")[0]
        box = parse_box(said, Frame((width, height), (0, 0, 1, 1)), (1, 1))
        assert box_iou(torch.tensor([box]), truth[None]).item() > 0.8


def test_it_finds_the_object_on_fresh_hard_scenes(model, processor):
    """A smoke test of the shipped weights; `make test-slow` runs the thousand scenes."""
    held = fresh_scenes(48, 77, "hard")
    scores = score(ask(model, processor, held, 48, "pocket"), held)
    assert scores["no_box"] == 0
    assert scores["iou50"] >= 0.85


def test_it_describes_the_picture_and_the_change_under_the_editing_prompt(model, processor):
    scores = score_descriptions(model, processor, fresh_scenes(24, 78, "hard"), 24)
    # Word for word, place included: a guess has the region right one time in nine.
    assert scores["change"] >= 0.7
    assert scores["scene"] >= 0.7


def test_data_without_boxes_get_the_models_own_under_the_paper_presets_settings(tmp_path):
    """What the paper preset does to OmniEdit: no true boxes, shrunken pictures, prompt states only, any order."""
    write_scenes(ScenesConfig(tmp_path / "src", samples=24, seed=90))
    (shard,) = (tmp_path / "src").glob("*.parquet")
    (tmp_path / "data").mkdir()
    pq.write_table(pq.read_table(shard).drop_columns(["box", "objects"]), tmp_path / "data" / "train-00000.parquet")
    settings = {"data": str(tmp_path / "data"), "store": str(tmp_path / "s.zarr"), "limit": 24, "max_pixels": 30_000}
    assert extract(replace(PRESETS[POCKET], **settings, tokens="text", shuffle=True)) == 0
    samples = store.open(tmp_path / "s.zarr").samples.filter("valid")
    assert samples["n_image"].max() <= 30_000 // 28**2
    assert (samples["x1"] == samples["vlm_x1"]).all()
    truth = dict(pl.read_parquet(shard).select("omni_edit_id", "box").iter_rows())
    given = torch.tensor(samples.select("x1", "y1", "x2", "y2").to_numpy(), dtype=torch.float32)
    ious = box_iou(given, torch.tensor([truth[name] for name in samples["sample_id"]], dtype=torch.float32)).diagonal()
    assert len(samples) >= 22
    assert (ious >= 0.5).float().mean() >= 0.5  # smaller pictures than it was taught


def test_the_log_travels_with_the_weights():
    records = [json.loads(line) for line in (WEIGHTS / "log.jsonl").read_text().splitlines()]
    assert any("learning_rate" in record for record in records)
    assert records[-1]["step"] > 1000


def test_wilson_interval_against_a_known_value():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_training_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    settings = {"steps": 3, "pictures": 2, "branches": 2, "described": 1, "warmup": 1, "checkpoint_every": 1}
    monkeypatch.setattr(training, "build_processor", lambda: load_processor(WEIGHTS))
    monkeypatch.setattr(training, "teacher_forced_iou", lambda *_: [0.0])
    training.train(TrainConfig(tmp_path / "whole", **settings))
    real, saved = training.save_checkpoint, []

    def stop_after_two(folder, step, *rest):
        real(folder, step, *rest)
        saved.append(step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        training.train(TrainConfig(tmp_path / "stopped", **settings))
    monkeypatch.setattr(training, "save_checkpoint", real)
    training.train(TrainConfig(tmp_path / "stopped", **settings))
    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert saved == [1, 2]
    for name, weight in whole.items():
        assert torch.equal(weight, stopped[name]), name


@pytest.mark.slow
def test_the_bar_on_a_thousand_fresh_hard_scenes(model, processor):
    held = fresh_scenes(1000, 7_001, "hard")
    assert score(ask(model, processor, held, 50, "pocket"), held)["iou50"] >= 0.85


def test_the_shipped_config_is_the_scripts(model, processor):
    made = build_config(processor.tokenizer)
    for part in ("text_config", "vision_config"):
        mine, shipped = getattr(made, part).to_dict(), getattr(model.config, part).to_dict()
        for key in ("hidden_size", "intermediate_size", "rope_parameters"):
            assert mine[key] == shipped[key], key
