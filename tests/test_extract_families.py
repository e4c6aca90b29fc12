"""Every family's adapter against its stock classes: states, rows, sequence, what each token stands for, boxes."""

import json
import multiprocessing

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_families import INSTRUCTIONS, config_of, model_of, processor_of, texts, train_sentencepiece
from transformers import LlamaConfig, LlavaImageProcessor, LlavaProcessor, Qwen2_5_VLConfig

from extract.boxes import generate_boxes, parse_box
from extract.capture import embed, layer_names, single_pass
from extract.config import ExtractConfig
from extract.families import FAMILIES, family_of
from extract.model import find_checkpoint, identity, load_model, load_processor
from extract.omniedit import EMPTY_PROMPT, BadSample
from extract.prompts import editing_template, native_template
from extract.sequence import Conditioner, conditioner_for
from store.errors import Refusal

NAMES = list(FAMILIES)
SAMPLES = [
    (Image.effect_noise((250, 130), 80).convert("RGB"), INSTRUCTIONS[0]),
    (Image.effect_noise((90, 200), 80).convert("RGB"), INSTRUCTIONS[1]),
    (Image.effect_noise((130, 130), 80).convert("RGB"), "swap the  {two}\ncats; réplace 球!"),
]
families = pytest.mark.parametrize("name", NAMES)


def conditioner_of(name, purpose="native", processor=None):
    family = FAMILIES[name]
    return conditioner_for(processor or processor_of(name), config_of(name), purpose, family.own_positions)


def padded_llava():
    """LLaVA's own processor as its authors set it: the picture padded to a square."""
    image = LlavaImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}, do_pad=True)
    tokenizer = processor_of("llava").tokenizer
    return LlavaProcessor(image, tokenizer, 14, "default", chat_template="", num_additional_image_tokens=1)


