"""The recipe's models: real diffusers and transformers classes with random weights, and bad answers of theirs."""

import gc
import json

import numpy as np
import pytest
import torch
from commands import run_here
from judging import KEY, Endpoint, reply, said
from PIL import Image
from tiny_recipe import save_editor, save_generator, save_language, save_vision
from transformers import AutoConfig, Qwen2ForCausalLM

import edit.recipe.words as words
import store
from edit.recipe.checkpoints import find, find_vision
from edit.recipe.config import RecipeConfig
from edit.recipe.pictures import DiffusionGenerator, EditorHarmonizer, states_of
from edit.recipe.run import make, recipe, stages_of
from edit.recipe.stages import Given, Made, Stage
from edit.recipe.words import (
    CUT_CAPTION,
    NO_CAPTION,
    NO_PAIR,
    LanguageWriter,
    LocalText,
    VisionCaptioner,
    caption_of,
    pair_of,
)
from extract.families import FAMILIES
from extract.model import load_model, load_processor
from extract.omniedit import BadSample, read
from extract.pocket.build import WEIGHTS
from extract.sequence import conditioner_for
from store.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models by name."""
    root = tmp_path_factory.mktemp("models")
    made = {"editor": save_editor(root / "editor"), "generator": save_generator(root / "generator")}
    made |= {"language": save_language(root / "language"), "plain": save_language(root / "plain", chat=False)}
    return made | {name: save_vision(root / name, name) for name in FAMILIES}


def noise(seed, size=(96, 64)):
    """A picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def given(tmp_path, seed=0, told=(), **pictures):
    files = {}
    for name, picture in pictures.items():
        files[name] = tmp_path / f"{name}.png"
        picture.save(files[name])
    return Given(0, seed, dict(told), files)


def test_a_diffusers_pipeline_draws_the_written_scene_the_same_for_the_same_seed(models, tmp_path):
    found = find("generator", models["generator"], "model_index.json")
    draw = DiffusionGenerator(found, 64, 2, CPU).load()
    scene = "remove the second red cube from the left and make the ball blue"
    made = [draw(given(tmp_path, seed, {"scene": scene})).pictures["drawn"] for seed in (0, 0, 1)]
    other = draw(given(tmp_path, 0, {"scene": "the ball"})).pictures["drawn"]
    assert [picture.size for picture in made] == [(64, 64)] * 3
    assert made[0].tobytes() == made[1].tobytes() != made[2].tobytes()
    assert other.tobytes() != made[0].tobytes()


class Parrot:
    """A captioner of one sentence: a random model has none."""

    def describe(self):
        return {"model": "parrot"}

    def load(self):
        return lambda given: Made({"instructions": ["Make the leftmost ball red."]})


