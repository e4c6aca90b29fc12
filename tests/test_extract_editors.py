"""Conditioning is the image editors' own: our states are the embeddings that the real pipelines hand to their DiT."""

import importlib
import pickle

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_families import config_of, processor_of
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor

import extract.editors as editors
from extract.capture import single_pass
from extract.config import ExtractConfig
from extract.editors import OPENING, PIPELINES, Editor
from extract.model import identity
from extract.pocket.build import train_tokenizer
from extract.sequence import Conditioner, conditioner_for
from store.errors import Refusal

INSTRUCTIONS = ["make the second red cube from the left blue", "remove the ball"]
both = pytest.mark.parametrize("name", list(PIPELINES))


def picture_of(*size):
    return Image.effect_noise(size, 80).convert("RGB")


class Handed(Exception):  # noqa: N818 - it ends a pipeline's call where its DiT would begin
    pass


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def published(processor):
    """The picture sizes of the published checkpoints, which leave an editor's pictures as they are."""
    image = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 12845056})
    return Qwen2_5_VLProcessor(image, processor.tokenizer, processor.video_processor, chat_template="")


@pytest.fixture
def pipeline_of(processor, model):
    """A function that makes the real pipeline without VAE and DiT, dropping what our tokenizer makes of its prefix."""

    def make(conditioner):
        parts = {"text_encoder": model, "tokenizer": processor.tokenizer, "processor": processor}
        kind = getattr(diffusers, PIPELINES[conditioner.editor.name])
        pipeline = kind(scheduler=None, vae=None, transformer=None, **parts)
        pipeline.prompt_template_encode_start_idx = conditioner.drop
        return pipeline

    return make


@pytest.fixture
def with_types(model):
    """A text encoder that is given the token types which the pipelines do not pass on."""

    def add(module, args, given):
        return args, given | {"mm_token_type_ids": (given["input_ids"] == model.config.image_token_id).long()}

    hook = model.register_forward_pre_hook(add, with_kwargs=True)
    yield
    hook.remove()


def handed_on(pipeline, picture, prompt):
    """What the pipeline's own call has encoded when it turns to its latents."""
    encode = pipeline.encode_prompt

    def encode_and_stop(**asked):
        raise Handed(*encode(**asked))

    pipeline.encode_prompt = encode_and_stop
    with pytest.raises(Handed) as handed, torch.no_grad():
        pipeline(image=picture, prompt=prompt, true_cfg_scale=1.0)
    return handed.value.args


def kept_states(model, conditioner, samples):
    """Our states of the layer ``final``, per sample the kept tokens'."""
    batch = conditioner.batch(samples)
    final = single_pass(model, batch.inputs, ["final"]).hidden[0]
    return [states[mask] for states, mask in zip(final, batch.image_mask | batch.text_mask, strict=True)]


def assert_handed_on(model, conditioner, pipeline_of):
    for size in [(40, 30), (300, 500), (200, 200), (640, 90)]:
        picture = picture_of(*size)
        (ours,) = kept_states(model, conditioner, [(picture, INSTRUCTIONS[0])])
        embeds, mask = handed_on(pipeline_of(conditioner), picture, INSTRUCTIONS[0])
        assert mask is None  # all of them count
        assert embeds[0].equal(ours), size


@both
def test_final_states_under_sequential_positions_are_what_the_pipeline_hands_on(name, processor, model, pipeline_of):
    assert_handed_on(model, conditioner_for(processor, model.config, name, "sequential"), pipeline_of)


@both
def test_final_states_under_own_positions_are_what_it_hands_on_once_it_passes_token_types(
    name, processor, model, pipeline_of, with_types
):
    assert_handed_on(model, conditioner_for(processor, model.config, name, "mrope"), pipeline_of)


def test_several_prompts_and_pictures_encoded_at_once_are_each_alone(processor, model, pipeline_of):
    conditioner = conditioner_for(processor, model.config, "edit", "sequential")
    samples = [(picture_of(300, 200), INSTRUCTIONS[0]), (picture_of(200, 300), INSTRUCTIONS[1])]
    resized = [conditioner.editor.resize(picture) for picture, _ in samples]
    with torch.no_grad():
        embeds, mask = pipeline_of(conditioner).encode_prompt(INSTRUCTIONS, resized)
    for row, real, sample in zip(embeds, mask.bool(), samples, strict=True):
        (alone,) = kept_states(model, conditioner, [sample])
        torch.testing.assert_close(row[real], alone, rtol=1e-4, atol=1e-4)
    assert not mask.all()


@both
@given(width=st.integers(30, 4000), height=st.integers(30, 4000))
def test_pictures_are_resized_to_the_pipelines_area(name, width, height):
    kind = getattr(diffusers, PIPELINES[name])
    module = importlib.import_module(kind.__module__)
    area = 1024 * 1024 if name == "edit" else module.CONDITION_IMAGE_SIZE
    expected = module.calculate_dimensions(area, width / height)[:2]
    assert Editor(name).resized(width, height) == expected
    assert all(side % 32 == 0 for side in expected)