@families
@pytest.mark.parametrize("purpose", ["native", "ground"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_inputs_equal_the_stock_processors(name, purpose, side):
    conditioner = conditioner_of(name, purpose)
    batch = conditioner.batch(SAMPLES, padding_side=side)
    # InternVL's processor puts the marks around an image itself.
    template = conditioner.template.replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>")
    asked = [template.replace("{}", instruction) if purpose == "native" else None for _, instruction in SAMPLES]
    if purpose == "ground":
        before, after = template.rsplit("{}", 1)
        asked = [before + instruction + after for _, instruction in SAMPLES]
    pictures = [picture for picture, _ in SAMPLES]
    stock = processor_of(name)(text=asked, images=pictures, padding=True, padding_side=side, return_tensors="pt")
    assert set(batch.inputs) == {*stock, "position_ids"}
    for key, tensor in stock.items():
        assert batch.inputs[key].equal(tensor.to(batch.inputs[key].dtype)), key


@families
@pytest.mark.parametrize("rows", [None, "mean"])
def test_states_equal_the_stock_class_bit_for_bit(name, rows):
    model = model_of(name)
    batch = conditioner_of(name).batch(SAMPLES)
    names = layer_names(model)
    assert names == ["embed", "0", "1", "2", "3", "final"]
    before_norm = []
    hook = model.model.language_model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad():
        # Positions are not handed on: these are the ones that the model itself would choose.
        inputs = {key: tensor for key, tensor in batch.inputs.items() if key != "position_ids"}
        expected = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    real = batch.inputs["attention_mask"].bool()
    hidden = dict(zip(names, single_pass(model, batch.inputs, names, rows, batch.query_mask).hidden, strict=True))
    for index, layer in enumerate(["embed", "0", "1", "2"]):
        assert hidden[layer][real].equal(expected[index][real]), layer
    assert hidden["3"][real].equal(before_norm[0][real])
    assert hidden["final"][real].equal(expected[4][real])


@families
def test_rows_equal_eager_attention(name):
    batch = conditioner_of(name).batch(SAMPLES)
    with torch.no_grad():
        eager = model_of(name, "eager")(**batch.inputs, use_cache=False, output_attentions=True).attentions
    rows = single_pass(model_of(name), batch.inputs, ["0", "1", "2", "3"], "heads", batch.query_mask).rows
    for layer, attention in enumerate(eager):
        for number, asked in enumerate(batch.query_mask):
            expected = attention[number][:, asked]
            torch.testing.assert_close(rows[number, layer, :, : asked.sum()], expected, rtol=0, atol=1e-6)


@families
def test_a_padded_batch_gives_what_each_sample_gives_alone(name):
    model, conditioner = model_of(name), conditioner_of(name)
    layers = layer_names(model)
    batch = conditioner.batch(SAMPLES)
    together = single_pass(model, batch.inputs, layers).hidden
    assert not batch.inputs["attention_mask"].all()
    for number, sample in enumerate(SAMPLES):
        alone = single_pass(model, conditioner.batch([sample]).inputs, layers).hidden[:, 0]
        torch.testing.assert_close(together[:, number, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


def test_deepstack_features_join_after_the_state_that_is_kept():
    model, batch = model_of("qwen3_vl"), conditioner_of("qwen3_vl").batch(SAMPLES)
    entered = []
    hook = model.model.language_model.layers[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    left = single_pass(model, batch.inputs, ["0", "1"]).hidden[0]
    hook.remove()
    with torch.no_grad():
        _, further = embed(model, batch.inputs)
    added = left.clone()
    added[batch.image_mask] += further["deepstack_visual_embeds"][0]
    assert entered[0].equal(added) and not entered[0].equal(left)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_own_positions_are_the_models(name):
    inputs = conditioner_of(name).batch(SAMPLES).inputs
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, _ = model_of(name).model.get_rope_index(**{key: inputs[key] for key in names})
    real = inputs["attention_mask"].bool()
    assert inputs["position_ids"][:, real].equal(expected[:, real])


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_three_axes_are_refused_where_there_is_one(name):
    with pytest.raises(Refusal, match="give --positions sequential"):
        conditioner_for(processor_of(name), config_of(name), "native", "mrope")


@families
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_the_sequence_and_of_the_stock_processor(name, data):
    width, height = (data.draw(st.integers(14, 600)) for _ in range(2))
    instruction = data.draw(
        st.text(st.characters(codec="utf-8", exclude_characters="<\0"), min_size=1, max_size=30).filter(str.strip)
    )
    conditioner = conditioner_of(name)
    counts = conditioner.count_tokens(width, height, instruction)
    one = conditioner.prepare(Image.new("RGB", (width, height)), instruction)
    assert counts == tuple(int(mask.sum()) for mask in (one.image, one.text, one.query))
    (stock,) = processor_of(name)._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
    assert counts.n_image == stock - 2 * (name == "internvl")  # its count holds the marks around the image
    assert int(one.image.sum()) == int((one.ids == conditioner.image_token_id).sum())
    words = one.tokens["word"].drop_nulls().unique().sort().to_list()
    assert set(words) <= set(range(len(instruction.split())))
    assert len(one.tokens) == counts.n_image + counts.n_text


@families
@given(
    instruction=st.text(st.characters(codec="utf-8", exclude_characters="<\0"), min_size=1, max_size=30).filter(
        lambda text: text.strip() and text == text.strip()
    )
)
@settings(max_examples=30, deadline=None)
def test_the_query_tokens_spell_the_instruction_and_nothing_else(name, instruction):
    conditioner = conditioner_of(name)
    try:
        encoded = conditioner.encode(instruction)
    except BadSample as bad:
        # All of it may be in a token that begins in the template, or be unknown to a tokenizer as small as these.
        assert bad.reason == EMPTY_PROMPT
        return
    pieces = encoded.ids[encoded.query].tolist()
    said = conditioner.tokenizer.decode(pieces)
    plain = conditioner.tokenizer.decode(conditioner.tokenizer(instruction, add_special_tokens=False)["input_ids"])
    # Where no special token stands between them, the first character may be in a token that begins in the template.
    assert said.strip() == plain.strip() or (name == "llava" and plain.strip().endswith(said.strip()))


@families
def test_the_user_turn_is_what_is_kept(name):
    conditioner = conditioner_of(name)
    one = conditioner.prepare(*SAMPLES[0])
    kept = one.image | one.text
    assert kept[conditioner.drop :].all() and not kept[: conditioner.drop].any()
    decode = conditioner.tokenizer.decode
    assert decode(one.ids[kept]).lstrip().startswith(conditioner.family.turn.strip())
    assert conditioner.family.turn.strip() not in decode(one.ids[: conditioner.drop])


@families
def test_an_instruction_cannot_bring_special_tokens(name):
    conditioner = conditioner_of(name)
    for text in (f"a {conditioner.family.placeholder} b", conditioner.tokenizer.eos_token):
        with pytest.raises(BadSample, match="prompt contains special tokens"):
            conditioner.count_tokens(100, 100, text)


def test_a_token_that_begins_in_the_template_is_the_templates():
    """SentencePiece has one token for the blank before an instruction and its first word."""
    processor = LlavaProcessor(
        processor_of("llava").image_processor,
        train_sentencepiece([*texts("llava"), *["say red cube"] * 200], 700),
        14,
        "default",
        chat_template="",
        num_additional_image_tokens=1,
    )
    conditioner = Conditioner(processor, "It USER: <image> {} ASSISTANT:", "sequential", config_of("llava"))
    encoded = conditioner.encode("red cube")
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded.ids)
    shared = tokens.index("▁red")
    assert not encoded.query[shared]
    assert processor.tokenizer.decode(encoded.ids[encoded.query]).strip() == "cube"


def paint(size, box):
    """A grey picture with noise, and the same one with the middle of a box white."""
    rng = np.random.default_rng(0)
    picture = rng.integers(100, 130, (size[1], size[0], 3), dtype=np.uint8)
    other = picture.copy()
    x1, y1, x2, y2 = box
    across, down = (x2 - x1) / 5, (y2 - y1) / 5
    other[round(y1 + down) : round(y2 - down), round(x1 + across) : round(x2 - across)] = 255
    return Image.fromarray(picture), Image.fromarray(other)


@pytest.mark.parametrize("name", [*NAMES, "padded llava"])
@pytest.mark.parametrize("size", [(300, 200), (200, 410), (333, 333)])
def test_a_change_within_a_tokens_pixel_box_is_seen_most_by_that_token(name, size):
    kind = name.removeprefix("padded ")
    conditioner = conditioner_of(kind, processor=padded_llava() if name != kind else None)
    torch.manual_seed(0)
    model = FAMILIES[kind].model_class(config_of(kind)).eval()
    tokens = conditioner.prepare(Image.new("RGB", size), "go").tokens.filter(kind="image")
    placed = tokens.filter(pl.col("px1").is_not_null())
    assert placed.filter(pl.col("row").is_null())["slot"].to_list() == (
        list(range(len(tokens) - 16, len(tokens))) if kind == "internvl" and len(tokens) > 16 else []
    )
    in_grid = torch.from_numpy(tokens["row"].is_not_null().to_numpy())
    for token in placed.filter(pl.col("row").is_not_null()).sample(12, seed=1).iter_rows(named=True):
        batch = conditioner.batch(
            [(one, "go") for one in paint(size, [token[f"p{e}"] for e in ("x1", "y1", "x2", "y2")])]
        )
        with torch.no_grad():
            states, _ = embed(model, batch.inputs)
        plain, changed = states[batch.image_mask].view(2, len(tokens), -1)
        moved = (changed - plain).norm(dim=-1)
        assert int(moved.masked_fill(~in_grid, 0).argmax()) == token["slot"]
        if not in_grid.all():  # and by the thumbnail's token over it
            over = tokens.row(int(moved.masked_fill(in_grid, 0).argmax()), named=True)
            middle = (token["px1"] + token["px2"]) / 2, (token["py1"] + token["py2"]) / 2
            assert over["px1"] <= middle[0] <= over["px2"] and over["py1"] <= middle[1] <= over["py2"]
    rows, cols = tokens["row"].max() + 1, tokens["col"].max() + 1
    assert tokens["row"].count() == rows * cols == len(tokens.select("row", "col").drop_nulls().unique())
    ordered = placed.filter(pl.col("row").is_not_null()).sort("row", "col")
    assert ordered.sort("py1", "px1")["slot"].equals(ordered["slot"])


def test_tokens_of_padding_have_no_pixel_box_and_those_of_a_crop_stay_inside_it():
    shown = conditioner_of("llava", processor=padded_llava()).prepare(Image.new("RGB", (300, 100)), "go")
    image = shown.tokens.filter(kind="image")
    assert image["px1"].null_count() == 24  # two of three rows of the square lie beside the picture
    assert image.filter(pl.col("px1").is_null())["row"].unique().sort().to_list() == [0, 1, 4, 5]
    crop = conditioner_of("llava").prepare(Image.new("RGB", (300, 100)), "go").tokens.filter(kind="image")
    assert crop["px1"].min() == pytest.approx(100, abs=1) and crop["px2"].max() == pytest.approx(200, abs=1)
    assert (crop["py1"].min(), crop["py2"].max()) == (0, 100)


def spoken(name, size, box):
    """The numbers in which a family says a box, written down by its authors' rule."""
    width, height = size
    x1, y1, x2, y2 = box
    if name == "qwen2_5_vl":
        rows, cols = processor_of(name).image_processor(images=[Image.new("RGB", size)])["image_grid_thw"][0][1:]
        wide, high = int(cols) * 14, int(rows) * 14
    else:
        wide, high = (1000, 1000) if name in ("qwen3_vl", "internvl") else (1, 1)
    if name == "llava":  # the centre crop
        side = min(size)
        x1, x2 = (x - (width - side) / 2 for x in (x1, x2))
        y1, y2 = (y - (height - side) / 2 for y in (y1, y2))
        width = height = side
    if name == "padded llava":
        side = max(size)
        x1, x2 = (x + (side - width) // 2 for x in (x1, x2))
        y1, y2 = (y + (side - height) // 2 for y in (y1, y2))
        width = height = side
    return x1 / width * wide, y1 / height * high, x2 / width * wide, y2 / height * high


@pytest.mark.parametrize("name", [*NAMES, "padded llava"])
@given(size=st.tuples(*[st.integers(60, 900)] * 2), corners=st.tuples(*[st.floats(0.4, 0.6)] * 4))
@settings(max_examples=25, deadline=None)
def test_boxes_come_back_from_the_familys_numbers(name, size, corners):
    kind = name.removeprefix("padded ")
    conditioner = conditioner_of(kind, "ground", padded_llava() if name != kind else None)
    middle, side = np.array(size) / 2, min(size)
    x1, x2 = sorted(middle[0] + (corner - 0.5) * side for corner in corners[:2])
    y1, y2 = sorted(middle[1] + (corner - 0.5) * side for corner in corners[2:])
    said = ", ".join(f"{number:.6f}" for number in spoken(name, size, (x1, y1, x2, y2)))
    box = parse_box(f'{{"bbox_2d": [{said}]}}', conditioner.frame(*size), size)
    # A crop is cut at whole pixels of the resized picture.
    assert box == pytest.approx((x1, y1, x2, y2), abs=max(size) / 84 if name == "llava" else 1e-2)


@families
def test_a_batch_says_what_each_sample_says_alone(name):
    model, conditioner = model_of(name), conditioner_of(name, "ground")
    together = generate_boxes(model, conditioner, SAMPLES, max_new_tokens=6)
    alone = [generate_boxes(model, conditioner, [sample], max_new_tokens=6)[0] for sample in SAMPLES]
    assert together == alone
    assert any(answer.text for answer in together)


def test_samples_of_every_family_are_prepared_by_another_process_as_here():
    conditioners = [conditioner_of(name) for name in NAMES]
    here = [one.prepare(*SAMPLES[2], "a") for one in conditioners]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        waiting = [pool.apply_async(one.prepare, (*SAMPLES[2], "a")) for one in conditioners]
        there = [one.get() for one in waiting]
    for one, other in zip(here, there, strict=True):
        assert one.tokens.equals(other.tokens)
        assert one.positions.equal(other.positions) and one.ids.equal(other.ids)
        assert all(tensor.equal(other.pixels[key]) for key, tensor in one.pixels.items())


def test_qwens_native_prompt_is_the_editors_own():
    assert native_template(FAMILIES["qwen2_5_vl"]) == editing_template()


@families
def test_a_checkpoint_is_found_loaded_and_named(name, tmp_path):
    model_of(name).to(torch.bfloat16).save_pretrained(tmp_path)
    processor_of(name).save_pretrained(tmp_path)
    assert find_checkpoint(str(tmp_path)) == tmp_path
    processor, model = load_processor(tmp_path), load_model(tmp_path, torch.device("cpu"))
    assert isinstance(processor, FAMILIES[name].processor_class) and model.dtype == torch.bfloat16
    conditioner = conditioner_for(processor, model.config, "native", FAMILIES[name].own_positions)
    for key, tensor in conditioner_of(name).batch(SAMPLES).inputs.items():
        assert conditioner.batch(SAMPLES).inputs[key].equal(tensor), key
    named = identity(tmp_path, conditioner, ExtractConfig(), torch.device("cpu"))
    assert json.loads(json.dumps(named)) == named
    assert set(named["processor"]) == set(FAMILIES[name].settings)


def test_a_model_of_no_known_family_is_refused_with_those_that_are(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    for refused in (lambda: find_checkpoint(str(tmp_path)), lambda: family_of(LlamaConfig())):
        with pytest.raises(Refusal, match=r"'llama'.*qwen2_5_vl, qwen3_vl, llava, internvl"):
            refused()


@pytest.mark.parametrize(
    ("name", "area"), [("qwen2_5_vl", 28 * 28 * 12), ("qwen3_vl", 32 * 32 * 12), ("internvl", 25088)]
)
def test_pictures_are_shrunk_to_the_largest_area(name, area, tmp_path):
    model_of(name).config.save_pretrained(tmp_path)
    processor_of(name).save_pretrained(tmp_path)
    own, shrunk = load_processor(tmp_path), load_processor(tmp_path, area)
    family, config = FAMILIES[name], config_of(name)
    pictures = [(Image.effect_noise(size, 80).convert("RGB"), "go") for size in ((640, 480), (200, 800))]

    def area_of(inputs):
        if name != "internvl":
            patch = own.image_processor.patch_size
            return (inputs["image_grid_thw"].prod(1) * patch**2).tolist()
        return [(len(inputs["pixel_values"]) - 1) * 112**2]  # without the thumbnail

    for picture in pictures:
        before, after = (
            conditioner_for(one, config, "native", family.own_positions).batch([picture]) for one in (own, shrunk)
        )
        assert area_of(after.inputs)[0] <= area < area_of(before.inputs)[0]
        with torch.no_grad():
            embed(model_of(name), after.inputs)  # as many features as placeholders


def test_areas_that_a_family_cannot_keep_are_refused(tmp_path):
    for name, area, says in (("llava", 10**6, "square of one size"), ("internvl", 100, "needs 12544 or more")):
        config_of(name).save_pretrained(tmp_path / name)
        processor_of(name).save_pretrained(tmp_path / name)
        with pytest.raises(Refusal, match=says):
            load_processor(tmp_path / name, area)


# Published sizes: blocks, width, heads, key heads, MLP width, vision MLP width, tied embeddings, parameters.
SIZES = {
    "3B": (36, 2048, 16, 2, 11008, 3420, True, 3.75e9),
    "7B": (28, 3584, 28, 4, 18944, 3420, False, 8.29e9),
    "32B": (64, 5120, 40, 8, 27648, 3456, False, 33.5e9),
    "72B": (80, 8192, 64, 8, 29568, 3456, False, 73.4e9),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_qwen25_is_read_by_the_same_code(size):
    blocks, width, heads, key_heads, inner, vision_inner, tied, parameters = SIZES[size]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064 if size != "3B" else 151936,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_inner,
            "num_heads": 16,
            "out_hidden_size": width,
        },
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = family_of(config).model_class(config)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert layer_names(model) == ["embed", *map(str, range(blocks)), "final"]
