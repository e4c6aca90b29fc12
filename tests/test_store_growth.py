"""Growing: samples, layers and derived arrays come without touching what is there; arrays go; parts are copied."""

import dataclasses
import shutil
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import xarray as xr

import store
from store.__main__ import COMMANDS
from store.commandline import route
from store.inspection import describe, disk_usage
from store.repair import repair
from store.sealing import seal, unseal
from store.synthetic import fill_store, synthetic_plan, synthetic_store

ROWS = {"attention": ("text_to_image", "text_to_text"), "attention_layers": ("0",)}


def longer(plan, first, more_image=25, more_text=14):
    """The plan with longer samples from ``first`` on: they need further units."""
    late = pl.int_range(pl.len()) >= first
    samples = plan.samples.with_columns(
        n_image=pl.col("n_image") + pl.when(late).then(more_image).otherwise(0),
        n_text=pl.col("n_text") + pl.when(late).then(more_text).otherwise(0),
    )
    return dataclasses.replace(plan, samples=samples.with_columns(n_query=pl.col("n_text") - 3))


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


@pytest.mark.parametrize("codec", ["zstd", "none", "planes"])
def test_a_store_that_grew_by_samples_and_layers_equals_one_made_at_once(tmp_path, codec):
    given = {"seed": 3, "image": (3, 9), "text": (5, 9), "codec": codec, "text_codec": codec} | ROWS
    whole = longer(synthetic_plan(30, layers=("embed", "0", "1", "final"), **given), 21)
    whole = dataclasses.replace(whole, attention_layers=("0", "1"))
    small = dataclasses.replace(whole, samples=whole.samples[:21], layers=("embed", "final"), attention_layers=("0",))
    grown = synthetic_store(tmp_path / "grown", small)
    before = files(grown)
    parts = store.grow(grown, whole)
    assert [part.layers for part in parts] == [("embed", "final"), ("0", "1")]
    assert [part.attention_layers for part in parts] == [("0",), ("1",)]
    assert store.pending(grown) == [3, 4] and store.pending(grown, 1) == [0, 1, 2, 3, 4]
    for part in parts:
        fill_store(grown, part=part.part)
    after = files(grown)
    for name, data in before.items():
        if "/c/" in name and not name.endswith(("sample/c/0", "layer/c/0")):
            assert after[name] == data, name
    at_once = synthetic_store(tmp_path / "at_once", whole)
    reports = store.verify(grown), store.verify(at_once)
    assert [report.ok for report in reports] == [True, True], reports
    assert reports[0].content_hash == reports[1].content_hash
    a, b = store.open(grown), store.open(at_once)
    assert a.layers == b.layers == ("embed", "0", "1", "final")
    assert a.samples.equals(b.samples) and a.tokens.collect().equals(b.tokens.collect())
    xr.testing.assert_equal(a.hidden.compute(), b.hidden.compute())
    xr.testing.assert_equal(a.attention.compute(), b.attention.compute())
    for tokens in ("all", "image", "instruction", "template"):
        for layout in ("padded", "ragged"):
            asked = {"layers": ["1", "embed", "0"], "tokens": tokens, "batch_size": 7, "layout": layout}
            for one, other in zip(a.batches(shuffle=True, **asked), b.batches(shuffle=True, **asked), strict=True):
                values = ("states", "mask") if layout == "padded" else ("values", "offsets")
                for name in values:
                    left, right = (getattr(of, name) for of in (one, other))
                    left, right = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (left, right))
                    assert torch.equal(left, right)


def test_stock_readers_see_added_samples_and_layers(tmp_path):
    plan = synthetic_plan(21, seed=3)
    path = synthetic_store(tmp_path / "store.zarr", plan)
    store.grow(path, synthetic_plan(30, seed=3, layers=("embed", "0", "1", "final")))
    for part in (0, 1):
        fill_store(path, part=part)
    opened, tree = store.open(path), xr.open_datatree(path)
    assert tree["hidden_1"].layer.values.tolist() == ["1"]
    assert tree["hidden"].sizes["sample"] == opened.plan.n_rows == 33
    ids = tree["hidden"].sample.values
    assert ids[opened.plan.rows].tolist() == opened.samples["sample_id"].to_list() and (ids == "").sum() == 3
    found = tree["hidden/text"].sel(sample="made-3-00025", layer="final").values
    (states, mask) = opened.read([25], "final", "text")
    np.testing.assert_array_equal(found[: int(mask.sum())], states[0, 0].view(torch.uint16).numpy())
    assert (tree["hidden/text"].values[21:24] == 0x7FC0).all()


