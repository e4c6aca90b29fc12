"""Attention in a store as lazy xarray: what lies where, and queries that read like sentences."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from attended_store import ASIDE, HEADS, READ, SAID, attended_store

import store
from analysis.attention import choose, mass, token_table, written
from analysis.labels import LabelIndex
from store.errors import Refusal

N = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return attended_store(tmp_path_factory.mktemp("attended") / "store", N)


def test_the_mass_of_layers_is_the_sum_over_tokens_lazily_and_nan_without_attention(place):
    found, whole = mass(place), store.open(place).derived["attention-true-0"]
    assert isinstance(found.data, da.Array) and found.dtype == np.float32
    assert found.dims == ("sample", "head", "query", "layer")
    values, written_values = found.values, whole.values.astype(np.float64)
    for s in range(N):
        for h in range(len(HEADS)):
            expected = [[sum(x for x in row if x == x) for row in query] for query in written_values[s, h]]
            if s in ASIDE:
                assert np.isnan(values[s, h]).all()
            else:
                np.testing.assert_allclose(values[s, h], expected, rtol=1e-5)


def test_words_kinds_and_layers_are_found_by_name_wherever_they_stand(place):
    found = mass(place, by="token").sel(kind="instruction", word="leftmost")
    whole = store.open(place).derived["attention-true-0"].values
    # "Remove the leftmost ball." and "The leftmost one of the leftmost row should go.", after one template token.
    at = {0: [3], 3: [2, 6]}
    rows = [(s, t) for s in range(N) if s not in ASIDE for t in at.get(s % len(SAID), [])]
    assert found.dims == ("sample", "head", "query", "layer")
    assert found["sample"].values.tolist() == [f"scene-{s}" for s, _ in rows]
    np.testing.assert_array_equal(found.values, [whole[s, ..., t] for s, t in rows])
    mean = found.mean("sample")
    assert mean.dims == ("head", "query", "layer")
    np.testing.assert_allclose(
        mean.values, np.mean([whole[s, ..., t].astype(np.float32) for s, t in rows], axis=0), 1e-5
    )


def test_queries_may_be_chained_and_mixed_with_those_of_xarray(place):
    found = mass(place, by="token")
    one = found.sel(layer="2", head="1.0").sel(split="test").sel(word=["leftmost", "ball"])
    both = found.sel(layer="2", head="1.0", kind="instruction", word=["leftmost", "ball"])
    assert set(one["word"].values) == {"leftmost", "ball"}
    kept = both.isel(sample=np.flatnonzero(both["split"].values == "test"))
    np.testing.assert_array_equal(one.values, kept.values)
    at_once = found.sel(split="test", layer="2", head="1.0", word=["leftmost", "ball"])
    np.testing.assert_array_equal(at_once.values, one.values)
    single = found.sel(sample="scene-3").sel(word="leftmost")
    assert single.sizes["token"] == 2 and set(single.dims) == {"token", "head", "query", "layer"}
    grouped = mass(place).sel(split="train").groupby("task").mean()
    assert grouped["task"].values.tolist() == ["removal", "swap"]
    assert float(grouped.sum("layer").mean()) == pytest.approx(1, abs=1e-3)
    assert (mass(place).area.dropna("sample") > 0.11).all()


def test_what_every_token_says_of_itself_is_what_the_token_table_says(place):
    opened = store.open(place)
    found, table = mass(opened, by="token"), token_table(opened, choose(opened).main)
    row = table.filter((table["sample"] == 5) & (table["word"] == "cube")).row(0, named=True)
    assert (row["text"], row["kind"], row["word_index"]) == (" cube", "instruction", 3)
    here = found.isel(sample=5, token=row["token"])
    assert (str(here.word.values), str(here.kind.values), int(here.slot)) == ("cube", "instruction", row["slot"])
    words = found["word"].isel(sample=5).values[1:10].tolist()
    assert words == ["paint", "the", "second", "cube", "from", "the", "left", "red", "please"]
    assert all(value is None or value != value for value in found["kind"].isel(sample=ASIDE[0]).values)


def test_a_label_that_nothing_bears_is_named_with_those_there_are(place):
    found = mass(place, by="token")
    with pytest.raises(KeyError, match=r"nothing has word 'elephant'; there are a, ball, cube.* more"):
        found.sel(word="elephant")
    with pytest.raises(KeyError, match="nothing has split 'dev'; there are test, train"):
        found.sel(split="dev")
    with pytest.raises(ValueError, match="has no order"):
        found.sel(word=slice("a", "b"))
    with pytest.raises(ValueError, match="method and tolerance"):
        found.sel(word="ball", method="nearest")


def test_labels_of_different_dimensions_get_their_own_index():
    array = xr.DataArray(np.zeros((2, 3)), dims=("a", "b"), coords={"x": ("a", ["p", "q"]), "y": ("b", list("uvw"))})
    with pytest.raises(ValueError, match="y does not lie along a"):
        array.set_xindex(["x", "y"], LabelIndex)
    indexed = array.set_xindex("x", LabelIndex).set_xindex("y", LabelIndex)
    assert indexed.sel(x="q", y=["w", "u"]).shape == (1, 2)
    assert (indexed + indexed).sel(x="p").shape == (1, 3)
    assert not indexed.xindexes["x"].equals(indexed.xindexes["y"])


def test_the_proxy_of_most_layers_is_chosen_with_its_seeds_and_its_permuted_twins(place):
    opened = store.open(place)
    chosen = choose(opened)
    assert (chosen.main.name, chosen.main.by_token, chosen.main.layers) == ("attention-true-0", True, READ)
    assert [one.seed for one in chosen.seeds] == [0, 1] and [one.labels for one in chosen.permuted] == ["permuted"]
    assert chosen.main.called == "the proxy on text tokens of blocks 0–3 (seed 0)"
    other = choose(opened, "attention-true-1")
    assert other.main.seed == 1 and [one.seed for one in other.seeds] == [1, 0]
    assert choose(opened, "attention-permuted-0").permuted == ()


def test_what_is_not_there_is_refused_with_what_writes_it(place, tmp_path):
    with pytest.raises(Refusal, match=r"--attention eyes is no proxy's attention in .*probes attend"):
        mass(place, "eyes")
    with pytest.raises(Refusal, match=r"is summed over tokens: .*--keep tokens"):
        mass(place, "attention-true-1", by="token")
    with pytest.raises(Refusal, match="by='word' is not known"):
        mass(place, by="word")
    bare = attended_store(tmp_path / "bare", 8, seeds=(), permuted=())
    with pytest.raises(Refusal, match="holds no proxy's attention"):
        mass(bare)
    with store.derive(bare, "norms", ("sample",), (8,)) as out:
        out.write(np.ones(8))
    assert written(store.open(bare)) == []
