"""Boxes that the model speaks: parsed under any words, brought to source pixels, the same alone and in a batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from extract.boxes import Problem, count_problems, generate_boxes, parse_box, read_answer
from extract.decoding import Said
from extract.families import Frame
from extract.prompts import GROUND_TEMPLATE
from extract.sequence import Conditioner

SAMPLES = [
    (Image.effect_noise((150, 90), 80).convert("RGB"), "make the second red cube from the left blue"),
    (Image.effect_noise((90, 200), 80).convert("RGB"), "remove the ball"),
    (Image.effect_noise((130, 130), 80).convert("RGB"), "swap it"),
]
side = st.integers(28, 4000)
number = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=True, allow_infinity=True))


def inside(box, size):
    x1, y1, x2, y2 = box
    return 0 <= x1 <= x2 <= size[0] and 0 <= y1 <= y2 <= size[1]


@given(st.lists(number, max_size=6), st.text(max_size=20), st.text(max_size=20), side, side, side, side)
def test_a_box_is_always_ordered_and_inside_the_picture(numbers, before, after, wide, high, width, height):
    for text in (f"{before}{numbers}{after}", f'{before}{{"bbox_2d": {numbers}}}{after}', before + after):
        box = parse_box(text, Frame((wide, high), (0, 0, width, height)), (width, height))
        assert box is None or inside(box, (width, height))


@given(st.data())
def test_each_axis_is_mapped_on_its_own(data):
    wide, high, width, height = (data.draw(side) for _ in range(4))
    x1, x2 = sorted(data.draw(st.tuples(st.integers(0, wide), st.integers(0, wide))))
    y1, y2 = sorted(data.draw(st.tuples(st.integers(0, high), st.integers(0, high))))
    expected = (x1 * width / wide, y1 * height / high, x2 * width / wide, y2 * height / high)
    for corners in ((x1, y1, x2, y2), (x2, y2, x1, y1), (x2, y1, x1, y2)):
        text = f'{{"bbox_2d": {list(corners)}}}'
        assert parse_box(text, Frame((wide, high), (0, 0, width, height)), (width, height)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('{"bbox_2d": [1, 2, 3, 4]}', (1, 2, 3, 4)),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```', (1, 2, 3, 4)),
        ("{'bbox_2d': [ 1.5,2 , 3, 4]} and [5, 6, 7, 8]", (1.5, 2, 3, 4)),
        ("first [5, 6, 7, 8], rather [1, 2, 3, 4]", (1, 2, 3, 4)),
        ("the cat at (1, 2, 3, 4)", (1, 2, 3, 4)),
        ("[3, 4, 1, 2]", (1, 2, 3, 4)),
        ("[-5, 2, 999, 4]", (0, 2, 100, 4)),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ('{"bbox_2d": [1, 2, 3', None),
        ("1 2 3 4", None),
        ("", None),
    ],
)
def test_answers_people_have_seen(text, box):
    assert parse_box(text, Frame((100, 100), (0, 0, 100, 100)), (100, 100)) == box


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def test_a_batch_says_what_each_sample_says_alone(processor, model):
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    together = generate_boxes(model, conditioner, SAMPLES, max_new_tokens=12)
    alone = [generate_boxes(model, conditioner, [sample], max_new_tokens=12)[0] for sample in SAMPLES]
    assert together == alone
    assert len({answer.text for answer in together}) > 1  # the samples do not all say the same


def test_decoding_uses_the_models_own_positions(processor, model):
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    batch = conditioner.batch(SAMPLES, padding_side="left")
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, settings: seen.append(settings["position_ids"][-3:].clone()), with_kwargs=True
    )
    generate_boxes(model, conditioner, SAMPLES, max_new_tokens=2)
    hook.remove()
    real = batch.inputs["attention_mask"].bool()
    assert seen[0][:, real].equal(batch.inputs["position_ids"][:, real])
    assert seen[1][:, :, 0].equal(batch.inputs["position_ids"].amax(-1) + 1)


def test_an_answer_ends_with_its_box_in_source_pixels(processor, model, scripted):
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    says = ['{"bbox_2d": [0, 28, 70, 42]} and so on, for ever', '{"bbox_2d": [1, 2, 3, 4]} and so on']
    scripted(model, [processor.tokenizer(text)["input_ids"] for text in says])
    answers = generate_boxes(model, conditioner, SAMPLES[:2], 100)
    for answer, text in zip(answers, says, strict=True):
        assert text.startswith(answer.text)
        assert "so on" not in answer.text
    resized = conditioner.frame(150, 90).extent
    assert answers[0].box == pytest.approx((0, 28 * 90 / resized[1], 70 * 150 / resized[0], 42 * 90 / resized[1]))


@pytest.mark.parametrize(
    ("text", "finished", "problem"),
    [
        ('{"bbox_2d": [1, 2, 3, 4]}', True, None),
        ("it is at [1, 2, 3, 4], and so on", False, None),
        ("I see no such thing.", True, Problem.NO_NUMBERS),
        ("[1, 2, 3]", True, Problem.NO_NUMBERS),
        ('{"bbox_2d": [1, 2, 3', False, Problem.UNFINISHED),
        ("", False, Problem.UNFINISHED),
        ("[1, 2, 1, 4]", True, Problem.DEGENERATE),
        ("[1, 2, 3, 2]", True, Problem.DEGENERATE),
        ("[100, 2, 130, 4]", True, Problem.DEGENERATE),
        ("[1, -40, 3, 0]", True, Problem.DEGENERATE),
        ("[90, 90, 130, 140]", True, None),
    ],
)
def test_an_answer_says_why_it_is_no_usable_box(text, finished, problem):
    answer = read_answer(Said(text, 5, finished), Frame((100, 100), (0, 0, 50, 200)), (50, 200))
    assert answer.problem == problem
    assert (answer.box is None) == (problem in (Problem.NO_NUMBERS, Problem.UNFINISHED))


@given(st.text(max_size=700), st.booleans(), side, side)
def test_the_columns_of_any_answer_go_into_a_table(text, finished, width, height):
    columns = read_answer(
        Said(text, 5, finished), Frame((width, height), (0, 0, width, height)), (width, height)
    ).columns()
    assert list(columns) == ["x1", "y1", "x2", "y2", "answer", "problem"]
    assert text.startswith(columns["answer"])
    assert len(columns["answer"]) == min(len(text), 500)
    assert columns["problem"] is None or type(columns["problem"]) is str


def test_problems_are_counted_the_most_frequent_first():
    problems = [None, Problem.UNFINISHED, Problem.NO_NUMBERS, None, Problem.NO_NUMBERS]
    assert list(count_problems(problems).items()) == [(Problem.NO_NUMBERS, 2), (Problem.UNFINISHED, 1)]


def test_the_checkpoints_sampling_defaults_do_not_bend_greedy_decoding(processor, model, monkeypatch):
    conditioner = Conditioner(processor, GROUND_TEMPLATE, "mrope", model.config)
    plain = generate_boxes(model, conditioner, SAMPLES, max_new_tokens=8)
    defaults = {
        "do_sample": True,
        "repetition_penalty": 9.0,
        "temperature": 5.0,
        "top_p": 0.5,
        "no_repeat_ngram_size": 1,
    }
    for name, value in defaults.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate_boxes(model, conditioner, SAMPLES, max_new_tokens=8) == plain
    assert model.generation_config.repetition_penalty == 9.0  # and the model keeps them
