"""The encoder: what a store of an identity holds, for a picture at hand; and what it says to bad input."""

import dataclasses
import io
import shutil
import subprocess
import sys

import polars as pl
import pytest
import torch
from PIL import Image

import extract
import store
from extract.config import POCKET, PRESETS
from extract.pipeline import TOLERANCE
from extract.pocket.build import WEIGHTS
from extract.run import extract as run
from extract.scenes.shards import ScenesConfig, write_scenes
from store.errors import Refusal

LAYERS = ("embed", "4", "11", "final")
TOKENS = ("image", "text", "all", "instruction", "template")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=24, seed=21, difficulty="hard"))
    return folder


@pytest.fixture(scope="module")
def pairs(scenes):
    rows = pl.read_parquet(scenes / "*.parquet")
    return [(row["src_img"]["bytes"], row["edited_prompt_list"][0]) for row in rows.iter_rows(named=True)]


@pytest.fixture(scope="module")
def stores(scenes, tmp_path_factory):
    """A function of settings that makes a store of the pocket model, each once."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def make(**settings):
        key = repr(settings)
        if key not in made:
            path = folder / f"{len(made)}.zarr"
            config = dataclasses.replace(PRESETS[POCKET], data=str(scenes), store=path, vlm_boxes=False, loaders=0)
            assert run(dataclasses.replace(config, **settings)) == 0
            made[key] = store.open(path)
        return made[key]

    return make


@pytest.fixture(scope="module")
def alone(stores):
    """A store whose samples went through the model one by one."""
    return stores(batch_size=1)


@pytest.fixture(scope="module")
def encoder(alone):
    return extract.Encoder.of(alone.identity)


def same_bits(one, other):
    return one[0].dtype == other[0].dtype and one[0].equal(other[0]) and one[1].equal(other[1])


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_picture_of_a_store_gives_what_the_store_holds_bit_for_bit(alone, encoder, pairs, tokens):
    for number in (0, 7, 23):
        assert same_bits(encoder.read(*pairs[number], LAYERS, tokens), alone.read([number], LAYERS, tokens))


def test_layers_come_in_the_order_asked_for_and_one_may_be_named_by_itself(alone, encoder, pairs):
    assert same_bits(encoder.read(*pairs[2], ("final", "3"), "text"), alone.read([2], ("final", "3"), "text"))
    assert same_bits(encoder.read(*pairs[2], "3"), alone.read([2], "3"))
    assert encoder.layers == alone.layers


def test_several_pairs_are_padded_as_a_store_pads_them(stores, pairs):
    batched = stores(batch_size=24)
    encoder = extract.Encoder.of(batched.identity)
    # One block, one batch: the same neighbours as there, in the same order.
    assert same_bits(encoder.read_many(pairs, LAYERS, "all"), batched.read(range(24), LAYERS, "all"))
    some = [5, 0, 11]
    (here, mask), (there, expected) = (
        encoder.read_many([pairs[n] for n in some], LAYERS, "instruction"),
        batched.read(some, LAYERS, "instruction"),
    )
    assert mask.equal(expected) and (here[~mask[:, None].expand(here.shape[:3])] == 0).all()
    here, there = (states.float().transpose(0, 1).flatten(1) for states in (here, there))
    apart = (here - there).norm(dim=1) / there.norm(dim=1)
    assert (apart <= TOLERANCE[torch.bfloat16]).all()


def test_no_pairs_are_no_states(encoder):
    states, mask = encoder.read_many([], LAYERS, "text")
    assert states.shape[:2] == (0, 4) and mask.shape == (0, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"max_pixels": 20 * 28 * 28},
        {"positions": "sequential"},
        {"conditioning": "edit-plus", "max_pixels": None},
        {"control": "random-weights"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_are_taken_from_the_identity(stores, pairs, settings):
    opened = stores(batch_size=1, limit=3, **settings)
    encoder = extract.Encoder.of(opened.identity)
    for number in range(3):
        assert same_bits(encoder.read(*pairs[number], LAYERS, "all"), opened.read([number], LAYERS, "all"))


def test_a_picture_may_be_a_path_bytes_or_pillows_own_and_is_turned_upright(encoder, pairs, tmp_path):
    encoded, instruction = pairs[1]
    (tmp_path / "a.jpg").write_bytes(encoded)
    expected = encoder.read(encoded, instruction, "final")
    for image in (tmp_path / "a.jpg", str(tmp_path / "a.jpg"), Image.open(io.BytesIO(encoded))):
        assert same_bits(encoder.read(image, instruction, "final"), expected)
    turned = Image.open(io.BytesIO(encoded)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert same_bits(encoder.read(tmp_path / "turned.png", instruction, "final"), expected)
    assert same_bits(encoder.read(Image.open(tmp_path / "turned.png"), instruction, "final"), expected)


def test_the_threads_of_others_stay_as_they_are(encoder, pairs):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    encoder.read(*pairs[0], "embed")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (lambda good: good[:-400], "image truncated"),
        (lambda good: good[:10], "cannot be decoded"),
        (lambda good: b"", "cannot be decoded"),
        (lambda good: Image.new("RGB", (4, 400)), "absurd size"),
        (lambda good: Image.new("F", (64, 64)), "mode F"),
        (lambda good: Image.open(io.BytesIO(good[:-400])), "image truncated"),
        (lambda good: "/nowhere/at/all.png", "/nowhere/at/all.png"),
        (lambda good: 17, "17"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_refusal_that_says_why(encoder, pairs, image, says):
    with pytest.raises(Refusal, match=f"picture of pair 1.*{says}"):
        encoder.read_many([pairs[0], (image(pairs[0][0]), "Remove the ball.")], "final")


@pytest.mark.parametrize(
    ("instruction", "says"),
    [
        ("", "empty prompt"),
        (" \n ", "empty prompt"),
        (None, "it is a NoneType"),
        ("remove <|image_pad|> it", "special tokens"),
        ("remove the ball " * 600, "too long: .* 512 are allowed"),
    ],
)
def test_an_instruction_that_cannot_be_used_is_a_refusal_that_names_it(encoder, pairs, instruction, says):
    with pytest.raises(Refusal, match=f"instruction of pair 0 .*{says}"):
        encoder.read(pairs[0][0], instruction, "final")


def test_unknown_layers_and_kinds_are_refused_with_those_there_are(encoder, pairs):
    with pytest.raises(Refusal, match=r"layer '12' .* embed, 0, .*, 11, final"):
        encoder.read(*pairs[0], ("4", "12"))
    with pytest.raises(Refusal, match=r"\(none\)"):
        encoder.read(*pairs[0], ())
    with pytest.raises(Refusal, match=r"kind 'verbs': ask for all, image, text, instruction, template"):
        encoder.read(*pairs[0], "4", "verbs")


def test_a_folder_of_other_weights_or_another_tokenizer_is_refused_by_file(alone, tmp_path):
    same, words, weights = (shutil.copytree(WEIGHTS, tmp_path / name) for name in ("same", "words", "weights"))
    assert extract.Encoder.of(alone.identity, model=same).layers == alone.layers
    with (words / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(Refusal, match=r"not the model of the store: tokenizer tokenizer\.json"):
        extract.Encoder.of(alone.identity, model=words)
    damaged = bytearray((weights / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (weights / "model.safetensors").write_bytes(damaged)
    with pytest.raises(Refusal, match=r"weights model\.safetensors"):
        extract.Encoder.of(alone.identity, model=str(weights))
    with pytest.raises(Refusal, match="processor patch_size"):
        extract.Encoder.of(alone.identity | {"processor": alone.identity["processor"] | {"patch_size": 16}})


def test_a_local_folder_that_is_not_here_is_refused_with_the_mend(stores, scenes, pairs, tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, folder := tmp_path / "my-checkpoint")
    opened = stores(model=str(folder), limit=2, batch_size=1)
    assert opened.identity["model"] == "my-checkpoint"
    with pytest.raises(Refusal, match=r"'my-checkpoint'.*model='/path/to/its/folder'"):
        extract.Encoder.of(opened.identity)
    encoder = extract.Encoder.of(opened.identity, model=folder)
    assert same_bits(encoder.read(*pairs[0], "final"), opened.read([0], "final"))
    with pytest.raises(Refusal, match=r"nowhere.*give model="):
        extract.Encoder.of(opened.identity, model="/nowhere/at/all")


def test_an_identity_that_is_no_extractions_is_refused():
    with pytest.raises(Refusal, match=r"no 'model'.*python -m extract"):
        extract.Encoder.of({"width": 8})


def test_other_libraries_are_said_but_not_refused(alone, pairs):
    other = alone.identity | {"libraries": alone.identity["libraries"] | {"torch": "1.0"}}
    with pytest.warns(UserWarning, match=r"last bits: torch 1\.0 there"):
        extract.Encoder.of(other)


def test_importing_extract_alone_loads_no_torch():
    code = "import sys, extract; assert 'torch' not in sys.modules; extract.Encoder; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        _ = extract.encode
