"""The judge on this machine: the pocket model's real weights, free and forced to an answer."""

import json
import shutil

import pytest
import torch
from judging import GRADES, picture
from PIL import Image
from tiny_families import model_of, processor_of

from edit.judges.cache import AnswerCache
from edit.judges.judge import Item, judge_all
from edit.judges.local import LocalJudge
from edit.judges.questions import Cost, Failure, Verdict, prompt_for
from extract.families import FAMILIES
from extract.model import find_checkpoint
from store.errors import Refusal


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield LocalJudge("pocket", device="cpu", max_tokens=6)
    torch.set_num_threads(threads)


@pytest.fixture
def judge(loaded, tmp_path):
    """A judge of its own with the weights that are there, and a cache."""
    made = LocalJudge("pocket", AnswerCache(tmp_path / "cache"), "cpu", max_tokens=90)
    made.model = loaded.model
    made.model.generation_config.max_new_tokens = 90
    return made


class Forced:
    """Has a model's head say a text and end its turn, whatever it is shown; keeps what it was shown."""

    def __init__(self, judge, text):
        tokenizer = judge.processor.tokenizer
        self.ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        self.model, self.read, self.seen = judge.model, [], []

    def __enter__(self):
        self.left = list(self.ids)
        self.hooks = [
            self.model.register_forward_pre_hook(self._read, with_kwargs=True),
            self.model.model.visual.register_forward_pre_hook(self._see, with_kwargs=True),
            self.model.lm_head.register_forward_hook(self._say),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _read(self, module, args, kwargs):
        self.read.append(kwargs["input_ids"])

    def _see(self, module, args, kwargs):
        self.seen.append((*args, *kwargs.values())[:2])

    def _say(self, module, args, logits):
        said = torch.full_like(logits, -100.0)
        said[:, -1, self.left.pop(0)] = 100.0
        return said


def test_a_model_that_cannot_judge_is_set_aside_with_its_own_words(loaded):
    rows = judge_all(loaded, [Item("s", "m", "make it blue", picture(0), picture(1))], quiet=True)
    assert rows["edit"].to_list() == [None]
    assert "the model stopped (not at an end after 6 tokens): " in rows["failed"][0]
    assert rows["tokens_out"].to_list() == [6]
    assert loaded.judge(picture(0), picture(1), "make it blue").reason == rows["failed"][0]


def test_both_pictures_and_the_prompt_are_shown_and_the_answer_is_read(judge):
    with Forced(judge, f"Here: {json.dumps(GRADES)}") as forced:
        verdict = judge.judge(picture(0), picture(1, (112, 56)), "make it blue", (0, 0, 28, 56))
    ((pixels, grids),) = forced.seen
    ids = forced.read[0][0]
    assert verdict == Verdict(4, 3, 2, "the cube is blue", Cost(len(ids), len(forced.ids)))
    text = judge.processor.tokenizer.decode(ids)
    assert prompt_for("make it blue", (0, 0, 28, 56), (56, 56)).strip() in text
    assert text.index("<|image_pad|>") < text.index("two pictures")
    assert len(grids) == 2
    assert grids[1][2] > grids[0][2]
    # Each is what the processor makes of it, in this order.
    alone = [
        judge.processor.image_processor(images=[one], return_tensors="pt")["pixel_values"]
        for one in (picture(0), picture(1, (112, 56)))
    ]
    torch.testing.assert_close(pixels.float(), torch.cat(alone).to(judge.model.dtype).float())


def test_an_answer_is_kept_and_a_second_run_needs_no_weights(judge, tmp_path):
    with Forced(judge, json.dumps(GRADES)):
        first = judge.judge(picture(0), picture(1), "make it blue")
    again = LocalJudge("pocket", AnswerCache(tmp_path / "cache"), "cpu", max_tokens=90)
    assert again.judge(picture(0), picture(1), "make it blue") == first
    assert "model" not in vars(again)  # loaded when it is needed
    others = [
        LocalJudge("pocket", None, "cpu", max_tokens=91)._described,
        LocalJudge("pocket", None, "cpu", max_pixels=56 * 56, max_tokens=90)._described,
    ]
    assert again._described not in others


def test_a_checkpoints_own_sampling_settings_play_no_part(loaded):
    settings = loaded.model.generation_config
    assert settings.do_sample is False
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.temperature in (None, 1.0)


def test_pictures_that_the_model_cannot_take_are_set_aside(judge):
    failure = judge.judge(Image.new("RGB", (8000, 10)), picture(1), "x")
    assert isinstance(failure, Failure)
    assert "cannot take the pictures" in failure.reason


def test_a_checkpoint_without_chat_template_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(find_checkpoint("pocket"), folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(Refusal, match="no chat template"):
        LocalJudge(str(folder), None, "cpu")


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "llava"])
def test_every_family_is_shown_both_pictures(tmp_path, name):
    processor = processor_of(name)
    model_of(name).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", FAMILIES[name].image.strip()))
    judge = LocalJudge(str(tmp_path / "model"), None, "cpu", max_tokens=2)
    one, two = picture(0, (112, 112)), picture(1, (112, 112))
    asked = [judge.judge(one, two, "make it blue"), judge.judge(two, one, "make it blue")]
    assert all("not at an end after 2 tokens" in found.reason for found in asked)
    placeholder = processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].placeholder)
    ids = []
    judge.model.register_forward_pre_hook(lambda *given: ids.append(given[2]["input_ids"]), with_kwargs=True)
    judge.judge(one, two, "make it blue")
    alone = len(FAMILIES[name].regions(judge.processor, 112, 112).row)
    assert (ids[0] == placeholder).sum() == 2 * alone > 0


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refusal, match="--model"):
        LocalJudge(str(tmp_path), None, "cpu")
