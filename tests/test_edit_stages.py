"""Two stages of one pass: what conditions, where the box comes from, and what the editor sees."""

import dataclasses
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from commands import run_here
from PIL import Image
from planted_store import alone
from tiny_editor import tiny_editor, tiny_study

import probes
import store
from edit.conditions import Conditioning, condition
from edit.config import RunConfig, TrainConfig
from edit.editor import Editor
from edit.evaluate import held_out, through
from edit.overlay import Overlay, rescaled
from edit.scores.scene_judge import SceneJudge
from edit.stages import TwoStage, lora_settings
from edit.train import LORA_SETTINGS, train
from extract.encoder import Encoder
from extract.model import file_hash
from probes.sweep import train as train_probe
from store.errors import Refusal

INSTRUCTION = "Remove the leftmost star."


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return tiny_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def opened(study):
    return store.open(study / "store.zarr")


@pytest.fixture(scope="module")
def encoder(opened):
    return Encoder.of(opened.identity)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((256, 192))


@pytest.fixture(scope="module")
def proxy(study):
    """A joint proxy of prompt tokens, trained for a moment."""
    train_probe(alone(study / "store.zarr", study / "probes", "3", "6", tokens="text", seeds=(0,), watch=4))
    return next((study / "probes" / "proxies").iterdir())


@pytest.fixture(scope="module")
def editor_folder(study):
    return tiny_editor(study / "editor")


@pytest.fixture(scope="module")
def lora(study, editor_folder):
    config = TrainConfig(
        store=str(study / "store.zarr"),
        data=str(study / "scenes"),
        editor=str(editor_folder),
        out=study / "lora",
        steps=4,
        warmup=1,
        learning_rate=3e-2,
        validation=1,
        threads=1,
    )
    train(config)
    return config.out


@pytest.fixture
def stages(encoder, editor_folder, proxy, lora):
    return TwoStage(encoder, Editor.load(editor_folder), Conditioning(), probes.load(proxy)).with_lora(lora)


# Conditionings


def test_what_was_seen_is_what_a_store_gives_for_every_kind_of_token(encoder, picture):
    seen = encoder.see(picture, INSTRUCTION, ("2", "final"))
    for kind in ("image", "text", "instruction", "template", "all"):
        assert torch.equal(
            seen.tokens(("2", "final"), kind), encoder.read(picture, INSTRUCTION, ("2", "final"), kind)[0][0]
        )
    assert torch.equal(seen.tokens(("final",), "text"), seen.states[1:, ~seen.kinds["image"]])
    runs = np.flatnonzero(np.diff(seen.kinds["image"].numpy().astype(int)))
    assert len(runs) == 2, "the picture's tokens follow each other, with others before and after them"
    with pytest.raises(Refusal, match="layer '99'"):
        encoder.see(picture, INSTRUCTION, ("99",))


def test_a_stored_sample_is_conditioned_as_at_hand(encoder, opened, study):
    from edit.pairs import Pairs
    from edit.states import StoredStates

    pair = next(iter(Pairs(opened, study / "scenes").read([3])))
    states, mask = StoredStates(opened, ["final"]).read([3])
    made = condition(encoder, Conditioning(), pair.source, opened.samples["instruction"][3])
    assert torch.equal(made.states, states[0, 0][mask[0]])


