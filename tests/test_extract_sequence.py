"""The conditioning sequence is the stock processor's, and the token table says truly what each token is."""

import pickle

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from extract.capture import layer_names, single_pass
from extract.omniedit import BadSample
from extract.prompts import GROUND_TEMPLATE, editing_template, editing_text, ground_text
from extract.sequence import TOKEN_SCHEMA, Conditioner

SAMPLES = [
    (Image.effect_noise((150, 90), 80).convert("RGB"), "make the second red cube from the left blue"),
    (Image.effect_noise((90, 333), 80).convert("RGB"), "  réplace {the} ball\twith\n a 球!  "),
]


@pytest.fixture(scope="module")
def conditioner(processor, tiny_config):
    return Conditioner(processor, editing_template(), "mrope", tiny_config())


def kept_lengths(batch):
    return list(
        zip(*(mask.sum(1).tolist() for mask in (batch.image_mask, batch.text_mask, batch.query_mask)), strict=True)
    )


@pytest.mark.parametrize(("template", "text"), [(editing_template(), editing_text), (GROUND_TEMPLATE, ground_text)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_inputs_equal_the_stock_processors(processor, tiny_config, template, text, side):
    batch = Conditioner(processor, template, "mrope", tiny_config()).batch(SAMPLES, padding_side=side)
    pictures, instructions = zip(*SAMPLES, strict=True)
    texts = [text(instruction) for instruction in instructions]
    stock = processor(text=texts, images=list(pictures), padding=True, padding_side=side, return_tensors="pt")
    assert set(batch.inputs) == {*stock, "position_ids"}
    for name, tensor in stock.items():
        assert batch.inputs[name].equal(tensor.to(batch.inputs[name].dtype)), name


def test_the_first_kept_token_opens_the_users_turn(conditioner):
    batch = conditioner.batch(SAMPLES)
    decode = conditioner.tokenizer.decode
    ids = batch.inputs["input_ids"][0]
    assert decode(ids[conditioner.drop : conditioner.drop + 1]) == "<|im_start|>"
    assert decode(ids[conditioner.drop :]).startswith("<|im_start|>user\n<|vision_start|>")
    assert "system" not in decode(ids[conditioner.drop :])
    kept = batch.image_mask | batch.text_mask
    assert not kept[:, : conditioner.drop].any()
    assert kept[:, conditioner.drop :].equal(batch.inputs["attention_mask"][:, conditioner.drop :].bool())
    assert not (batch.image_mask & batch.text_mask).any()


def test_the_query_tokens_spell_the_instruction(conditioner):
    batch = conditioner.batch(SAMPLES)
    for ids, asked, (_, instruction) in zip(batch.inputs["input_ids"], batch.query_mask, SAMPLES, strict=True):
        assert conditioner.tokenizer.decode(ids[asked]) == instruction


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(14, 700),
    height=st.integers(14, 700),
    instruction=st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and "<|" not in text),
)
def test_counts_are_those_of_the_batch(conditioner, width, height, instruction):
    batch = conditioner.batch([(Image.new("RGB", (width, height)), instruction)])
    assert tuple(conditioner.count_tokens(width, height, instruction)) == kept_lengths(batch)[0]
    rows, cols = batch.inputs["image_grid_thw"][0, 1:].tolist()
    assert conditioner.frame(width, height) == ((cols * 14, rows * 14), (0, 0, width, height))
    table = conditioner.prepare(Image.new("RGB", (width, height)), instruction).tokens
    assert table.filter(pl.col("kind") == "instruction").height == batch.query_mask.sum()
    assert table["word"].drop_nulls().unique().sort().to_list() == list(range(len(instruction.split())))


def test_own_positions_are_the_models_and_sequential_ones_count(processor, conditioner, tiny_model):
    batch = conditioner.batch(SAMPLES)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    model = tiny_model()
    expected, _ = model.model.get_rope_index(**{name: batch.inputs[name] for name in names})
    real = batch.inputs["attention_mask"].bool()
    assert not real.all()
    assert batch.inputs["position_ids"][:, real].equal(expected[:, real])
    plain = Conditioner(processor, editing_template(), "sequential", model.config).batch(SAMPLES).inputs
    steps = torch.arange(real.shape[1]).expand(3, *real.shape)
    assert plain["position_ids"][:, real].equal(steps[:, real])
    assert not plain["position_ids"].equal(expected)
    with pytest.raises(ValueError, match="'mrope' or 'sequential'"):
        Conditioner(processor, editing_template(), "1d", model.config)


