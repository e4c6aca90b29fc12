"""Control stores: the samples of the ordinary one, with the learning or the picture taken away, and nothing else."""

import dataclasses
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import run_here

import store
from extract.capture import single_pass
from extract.config import PAPER, POCKET, PRESETS, ExtractConfig
from extract.control import CONTROL_SEED, OF_PICTURE, derange, show_others
from extract.model import draw_model, load_model, load_processor
from extract.omniedit import BOX_COLUMNS, decode
from extract.pocket.build import WEIGHTS
from extract.run import extract
from extract.scenes.shards import ScenesConfig, write_scenes
from extract.sequence import conditioner_for
from store.errors import Refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(ScenesConfig(folder, samples=80, seed=11, difficulty="hard"))
    return folder


@pytest.fixture(scope="module")
def config(scenes):
    return dataclasses.replace(
        PRESETS[POCKET], data=str(scenes), limit=70, batch_size=16, held_out=0.3, loaders=0, layers="embed,5,final"
    )


@pytest.fixture(scope="module")
def stores(config, tmp_path_factory):
    """The ordinary store and both controls, by name."""
    folder, made = tmp_path_factory.mktemp("stores"), {}
    for control in ("none", "random-weights", "shuffled-images"):
        path = folder / f"{control}.zarr"
        # The ordinary one asks the model for boxes, too, as the preset does.
        assert extract(dataclasses.replace(config, store=path, control=control)) == 0
        made[control] = store.open(path)
    return made


def again(stores, config, control, path, **other):
    """Another store by the settings of a control's; its content hash and that of the first."""
    assert extract(dataclasses.replace(config, store=path, control=control, **other)) == 0
    return store.verify(path).content_hash, store.verify(stores[control].path).content_hash


@pytest.mark.parametrize("control", ["random-weights", "shuffled-images"])
def test_a_controls_samples_are_the_ordinary_stores(stores, control):
    same = ["sample_id", "split", "instruction", "task", "n_text", "n_query", "valid"]
    ordinary, here = stores["none"].samples, stores[control].samples
    assert here.select(same).equals(ordinary.select(same))
    assert set(here["split"]) == {"train", "test"} and here["valid"].all()
    assert not [name for name in here.columns if name.startswith("vlm_")]


def test_random_weights_change_nothing_but_the_states(stores):
    ordinary, here = stores["none"], stores["random-weights"]
    both = [name for name in ordinary.samples.columns if not name.startswith("vlm_")]
    assert here.samples.select(both).equals(ordinary.samples.select(both))
    assert here.tokens.collect().equals(ordinary.tokens.collect())
    assert set(here.identity["weights"]) == {"config.json"} < set(ordinary.identity["weights"])
    assert here.identity["control"] == {"name": "random-weights", "seed": CONTROL_SEED}
    changed = {"weights", "control"}
    rest = [{k: v for k, v in one.identity.items() if k not in changed} for one in (here, ordinary)]
    assert rest[0] == rest[1]
    (a, mask), (b, _) = (one.read(range(8), ["5", "final"], "all", dtype="float32") for one in (here, ordinary))
    real = mask[:, None, :, None]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[mask[:, None].expand(-1, 2, -1)]
    assert a.isfinite().all() and (a.norm(dim=-1)[real[..., 0].expand(-1, 2, -1)] > 0).all()
    assert cosine.abs().mean() < 0.3


def test_an_ordinary_stores_identity_names_no_control(stores):
    assert "control" not in stores["none"].identity
    assert "shown" not in stores["none"].samples.columns


@pytest.mark.slow
def test_random_weights_again_are_the_same_store_bit_for_bit(stores, config, tmp_path):
    torch.manual_seed(1234)  # nobody else's draws matter
    first, second = again(stores, config, "random-weights", tmp_path / "again.zarr", loaders=1)
    assert first == second


