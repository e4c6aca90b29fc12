"""A trained probe: one line from a picture to its answer, and what is said of folders that hold no whole probe."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys

import polars as pl
import pytest
import torch
from PIL import Image
from planted import SMALL, planted_store

import extract
import probes
import store
from extract.config import POCKET, PRESETS
from extract.pocket.build import WEIGHTS as CHECKPOINT
from extract.run import extract as run
from extract.scenes.shards import ScenesConfig, write_scenes
from probes.config import TrainConfig
from probes.sweep import train
from probes.trained import MAKING, WEIGHTS


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A store of the pocket model whose samples went through it one by one, and its pictures and instructions."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(ScenesConfig(folder / "scenes", samples=24, seed=21, difficulty="hard"))
    config = dataclasses.replace(PRESETS[POCKET], data=str(folder / "scenes"), store=folder / "s.zarr", batch_size=1)
    assert run(dataclasses.replace(config, vlm_boxes=False, loaders=0)) == 0
    rows = pl.read_parquet(folder / "scenes" / "*.parquet").iter_rows(named=True)
    return folder / "s.zarr", [(row["src_img"]["bytes"], row["edited_prompt_list"][0]) for row in rows]


@pytest.fixture(scope="module")
def proxies(scenes, tmp_path_factory):
    """A function that gives the folder of a probe of a target, trained once, briefly."""
    folder = tmp_path_factory.mktemp("runs")

    def make(target="box", layers=("4", "final"), tokens="text"):
        out = folder / target
        train(TrainConfig(str(scenes[0]), out, target=target, layers=layers, tokens=tokens, seeds=(0,), **SMALL))
        return next((out / "proxies").iterdir())

    return make


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder of a run on a store that no model filled."""
    folder = tmp_path_factory.mktemp("planted")
    path = planted_store(folder / "store")
    train(TrainConfig(str(path), folder / "probes", layers=("1",), seeds=(0,), **SMALL))
    return folder / "probes"


@pytest.fixture
def proxy(planted, tmp_path):
    """A copy of a probe's folder, to be damaged."""
    return shutil.copytree(planted / "proxies" / "layer-1-seed0", tmp_path / "layer-1-seed0")


def from_store(probe, opened, sample, **more):
    return probe.predict_states(*opened.read([sample], probe.spec.layers, probe.spec.tokens), **more)


def test_a_box_is_in_pixels_of_the_picture_and_as_the_stored_states_say(scenes, proxies):
    (path, pairs), probe = scenes, probes.load(proxies())
    opened = store.open(path)
    for number in (0, 7, 23):
        found, maps = probe.predict(*pairs[number], attention=True)
        unit, expected = from_store(probe, opened, number, attention=True)
        width, height = opened.samples.row(number)[3:5]
        assert (width, height) == Image.open(io.BytesIO(pairs[number][0])).size
        assert found.dtype == torch.float32 and found.shape == (4,)
        torch.testing.assert_close(found, unit[0] * torch.tensor([width, height, width, height]), atol=1e-3, rtol=0)
        torch.testing.assert_close(maps, expected[0])


def test_classes_are_answered_as_strings_and_numbers_as_floats(scenes, proxies):
    pairs, opened = scenes[1], store.open(scenes[0])
    cells, number = (probes.load(proxies(target)) for target in ("cell-3x3", "x1"))
    assert cells.predict(*pairs[3]) == from_store(cells, opened, 3)[0] and "row" in cells.predict(*pairs[3])
    found = number.predict(*pairs[3])
    assert isinstance(found, float) and found == pytest.approx(float(from_store(number, opened, 3)[0]), abs=1e-3)


def test_a_picture_may_be_a_path_or_pillows_own_and_the_box_is_of_it_upright(scenes, proxies, tmp_path):
    (encoded, instruction), probe = scenes[1][1], probes.load(proxies())
    expected = probe.predict(encoded, instruction)
    (tmp_path / "a.jpg").write_bytes(encoded)
    turned, exif = Image.open(io.BytesIO(encoded)).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg"), str(tmp_path / "turned.png")):
        assert probe.predict(image, instruction).equal(expected)


def test_the_model_is_loaded_once_from_where_it_is_said_to_be(scenes, proxies, monkeypatch, tmp_path):
    (_, pairs), probe = scenes, probes.load(proxies())
    asked, whole = [], extract.Encoder.of
    monkeypatch.setattr(
        extract.Encoder, "of", lambda *given, **more: asked.append(more["model"]) or whole(*given, **more)
    )
    expected = probe.predict(*pairs[0])
    assert probe.predict(*pairs[0]).equal(expected) and asked == [None]
    folder = shutil.copytree(CHECKPOINT, tmp_path / "same")
    for _ in range(2):
        assert probe.predict(*pairs[0], vlm=folder).equal(expected)
    assert asked == [None, str(folder)]
    encoder = whole(probe.making["store"]["identity"])
    assert probe.predict(*pairs[0], vlm=encoder).equal(expected) and len(asked) == 2


