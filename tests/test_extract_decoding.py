"""Greedy decoding: transformers' own answers, each of them ended where it is complete and not computed any further."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from extract.boxes import _NAMED
from extract.decoding import ask
from extract.model import load_model, load_processor
from extract.pocket.build import WEIGHTS
from extract.pocket.evaluate import fresh_scenes
from extract.prompts import GROUND_TEMPLATE, editing_template
from extract.sequence import Conditioner

SAMPLES = [
    (Image.effect_noise((150, 90), 80).convert("RGB"), "make the second red cube from the left blue"),
    (Image.effect_noise((90, 200), 80).convert("RGB"), "remove the ball"),
    (Image.effect_noise((130, 130), 80).convert("RGB"), "swap it"),
    (Image.effect_noise((60, 60), 80).convert("RGB"), "remove the ball, make the second cube red"),
]
# Random weights say no box: here an answer is complete with its first closing bracket.
BRACKET = re.compile(r"[\])]")


@pytest.fixture(scope="module")
def pocket():
    return load_model(WEIGHTS, torch.device("cpu")), load_processor(WEIGHTS)


def transformers_own(model, batch, tokenizer, max_new_tokens):
    """Token ids of plain greedy ``generate``, without the padding behind the end of the turn."""
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}
    end = tokenizer.eos_token_id
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    said = model.generate(**inputs, generation_config=plain)[:, inputs["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in said]


def ended_where_complete(ids, tokenizer, complete):
    """The text and the number of tokens up to the first token with which the whole text is complete."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if complete is not None and complete.search(text):
            break
    return text, count


def check(model, conditioner, pairs, max_new_tokens, complete):
    """`ask` says what transformers says, ended where it is complete."""
    tokenizer = conditioner.tokenizer
    batch = conditioner.batch(pairs, padding_side="left")
    said = ask(model, batch, tokenizer, max_new_tokens, complete)
    own = transformers_own(model, batch, tokenizer, max_new_tokens)
    assert [(one.text, one.tokens) for one in said] == [ended_where_complete(ids, tokenizer, complete) for ids in own]
    return said


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_pocket_models_answers_are_transformers_own_up_to_the_box(pocket, seed):
    model, processor = pocket
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    pairs = [(scene.image, scene.instruction) for scene in fresh_scenes(20, seed, "medium")]
    said = check(model, conditioner, pairs, 40, _NAMED)
    assert all(one.finished for one in said)
    assert len({one.tokens for one in said}) > 1  # some ended before others


def test_without_a_pattern_answers_go_on_to_the_end_of_the_turn(pocket):
    model, processor = pocket
    conditioner = Conditioner(processor, editing_template(), "mrope", model.config)
    pairs = [(scene.image, scene.instruction) for scene in fresh_scenes(12, 14, "hard")]
    said = check(model, conditioner, pairs, 60, None)
    assert all(one.finished for one in said)


def test_answers_of_random_weights_are_transformers_own_padded_and_alone(processor, tiny_model):
    model, tokenizer = tiny_model(), processor.tokenizer
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    closing = [token_id for token_id in range(len(tokenizer)) if "]" in tokenizer.decode([token_id])]
    answers = []
    for seed in range(5):
        torch.manual_seed(seed)
        model.lm_head.weight.data.normal_()[closing] *= 1.5  # said now and then
        together = check(model, conditioner, SAMPLES, 24, BRACKET)
        assert [check(model, conditioner, [sample], 24, BRACKET)[0] for sample in SAMPLES] == together
        answers += together
    assert {one.finished for one in answers} == {True, False}
    assert len({one.text for one in answers}) > len(answers) / 2


texts = st.text(st.sampled_from('[]()0123456789,. :"abo_x2d{}é\n'), max_size=40)
boxes = st.lists(st.integers(0, 999), min_size=4, max_size=4).map(lambda numbers: f'{{"bbox_2d": {numbers}}}')


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(texts, boxes), min_size=1, max_size=6))
def test_an_answer_ends_with_the_first_token_that_completes_a_box_whatever_was_said_before(
    processor, tiny_model, scripted, said
):
    model, tokenizer = tiny_model(layers=1), processor.tokenizer
    ids = [*tokenizer("".join(said))["input_ids"], tokenizer.eos_token_id]
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    batch = conditioner.batch(SAMPLES[3:], padding_side="left")
    scripted(model, [ids])
    (answer,) = ask(model, batch, tokenizer, len(ids), _NAMED)
    assert (answer.text, answer.tokens) == ended_where_complete(ids, tokenizer, _NAMED)


def test_finished_samples_are_not_computed_any_further(processor, tiny_model, scripted):
    model, tokenizer = tiny_model(), processor.tokenizer
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    says = [f"{'so on, ' * length}[1, 2, 3, 4] and more" for length in (9, 2, 1, 0)]
    rows = scripted(model, [tokenizer(text)["input_ids"] for text in says])
    answers = ask(model, conditioner.batch(SAMPLES, padding_side="left"), tokenizer, 200, BRACKET)
    assert [one.text for one in answers] == [text.removesuffix(" and more") for text in says]
    assert len(rows) == answers[0].tokens  # the last step is the one that completes the longest
    assert rows[answers[2].tokens] == 2  # half of them have ended: the others go on without them
    assert rows[-1] == 1


def test_an_answer_that_the_limit_cuts_off_is_not_finished(processor, tiny_model, scripted):
    model, tokenizer = tiny_model(layers=1), processor.tokenizer
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    steps = scripted(model, [tokenizer("so on and so on")["input_ids"], [tokenizer.eos_token_id]])
    cut, ended = ask(model, conditioner.batch(SAMPLES[:2], padding_side="left"), tokenizer, 7)
    assert (cut.finished, cut.tokens, len(steps)) == (False, 7, 7)
    assert (ended.finished, ended.tokens, ended.text) == (True, 1, "")


@pytest.mark.parametrize("kind", ["pocket", "tiny"])
def test_the_vision_tower_runs_once_for_two_questions_and_nothing_changes(request, kind):
    if kind == "pocket":
        model, processor = request.getfixturevalue("pocket")
        pairs = [(scene.image, scene.instruction) for scene in fresh_scenes(8, 15, "medium")]
    else:
        model, processor, pairs = (*map(request.getfixturevalue, ("tiny_model", "processor")), SAMPLES)
        model = model()
    editing, ground = (Conditioner(processor, t, "mrope", model.config) for t in (editing_template(), GROUND_TEMPLATE))
    other, batch = editing.batch(pairs), ground.batch(pairs, padding_side="left")
    towers, logits = [], []
    hooks = [
        model.model.visual.register_forward_hook(lambda *_: towers.append(1)),
        model.lm_head.register_forward_hook(lambda module, args, given: logits.append(given)),
    ]
    with torch.no_grad():
        features = model.model.get_image_features(
            other.inputs["pixel_values"], other.inputs["image_grid_thw"], return_dict=True
        )
    given = ask(model, batch, ground.tokenizer, 12, features=features)
    assert len(towers) == 1
    with_features = logits.copy()
    logits.clear()
    assert ask(model, batch, ground.tokenizer, 12) == given
    for hook in hooks:
        hook.remove()
    assert len(logits) == len(with_features)
    assert all(mine.equal(own) for mine, own in zip(with_features, logits, strict=True))