def test_growing_twice_by_the_same_plan_changes_nothing_and_by_another_identity_is_refused(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    larger = synthetic_plan(12, seed=3)
    store.grow(path, larger)
    before = files(path)
    store.grow(path, larger)
    assert files(path) == before
    with pytest.raises(store.Refusal, match=r"identity.seed is 3 there and 4 here"):
        store.grow(path, synthetic_plan(12, seed=4))
    with pytest.raises(store.Refusal, match=r"width is 16 there and 8 here"):
        store.grow(path, synthetic_plan(12, seed=3, width=8))
    assert files(path) == before


def test_while_a_store_grows_the_old_samples_and_layers_are_there(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    store.grow(path, synthetic_plan(12, seed=3, layers=("embed", "0", "1", "final")))
    opened = store.open(path)
    assert opened.valid.tolist() == [True] * 9 + [False] * 3
    assert sum(len(batch.sample) for batch in opened.batches("final")) == 9
    assert np.isnan(opened.hidden.text.sel(layer="1").values).all()
    with pytest.raises(store.Refusal, match="no states"):
        opened.read([0], "1")
    report = store.verify(path)
    assert not report.ok and any("added layers 1" in problem for problem in report.problems)


def test_a_metadata_write_that_was_killed_is_completed_by_the_next_writer(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    old = files(path)
    store.grow(path, synthetic_plan(12, seed=3))
    # As if the plan was the last thing written.
    for name, data in old.items():
        if name.endswith(("zarr.json", "layout.json", "sample/c/0", "layer/c/0")):
            (path / name).write_bytes(data)
    assert store.open(path).plan.n_samples == 12
    fill_store(path)
    assert store.verify(path).ok and xr.open_zarr(path, group="hidden").sizes["sample"] == 19


def test_derived_arrays_are_added_whole_read_lazily_and_grow_with_nan(tmp_path):
    path = synthetic_store(tmp_path / "store.zarr", synthetic_plan(21, seed=3))
    rng = np.random.default_rng(0)
    mass, norms = rng.random((21, 4, 3), np.float32), rng.random((3, 16), np.float32)
    dims = ("sample", "head", "layer")
    with store.derive(path, "mass", dims, mass.shape, attributes={"probe": "ab12"}) as out:
        for start in range(0, 21, 5):
            assert "mass" not in store.open(path).derived
            out.write(mass[start : start + 5])
    layers = store.open(path).layers
    with store.derive(path, "norms", ("layer", "width"), norms.shape, coordinates={"layer": layers}) as out:
        out.write(norms)
    found = store.open(path).derived
    np.testing.assert_array_equal(found["mass"].values, mass)
    assert found["mass"].dims == dims and found["mass"].attrs["probe"] == "ab12"
    np.testing.assert_array_equal(found["norms"].sel(layer="final").values, norms[-1])
    assert store.verify(path).ok
    store.grow(path, synthetic_plan(25, seed=3))
    fill_store(path)
    grown = store.open(path).derived["mass"]
    np.testing.assert_array_equal(grown.values[:21], mass)
    assert grown.shape == (25, 4, 3) and np.isnan(grown.values[21:]).all()
    assert store.verify(path).ok
    tree = xr.open_datatree(path)
    np.testing.assert_array_equal(tree["derived/mass/mass"].values[:21], mass)
    assert tree["derived/norms"].layer.values.tolist() == list(layers)


def test_derived_arrays_of_one_axis_and_other_sizes_lie_side_by_side_and_stock_xarray_opens_each(tmp_path):
    path = synthetic_store(tmp_path / "store.zarr", synthetic_plan(9, seed=3))
    given = {}
    for heads in (2, 3):
        name, labels = f"mass-{heads}", [f"h{heads}.{n}" for n in range(heads)]
        given[name] = np.arange(9 * heads, dtype=np.float32).reshape(9, heads)
        with store.derive(path, name, ("sample", "head"), (9, heads), coordinates={"head": labels}) as out:
            out.write(given[name])
    store.grow(path, synthetic_plan(12, seed=3))
    fill_store(path)
    assert store.verify(path).ok
    rows, tree = store.open(path).plan.rows, xr.open_datatree(path)
    for name, values in given.items():
        mine, alone = store.open(path).derived[name], xr.open_zarr(path, group=f"derived/{name}")
        np.testing.assert_array_equal(mine.values[:9], values)
        np.testing.assert_array_equal(alone[name].values[rows[:9]], values)
        np.testing.assert_array_equal(tree[f"derived/{name}/{name}"].values, alone[name].values)
        assert (
            alone["head"].values.tolist()
            == mine["head"].values.tolist()
            == tree[f"derived/{name}"]["head"].values.tolist()
        )
        assert alone.sample.values[rows].tolist() == mine.sample.values.tolist()
        assert f"derived/{name}" in disk_usage(path) and name in describe(path)["derived"]
    store.drop(path, "derived/mass-2")
    assert list(store.open(path).derived) == ["mass-3"] and not (path / "derived/mass-2").exists()
    assert store.verify(path).ok


def test_a_derivation_that_was_killed_leaves_nothing_in_the_next_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("store.growth.SHARD_BYTES", 1)
    path = synthetic_store(tmp_path / "store.zarr", synthetic_plan(9, seed=3))
    killed = store.derive(path, "mass", ("sample", "x"), (9, 300_000))
    killed.write(np.ones((9, 300_000)))
    assert len(list((path / "derived/mass").rglob("c/*/0"))) == 8  # and no process there any more to take them away
    with store.derive(path, "mass", ("sample", "x"), (9, 300_000)) as out:
        out.write(np.full((9, 300_000), np.nan))
    assert np.isnan(store.open(path).derived["mass"].values).all() and store.verify(path).ok


def test_derived_arrays_of_format_2_0_stay_readable_and_those_of_2_1_fit_beside_them(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data/format-2.0.zarr.zip") as packed:
        packed.extractall(tmp_path)
    path = tmp_path / "format-2.0.zarr"
    before = files(path)

    def check():
        found, tree = store.open(path).derived, xr.open_datatree(path)
        rows = store.open(path).plan.rows[:9]
        assert store.verify(path).ok
        for mass in (found["mass"].values[:9], tree["derived/mass"].values[rows]):
            np.testing.assert_array_equal(mass, np.arange(18).reshape(9, 2))
        assert found["mass"]["head"].values.tolist() == tree["derived"]["head"].values.tolist() == ["left", "right"]
        np.testing.assert_array_equal(found["norms"].sel(layer="final").values, [8, 9, 10, 11])

    check()
    store.Writer(path).close()
    assert {name: data for name, data in files(path).items() if not name.startswith("record/commits")}.items() <= (
        before.items()
    )
    for dims, shape, labels in ((("head",), (3,), {}), (("head",), (2,), {"head": ["up", "down"]})):
        with pytest.raises(store.Refusal, match=r"the axis head of other .* format 2\.0 .*drop that one"):
            store.derive(path, "other", dims, shape, coordinates=labels)
    with store.derive(path, "other", ("sample", "query"), (9, 3)) as out:
        out.write(np.ones((9, 3)))
    check()
    store.grow(path, synthetic_plan(12, seed=3))
    fill_store(path)
    check()
    store.drop(path, "derived/norms")
    store.drop(path, "derived/mass")
    assert store.verify(path).ok and list(store.open(path).derived) == ["other"]
    assert sorted(p.name for p in (path / "derived").iterdir()) == ["other", "zarr.json"]


def test_a_derived_array_of_a_later_format_is_refused_by_what_is_new(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    with store.derive(path, "mass", ("sample",), (9,)) as out:
        out.write(np.ones(9))
    record = path / "record/derived/mass.json"
    record.write_bytes(seal(unseal(record.read_bytes()) | {"mirror": 1}))
    for look in (lambda: store.open(path).derived, lambda: store.verify(path), lambda: store.Writer(path)):
        with pytest.raises(store.Refusal, match="derived/mass has mirror, which a later format wrote"):
            look()


def test_a_derived_array_that_is_not_finished_is_not_there(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    before = files(path)
    with pytest.raises(KeyboardInterrupt), store.derive(path, "a", ("sample", "x"), (9, 2)) as out:
        out.write(np.zeros((9, 2)))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="8 of 9"), store.derive(path, "a", ("sample", "x"), (9, 2)) as out:
        out.write(np.zeros((8, 2)))
    assert files(path) == before and not store.open(path).derived


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("../x", ("sample",), (9,)), "no name"),
        (("a", ("sample", "x"), (8, 2)), "9 long"),
        (("a", ("x", "sample"), (2, 9)), "comes first"),
        (("a", ("x",), (2, 3)), "do not make an array"),
        (("a", ("sample",), (9,), "int32"), "int32"),
        (("there", ("sample", "x"), (9, 2)), "already"),
        (("x", ("sample", "x"), (9, 2)), "'x' would be the name"),
    ],
)
def test_a_derived_array_that_cannot_be_is_refused(tmp_path, asked, named):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    with store.derive(path, "there", ("sample", "x"), (9, 2)) as out:
        out.write(np.zeros((9, 2)))
    with pytest.raises(store.Refusal, match=named):
        store.derive(path, *asked)


def test_dropping_an_array_frees_its_bytes_and_leaves_the_rest(tmp_path, capsys):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3, **ROWS))
    with store.derive(path, "mass", ("sample",), (9,)) as out:
        out.write(np.ones(9))
    states = store.open(path).hidden.compute()
    for name in ("attention/text_to_text", "derived/mass", "attention/text_to_image", "hidden/image"):
        with pytest.raises(SystemExit) as end:
            route("python -m store", "", COMMANDS, ["drop", str(path), name])
        assert not end.value.code and not (path / name).exists()
        report = store.verify(path)
        assert report.ok, report.problems
    opened = store.open(path)
    assert not opened.attention and list(opened.hidden) == ["text"] and not (path / "attention").exists()
    np.testing.assert_array_equal(opened.hidden.text.values, states.text.values)
    for name, match in (("hidden/text", "last array"), ("hidden/image", "not in"), ("derived/x", "not in")):
        with pytest.raises(store.Refusal, match=match):
            store.drop(path, name)