def test_drawing_weights_leaves_others_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_model(WEIGHTS, CPU)
    assert torch.rand(3).equal(expected)


def test_drawn_weights_are_sane_and_another_seed_draws_others():
    one, other = draw_model(WEIGHTS, CPU), draw_model(WEIGHTS, CPU, seed=CONTROL_SEED + 1)
    table = one.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16 and not one.training
    assert table.isfinite().all() and (table.float().norm(dim=1) > 0).float().mean() > 0.99
    assert not table.equal(other.get_input_embeddings().weight)


def test_a_drawn_model_with_the_checkpoints_weights_gives_the_checkpoints_states(scenes):
    """So it differs from it in its weights and in nothing else."""
    learned, drawn = load_model(WEIGHTS, CPU), draw_model(WEIGHTS, CPU)
    drawn.load_state_dict(learned.state_dict())
    row = pl.read_parquet(scenes / "*.parquet").row(0, named=True)
    conditioner = conditioner_for(load_processor(WEIGHTS), learned.config, "native", "mrope")
    batch = conditioner.batch([(decode(row["src_img"]["bytes"]), row["edited_prompt_list"][0])])
    here, there = (single_pass(model, batch.inputs, ["embed", "6", "final"]).hidden for model in (drawn, learned))
    assert here.equal(there)


def test_weights_without_values_are_refused(monkeypatch):
    cls = type(draw_model(WEIGHTS, CPU))
    made = cls._from_config

    def spoiled(*given, **settings):
        model = made(*given, **settings)
        with torch.no_grad():
            model.model.language_model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(cls, "_from_config", spoiled)
    with pytest.raises(Refusal, match=r"layers\.2\.mlp\.up_proj"):
        draw_model(WEIGHTS, CPU)


def test_every_sample_is_shown_anothers_picture_of_its_split_and_every_picture_once(stores):
    samples = stores["shuffled-images"].samples
    ordinary = stores["none"].samples
    assert (samples["shown"] != samples["sample_id"]).all()
    assert sorted(samples["shown"]) == sorted(samples["sample_id"])
    split = dict(zip(ordinary["sample_id"], ordinary["split"], strict=True))
    assert [split[shown] for shown in samples["shown"]] == samples["split"].to_list()


def test_a_shuffled_samples_size_place_and_tokens_are_the_shown_pictures(stores):
    here, ordinary = stores["shuffled-images"], stores["none"]
    shown = here.samples.select(sample_id="shown").join(ordinary.samples, on="sample_id", maintain_order="left")
    assert here.samples.select(OF_PICTURE).equals(shown.select(OF_PICTURE))
    token = here.tokens.filter(pl.col("kind") == "image").group_by("sample").agg(pl.col("px2", "py2").max())
    edges = token.sort("sample").collect()
    assert edges["px2"].to_list() == pytest.approx(here.samples["width"].to_list(), abs=0.01)
    assert edges["py2"].to_list() == pytest.approx(here.samples["height"].to_list(), abs=0.01)


def test_a_shuffled_samples_box_keeps_its_shares_of_the_picture(stores):
    def shares(samples):
        return np.stack([samples[name] / samples["width" if name[0] == "x" else "height"] for name in BOX_COLUMNS], 1)

    here, ordinary = stores["shuffled-images"].samples, stores["none"].samples
    np.testing.assert_allclose(shares(here), shares(ordinary), rtol=1e-6)
    assert not here.select(BOX_COLUMNS).equals(ordinary.select(BOX_COLUMNS))


def test_shuffled_states_are_of_the_shown_picture_and_the_own_instruction(stores):
    here, ordinary = stores["shuffled-images"], stores["none"]
    ids = ordinary.samples["sample_id"].to_list()
    for number in (0, 33):
        row = here.samples.row(number, named=True)
        # What enters block 0 is the same wherever it stands: the picture of one sample, the words of the other.
        picture = ordinary.read([ids.index(row["shown"])], "embed", "image")[0]
        words = ordinary.read([number], "embed", "text")[0]
        torch.testing.assert_close(here.read([number], "embed", "image")[0], picture, rtol=0.02, atol=0.02)
        assert here.read([number], "embed", "text")[0].equal(words)