@pytest.mark.parametrize("norm", ["rms", "l2", "layernorm"])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_norm_average_is_that_of_plain_numpy(norm, rescale):
    states = (
        torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 10, 0.1, 3])[:, None, None]
    )
    x = states.numpy().astype(np.float64)
    if norm == "layernorm":
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    else:
        normal = x / np.sqrt((x**2).mean(-1, keepdims=True) if norm == "rms" else (x**2).sum(-1, keepdims=True))
    expected = normal.mean(0)
    if rescale:
        expected *= np.linalg.norm(x[-1], axis=-1, keepdims=True) / np.linalg.norm(expected, axis=-1, keepdims=True)
    way = Conditioning("norm-average", norm=norm, rescale=rescale)
    assert np.allclose(way.combine(states).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_layers_are_those_that_a_way_needs(encoder):
    every = encoder.layers
    assert Conditioning().layers(every) == Conditioning("description").layers(every) == ("final",)
    assert Conditioning("middle", "4").layers(every) == ("4",)
    assert Conditioning("norm-average").layers(every) == every[1:]
    assert Conditioning("norm-average", average_over="all").layers(every) == every


def test_a_description_is_read_as_well_or_instead(encoder, picture):
    said = encoder.describe(picture, INSTRUCTION, 60)
    assert said and said == encoder.describe(picture, INSTRUCTION, 60)
    appended = condition(encoder, Conditioning("description", max_new_tokens=60), picture, INSTRUCTION)
    replaced = condition(
        encoder, Conditioning("description", describe="replace", max_new_tokens=60), picture, INSTRUCTION
    )
    assert appended.read == f"{INSTRUCTION} {said}" and replaced.read == said
    assert torch.equal(replaced.states, condition(encoder, Conditioning(), picture, said).states)


@pytest.mark.parametrize("wrong", [{"way": "middle"}, {"middle": "4"}, {"way": "first"}])
def test_settings_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(Refusal):
        Conditioning(**wrong)


# Two stages


def test_one_pass_gives_the_box_that_the_proxy_finds_by_itself(stages, picture, monkeypatch):
    asked = []
    see = Encoder.see
    monkeypatch.setattr(Encoder, "see", lambda self, *given: asked.append(given) or see(self, *given))
    made = stages(picture, INSTRUCTION, seed=1, steps=2)
    assert len(asked) == 1 and set(asked[0][2]) == {"3", "6", "final"}
    assert asked[0][0] is picture, "the VLM sees the clean picture"
    assert np.allclose(made.box, stages.proxy.predict(picture, INSTRUCTION).numpy(), atol=1e-3)
    assert made.picture.size == picture.size and made.picture.mode == "RGB"


def test_the_autoencoder_sees_the_picture_with_its_box(stages, picture, monkeypatch):
    seen = []
    edit = Editor.edit
    monkeypatch.setattr(Editor, "edit", lambda self, one, *given: seen.append(one) or edit(self, one, *given))
    stages(picture, INSTRUCTION, box=(40, 40, 120, 100), steps=1)
    clean = stages.editor.resized(picture)
    expected = stages.overlay.draw(clean, rescaled((40, 40, 120, 100), picture.size, clean.size))
    assert np.array_equal(np.asarray(seen[0]), np.asarray(expected))


def test_the_same_seed_gives_the_same_picture_and_another_another(stages, picture):
    first, again, other = (stages(picture, INSTRUCTION, seed, steps=2).picture for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_without_its_lora_the_editor_is_the_plain_one(stages, encoder, editor_folder, picture):
    plain = TwoStage(encoder, Editor.load(editor_folder))(picture, INSTRUCTION, steps=2).picture.tobytes()
    without = dataclasses.replace(stages, overlay=None)
    assert without(picture, INSTRUCTION, steps=2).picture.tobytes() != plain
    with stages.without_lora():
        assert without(picture, INSTRUCTION, steps=2).picture.tobytes() == plain
    assert without(picture, INSTRUCTION, steps=2).picture.tobytes() != plain


def test_a_box_needs_someone_who_finds_it(stages, picture):
    with pytest.raises(Refusal, match="nothing to find the box"):
        dataclasses.replace(stages, proxy=None)(picture, INSTRUCTION)


def test_a_folder_that_is_no_lora_is_refused(tmp_path, lora):
    with pytest.raises(Refusal, match="has no pytorch_lora_weights"):
        lora_settings(tmp_path)
    for path in lora.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / LORA_SETTINGS).write_text('{"overlay": {"colour": "red"}}')
    with pytest.raises(Refusal, match="colour"):
        lora_settings(tmp_path)
    (tmp_path / LORA_SETTINGS).write_text("{")
    with pytest.raises(Refusal, match="damaged"):
        lora_settings(tmp_path)


# The command


@pytest.fixture
def given(editor_folder, proxy, lora):
    return [
        "edit",
        "run",
        "--editor",
        editor_folder,
        "--proxy",
        proxy,
        "--lora",
        lora,
        "--steps",
        "1",
        "--threads",
        "1",
    ]


def test_a_folder_is_edited_each_picture_with_its_label_and_not_twice(given, picture, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, text in (("a", INSTRUCTION), ("b", "Make the moon red."), ("c", None), ("d", "  ")):
        picture.save(folder / f"{name}.png")
        if text is not None:
            (folder / f"{name}.txt").write_text(text)
    (folder / "e.png").write_bytes(b"no picture")
    (folder / "e.txt").write_text("Remove it.")
    done = run_here(*given, "--folder", folder, "--out", out, "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["edited"] == 2 and found["kept"] == 0 and set(found["set_aside"]) == {"c.png", "d", "e"}
    assert "no instruction" in found["set_aside"]["c.png"] and "empty" in found["set_aside"]["d"]
    label = json.loads((out / "a.json").read_text())
    assert Image.open(out / "a.png").size == picture.size and label["instruction"] == INSTRUCTION
    assert (
        len(label["box"]) == 4
        and label["noise_seed"] == 0
        and label["overlay"]["style"] == "frame"
        and label["steps"] == 1
    )
    before = (out / "a.png").stat().st_mtime_ns
    (out / "b.json").unlink()
    again = json.loads(run_here(*given, "--folder", folder, "--out", out, "--json").stdout)
    assert again["edited"] == 1 and again["kept"] == 1 and (out / "a.png").stat().st_mtime_ns == before
    other = json.loads(run_here(*given, "--folder", folder, "--out", out, "--noise-seed", "5", "--json").stdout)
    assert other["edited"] == 2


def test_pictures_of_weights_that_have_changed_since_are_made_again(encoder, editor_folder, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    from edit.config import StagesConfig
    from edit.run import settings_of

    def settings():
        stages = TwoStage(encoder, Editor.load(tmp_path / "editor")).with_lora(tmp_path / "lora")
        return settings_of(StagesConfig(), stages)

    shutil.copytree(editor_folder, tmp_path / "editor")
    shutil.copytree(lora, tmp_path / "lora", ignore=shutil.ignore_patterns("latents"))
    found = [settings(), settings()]
    for folder, pattern in (("lora", "*lora_weights.safetensors"), ("editor", "transformer/*.safetensors")):
        (path,) = (tmp_path / folder).glob(pattern)
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, path)
        file_hash.cache_clear()
        found.append(settings())
    assert found[0] == found[1]
    assert [{key for key in one if one[key] != other[key]} for one, other in pairwise(found[1:])] == [
        {"lora_weights"},
        {"weights"},
    ]


def test_data_in_omniedits_columns_are_edited(given, study, tmp_path):
    done = run_here(*given, "--data", study / "scenes", "--limit", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 edited" in done.stdout and len(list(tmp_path.glob("scene_hard_5_*.png"))) == 2


def test_one_picture_with_a_box_needs_no_proxy(given, study, picture, tmp_path):
    picture.save(tmp_path / "one.png")
    more = ["--picture", tmp_path / "one.png", "--instruction", INSTRUCTION, "--box", "10", "20", "90", "80"]
    done = run_here(*given, *more, "--store", study / "store.zarr", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "one.json").read_text())["box"] == [10, 20, 90, 80]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "give one of --picture"),
        ({"picture": "x.png"}, "--instruction"),
        ({"folder": "x", "data": "y"}, "give one of"),
        ({"folder": "x", "box": (1, 2, 3, 4)}, "--box is of one"),
        ({"folder": "x", "steps": 0}, "--steps 0"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(Refusal, match=said):
        RunConfig(**wrong)


def test_the_shipped_editor_edits_from_the_command_line(tmp_path):
    (scene,) = held_out(1, 3, "easy")
    scene.picture.save(tmp_path / "one.png")
    given = ("--picture", tmp_path / "one.png", "--instruction", scene.instruction, "--out", tmp_path / "out")
    done = run_here("edit", "run", *given)
    assert done.returncode == 0, done.stderr
    label = json.loads((tmp_path / "out" / "one.json").read_text())
    assert Overlay.of(label["overlay"]) == Overlay() and label["conditioning"]["way"] == "last"
    x1, y1, x2, y2 = label["box"]
    assert 0 <= x1 < x2 <= scene.picture.width and 0 <= y1 < y2 <= scene.picture.height
    made = Image.open(tmp_path / "out" / "one.png")
    assert made.size == scene.picture.size
    editor = Editor.load("pocket")
    verdict = SceneJudge.of_row(scene.row, lambda known: through(editor, known))(made.convert("RGB"))
    assert verdict.subject != "left" and not verdict.changed, "the object that is named changed, and no other"


def test_names_of_samples_become_names_of_files():
    from pathlib import Path

    from edit.run import paths_of

    names = ["a", "../../etc/passwd", "a/b", "ä ö", ".hidden", "x" * 400, "a b", "a_b"]
    found = [paths_of(Path("out"), name)[0] for name in names]
    assert len(set(found)) == len(names) and all(path.parent == Path("out") for path in found)
    assert all(len(path.name) < 200 and not path.name.startswith(".") for path in found)