def test_a_copy_has_the_chosen_samples_and_layers_with_their_tokens_and_results(tmp_path, capsys):
    path = synthetic_store(tmp_path / "store", synthetic_plan(21, seed=3, **ROWS))
    store.grow(path, synthetic_plan(21, seed=3, layers=("embed", "0", "1", "final"), **ROWS))
    fill_store(path, part=1)
    chosen = [3, 17, 5]
    target = store.copy(path, tmp_path / "copy", samples=chosen, layers=["0", "1"], codec="planes", text_codec="zstd")
    assert store.verify(target).ok
    a, b = store.open(path), store.open(target)
    assert b.layers == ("0", "1") and b.samples["sample_id"].to_list() == [f"made-3-{n:05d}" for n in chosen]
    assert b.samples["vlm_x1"].to_list() == a.samples["vlm_x1"].gather(chosen).to_list()
    for kind in ("image", "text", "instruction"):
        (left, mask), (right, _) = a.read(chosen, ["0", "1"], kind), b.read([0, 1, 2], ["0", "1"], kind)
        assert torch.equal(left.view(torch.int16), right.view(torch.int16)) and mask.any()
    rows = a.attention.text_to_image.sel(layer=["0"]).values[chosen]
    np.testing.assert_array_equal(
        b.attention.text_to_image.values[:, :, : rows.shape[2], : rows.shape[3]],
        rows[:, :, : b.attention.sizes["query"], : b.attention.sizes["token"]],
    )
    with pytest.raises(SystemExit) as end:
        route("python -m store", "", COMMANDS, ["copy", str(path), str(tmp_path / "all"), "--split", "test"])
    assert not end.value.code and store.verify(tmp_path / "all").samples == 5