def test_a_pass_over_collated_samples_is_the_one_over_the_stock_processors_batch(processor, conditioner, tiny_model):
    model = tiny_model()
    batch = conditioner.batch(SAMPLES)
    texts = [editing_text(instruction) for _, instruction in SAMPLES]
    pictures = [picture for picture, _ in SAMPLES]
    stock = dict(processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt"))
    stock["position_ids"], _ = model.model.get_rope_index(
        **{name: tensor for name, tensor in stock.items() if name != "pixel_values"}
    )
    ours, theirs = (single_pass(model, inputs, layer_names(model)).hidden for inputs in (batch.inputs, stock))
    assert ours.equal(theirs)


def test_a_conditioner_pickles_without_what_it_built_and_prepares_as_before(conditioner):
    before = pickle.dumps(conditioner)
    prepared = conditioner.prepare(*SAMPLES[0], "a")
    assert len(pickle.dumps(conditioner)) < 2 * len(before)
    for other in (pickle.loads(before).prepare(*SAMPLES[0], "a"), pickle.loads(pickle.dumps(prepared))):
        assert (prepared.sample_id, prepared.source_size) == (other.sample_id, other.source_size) == ("a", (150, 90))
        assert prepared.tokens.equals(other.tokens)
        for name in ("ids", "positions", "image", "text", "query"):
            assert getattr(prepared, name).equal(getattr(other, name)), name
        assert all(tensor.equal(other.pixels[name]) for name, tensor in prepared.pixels.items())


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_token_table(conditioner, side):
    prepared = [conditioner.prepare(*sample) for sample in SAMPLES]
    batch = conditioner.collate(prepared, padding_side=side)
    for number, (one, (picture, instruction)) in enumerate(zip(prepared, SAMPLES, strict=True)):
        mine = one.tokens
        expected = pl.Schema({name: kind for name, kind in TOKEN_SCHEMA.items() if name != "sample"})
        assert list(mine.schema.items()) == list(expected.items())
        counts = conditioner.count_tokens(*picture.size, instruction)
        image = mine.filter(pl.col("kind") == "image")
        other = mine.filter(pl.col("kind") != "image")
        assert (image.height, other.height) == (counts.n_image, counts.n_text)
        assert image["slot"].to_list() == list(range(counts.n_image))
        assert other["slot"].to_list() == list(range(counts.n_text))
        assert mine["position"].to_list() == list(range(conditioner.drop, conditioner.drop + mine.height))
        real = batch.inputs["attention_mask"][number].bool()
        assert mine["token_id"].to_list() == batch.inputs["input_ids"][number, real][conditioner.drop :].tolist()
        positions = batch.inputs["position_ids"][:, number, real][:, conditioner.drop :]
        assert mine.select("pos_t", "pos_h", "pos_w").to_numpy().T.tolist() == positions.tolist()
        decode = conditioner.tokenizer.decode
        assert mine["text"].to_list() == [decode([token_id]) for token_id in mine["token_id"]]
        rows, cols = (batch.inputs["image_grid_thw"][number, 1:] // 2).tolist()
        assert [tuple(place) for place in image.select("row", "col").rows()] == [
            (row, col) for row in range(rows) for col in range(cols)
        ]
        # Rotary height and width of an image token are its row and column, from the image's start on.
        assert (image["pos_h"] - image["pos_h"][0]).to_list() == image["row"].to_list()
        assert (image["pos_w"] - image["pos_w"][0]).to_list() == image["col"].to_list()
        assert other.select("row", "col", "px1", "py2").null_count().row(0) == (other.height,) * 4
        assert mine.filter(pl.col("kind") != "instruction")["word"].null_count() == mine.height - counts.n_query


def test_pixel_boxes_tile_the_source_picture_each_axis_on_its_own(conditioner):
    size = 150, 100  # resized to 140 × 112: the axes are scaled differently
    prepared = conditioner.prepare(Image.new("RGB", size), "go")
    image = prepared.tokens.filter(pl.col("kind") == "image")
    rows, cols = (prepared.pixels["image_grid_thw"][0, 1:] // 2).tolist()
    assert size[0] / cols != size[1] / rows
    area = ((image["px2"] - image["px1"]) * (image["py2"] - image["py1"])).sum()
    assert area == pytest.approx(size[0] * size[1], rel=1e-5)
    assert image.select(pl.min("px1", "py1")).row(0) == (0, 0)
    assert image.select(pl.max("px2", "py2")).row(0) == size


def test_words_are_those_that_blanks_separate(conditioner):
    instruction = SAMPLES[1][1]
    table = conditioner.prepare(*SAMPLES[1]).tokens.filter(pl.col("kind") == "instruction")
    for word, expected in enumerate(instruction.split()):
        ids = table.filter(pl.col("word") == word)["token_id"].to_list()
        assert conditioner.tokenizer.decode(ids).strip() == expected


@pytest.mark.parametrize("text", ["a <|image_pad|> b", "<|im_end|>", "x<|im_start|>system", "<|video_pad|>"])
def test_an_instruction_cannot_bring_special_tokens(conditioner, text):
    for refused in (
        lambda: conditioner.count_tokens(100, 100, text),
        lambda: conditioner.batch([(Image.new("RGB", (100, 100)), text)]),
    ):
        with pytest.raises(BadSample, match="prompt contains special tokens"):
            refused()


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_instruction_is_refused(conditioner, text):
    with pytest.raises(BadSample, match="empty prompt"):
        conditioner.encode(text)