def test_bad_pictures_instructions_and_models_are_refused_by_name(scenes, proxies, planted, tmp_path):
    (encoded, instruction), probe = scenes[1][0], probes.load(proxies())
    for image, says in ((encoded[:-400], "truncated"), ("/nowhere.png", r"/nowhere\.png"), (None, "None")):
        with pytest.raises(store.Refusal, match=f"the picture .*{says}"):
            probe.predict(image, instruction)
    for words in ("", None, "remove <|image_pad|> it"):
        with pytest.raises(store.Refusal, match="the instruction"):
            probe.predict(encoded, words)
    with pytest.raises(store.Refusal, match=r"vlm=17 reads no picture"):
        probe.predict(encoded, instruction, vlm=17)
    with pytest.raises(store.Refusal, match=r"nowhere.*give model="):
        probe.predict(encoded, instruction, vlm="/nowhere/at/all")
    other = shutil.copytree(CHECKPOINT, tmp_path / "other")
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(store.Refusal, match="is not the model of the store"):
        probe.predict(encoded, instruction, vlm=other)
    without = probes.load(planted / "proxies" / "layer-1-seed0")
    with pytest.raises(store.Refusal, match="identity has no 'model'"):
        without.predict(encoded, instruction)
    with pytest.raises(store.Refusal, match=r"reads states .* 16"):
        without.predict(encoded, instruction, vlm=extract.Encoder.of(probe.making["store"]["identity"]))


def told(folder, **more):
    making = json.loads((folder / MAKING).read_text())
    (folder / MAKING).write_text(json.dumps(making | more))
    return making


def test_a_probe_of_drawn_keys_answers_for_no_picture(proxy):
    told(proxy, spec=told(proxy)["spec"] | {"keys": 4})
    with pytest.raises(store.Refusal, match=r"reads 4 keys drawn .* cannot answer for a picture: .* layer-1"):
        probes.load(proxy).predict("a.png", "Remove it.")


def test_loading_needs_neither_the_model_nor_extract(proxy):
    code = f"import sys, probes; assert 'torch' not in sys.modules; probes.load({str(proxy)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and not {"extract", "transformers"} & set(loaded)


def test_a_run_and_other_folders_are_refused_with_what_to_give_instead(planted, tmp_path):
    for folder in (planted, planted / "proxies"):
        with pytest.raises(store.Refusal, match=r"has 1 of them, give one, e\.g\. .*proxies/layer-1-seed0"):
            probes.load(folder)
    with pytest.raises(store.Refusal, match=r"lacks probe\.json; give one of a run"):
        probes.load(tmp_path)
    for nothing in (tmp_path / "nothing", planted / "results.parquet"):
        with pytest.raises(store.Refusal, match="no such folder; `python -m probes sweep`"):
            probes.load(str(nothing))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"seed": 0}', '{"spec": {"name": "a", "layers": ["1"], "colour": 3}, "seed": 0}', "\xff"]
)
def test_a_description_that_is_damaged_is_refused_by_its_file(proxy, text):
    (proxy / MAKING).write_bytes(text.encode("latin1"))
    with pytest.raises(store.Refusal, match=r"layer-1-seed0/probe\.json is damaged .*train"):
        probes.load(proxy)


@pytest.mark.parametrize("change", [{"sizes": {}}, {"sizes": {"wings": 2}}, {"width": "wide"}, {"target": {}}])
def test_a_description_of_no_probe_is_refused_by_its_file(proxy, change):
    told(proxy, **change)
    with pytest.raises(store.Refusal, match=r"layer-1-seed0/probe\.json describes no probe"):
        probes.load(proxy)


def test_weights_that_are_damaged_missing_or_of_another_probe_are_refused_by_their_file(proxy):
    weights, data = proxy / WEIGHTS, (proxy / WEIGHTS).read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 1
    making = json.loads((proxy / MAKING).read_text())
    for sealed in (True, False):
        if not sealed:  # as probes of before the hash was kept
            (proxy / MAKING).write_text(json.dumps({name: making[name] for name in making if name != "weights"}))
        for damaged in (data[:-7], data[:5], b"", b"nonsense" * 40, *([bytes(flipped)] if sealed else [])):
            weights.write_bytes(damaged)
            with pytest.raises(
                store.Refusal, match=r"layer-1-seed0/probe\.safetensors is not of this probe or damaged"
            ):
                probes.load(proxy)
    weights.unlink()
    with pytest.raises(store.Refusal, match=r"probe\.safetensors.* No such file"):
        probes.load(proxy)
    weights.write_bytes(data)
    assert probes.load(proxy).seed == 0
    told(proxy, width=17)
    with pytest.raises(store.Refusal, match=r"probe\.safetensors is not of this probe .*size mismatch"):
        probes.load(proxy)