def test_a_full_lossless_copy_has_the_same_content(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(11, seed=3, **ROWS))
    target = store.copy(path, tmp_path / "copy", codec="none", text_codec="planes")
    assert store.verify(target).content_hash == store.verify(path).content_hash


def test_a_store_of_format_1_opens_verifies_and_grows_to_format_2(tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "data/format-1.zarr.zip") as packed:
        packed.extractall(tmp_path)
    path = tmp_path / "format-1.zarr"
    before = files(path)
    opened, report = store.open(path), store.verify(path)
    assert report.ok and report.samples == 10 and report.set_aside == 1, report.problems
    assert opened.attrs["format_version"] == 1 and opened.samples["set_aside"][6] == "the picture does not open"
    assert sum(len(batch.sample) for batch in opened.batches(["embed", "final"], "instruction", 4)) == 10
    assert float(opened.hidden.text.sel(layer="0").mean()) == pytest.approx(-0.011638871)
    assert files(path) == before
    repair(path)
    assert store.verify(path).ok
    plan = opened.plan
    more = pl.concat([plan.samples, plan.samples[:3].with_columns(sample_id=pl.col("sample_id") + "-again")])
    store.grow(path, dataclasses.replace(plan, samples=more, generations=()))
    fill_store(path)
    grown = store.open(path)
    assert store.verify(path).ok and grown.attrs["format_version"] == 2 and grown.plan.n_samples == 14
    assert not (path / "record/samples.parquet").exists()
    shutil.rmtree(path)


def test_a_later_format_is_refused_with_its_number(tmp_path):
    path = synthetic_store(tmp_path / "store", synthetic_plan(9, seed=3))
    plan = path / "record/plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"format_version":2', b'"format_version":9'))
    with pytest.raises(store.Refusal, match=r"format version 9, this code reads up to 2: update it"):
        store.open(path)