@pytest.mark.parametrize(("name", "side"), [("edit", 37), ("edit-plus", 14)])
def test_a_square_brings_as_many_image_tokens_as_in_the_pipeline_and_they_tile_the_source(published, model, name, side):
    conditioner = conditioner_for(published, model.config, name, "mrope")
    image = conditioner.prepare(picture_of(500, 500), "go").tokens.filter(kind="image")
    assert conditioner.count_tokens(500, 500, "go").n_image == len(image) == side**2
    area = ((image["px2"] - image["px1"]) * (image["py2"] - image["py1"])).sum()
    assert area == pytest.approx(500 * 500, rel=1e-4)
    assert (image["px2"].max(), image["py2"].max()) == (500, 500)


def test_the_plus_editor_numbers_its_picture(processor, model):
    conditioner = conditioner_for(processor, model.config, "edit-plus", "mrope")
    one = conditioner.prepare(picture_of(100, 100), "go")
    assert processor.tokenizer.decode(one.ids[conditioner.drop :]).startswith("Picture 1: <|vision_start|>")
    assert "".join(one.tokens.filter(kind="instruction")["text"]) == "go"


@both
def test_the_dropped_tokens_are_the_pipelines_64(name, processor, model):
    """Of a tokenizer that has every word of the prefix as one token, as Qwen's has."""
    template = Editor(name).template
    tokenizer = train_tokenizer([template] * 50, 5000)
    words = Qwen2_5_VLProcessor(processor.image_processor, tokenizer, processor.video_processor, chat_template="")
    conditioner = conditioner_for(words, model.config, name, "mrope")
    assert conditioner.drop == Editor(name).start_index == 64
    before = template[: template.index(OPENING) + len(OPENING)]
    assert len(tokenizer(before)["input_ids"]) == 64


@both
def test_an_editors_conditioner_pickles(name, processor, model):
    conditioner = conditioner_for(processor, model.config, name, "mrope")
    sample = picture_of(90, 120), "remove the ball"
    one, other = (c.prepare(*sample) for c in (conditioner, pickle.loads(pickle.dumps(conditioner))))
    assert one.tokens.equals(other.tokens) and one.pixels["pixel_values"].equal(other.pixels["pixel_values"])


def test_native_keeps_the_pictures_own_size_and_the_opening_of_the_turn(processor, model):
    native = conditioner_for(processor, model.config, "native", "mrope")
    edit = conditioner_for(processor, model.config, "edit", "mrope")
    assert native.template == edit.template
    opening = len(processor.tokenizer(OPENING)["input_ids"])
    assert edit.drop == native.drop + opening
    by_hand = Conditioner(processor, edit.template, "mrope", model.config)
    assert native.prepare(picture_of(90, 120), "go").ids.equal(by_hand.prepare(picture_of(90, 120), "go").ids)


def test_stores_of_other_conditioning_have_other_identities(processor, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    named = [
        identity(
            tmp_path, conditioner_for(processor, model.config, name, "mrope"), ExtractConfig(), torch.device("cpu")
        )
        for name in ("native", *PIPELINES)
    ]
    assert [one["conditioning"] for one in named] == ["native", *PIPELINES]
    assert named[0]["template"] == named[1]["template"]  # so that the name is needed
    assert ["diffusers" in one["libraries"] for one in named] == [False, True, True]


@both
@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "internvl"])
def test_an_editor_of_another_family_is_refused(name, family):
    with pytest.raises(Refusal, match=f"{name}: that editor reads a qwen2_5_vl, not a {family}; give native"):
        conditioner_for(processor_of(family), config_of(family), name, "sequential")


@pytest.fixture
def forgetful():
    """What was learned of diffusers is forgotten before and after."""
    caches = (editors._pipeline, editors.pipeline_template, editors._resized)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@both
def test_another_diffusers_is_refused_with_the_mend(name, forgetful, monkeypatch):
    kind = getattr(diffusers, PIPELINES[name])
    monkeypatch.setattr(kind, "_get_qwen_prompt_embeds", lambda self, *args, **given: None)
    with pytest.raises(Refusal, match=r"not known here; install diffusers 0\.42"):
        _ = Editor(name).template
    monkeypatch.setattr(kind, "_get_qwen_prompt_embeds", lambda self, **given: None)
    with pytest.raises(Refusal, match=r"TypeError: .*install diffusers 0\.42"):
        _ = Editor(name).template
    monkeypatch.setitem(PIPELINES, name, "QwenImageNoSuchPipeline")
    editors._pipeline.cache_clear()
    with pytest.raises(Refusal, match=r"AttributeError: .*install diffusers 0\.42"):
        Editor(name).resized(10, 10)


def test_a_template_of_another_kind_is_refused(forgetful, monkeypatch):
    kind = diffusers.QwenImageEditPipeline
    make = kind.__init__

    def reworded(self, *args, **given):
        make(self, *args, **given)
        self.prompt_template_encode = "{} and then the picture"

    monkeypatch.setattr(kind, "__init__", reworded)
    with pytest.raises(Refusal, match="is not one image followed by one instruction"):
        _ = Editor("edit").template