def test_shuffled_images_again_are_the_same_store_and_go_on_from_where_they_were(stores, config, tmp_path):
    path = tmp_path / "again.zarr"
    first, second = again(stores, config, "shuffled-images", path, loaders=1)
    assert first == second
    (log,) = (path / "record/commits").glob("*.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:1]))
    assert len(store.pending(path)) == 1
    assert again(stores, config, "shuffled-images", path)[0] == second


@pytest.mark.slow
def test_two_processes_share_the_blocks_of_shuffled_images(stores, config, tmp_path):
    path = tmp_path / "shared.zarr"
    given = ["--preset", "pocket", "--data", config.data, "--store", str(path), "--limit", "70", "--held-out", "0.3"]
    given += ["--batch-size", "16", "--layers", config.layers, "--control", "shuffled-images"]
    commands = [[sys.executable, "-m", "extract", *given, "--worker", name] for name in "ab"]
    workers = [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for one in commands]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert store.verify(path).content_hash == store.verify(stores["shuffled-images"].path).content_hash


def test_a_picture_that_is_shown_may_not_change_after_planning(config, scenes, tmp_path, monkeypatch):
    import shutil

    import extract.run as run

    shutil.copytree(scenes, data := tmp_path / "data")
    (shard,) = data.glob("*.parquet")

    def plan_then_change(*given):
        planned = real(*given)
        table = pq.read_table(shard)
        rows = table.to_pylist()
        rows[3]["src_img"] = rows[4]["src_img"] | {}
        rows[3] |= {"width": rows[4]["width"], "height": rows[4]["height"], "box": None}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
        return planned

    real = run.read_plan
    monkeypatch.setattr(run, "read_plan", plan_then_change)
    path = tmp_path / "s.zarr"
    asked = dataclasses.replace(config, data=str(data), store=path, limit=20, control="shuffled-images")
    assert extract(asked) == 0
    samples = store.open(path).samples
    (changed,) = samples.filter(~pl.col("valid")).iter_rows(named=True)
    assert changed["shown"].endswith("_3") and changed["set_aside"] == "the data changed since it was planned"


@pytest.mark.parametrize("control", ["random-weights", "shuffled-images"])
def test_rows_without_a_box_are_refused_with_the_mend_or_set_aside_as_the_ordinary_store_does(
    config, tmp_path, control
):
    data = tmp_path / "medium"
    write_scenes(ScenesConfig(data, samples=30, seed=4, difficulty="medium"))
    asked = dataclasses.replace(config, data=str(data), store=tmp_path / "s.zarr", control=control, held_out=0.5)
    with pytest.raises(Refusal, match=f"--control {control}.*--boxes with the ordinary store"):
        extract(asked)
    assert not (tmp_path / "s.zarr").exists()
    ordinary = dataclasses.replace(asked, store=tmp_path / "o.zarr", control="none", vlm_boxes=False)
    assert extract(dataclasses.replace(asked, vlm_boxes=False)) == extract(ordinary) == 0
    here, there = (store.open(one.store) for one in (asked, ordinary))
    assert here.samples.select("sample_id", "split").equals(there.samples.select("sample_id", "split"))
    assert here.set_aside.equals(there.set_aside) and here.set_aside.height


def test_a_controls_store_is_beside_the_ordinary_one_unless_a_place_is_given():
    assert ExtractConfig(control="random-weights").store == "data/store-random-weights.zarr"
    shuffled = dataclasses.replace(PRESETS[PAPER], control="shuffled-images")
    assert shuffled.store == "data/store-paper-shuffled-images.zarr"
    assert ExtractConfig(control="shuffled-images", store="s3://bucket/a.zarr").store == "s3://bucket/a.zarr"
    assert ExtractConfig().store == "data/store.zarr"


def test_a_control_is_never_added_to_the_ordinary_store_nor_shuffled_images_grown(stores, config):
    ordinary = stores["none"].path
    for grow in (False, True):
        asked = dataclasses.replace(config, store=ordinary, control="random-weights", grow=grow)
        with pytest.raises(Refusal, match=r"identity\.control\.name|identity\.weights"):
            extract(asked)
    with pytest.raises(Refusal, match="--grow --control shuffled-images"):
        dataclasses.replace(config, control="shuffled-images", grow=True)


def test_random_weights_grow_by_layers_as_an_ordinary_store_does(stores, config, tmp_path):
    path = tmp_path / "grown.zarr"
    assert extract(dataclasses.replace(config, store=path, control="random-weights", layers="embed,5")) == 0
    first, second = again(stores, config, "random-weights", path, grow=True)
    assert first == second


def test_a_dry_run_of_a_control_says_sizes_and_writes_nothing(config, tmp_path):
    path = tmp_path / "s.zarr"
    given = ["--preset", "pocket", "--data", config.data, "--store", str(path), "--limit", "40", "--dry-run"]
    for control in ("random-weights", "shuffled-images"):
        done = run_here("extract", *given, "--loaders", "0", "--control", control)
        assert done.returncode == 0, done.stderr
        assert "hidden/image" in done.stdout and "boxes" not in done.stdout
    assert not path.exists()


@pytest.mark.parametrize("size", [2, 3, 7, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_derangement_takes_every_place_once_and_none_twice_or_its_own(size, seed):
    taken = derange(np.arange(size), np.random.default_rng(seed))
    assert sorted(taken) == list(range(size)) and (taken != np.arange(size)).all()
    assert taken.tolist() == derange(np.arange(size), np.random.default_rng(seed)).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_derangement_takes_no_place_of_its_own_group_while_none_has_more_than_half(seed):
    draw = np.random.default_rng(seed)
    groups = draw.permutation(np.repeat([7, 1, 4, 9, 2], [5, 2, 2, 1, 1]))
    taken = derange(groups, draw)
    assert sorted(taken) == list(range(len(groups))) and (groups[taken] != groups).all()
    assert derange(np.repeat([7, 1], [5, 4]), draw) is None


def test_one_picture_for_too_many_samples_is_refused_by_split():
    table = {"sample_id": ["a", "b", "c"], "split": ["train"] * 3, "image_crc32c": [5, 5, 6]}
    rest = dict.fromkeys(("width", "height", "n_image", "row"), [1] * 3) | {"file": ["f"] * 3}
    boxes = dict.fromkeys(BOX_COLUMNS, [0.5] * 3)
    with pytest.raises(Refusal, match="3 samples of the split 'train'"):
        show_others(pl.DataFrame(table | rest | boxes))


def test_samples_of_scenes_bring_what_strata_are_made_of(stores, scenes):
    rows = {row["omni_edit_id"]: row for row in pl.read_parquet(scenes / "*.parquet").iter_rows(named=True)}
    for control in ("none", "shuffled-images"):
        for sample in stores[control].samples.iter_rows(named=True):
            row = rows[sample["sample_id"]]
            (thing,) = (thing for thing in row["objects"] if thing["box"] == row["box"])
            found = [sample[name] for name in ("n_objects", "object_kind", "object_colour", "layout", "reference")]
            assert found == [len(row["objects"]), thing["kind"], thing["colour"], row["layout"], row["reference"]]


def test_what_is_to_be_added_is_no_object_yet_and_data_without_objects_have_no_strata(config, tmp_path):
    write_scenes(ScenesConfig(tmp_path / "medium", samples=40, seed=4, difficulty="medium"))
    (shard,) = (tmp_path / "medium").glob("*.parquet")
    table = pq.read_table(shard)
    added = table.filter(pa.compute.equal(table["task"], "addition"))
    words = added.set_column(added.schema.get_field_index("objects"), "objects", pa.array(["two"] * len(added)))
    own = added.append_column("n_objects", pa.array([99] * len(added)))
    found = {}
    for name, rows in {"added": added, "words": words, "own": own, "none": added.drop_columns("objects")}.items():
        (data := tmp_path / name).mkdir()
        pq.write_table(rows, data / "train-00000.parquet")
        if name == "own":  # as another writer names and types lists
            pl.from_arrow(rows).write_parquet(data / "train-00000.parquet")
        asked = dataclasses.replace(config, data=str(data), store=tmp_path / f"{name}.zarr", vlm_boxes=False)
        assert extract(asked) == 0
        found[name] = store.open(asked.store).samples
    assert found["added"].schema["object_kind"] == found["added"].schema["object_colour"] == pl.String
    assert found["added"]["object_kind"].null_count() == len(added)
    assert found["added"]["n_objects"].to_list() == [len(things) for things in added["objects"].to_pylist()]
    assert set(found["words"]["objects"]) == {"two"} and "n_objects" not in found["words"].columns
    assert set(found["own"]["n_objects"]) == {99} and "object_kind" in found["own"].columns
    assert not {"n_objects", "object_kind", "objects"} & set(found["none"].columns)


@pytest.mark.parametrize("control", ["random-weights", "shuffled-images"])
def test_a_control_takes_samples_and_boxes_of_the_ordinary_store_where_the_data_bring_none(config, tmp_path, control):
    write_scenes(ScenesConfig(tmp_path / "medium", samples=40, seed=4, difficulty="medium"))
    asked = dataclasses.replace(config, data=str(tmp_path / "medium"), limit=30, max_area=0.5)
    ordinary = dataclasses.replace(asked, store=tmp_path / "o.zarr")
    assert extract(ordinary) == 0
    there = store.open(ordinary.store)
    assert not there.valid.all()  # some of the model's boxes are none
    here = dataclasses.replace(asked, store=tmp_path / "c.zarr", control=control, boxes=str(ordinary.store))
    assert extract(here) == 0
    found, expected = store.open(here.store).samples, there.samples.filter("valid")
    assert found.select("sample_id", "split", "instruction").equals(
        expected.select("sample_id", "split", "instruction")
    )
    shares = [samples["x2"] / samples["width"] for samples in (found, expected)]
    np.testing.assert_allclose(*shares, rtol=1e-6)
    if control == "shuffled-images":
        with pytest.raises(Refusal, match="store of shuffled images"):
            extract(dataclasses.replace(asked, store=tmp_path / "d.zarr", boxes=str(here.store)))


def test_a_paraphrased_store_has_the_pictures_samples_and_boxes_and_other_words(config, stores, tmp_path):
    twin = tmp_path / "twin.zarr"
    assert extract(dataclasses.replace(config, store=twin, prompt=1, vlm_boxes=False)) == 0
    here, there = store.open(twin).samples, stores["none"].samples
    same = ["sample_id", "split", *BOX_COLUMNS, "image_crc32c", "reference"]
    assert here.select(same).equals(there.select(same))
    assert (here["instruction"] != there["instruction"]).all()
    assert store.open(twin).identity == stores["none"].identity


def test_prompt_zero_is_the_first_bit_for_bit(config, stores, tmp_path):
    paths = [tmp_path / "zero.zarr", tmp_path / "first.zarr"]
    for path, prompt in zip(paths, (0, "first"), strict=True):
        assert extract(dataclasses.replace(config, store=path, prompt=prompt, limit=20)) == 0
    reports = [store.verify(path) for path in paths]
    assert reports[0].content_hash == reports[1].content_hash
    assert reports[0].identity_hash == reports[1].identity_hash
