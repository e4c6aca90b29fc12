"""What the states say, from a store to findings and figures: real small stores, planted answers, hostile stores."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread

import store
from analysis.config import StatesConfig
from analysis.finding import Finding
from analysis.states import read as states_read
from analysis.states.findings import states
from extract.config import POCKET, PRESETS
from extract.run import extract as run
from extract.scenes.shards import ScenesConfig, write_scenes
from store.bits import from_float32
from store.errors import Refusal

LAYERS = ("embed", "0", "1", "final")
WIDTH = 24
MARKED = 1.5e30


def made(
    folder,
    n=120,
    seed=0,
    planted="0",
    layers=LAYERS,
    places=True,
    boxes=True,
    instruction=True,
    spoiled=None,
    shared=(),
):
    """A store whose image tokens spell their cell at ``planted``, and whose words spell the object's cell there.

    ``shared`` samples have the picture of sample 0; one number of the words of sample ``spoiled`` at block 0 is MARKED.
    """
    rng = np.random.default_rng([seed, 1])
    facts = np.random.default_rng(5)
    object_n = facts.integers(0, 9, n)
    n_text = facts.integers(3, 7, n)
    centre = np.stack([object_n % 3, object_n // 3], 1) * [100, 50] + [50, 25]
    samples = pl.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(n)],
            "instruction": ["remove the ball"] * n,
            "width": [300] * n,
            "height": [150] * n,
            "n_image": [9] * n,
            "n_text": n_text,
            "split": ["test" if i % 2 else "train" for i in range(n)],
            "image_crc32c": [0 if i in shared else i for i in range(n)],
        }
        | {
            name: centre[:, i % 2] + (-5, -5, 5, 5)[i] if boxes else [None] * n
            for i, name in enumerate(("x1", "y1", "x2", "y2"))
        },
        schema_overrides=dict.fromkeys(("x1", "y1", "x2", "y2"), pl.Float64),
    )
    letters = np.random.default_rng(7).normal(size=(9, WIDTH)) * 2
    plan = store.Plan(layers, WIDTH, samples, {"seed": seed}, samples_per_block=16)
    store.create(folder, plan)
    with store.Writer(folder) as writer:
        for b in writer.blocks():
            with writer.block(b) as block:
                for s in block.samples:
                    image = rng.normal(size=(len(layers), 9, WIDTH)).astype(np.float32)
                    text = rng.normal(size=(len(layers), n_text[s], WIDTH)).astype(np.float32)
                    if planted in layers:
                        image[layers.index(planted)] += letters
                        text[layers.index(planted), 1:] += letters[object_n[s]]
                    if s == spoiled:
                        text[1, 1, 3] = MARKED
                    kinds = (
                        ["template"] + ["image"] * 9 + ["instruction" if instruction else "template"] * (n_text[s] - 1)
                    )
                    cell = np.arange(9)
                    corner = {
                        "px1": cell % 3 * 100,
                        "py1": cell // 3 * 50,
                        "px2": cell % 3 * 100 + 100,
                        "py2": cell // 3 * 50 + 50,
                    }
                    around = {name: [None, *map(float, own), *[None] * (n_text[s] - 1)] for name, own in corner.items()}
                    tokens = pl.DataFrame(
                        {"position": range(len(kinds)), "kind": kinds, "token_id": range(len(kinds))}
                        | (around if places else {})
                    )
                    block.add(s, image=from_float32(image), text=from_float32(text), tokens=tokens)
    return str(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return made(folder / "store"), made(folder / "random", seed=3, planted=None)


def ask(path, out, **changes):
    return {
        one.name: one for one in states(StatesConfig(path, Path(out), **{"no_lens": True, "samples": 60} | changes))
    }


@pytest.fixture(scope="module")
def findings(stores, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return ask(stores[0], out, random_weights=stores[1]), out


def test_three_questions_are_answered_with_figures_tables_and_floors(findings):
    found, out = findings
    assert list(found) == ["norms", "similarity", "position"]
    for one in found.values():
        assert one.question.endswith("?")
        assert one.caveats
        for drawn in one.figures:
            assert drawn.caption
            picture = imread(out / f"{drawn.name}.png")
            assert 0.01 < (picture[..., :3].mean(-1) < 0.9).mean() < 0.7  # drawn on, and not filled
            assert (out / f"{drawn.name}.csv").exists()
        assert set(next(iter(one.tables.values()))["source"]) == {"store", "random-weights"}


def test_a_finding_is_read_back_as_it_was_saved(findings, tmp_path):
    for name, one in findings[0].items():
        one.save(tmp_path)
        again = Finding.load(tmp_path, name)
        assert again.answer == one.answer
        assert all(again.tables[key].equals(table) for key, table in one.tables.items())


def test_planted_places_are_found_in_their_layer_and_not_with_random_weights(findings):
    table = findings[0]["position"].tables["accuracy"].filter(metric="cell", labels="true")
    for question in ("token", "object"):
        rows = {(row["source"], row["layer"]): row for row in table.filter(question=question).to_dicts()}
        assert rows["store", "0"]["low"] > 0.7
        for other in (("store", "embed"), ("store", "final"), ("random-weights", "0")):
            assert rows[other]["high"] < 0.4
    assert "is read best at 0" in findings[0]["position"].answer


def test_norms_are_those_of_the_states_that_were_chosen(stores, findings):
    opened = store.open(stores[0])
    chosen = states_read.choose(opened, None, StatesConfig(stores[0], samples=60))
    read, mask = opened.read(chosen.read, "1", "image")
    mean = read.float().norm(dim=-1)[:, 0][mask].mean().item()
    (row,) = (
        findings[0]["norms"].tables["layers"].filter(source="store", layer="1", kind="image", metric="mean").to_dicts()
    )
    assert row["value"] == pytest.approx(mean, rel=1e-5)
    assert (row["images"], row["tokens"]) == (60, 540)


def test_the_samples_that_teach_the_objects_place_are_of_other_pictures(tmp_path):
    path = made(tmp_path / "store", n=64, shared=(0, 3, 6, 9, 12))
    opened = store.open(path)
    chosen = states_read.choose(opened, None, StatesConfig(path, samples=20))
    pictures = opened.samples["image_crc32c"].to_numpy()[chosen.all]
    assert len(set(pictures.tolist())) == len(pictures)
    assert set(opened.samples["split"][chosen.read.tolist()]) == {"test"}


def test_the_same_call_gives_the_same_bits_and_another_seed_other_samples(stores, findings, tmp_path):
    again = ask(stores[0], tmp_path / "a", random_weights=stores[1])
    for name, one in again.items():
        assert all(table.equals(findings[0][name].tables[key]) for key, table in one.tables.items())
        assert one.answer == findings[0][name].answer
    other = ask(stores[0], tmp_path / "b", samples=20, seed=1)["norms"].tables["layers"]
    assert not other.equals(ask(stores[0], tmp_path / "c", samples=20)["norms"].tables["layers"])


def test_layers_in_groups_and_samples_in_small_batches_give_the_same_findings(stores, findings, tmp_path, monkeypatch):
    monkeypatch.setattr(states_read, "GROUP_BYTES", 1)
    monkeypatch.setattr(states_read, "BATCH_BYTES", 4000)
    assert len(states_read.grouped(LAYERS, WIDTH, 60)) == 4
    again = ask(stores[0], tmp_path, random_weights=stores[1])
    for name, one in again.items():
        for key, table in one.tables.items():
            wanted = findings[0][name].tables[key]
            order = [column for column in table.columns if table[column].dtype == pl.String]
            numbers = ("value", "low", "high")
            table, wanted = table.sort(order), wanted.sort(order)
            assert table.drop(numbers, strict=False).equals(wanted.drop(numbers, strict=False))
            for number in set(numbers) & set(table.columns):
                assert np.allclose(
                    table[number].to_numpy(), wanted[number].to_numpy(), rtol=1e-4, atol=1e-4, equal_nan=True
                )


def test_a_store_without_places_or_boxes_says_what_it_cannot_answer(tmp_path):
    path = made(tmp_path / "store", n=40, places=False, boxes=False)
    found = ask(path, tmp_path / "out")
    assert found["position"].answer.count("Not asked") == 2
    assert not found["position"].figures
    assert found["norms"].figures


def test_a_store_without_an_instruction_is_asked_of_its_pictures_alone(tmp_path):
    path = made(tmp_path / "store", n=40, instruction=False)
    found = ask(path, tmp_path / "out")
    assert "Not asked, the cell of the edited object" in found["position"].answer
    assert set(found["position"].tables["accuracy"]["question"]) == {"token"}
    assert set(found["norms"].tables["layers"]["kind"]) == {"image", "template"}


@pytest.mark.parametrize("layer", ["0", "final"])
def test_one_layer_and_eight_samples_are_enough(tmp_path, layer):
    path = made(tmp_path / "store", n=40, layers=(layer,))
    found = ask(path, tmp_path / "out", samples=8)
    assert found["norms"].tables["layers"]["layer"].unique().to_list() == [layer]
    assert all((tmp_path / "out" / f"{drawn.name}.png").exists() for one in found.values() for drawn in one.figures)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"split": "dev"}, "split 'dev'"), ({"samples": 4}, "--samples 4"), ({"no_lens": False}, "--no-lens")],
)
def test_what_cannot_be_asked_is_refused_in_words(stores, tmp_path, changes, said):
    with pytest.raises(Refusal, match=said):
        ask(stores[0], tmp_path, **changes)


@pytest.mark.parametrize(("value", "sample"), [(float("nan"), 5), (float("inf"), 5), (float("nan"), 4)])
def test_states_that_are_not_finite_are_refused_by_their_layer(tmp_path, value, sample):
    # A writer takes no such states: they come by damage of the disk, or by another hand. Sample 4 only teaches.
    path = made(tmp_path / "store", n=32, spoiled=sample)
    found, put = (from_float32(np.float32([number])).tobytes() for number in (MARKED, value))
    for shard in Path(path).glob("hidden/text/**/c/**/*"):
        if shard.is_file() and found in (data := shard.read_bytes()):
            shard.write_bytes(data.replace(found, put))
    with pytest.raises(Refusal, match="not finite at layer 0: `python -m store verify"):
        ask(path, tmp_path / "out")


def test_a_damaged_shard_is_refused_with_what_verifies_a_store(tmp_path):
    path = made(tmp_path / "store", n=32)
    for shard in Path(path).glob("hidden/text/**/c/**/*"):
        if shard.is_file():
            shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(Refusal, match="python -m store verify"):
        ask(path, tmp_path / "out")


def test_a_control_with_fewer_layers_is_compared_on_those_and_one_without_the_samples_is_refused(stores, tmp_path):
    fewer = made(tmp_path / "fewer", seed=4, layers=("0", "final"))
    found = ask(stores[0], tmp_path / "out", random_weights=fewer)
    assert found["norms"].tables["layers"]["layer"].unique(maintain_order=True).to_list() == ["0", "final"]
    few = made(tmp_path / "few", n=6)
    with pytest.raises(Refusal, match="8 and 1 are needed"):
        ask(stores[0], tmp_path / "out", random_weights=few)


def test_the_lens_of_a_pocket_store_is_better_at_the_end_than_at_the_start_and_than_unigrams(tmp_path):
    write_scenes(ScenesConfig(tmp_path / "scenes", samples=40, seed=5, difficulty="easy"))
    config = dataclasses.replace(
        PRESETS[POCKET], data=str(tmp_path / "scenes"), store=tmp_path / "pocket", vlm_boxes=False, loaders=0
    )
    assert run(config) == 0
    splits = store.open(tmp_path / "pocket").samples["split"].value_counts(sort=True)
    found = ask(tmp_path / "pocket", tmp_path / "out", no_lens=False, samples=16, split=splits["split"][0])["lens"]
    rows = {(row["source"], row["layer"], row["metric"]): row for row in found.tables["layers"].to_dicts()}
    final, embed, floor = (
        rows["store", "final", "log_p"],
        rows["store", "embed", "log_p"],
        rows["unigram", None, "log_p"],
    )
    assert final["low"] > embed["high"]
    assert final["low"] > floor["high"]
    assert abs(rows["store", "11", "log_p"]["value"] - final["value"]) < 0.02  # the last block, by way of the norm
    assert rows["store", "final", "agreement"]["value"] == 1
    assert found.tables["readings"]["top"].str.len_chars().max() > 1
    assert (tmp_path / "out" / "figure-7-states-lens.png").exists()