class Scribe:
    """An endpoint with an answer of its own."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def describe(self):
        return {"model": "scribe"}

    def open(self):
        return self.complete

    def complete(self, system, user, seed):
        self.asked.append(user)
        return self.answer


def test_a_run_of_models_alone_gives_a_data_set_without_truth_that_can_be_reviewed(models, tmp_path, capsys):
    config = RecipeConfig(
        tmp_path / "run",
        samples=4,
        writer=models["language"],
        generator=models["generator"],
        generator_steps=1,
        side=96,
        harmonizer=models["editor"],
        captioner="pocket",
        boxer="pocket",
        device="cpu",
        json=True,
    )
    other = {"caption": Parrot(), "write": LanguageWriter(Scribe('{"scene": "the ball", "edit": "make it blue"}'))}
    assert make(config, [Stage(one.name, other.get(one.name, one.model)) for one in stages_of(config)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["boxes"] is None
    assert [summary["stages"][name]["samples"] for name in ("generate", "harmonize", "reverse", "caption")] == [4] * 4
    samples = list(read(tmp_path / "run" / "dataset", edited=True))
    assert len(samples) == summary["dataset"]["samples"] >= 1
    for sample in samples:
        assert (sample.width, sample.height) == sample.edited.size == (96, 96)
        assert (sample.task, sample.instruction) == ("attribute_modification", "Make the leftmost ball red.")
        number = int(sample.sample_id.split("_")[1])
        folder = tmp_path / "run" / "stages"
        for seen, stage, name in ((sample.image, "harmonize", "harmonized"), (sample.edited, "generate", "drawn")):
            picture = Image.open(folder / stage / f"{number:06d}" / f"{name}.png")
            assert np.array_equal(np.asarray(seen), np.asarray(picture))
            assert np.asarray(seen).std() > 1
    _, _, _, _, store_path, _, _ = summary["review"].split()
    assert store.open(store_path).samples["sample_id"].to_list() == [sample.sample_id for sample in samples]


def test_an_editor_harmonizes_by_seed_and_wish(models, tmp_path):
    found, conditioner = find("harmonizer", models["editor"], "model_index.json"), find_vision("x", "pocket", WEIGHTS)
    harmonize = EditorHarmonizer(found, conditioner, "native", 1, CPU).load()

    def made(seed, wish):
        told = {"edit": wish}
        return harmonize(given(tmp_path, seed, told, drawn=noise(0))).pictures["harmonized"]

    first = made(0, "Make the red ball blue.")
    assert first.size == (96, 64)
    assert first.tobytes() == made(0, "Make the red ball blue.").tobytes()
    assert first.tobytes() != made(1, "Make the red ball blue.").tobytes()
    assert first.tobytes() != made(0, "Make the red ball a blue crate.").tobytes()


def test_the_states_that_condition_are_the_models_last_ones_in_the_order_of_the_sequence():
    sequence = conditioner_for(load_processor(WEIGHTS), AutoConfig.from_pretrained(WEIGHTS), "native", "mrope")
    model = load_model(WEIGHTS, CPU, torch.float32)
    picture, wish = noise(1), "Make the red ball blue."
    states_tw = states_of(model, sequence, picture, wish)
    inputs = dict(sequence.batch([(picture, wish)]).inputs)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states[-1][0, sequence.drop :]
    assert states_tw.shape == plain.shape
    assert torch.allclose(states_tw, plain, atol=1e-4)


def test_an_editor_of_other_states_is_refused(tmp_path):
    found = find("harmonizer", save_editor(tmp_path / "editor", width=64), "model_index.json")
    stage = EditorHarmonizer(found, find_vision("conditioner", "pocket", WEIGHTS), "native", 1, CPU)
    with pytest.raises(Refusal, match=r"reads states of width 64, --conditioner 'pocket' gives 128"):
        stage.load()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_asked_for_a_caption_as_the_paper_asks(models, family, tmp_path, monkeypatch):
    seen = []
    model_class = FAMILIES[family].model_class
    stock = model_class.generate

    def spy(self, **asked):
        seen.append(asked)
        asked["generation_config"].max_new_tokens = 6  # a random model never ends
        return stock(self, **asked)

    monkeypatch.setattr(model_class, "generate", spy)
    told = []
    for size in ((96, 64), (40, 120)):
        caption = VisionCaptioner(find_vision("captioner", models[family], WEIGHTS), CPU).load()
        for seed in (0, 0):
            with pytest.raises(BadSample) as bad:
                caption(given(tmp_path, seed, source=noise(0, size), target=noise(1, size)))
            assert bad.value.reason == CUT_CAPTION
            told.append(bad.value.detail)
    assert told[0] == told[1]
    assert told[2] == told[3]
    settings = seen[0]["generation_config"]
    assert (settings.do_sample, settings.temperature, settings.repetition_penalty) == (True, 0.1, 1.1)
    assert (settings.top_k, settings.top_p) == (0, 1.0)
    assert words.LONGEST == 256


def test_the_captioner_sees_the_source_on_the_left_and_the_target_on_the_right_and_its_words_are_kept(
    models, tmp_path, monkeypatch, scripted
):
    tokenizer = load_processor(find("captioner", models["qwen2_5_vl"]).folder).tokenizer
    script = [*tokenizer(' "make the ball blue"\nand more').input_ids, tokenizer.eos_token_id]
    loaded = load_model

    def load(*asked):
        model = loaded(*asked)
        scripted(model, [script])
        return model

    sheets = []
    prepare = words.Conditioner.prepare

    def look(self, picture, *rest):
        sheets.append(picture)
        return prepare(self, picture, *rest)

    monkeypatch.setattr(words, "load_model", load)
    monkeypatch.setattr(words.Conditioner, "prepare", look)
    caption = VisionCaptioner(find_vision("captioner", models["qwen2_5_vl"], WEIGHTS), CPU).load()
    source, target = noise(0), noise(1)
    assert caption(given(tmp_path, source=source, target=target)).told == {"instructions": ["make the ball blue"]}
    sheet = np.asarray(sheets[0])
    assert sheet.shape == (64, 2 * 96 + 8, 3)
    assert np.array_equal(sheet[:, :96], np.asarray(source))
    assert np.array_equal(sheet[:, -96:], np.asarray(target))
    assert (sheet[:, 96:-96] == 255).all()


def test_the_pocket_model_takes_a_sheet_of_two_pictures(tmp_path):
    stage = VisionCaptioner(find_vision("captioner", "pocket", WEIGHTS), CPU)
    asked = given(tmp_path, source=noise(0, (320, 240)), target=noise(1, (320, 240)))
    try:
        (said,) = stage.load()(asked).told["instructions"]
        assert said
    except BadSample as bad:
        assert bad.reason in (CUT_CAPTION, NO_CAPTION)


@pytest.mark.parametrize(
    ("text", "finished", "caption"),
    [
        (" Make the leftmost ball red. ", True, "Make the leftmost ball red."),
        ('"Make it red."\n\nBecause …', True, "Make it red."),
        ("“Make it red.”", True, "Make it red."),
        ("Make it red.\nAnd so on and on", False, "Make it red."),
        ("Make it and so on and on", False, CUT_CAPTION),
        (" \n ", True, NO_CAPTION),
        ('""', True, NO_CAPTION),
        ("", True, NO_CAPTION),
    ],
)
def test_a_caption_is_the_first_line_of_what_was_said(text, finished, caption):
    if caption in (CUT_CAPTION, NO_CAPTION):
        with pytest.raises(BadSample) as bad:
            caption_of(text, finished)
        assert bad.value.reason == caption
    else:
        assert caption_of(text, finished) == caption


def test_a_language_model_is_asked_for_four_to_nine_objects_in_every_layout(tmp_path):
    scribe = Scribe('Sure! {"scene": " Six cups in a row, one red. ", "edit": "Make the red cup white."} Enjoy')
    write = LanguageWriter(scribe).load()
    for seed in range(200):
        made = write(given(tmp_path, seed)).told
    assert made == {
        "scene": "Six cups in a row, one red.",
        "edit": "Make the red cup white.",
        "task": "attribute_modification",
    }
    counts = {asked.split("shows ")[1].split()[0] for asked in scribe.asked}
    assert counts == {"four", "five", "six", "seven", "eight", "nine"}
    assert len({asked.split("kind, ")[1].split(", all")[0] for asked in scribe.asked}) == 5
    write(given(tmp_path, 7))
    assert scribe.asked[-1] == scribe.asked[7]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no JSON here",
        '{"scene": "a"}',
        '{"scene": "", "edit": "b"}',
        '{"scene": 3, "edit": "b"}',
        '{"scene": null, "edit": "b"}',
        '{"scene": "\\ud800", "edit": "b"}',
        '[{"scene": "a"',
        '{"scene": "a", "edit": "b"',
        "{" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_an_answer_that_is_no_pair_of_prompts_is_a_bad_sample(answer):
    with pytest.raises(BadSample) as bad:
        pair_of(answer)
    assert bad.value.reason == NO_PAIR
    assert len(bad.value.detail) <= 200


@pytest.mark.parametrize("name", ["language", "plain"])
def test_a_local_language_model_answers_the_same_for_the_same_seed(models, name, monkeypatch):
    monkeypatch.setattr(words, "LONGEST", 24)
    complete = LocalText(find("writer", models[name]), CPU).open()
    said = [complete("You write.", "Write.", seed) for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]
    state = torch.get_rng_state()
    complete("You write.", "Write.", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_writer_that_only_babbles_ends_the_run_with_the_reason(models, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "LONGEST", 24)
    config = RecipeConfig(
        tmp_path / "run",
        samples=2,
        writer=models["language"],
        generator=models["generator"],
        harmonizer=models["editor"],
        captioner="pocket",
        device="cpu",
    )
    with pytest.raises(Refusal, match=f"2 × write: {NO_PAIR}"):
        recipe(config)
    assert not [one for one in gc.get_objects() if type(one) is Qwen2ForCausalLM], "it is kept after its stage"


def test_the_command_line_has_a_writer_behind_an_endpoint(models, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", KEY)
    pair = {"scene": "Six cups in a row, one red.", "edit": "Make the red cup white."}
    out = tmp_path / "run"
    with Endpoint(usual=reply(said(pair))) as server:
        asked = ("--writer", "openai:writer-1", "--url", server.url, "--key-env", "WRITER_KEY", "--price-in", "2")
        asked += ("--generator", models["generator"], "--generator-steps", "1", "--side", "96", "--device", "cpu")
        asked += ("--harmonizer", models["editor"], "--captioner", "pocket", "--boxer", "pocket", "--samples", "2")
        done = run_here("edit", "recipe", *asked, "--out", out)
    assert [one["headers"]["Authorization"] for one in server.asked] == [f"Bearer {KEY}"] * 2
    assert [one["body"]["temperature"] for one in server.asked] == [0.9, 0.9]
    written = [json.loads(path.read_text()) for path in sorted((out / "stages" / "write").glob("*/record.json"))]
    assert [one["told"]["scene"] for one in written] == [pair["scene"]] * 2
    assert len(list((out / "stages" / "harmonize").glob("*/harmonized.png"))) == 2, done.stderr
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_every_setting_of_a_model_is_in_what_describes_its_stage(models, tmp_path):
    base = {"samples": 1, "generator": models["generator"], "harmonizer": models["editor"], "captioner": "pocket"}

    def described(**other):
        stages = stages_of(RecipeConfig(tmp_path, device="cpu", **{**base, **other}))
        return {stage.name: json.dumps(stage.model.describe(), sort_keys=True) for stage in stages}

    before = described()
    for setting, value, stage in (
        ("side", 128, "generate"),
        ("generator_steps", 3, "generate"),
        ("harmonizer_steps", 3, "harmonize"),
        ("conditioner", models["qwen2_5_vl"], "harmonize"),
        ("conditioning", "edit", "harmonize"),
        ("captioner", models["qwen3_vl"], "caption"),
        ("boxer", models["qwen3_vl"], "box"),
        ("writer", models["language"], "write"),
        ("seed", 4, "write"),
    ):
        after = described(**{setting: value})
        assert [name for name in after if after[name] != before[name]] == [stage], setting


def test_weights_that_changed_are_another_model(tmp_path):
    folder = save_language(tmp_path / "language")
    before = find("writer", folder).identity
    weights = tmp_path / "language" / "model.safetensors"
    moved = tmp_path / "moved"
    save_language(moved, chat=False)
    assert find("writer", str(moved)).identity != before
    weights.unlink()
    with pytest.raises(Refusal, match="pickled weights are never read"):
        find("writer", folder)


@pytest.mark.parametrize(
    ("setting", "model", "named"),
    [
        ("writer", "qwen2_5_vl", "does not generate text"),
        ("captioner", "language", "'qwen2'"),
        ("boxer", "language", "'qwen2'"),
        ("conditioner", "language", "'qwen2'"),
        ("generator", "language", r"no model_index\.json"),
        ("harmonizer", "language", r"no model_index\.json"),
        ("boxer", "generator", r"no config\.json"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused_by_its_setting(models, setting, model, named, tmp_path):
    base = {"writer": models["language"], "generator": models["generator"], "harmonizer": models["editor"]}
    base |= {"captioner": "pocket", "boxer": "pocket", "conditioner": "pocket"}
    with pytest.raises(Refusal, match=f"--{setting} .*{named}"):
        recipe(RecipeConfig(tmp_path / "run", **{**base, setting: models[model]}))
    assert not (tmp_path / "run").exists()
